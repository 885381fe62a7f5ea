"""The model family: tensors and config in, tensors out. No files, tokenizers, optimizers or randomness in forward."""
