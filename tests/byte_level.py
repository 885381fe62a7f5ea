"""A tokenizer whose tokens are bytes, so that a test can tell what it made of a text."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TAGS = ("<|end_of_text|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


def byte_tokenizer(tags: Sequence[str] = TAGS) -> Tokenizer:
    """A token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate([*tags, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(tags))
    return tokenizer
