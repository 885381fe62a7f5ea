"""What a run trains on. A source makes batch number i of a seed as a pure function: nothing to store for a resume, and
any number of workers gives the same batches in the same order."""

import random
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator

from looplm.config import Config, NonNegativeInt, Number, PositiveFloat, Size, did_you_mean, parse
from looplm.data.bytes import BytesConfig, BytesSource
from looplm.data.pack import Batch, Document, pack
from looplm.data.prepared import PreparedConfig, PreparedSource
from looplm.data.tasks import REASONING, permutations
from looplm.data.tasks.example import is_test_question, render_completion, render_prompt
from looplm.data.tokenizer import PAD_ID, reasoning_tokenizer


class Source(Protocol):
    """Batches by number."""

    fingerprint: str
    """Must be the same when a run is resumed; empty for a source that makes its data up."""

    def batch(self, index: int) -> Batch:
        """Micro-batch number `index`."""
        ...


class ReasoningConfig(Config):
    """The reasoning suite, packed."""

    kind: Literal["reasoning"] = "reasoning"
    n_rows: Size = 24
    """Rows of a micro-batch."""
    row_len: Size = Field(default=336, ge=336)
    """Tokens of a row; the longest worked solution has 323, so that none is left out."""
    weights: dict[str, PositiveFloat] = Field(default_factory=lambda: dict.fromkeys(REASONING, 1.0))
    """Share of each task among the documents, relative."""
    small_share: Number = Field(default=0.15, ge=0, le=1)
    """Share of the documents drawn from the low end of each task's range, which a uniform draw seldom visits."""

    @field_validator("weights")
    @classmethod
    def _known_tasks(cls, weights: dict[str, float]) -> dict[str, float]:
        for name in weights:
            if name not in REASONING:
                raise ValueError(f"unknown task {name!r}{did_you_mean(name, REASONING)} Tasks: {', '.join(REASONING)}.")
        if not weights:
            raise ValueError("no task has a weight; name at least one")
        return weights


class PermutationsConfig(Config):
    """Permutation tracking in S3 (spec loops, 3.3): every position is scored."""

    kind: Literal["permutations"] = "permutations"
    batch_size: Size = 64
    """Sequences of a micro-batch."""
    min_len: Size = 2
    """Shortest sequence."""
    max_len: Size = 12
    """Longest sequence."""
    n_ramp: NonNegativeInt = 1000
    """Batches over which the longest length drawn grows from min_len to max_len."""
    gate: Number | None = Field(default=None, gt=0, le=1)
    """Instead of n_ramp: the longest length grows by one whenever this share of the tokens of the longest sequences is
    right; null for the ramp."""

    @model_validator(mode="after")
    def _ordered(self) -> "PermutationsConfig":
        if self.min_len > self.max_len:
            raise ValueError(f"min_len {self.min_len} is above max_len {self.max_len}")
        return self


DataConfig = Annotated[ReasoningConfig | PermutationsConfig | BytesConfig | PreparedConfig, Field(discriminator="kind")]
TextSource = BytesSource | PreparedSource


class _HasData(Config):
    """A run's config, of which only `data` is read."""

    data: DataConfig
    """What it learns from."""


def parse_data(data: Mapping[str, Any], *, source: str) -> DataConfig:
    """The `data:` section of a run's config."""
    return parse(_HasData, {"data": data}, source=source).data


class ReasoningSource:
    """Fresh training questions for ever; a held-out question is drawn again. With `held_out`, only held-out ones."""

    fingerprint = ""

    def __init__(self, config: ReasoningConfig, *, seed: int, held_out: bool = False) -> None:
        self.config = config
        self.seed = seed
        self.held_out = held_out
        self.tokenizer = reasoning_tokenizer()

    def batch(self, index: int) -> Batch:
        rng = random.Random(f"reasoning {self.seed} {index}")
        return pack(lambda: self.draw(rng), n_rows=self.config.n_rows, row_len=self.config.row_len, pad_id=PAD_ID)

    def draw(self, rng: random.Random) -> Document:
        """One question, held out or not as the source is, with its worked solution."""
        names, weights = list(self.config.weights), list(self.config.weights.values())
        while True:
            task = REASONING[rng.choices(names, weights)[0]]
            example = task.sample(rng, small=rng.random() < self.config.small_share)
            if is_test_question(example.question) == self.held_out:
                break
        prompt = self.tokenizer.encode(render_prompt(example.question)).ids
        completion = self.tokenizer.encode(render_completion(example)).ids
        return Document(prompt + completion, len(prompt))


class PermutationsSource:
    """Fresh S3 sequences, all of one length per batch, lengths growing over the first n_ramp batches."""

    fingerprint = ""

    def __init__(self, config: PermutationsConfig, *, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.level = 0
        """How often the longest length has grown, if it is gated."""

    @property
    def n_levels(self) -> int:
        """How often the longest length can grow."""
        return self.config.max_len - self.config.min_len

    def batch(self, index: int) -> Batch:
        config = self.config
        rng = np.random.default_rng([self.seed, index])
        ramp = min(1.0, (index + 1) / config.n_ramp) if config.n_ramp else 1.0
        grown = round(ramp * self.n_levels) if config.gate is None else self.level
        length = int(rng.integers(config.min_len, config.min_len + grown + 1))
        return self._sequences(rng, length)

    def trial(self, index: int) -> Batch:
        """Sequences of the longest length so far, different from those of batch number `index`."""
        return self._sequences(np.random.default_rng([self.seed, index, 1]), self.config.min_len + self.level)

    def _sequences(self, rng: np.random.Generator, length: int) -> Batch:
        ids, targets = permutations.sequences(rng, n_sequences=self.config.batch_size, length=length)
        return Batch(torch.from_numpy(ids), torch.from_numpy(targets))


def row_length(config: DataConfig) -> int:
    """Tokens of the longest row or sequence that `config` gives."""
    if isinstance(config, PermutationsConfig):
        return config.max_len + 1
    return config.longest_row if isinstance(config, PreparedConfig) else config.row_len


def batch_tokens(config: DataConfig) -> int:
    """Tokens of the largest micro-batch that `config` gives."""
    if isinstance(config, PermutationsConfig):
        return config.batch_size * row_length(config)
    if isinstance(config, PreparedConfig):
        return max(phase.n_rows * phase.row_len for phase in config.in_full())
    return config.n_rows * config.row_len


def held_out_text(config: BytesConfig | PreparedConfig) -> TextSource:
    """The part of a text that is never learned from."""
    if isinstance(config, PreparedConfig):
        return PreparedSource(config, seed=0, held_out=True)
    return BytesSource(config, seed=0, held_out=True)


def make_source(config: DataConfig, *, seed: int) -> Source:
    """The source that `config` names."""
    if isinstance(config, PreparedConfig):
        return PreparedSource(config, seed=seed)
    if isinstance(config, BytesConfig):
        return BytesSource(config, seed=seed)
    if isinstance(config, PermutationsConfig):
        return PermutationsSource(config, seed=seed)
    return ReasoningSource(config, seed=seed)
