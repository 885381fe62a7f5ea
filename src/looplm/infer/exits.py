"""Exit rules: when a token's loops stop at inference, without training.

A rule looks at one token at a time, never at its batch mates. Shapes: N tokens, D width, V logits.
Source: spec loops, 2.5 (the criteria of Huginn's code) and A.4: on serial tasks only the latent rule is safe.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from looplm.config import did_you_mean
from looplm.errors import ConfigError
from looplm.model.loop.exit import Gate
from looplm.model.looped import LoopedLM

RuleKind = Literal["latent", "kl", "entropy", "stable", "gate"]
KINDS: tuple[RuleKind, ...] = get_args(RuleKind)
DEFAULTS: dict[RuleKind, float] = {"latent": 1e-3, "kl": 5e-4, "entropy": 0.05, "stable": 6, "gate": 0.5}


@dataclass(frozen=True)
class ExitRule:
    """What is measured of a token after each loop, and the threshold at which it stops. Threshold 0 stops none.

    latent: |h - h before| / |h|, the relative change of the state, below the threshold; asks for no logits.
    kl: KL(p || p before) of the output distribution, in nats, below it.
    entropy: of the output distribution, in nats, below it.
    stable: the likeliest output has stayed the same for `threshold` loops.
    gate: what a learned gate leaves of the probability of going on, at most it; for models with `exit: {kind: gate}`.
    """

    kind: RuleKind = "latent"
    threshold: float = DEFAULTS["latent"]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"no exit rule {self.kind!r}{did_you_mean(self.kind, KINDS)} Rules: {', '.join(KINDS)}.")
        if not 0 <= self.threshold < math.inf:
            raise ConfigError(f"the threshold of exit rule {self} has to be 0 (stop no token) or more")
        if self.kind == "stable" and self.threshold % 1:
            raise ConfigError(f"exit rule {self} counts loops: give a whole number")

    @classmethod
    def parse(cls, text: str) -> "ExitRule":
        """`latent:0.001`, or a kind alone for its usual threshold."""
        name, colon, number = (part.strip() for part in text.partition(":"))
        kind = cast(RuleKind, name)
        rule = cls(kind, DEFAULTS.get(kind, 0))  # an unknown kind is refused there
        if not colon:
            return rule
        if not re.fullmatch(r"\d*\.?\d+(e[+-]?\d+)?", number):
            raise ConfigError(f"threshold {number!r} of exit rule {text!r} is not a number; write it as latent:0.001")
        return replace(rule, threshold=float(number))

    def __str__(self) -> str:
        return f"{self.kind}:{self.threshold:g}"

    @property
    def reads_logits(self) -> bool:
        """Whether it asks for the logits after every loop."""
        return self.kind in ("kl", "entropy", "stable")

    @property
    def first_loop(self) -> int:
        """The loop after which it is first asked: the one that changes a state, or the very first."""
        return 2 if self.kind == "latent" else 1

    def check(self, model: LoopedLM) -> None:
        """Refuse a model that the rule cannot be asked of.

        Raises:
            ConfigError: the rule is `gate` and the model has none.
        """
        if self.kind == "gate" and not isinstance(model.exit, Gate):
            raise ConfigError(f"exit rule {self} reads a learned gate: train a model with model.exit.kind=gate for it")

    def n_kept(self, n_logits: int) -> int:
        """Numbers remembered of a token from loop to loop: its distribution, or the likeliest output and its age."""
        return {"latent": 0, "entropy": 0, "kl": n_logits, "stable": 2, "gate": 1}[self.kind]

    def fires(
        self, change: Tensor, logits: Tensor | None, kept: Tensor, done: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Whether each token stops (N,), and what is remembered of it (N, n_kept). `change` (N,) is the relative change
        of its state by a loop, `logits` (N, V) those after it, `done` (N,) what a learned gate says of it; `kept` is
        NaN at first."""
        if self.kind == "latent":
            return change < self.threshold, kept
        if self.kind == "gate":
            assert done is not None
            left = kept.nan_to_num(nan=1.0) * (1 - done[:, None])
            return (left <= self.threshold).squeeze(-1) & (self.threshold > 0), left
        assert logits is not None
        if self.kind == "entropy":
            return torch.special.entr(logits.float().softmax(-1)).sum(-1) < self.threshold, kept
        log_p = logits.float().log_softmax(-1)
        if self.kind == "kl":  # NaN compares as false: nothing fires after the first loop
            return (log_p.exp() * (log_p - kept)).sum(-1) < self.threshold, log_p
        best = log_p.argmax(-1).to(kept.dtype)
        age = torch.where(best == kept[:, 0], kept[:, 1] + 1, 0)
        return (age >= self.threshold) & (self.threshold > 0), torch.stack((best, age), dim=-1)
