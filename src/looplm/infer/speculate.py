"""Self-speculation: a text is drafted with few loops, and the loops left out are run for several tokens in one pass.

The first loops of a full forward are the draft itself: its states and keys are taken up where they stand, nothing is
run twice. What is emitted is always chosen from full-depth logits, so the text is that of plain decoding, greedy or
drawn, whatever the draft guesses; rounding aside, since a product of several rows may be summed in another order than
one of a single row.
Source of the idea: LoopSpec and WaveFront (2026), spec loops, 5.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from looplm.errors import ConfigError
from looplm.infer.decoders import FullDepth
from looplm.infer.engine import Generation, OnToken, cache_capacity, check_prompts, previous_ids
from looplm.infer.sampling import Sampler, SamplingConfig
from looplm.model.cache import Behind, join, left_behind
from looplm.model.loop.exit import check_last_state
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM


@dataclass(frozen=True)
class Draft:
    """How a draft is made."""

    n_loops: int
    """Loops per drafted token, fewer than the model's."""
    n_tokens: int = 8
    """Tokens drafted before they are checked."""

    def __post_init__(self) -> None:
        for name, value in (("n_loops", self.n_loops), ("n_tokens", self.n_tokens)):
            if value < 1:
                raise ConfigError(f"a draft's {name} is {value}; give 1 or more")


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
    if draft.n_loops >= loops:
        raise ConfigError(f"a draft of {draft.n_loops} loops leaves none of {loops} to run; give it fewer")
    check_last_state("drafting with few loops needs", exit=model.exit, has_backout=model.backout is not None)
    check_prompts(prompts, model=model, max_new_tokens=max_new_tokens)
    sampler = Sampler(sampling or SamplingConfig(), n_rows=len(prompts))
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


class _Drafting(FullDepth):
    """One text whose newest tokens have run the draft's loops alone."""

    def __init__(self, model: LoopedLM, draft: Draft, *, capacity: int, n_loops: int) -> None:
        super().__init__(model, batch_size=1, capacity=capacity, n_loops=n_loops)
        self.draft, self.capacity = draft, capacity

    def round(self, context: Sequence[int], *, n_tokens: int) -> tuple[list[int], Tensor]:
        """Guesses at the next `n_tokens`, and the full-depth logits (n_tokens, n_targets) that each is to be held
        against. The newest token of `context` has not run."""
        guesses: list[int] = []
        held: list[Behind] = []
        for _ in range(n_tokens):
            logits, behind = self._draft([*context, *guesses])
            held.append(behind)
            guesses.append(int(logits.argmax()))
        return guesses, self._finish(join(held, scratch=self.capacity))

    def _draft(self, context: Sequence[int]) -> tuple[Tensor, Behind]:
        """The newest token of `context` through the draft's loops."""
        model, device = self.model, self.cache.slots[0].keys.device
        is_compiled = model.one_token is not None
        parts = model if model.one_token is None else model.one_token
        ids, position = torch.tensor([[context[-1]]], device=device), len(context) - 1
        x, inputs = parts.enter(
            ids,
            self.cache.slots[: model.config.n_prelude],
            positions=torch.tensor([[position]], device=device),
            n_keys=self.capacity if is_compiled else len(context),
            documents=None,
            before=previous_ids([context[:-1]], n_back=model.n_back).to(device),
            asides=None,
        )
        entry, state = model.inject.prepare(x), None
        for loop_idx in range(self.draft.n_loops):
            number = torch.full_like(inputs.loop_idx, loop_idx)
            state, _ = parts.loop_and_exit(state, entry, number, inputs, self._slots(loop_idx), None, is_last=False)
        assert state is not None
        hidden = parts.leave(model.inject.read_out(state), inputs, self._coda())
        return self._logits(hidden, [0]), left_behind(inputs, entry, state)

    def _finish(self, tokens: Behind) -> Tensor:
        """Run the loops left out; logits (W, n_targets) of the drafted tokens."""
        model, state = self.model, tokens.state
        n_keys = int(tokens.positions.max()) + 1
        inputs = model.inputs(tokens.ids, positions=tokens.positions, n_keys=n_keys)
        inputs.first = tokens.first
        for loop_idx in range(self.draft.n_loops, self.plan.n_loops):
            number = torch.full_like(inputs.loop_idx, loop_idx)
            state, _ = model.one_loop(state, tokens.entry, number, inputs, self._slots(loop_idx))
        hidden = model.leave(model.inject.read_out(state), inputs, self._coda())
        return model.logits(hidden[0])[:, : model.config.n_targets]
