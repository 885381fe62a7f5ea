"""From logits to the next token: greedy, or drawn after temperature, top-k, top-p and min-p.

Every row has its own generator, so what a row draws does not depend on which rows share its batch.
"""

import math
from collections.abc import Sequence

import torch
from pydantic import Field, model_validator
from torch import Tensor

from looplm.config import Config, NonNegativeFloat, NonNegativeInt, Number, PositiveFloat, PositiveInt
from looplm.errors import CheckpointError

MOST = torch.finfo(torch.float64).max
MAX_SEED = 2**63 - 1
N_AHEAD = 64  # numbers that a row draws at once: the same as one by one, and one by one takes 5 us each


class SamplingConfig(Config):
    """How tokens are chosen. The defaults are greedy decoding."""

    temperature: NonNegativeFloat = 0.0
    """Logits are divided by it; 0 is greedy."""
    top_k: PositiveInt | None = None
    """Keep the k likeliest tokens."""
    top_p: Number = Field(default=1.0, gt=0, le=1)
    """Keep the fewest tokens whose probabilities reach this sum."""
    min_p: Number = Field(default=0.0, ge=0, le=1)
    """Keep tokens at least this likely, relative to the likeliest."""
    repetition_penalty: PositiveFloat = 1.0
    """Logits of tokens already in the context are divided by it if positive, multiplied if negative (CTRL, 2019)."""
    seed: NonNegativeInt = Field(default=0, le=MAX_SEED)
    """Row i draws from a generator seeded by (seed, i)."""

    @model_validator(mode="after")
    def _nothing_ignored(self) -> "SamplingConfig":
        if self.temperature == 0 and (self.top_k is not None or self.top_p < 1 or self.min_p > 0):
            raise ValueError(
                "top_k, top_p and min_p choose among draws, and temperature 0 draws none: raise temperature"
            )
        return self


class Sampler:
    """Chooses tokens for rows that are known by number throughout one generation. Errors call the model `source`."""

    def __init__(self, config: SamplingConfig, *, n_rows: int, source: str = "the model") -> None:
        self.config, self.source = config, source
        seed = (config.seed ^ config.seed >> 32) % 2**32  # a generator would overlook the upper half
        self._generators = [torch.Generator().manual_seed(seed * 1_000_003 + row) for row in range(n_rows)]
        self._ahead: list[list[float]] = [[] for _ in range(n_rows)]  # drawn, the next one last

    def choose(self, logits: Tensor, *, rows: list[int], contexts: list[list[int]]) -> list[int]:
        """One token for each of `rows`, from logits (B, V) and the tokens so far of each. Logits of -inf rule a token
        out.

        Raises:
            CheckpointError: logits of a row are NaN or +inf, or all are -inf: the weights are damaged.
        """
        config = self.config
        if config.repetition_penalty != 1.0:
            logits = penalise(logits, contexts, config.repetition_penalty)
        if config.temperature == 0:
            best, chosen = logits.max(dim=-1)  # NaN counts as the largest
            check_finite(best.tolist(), source=self.source)
            return chosen.tolist()
        logits, ids = keep_top(logits, config.top_k)
        logits = keep_likely(soften(logits, config.temperature), min_p=config.min_p, top_p=config.top_p)
        # inverse of the cumulative distribution at one uniform number per row
        cumulative = logits.softmax(-1).cpu().cumsum(-1)
        check_finite(cumulative[:, -1].tolist(), source=self.source)
        drawn = torch.tensor([self._uniform(row) for row in rows], dtype=torch.float64)
        chosen = torch.searchsorted(cumulative, (drawn * cumulative[:, -1])[:, None], right=True).squeeze(1)
        chosen = chosen.clamp(max=logits.shape[-1] - 1)
        return (chosen if ids is None else ids.cpu().gather(1, chosen[:, None]).squeeze(1)).tolist()

    def _uniform(self, row: int) -> float:
        """The row's next number in [0, 1)."""
        ahead = self._ahead[row]
        if not ahead:
            ahead += torch.rand(N_AHEAD, generator=self._generators[row], dtype=torch.float64).tolist()[::-1]
        return ahead.pop()


def check_finite(numbers: Sequence[float], *, source: str) -> None:
    """Refuse what damaged weights make, by numbers that are finite if and only if the logits were.

    Raises:
        CheckpointError: one of them is not.
    """
    if not all(map(math.isfinite, numbers)):
        raise CheckpointError(
            f"{source} gives logits that are not finite (NaN or infinity): its weights are damaged or its training "
            "diverged; take an earlier checkpoint, or copy the run again"
        )


def keep_top(logits: Tensor, top_k: int | None) -> tuple[Tensor, Tensor | None]:
    """The top_k largest logits (B, k) of (B, V) and their ids, in the order of the ids; all of them and None where that
    is no fewer."""
    if top_k is None or top_k >= logits.shape[-1]:
        return logits, None
    ids = logits.topk(top_k, dim=-1, sorted=False).indices.sort(dim=-1).values
    return logits.gather(1, ids), ids


def soften(logits: Tensor, temperature: float) -> Tensor:
    """Logits divided by the temperature, shifted so that the largest of a row is 0. In fp64, which holds every quotient
    that matters: the smallest temperatures and the largest logits give -inf, never NaN."""
    logits = logits.double()
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def penalise(logits: Tensor, contexts: list[list[int]], penalty: float) -> Tensor:
    """Make every token of a row's context less likely. In fp64: extreme penalties overflow fp32."""
    logits = logits.to(torch.float64, copy=True)
    for row, context in enumerate(contexts):
        # a prompt may hold ids that are never sampled and have no logit
        seen = torch.tensor([each for each in sorted(set(context)) if each < logits.shape[-1]], device=logits.device)
        values = logits[row, seen.long()]  # long: an empty list makes floats
        new = torch.where(values > 0, values / penalty, values * penalty)
        logits[row, seen.long()] = torch.where(values.isfinite(), new.clamp(-MOST, MOST), new)
    return logits


def keep_likely(logits: Tensor, *, min_p: float, top_p: float) -> Tensor:
    """Set the logits that min-p or top-p rule out to -inf, in that order; the likeliest always stays."""
    if min_p > 0:
        probabilities = logits.softmax(-1)
        floor = min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < floor, float("-inf"))
    if top_p < 1:
        ordered, order = logits.softmax(-1).sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of everything likelier
        ruled_out = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(ruled_out, float("-inf"))
    return logits
