"""The training loop and the losses."""
