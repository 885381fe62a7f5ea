"""The reasoner's tokenizer: byte-level BPE in which every digit and every punctuation mark is one token.

Words of the suite are single tokens; any other UTF-8 text falls back to bytes, so no question is refused.
"""

import random
from functools import cache
from importlib import resources

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from looplm.data.tasks import REASONING
from looplm.errors import DataError

PAD, BOS, EOS = "<PAD>", "<BOS>", "<EOS>"
SPECIAL = (PAD, BOS, EOS, "<INST>", "</INST>", "<THINK>", "</THINK>", "<STEP>", "<ANS>", "</ANS>")
PAD_ID, EOS_ID = 0, 2
VOCAB_SIZE = 512

# A word with the space before it, a mark with the space before it, one digit, or one space. Never two digits or two
# marks together: "==" as one token would hide the columns that a comparison is written in.
PIECE = r" ?\p{L}+| ?[^\s\p{L}\p{N}]|\p{N}|\s"


def train_tokenizer(*, n_samples: int = 20000, seed: int = 0) -> Tokenizer:
    """Learn the merges from generated questions. The saved result is package data; a test trains it again."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = random.Random(seed)
    tasks = list(REASONING.values())
    examples = (tasks[index % len(tasks)].sample(rng) for index in range(n_samples))
    texts = (text for example in examples for text in (example.question, *example.steps, example.answer))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@cache
def reasoning_tokenizer(*, reads_tags: bool = True) -> Tokenizer:
    """The tokenizer that ships with the package.

    `reads_tags` turns a tag spelled out in a text into its id: for text that the task's own templates wrote. What came
    from outside is encoded without: a question that spells tags stays a question.
    """
    text = resources.files("looplm").joinpath("builtin/tokenizer.json").read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_str(text)
    tokenizer.encode_special_tokens = not reads_tags
    return tokenizer


def longest_token(tokenizer: Tokenizer) -> int:
    """Characters of the longest token: no text has fewer tokens than its length divided by this."""
    return max(map(len, tokenizer.get_vocab()))


def check_text(text: str, *, most: int, what: str = "the prompt") -> None:
    """Refuse, before it is encoded, a text from outside that cannot be used. A tokenizer takes minutes over millions of
    characters, or raises an exception that is not Python's.

    Raises:
        DataError: the text has more than `most` characters, or half a surrogate pair: it was not UTF-8.
    """
    if len(text) > most:
        raise DataError(
            f"{what} has {len(text):,} characters, more than the model's context can hold ({most:,} at the very most); "
            "shorten it"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 30) : error.start + 10]
        raise DataError(
            f"{what} is not UTF-8 text: character {error.start + 1} is {text[error.start]!a} (in {around!r}); "
            "write it in UTF-8"
        ) from None
