"""Self-speculation: a text is drafted with few loops, and the loops left out are run for several tokens in one pass.

The first loops of a full forward are the draft itself: its states and keys are taken up where they stand, nothing is
run twice. What is emitted is always chosen from full-depth logits, so the text is that of plain decoding, greedy or
drawn, whatever the draft guesses; rounding aside, since a product of several rows may be summed in another order than
one of a single row.
Source of the idea: LoopSpec and WaveFront (2026), spec loops, 5.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from looplm.errors import ConfigError
from looplm.infer.decoders import EarlyExit, PartialDepth
from looplm.infer.engine import (
    Generation,
    OnToken,
    cache_capacity,
    check_kind,
    check_prompts,
    check_whole,
    generate,
    previous_ids,
)
from looplm.infer.sampling import Sampler, SamplingConfig
from looplm.model.compiler import TURNS
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM


@dataclass(frozen=True)
class Draft:
    """How a draft is made."""

    n_loops: int
    """Loops per drafted token, fewer than the model's."""
    n_tokens: int = 12
    """Tokens drafted before they are checked."""

    def __post_init__(self) -> None:
        for name, value in (("n_loops", self.n_loops), ("n_tokens", self.n_tokens)):
            check_whole(f"a draft's {name}", value)


@dataclass(frozen=True)
class Speculation:
    """A generated text and how well it was guessed."""

    generation: Generation
    n_drafted: int
    n_accepted: int
    """Drafted tokens that full depth would have chosen."""
    n_rounds: int
    """Passes of the loops left out."""


@torch.inference_mode()
def speculate(
    model: LoopedLM,
    prompts: Sequence[Sequence[int]],
    *,
    draft: Draft,
    eos_id: int,
    max_new_tokens: int,
    n_loops: int | None = None,
    sampling: SamplingConfig | None = None,
    on_token: OnToken | None = None,
) -> list[Speculation]:
    """Continue every prompt as `generate` does, one after another.

    Raises:
        ConfigError: the draft has no fewer loops than full depth, or the model an exit of its own or a backout.
    """
    loops = LoopPlan(model.config.n_loops if n_loops is None else n_loops).n_loops
    check_kind("sampling", sampling, SamplingConfig)
    if draft.n_loops >= loops:
        raise ConfigError(f"a draft of {draft.n_loops} loops leaves none of {loops} to run; give it fewer")
    check_prompts(prompts, model=model, max_new_tokens=max_new_tokens)
    sampler = Sampler(sampling or SamplingConfig(), n_rows=len(prompts), source=model.source)
    told = []
    for number, prompt in enumerate(prompts):
        capacity = cache_capacity(model, len(prompt), max_new_tokens)
        decoder = _Drafting(model, draft, capacity=capacity, n_loops=loops)
        context, end = list(prompt), min(len(prompt) + max_new_tokens, model.config.seq_len)
        n_drafted = n_accepted = n_rounds = 0
        guesses = [-1]  # none at the prompt's last token
        logits = decoder.prefill([prompt])
        while True:
            for row, guess in zip(logits, guesses, strict=True):
                (token,) = sampler.choose(row[None], rows=[number], contexts=[context])
                context.append(token)
                n_accepted += token == guess
                if on_token is not None:
                    on_token(number, token)
                if token == eos_id or len(context) == end or token != guess:
                    break
            if context[-1] == eos_id or len(context) == end:
                break
            guesses, logits = decoder.round(context, n_tokens=min(draft.n_tokens, end - len(context)))
            n_drafted, n_rounds = n_drafted + len(guesses), n_rounds + 1
        new = context[len(prompt) :]
        generation = Generation(new, "eos" if new[-1] == eos_id else "length", [loops] * len(new))
        told.append(Speculation(generation, n_drafted, n_accepted, n_rounds))
    return told


def generate_or_draft(
    model: LoopedLM,
    prompts: Sequence[Sequence[int]],
    *,
    draft: Draft | None,
    early: EarlyExit | None,
    batch_size: int | None,
    **options: Any,
) -> list[Generation]:
    """`generate`, or with a draft `speculate`.

    Raises:
        ConfigError: a draft was given, and `early` or `batch_size` too.
    """
    check_kind("draft", draft, Draft)
    if draft is None:
        return generate(model, prompts, early=early, batch_size=batch_size, **options)
    if early is not None:
        raise ConfigError("exits and a draft were both given, and a draft is checked at full depth: give one")
    if batch_size is not None:
        raise ConfigError("a draft takes one prompt after another: leave batch_size out")
    return [told.generation for told in speculate(model, prompts, draft=draft, **options)]


class _Drafting(PartialDepth):
    """One text whose newest tokens have run the draft's loops alone."""

    @TURNS.forward()
    def __init__(self, model: LoopedLM, draft: Draft, *, capacity: int, n_loops: int) -> None:
        super().__init__(model, batch_size=1, capacity=capacity, n_loops=n_loops)
        self.draft = draft

    @TURNS.forward()
    def round(self, context: Sequence[int], *, n_tokens: int) -> tuple[list[int], Tensor]:
        """Guesses at the next `n_tokens`, and the full-depth logits (n_tokens, n_targets) that each is to be held
        against. The newest token of `context` has not run."""
        model, n_done, device = self.model, len(context) - 1, self.tokens.ids.device
        n_keys = len(context) + n_tokens if model.one_token is None else self.capacity
        parts = self._parts(n_keys)
        where: dict[str, Any] = {"cache": self.cache, "tokens": self.tokens, "n_keys": n_keys}
        places = torch.arange(n_done, n_done + n_tokens, device=device)[None]
        guesses: list[int] = []
        for number in range(n_tokens):
            ids, at = [*context, *guesses], places[:, number : number + 1]
            before = previous_ids([ids[:-1]], n_back=model.n_back).to(device)
            newest = torch.tensor([ids[-1:]], device=device)
            hidden = parts.begin(newest, n_loops=self.draft.n_loops, positions=at, before=before, **where).hidden
            hidden = self._hidden(at, n_keys=n_keys) if hidden is None else hidden
            guesses.append(int(self._logits(hidden, [0]).argmax()))
        parts = parts if n_tokens == self.draft.n_tokens else model  # compiled for one number of tokens
        hidden = parts.go_on(places, first=self.draft.n_loops, n_loops=self.plan.n_loops, **where).hidden
        hidden = self._hidden(places, n_keys=n_keys) if hidden is None else hidden
        return guesses, model.logits(hidden[0])[:, : model.config.n_targets]
