"""A trained tokenizer: byte-level BPE with the tags of Nano-OSRT v4 as single tokens, saved so that Hugging Face
reads it. The reasoner's fixed one is `data/tokenizer.py`.

Every byte is a token, so any UTF-8 text is encoded and decoding gives it back exactly. A tag spelled out in a text is
plain text here: what a user types cannot end a turn or open another. `load_tokenizer(path, reads_tags=True)` is for
text that a chat template has written.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from looplm.errors import ConfigError, DataError
from looplm.files import write_whole
from looplm.reading import read_text

# Ids are places in this tuple: v4's order and spelling, so that its checkpoints keep their meaning.
SPECIAL = (
    "<|padding|>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|unknown|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|think|>",
    "<|/think|>",
    "<|answer|>",
    "<|/answer|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
)
PAD, BOS, EOS, UNKNOWN = SPECIAL[:4]
N_BYTES = 256
MAX_DIGITS = 3
MOST_ENCODED = 1 << 20  # characters at a time: the regular expressions give up on some ten million spaces in a row
TOKENIZER, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
MOST_BYTES = 1 << 28  # of a tokenizer.json; those of 256,000 tokens have some 40 MB

# Where no token reaches across: after a line's end, and before the space of a word. The last such place is found.
_CUTS = (re.compile(r"(?s:.*)\n(?=\S)"), re.compile(r"(?s:.*)\S(?= \S)"))

# What both Hugging Face and plain Jinja render, with or without `trim_blocks`: no line ends, no extension's tags. Only
# the assistant's turns are closed, for it alone must learn where they end.
CHAT_TEMPLATE = (
    "<|begin_of_text|>"
    "{% for message in messages %}"
    "{% if message.content is not string %}{{ raise_exception('the content of a turn must be a text') }}{% endif %}"
    "{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('a system turn can only be the first') }}"
    "{% elif message.role in ['system', 'user', 'assistant'] %}"
    "<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}<|end_of_text|>{% endif %}"
    "{% else %}"
    "{{ raise_exception('no role ' ~ message.role ~ '; there are system, user and assistant') }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What a tokenizer makes of some text."""

    n_bytes: int
    n_tokens: int

    @property
    def bytes_per_token(self) -> float:
        return self.n_bytes / self.n_tokens if self.n_tokens else 0.0


def train_bpe(texts: Iterable[str], *, vocab_size: int, digits: int = 1, min_frequency: int = 2) -> Tokenizer:
    """Learn the merges of a text; the same text gives the same tokenizer.

    `digits` is the most of them in one token. With one, a number's columns look the same whatever its length; with 2 or
    3 the pieces of 1234 are not those of 234, which makes arithmetic hard to learn. The price is longer numbers.
    `min_frequency` is how often a pair must occur to be merged. Nothing is put before or after an encoded text: v4's
    tokenizer ended every prompt with the end-of-text tag.

    Raises:
        ConfigError: a value out of range, or a vocabulary larger than the text can fill.
        DataError: there is no text.
    """
    check_options(vocab_size=vocab_size, digits=digits, min_frequency=min_frequency)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_piece(digits)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[AddedToken(tag, special=True, normalized=False) for tag in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    counted = _Counted(texts)
    tokenizer.train_from_iterator(counted, trainer)
    if not counted.n_bytes:
        raise DataError("there is no text to learn a tokenizer from; give sources that hold some")
    found = n_ids(tokenizer)
    if found < vocab_size:
        n_merges = found - len(SPECIAL) - N_BYTES
        raise ConfigError(
            f"a vocabulary of {vocab_size:,} is more than this text fills: its {counted.n_bytes:,} bytes hold "
            f"{n_merges:,} merges of pairs seen {min_frequency} times or more; ask for {found:,} or less, or read more"
        )
    tokenizer.encode_special_tokens = True
    return tokenizer


def check_options(*, vocab_size: int, digits: int = 1, min_frequency: int = 2) -> None:
    """Refuse, before any text is read, what `train_bpe` cannot do.

    Raises:
        ConfigError: a value out of range.
    """
    least = len(SPECIAL) + N_BYTES
    if vocab_size < least:
        raise ConfigError(
            f"a vocabulary of {vocab_size} is too small: {len(SPECIAL)} tags and {N_BYTES} bytes take {least}; "
            "give that or more"
        )
    if not 1 <= digits <= MAX_DIGITS:
        raise ConfigError(f"digits is {digits}; a token holds at most 1, 2 or {MAX_DIGITS} of them")
    if min_frequency < 1:
        raise ConfigError(f"min_frequency is {min_frequency}; give 1 or more")


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and the other files that Hugging Face reads, each whole or not at all.

    Raises:
        ConfigError: the folder holds a tokenizer, or is none.
    """
    check_new(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNKNOWN,  # never written: every byte has a token
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,  # it would take the space out of "so ."
        "chat_template": CHAT_TEMPLATE,
    }
    write_whole(folder / CONFIG_FILE, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    write_whole(
        folder / TOKENIZER, tokenizer.to_str(pretty=True).encode()
    )  # last: a folder without it holds no tokenizer


def check_new(folder: Path) -> None:
    """Refuse a folder that a tokenizer cannot be saved in.

    Raises:
        ConfigError: it holds a tokenizer, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{str(folder)!r} is a file; a tokenizer is saved in a folder")
    if (folder / TOKENIZER).exists():
        raise ConfigError(f"{str(folder)!r} already holds a tokenizer; give another --out")


def load_tokenizer(path: Path, *, reads_tags: bool = False) -> Tokenizer:
    """A saved tokenizer, from its folder or its `tokenizer.json`.

    `reads_tags` turns a tag spelled out in a text into its id: for text that a chat template wrote, never for what came
    from outside. `token_to_id` gives a tag's id in either case; `decode(..., skip_special_tokens=False)` shows it.

    Raises:
        ConfigError: there is none.
        DataError: the file is cut short or is of another kind.
    """
    file = path / TOKENIZER if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"no tokenizer in {str(path)!r}; make one with `looplm tokenizer train`")
    text = read_text(file, what="tokenizer", most=MOST_BYTES, error=DataError)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the Rust side raises no narrower class
        raise DataError(f"{str(file)!r} is not a whole tokenizer ({error}); train or copy it again") from None
    tokenizer.encode_special_tokens = not reads_tags
    return tokenizer


def n_ids(tokenizer: Tokenizer) -> int:
    """The vocabulary size that a model needs: the largest id and one. Ids may have gaps, so it is not the number of
    tokens."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def token_bytes(tokenizer: Tokenizer) -> list[int]:
    """How many bytes of text each id stands for (n_ids,), 0 for tags and for ids without a token. What turns nats per
    token into bits per byte.

    Raises:
        ConfigError: the tokenizer is not byte-level.
    """
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        raise ConfigError("bytes per token are known of byte-level tokenizers only, as `looplm tokenizer train` makes")
    added = tokenizer.get_added_tokens_decoder()
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    sizes = [0] * n_ids(tokenizer)
    for token, index in tokenizer.get_vocab().items():
        if index not in added and alphabet.issuperset(token):
            sizes[index] = len(token)  # a byte-level vocabulary writes each byte as one character
        elif index not in added or not added[index].special:
            sizes[index] = len(token.encode())
    return sizes


def compression(tokenizer: Tokenizer, texts: Iterable[str]) -> Compression:
    """Encode texts and count, on all cores."""
    kept = list(texts)
    n_tokens = sum(map(len, encode_all(tokenizer, kept)))
    return Compression(n_bytes=sum(len(text.encode()) for text in kept), n_tokens=n_tokens)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text of any length, without what the tokenizer would put around it."""
    return [token for piece in cut(text) for token in tokenizer.encode(piece, add_special_tokens=False).ids]


def encode_all(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts of any length, on all cores."""
    pieces = [list(cut(text)) for text in texts]
    encodings = iter(tokenizer.encode_batch_fast([each for cuts in pieces for each in cuts], add_special_tokens=False))
    return [[token for _ in cuts for token in next(encodings).ids] for cuts in pieces]


def cut(text: str) -> Iterator[str]:
    """A text as it is, or in pieces of MOST_ENCODED characters at most that have the same tokens. Only where neither a
    line nor a word ends for so long is a piece cut anywhere."""
    start = 0
    while len(text) - start > MOST_ENCODED:
        found = (each.match(text, start, start + MOST_ENCODED) for each in _CUTS)
        end = next((match.end() for match in found if match is not None), start + MOST_ENCODED)
        yield text[start:end]
        start = end
    yield text[start:]


class _Counted:
    """Texts, and how many bytes of them were read."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.n_bytes = 0
        self._texts = texts

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.n_bytes += len(text.encode())
            yield from cut(text)


def _piece(digits: int) -> str:
    """What no token reaches across. As in GPT-2 a word takes the space before it; beside that, marks belong to their
    letters (Hindi, Arabic), the white space up to a line's end is one piece, and a number never takes a space in."""
    kinds = (
        r"'(?:[sdmt]|ll|re|ve)(?![\p{L}\p{M}])",  # English endings: it's, we'll
        r" ?[\p{L}\p{M}]+",
        rf"\p{{N}}{{1,{digits}}}",
        r" ?[^\s\p{L}\p{M}\p{N}]+",
        r"\s*[\r\n]+",
        r"\s+(?=\s\S)",  # indentation, without the space that belongs to the next word
        r"\s+",
    )
    return "|".join(kinds)
