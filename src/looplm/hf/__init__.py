"""Other systems' checkpoints: read, checked, written back."""
