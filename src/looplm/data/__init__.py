"""From text and tasks to batches of token ids."""
