"""Batched generation with a cache. Prompts of different lengths share a batch; finished rows leave it, unless
decoding is compiled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from looplm.errors import DataError
from looplm.infer.decoders import EarlyExit, FullDepth, StopsEarly
from looplm.infer.sampling import Sampler, SamplingConfig
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM

# Dropping finished rows copies the whole cache: worth it once a quarter of the batch has finished.
SHRINK_BELOW = 0.75
MIN_CAPACITY = 64  # of a compiled model's cache, doubled until it holds the longest row


@dataclass(frozen=True)
class Generation:
    """What was generated for one prompt."""

    ids: list[int]
    """New tokens, EOS included."""
    stopped_by: Literal["eos", "length"]
    depths: list[int]
    """Loops run for each of them."""


OnToken = Callable[[int, int], None]  # (number of the prompt, token id)


@torch.inference_mode()
def generate(
    model: LoopedLM,
    prompts: Sequence[Sequence[int]],
    *,
    eos_id: int,
    max_new_tokens: int,
    n_loops: int | None = None,
    early: EarlyExit | None = None,
    sampling: SamplingConfig | None = None,
    on_token: OnToken | None = None,
) -> list[Generation]:
    """Continue every prompt until EOS, `max_new_tokens` or the model's seq_len. Greedy unless `sampling` is given.
    With `early`, `n_loops` is the most that a token runs.

    A model whose decoding is compiled (`LoopedLM.compile_decoding`) keeps its shapes: finished rows stay in the batch,
    and the cache has one of a few capacities, all of which attention looks at.
    """
    loops = LoopPlan(model.config.n_loops if n_loops is None else n_loops).n_loops
    check_prompts(prompts, model=model, max_new_tokens=max_new_tokens)
    device = model.embed.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    is_compiled = model.one_token is not None
    capacity = cache_capacity(model, int(lengths.max()), max_new_tokens)
    decoder = (
        FullDepth(model, batch_size=len(prompts), capacity=capacity, n_loops=loops)
        if early is None
        else StopsEarly(model, early, batch_size=len(prompts), capacity=capacity, n_loops=loops)
    )
    sampler = Sampler(sampling or SamplingConfig(), n_rows=len(prompts))
    contexts = [list(prompt) for prompt in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the batch is
    active = rows
    depths: list[list[int]] = [[] for _ in prompts]
    logits = decoder.prefill(prompts)
    for n_new in range(1, max_new_tokens + 1):
        chosen = sampler.choose(logits, rows=rows, contexts=[contexts[row] for row in rows])
        still_open = set(active)
        for row, token, depth in zip(rows, chosen, decoder.depths, strict=True):
            if row in still_open:
                contexts[row].append(token)
                depths[row].append(depth)
                if on_token is not None:
                    on_token(row, token)
        active = [row for row in active if contexts[row][-1] != eos_id and len(contexts[row]) < model.config.seq_len]
        if not active or n_new == max_new_tokens:
            break
        tokens = torch.tensor(chosen, device=device)
        if len(active) < SHRINK_BELOW * len(rows) and not is_compiled:
            still_open = set(active)
            kept = torch.tensor([index for index, row in enumerate(rows) if row in still_open], device=device)
            decoder.keep_rows(kept)
            tokens, lengths, rows = tokens[kept], lengths[kept], active
        n_keys = capacity if is_compiled else max(len(contexts[row]) for row in active)
        before = previous_ids([contexts[row][:-1] for row in rows], n_back=model.n_back).to(device)
        # finished rows that still sit in the batch write over their last place: harmless, nobody reads them
        logits = decoder.step(tokens, lengths.clamp(max=capacity - 1), n_keys=n_keys, before=before)
        lengths = lengths + 1
    return [
        _generation(context[len(prompt) :], depth, eos_id=eos_id)
        for context, prompt, depth in zip(contexts, prompts, depths, strict=True)
    ]


def cache_capacity(model: LoopedLM, n_prompt: int, max_new_tokens: int) -> int:
    """Places of a cache for a prompt of n_prompt tokens and what follows: one of a few for a compiled model."""
    capacity = n_prompt + max_new_tokens
    if model.one_token is not None:
        capacity = max(MIN_CAPACITY, 2 ** (capacity - 1).bit_length())
    return min(capacity, model.config.seq_len)


def previous_ids(contexts: Sequence[Sequence[int]], *, n_back: int) -> Tensor:
    """The last n_back ids of each context (B, n_back), -1 where a context is shorter."""
    padded = [[-1] * n_back + list(context[-n_back:] if n_back else []) for context in contexts]
    return torch.tensor([row[len(row) - n_back :] for row in padded], dtype=torch.long).view(len(contexts), n_back)


def check_prompts(prompts: Sequence[Sequence[int]], *, model: LoopedLM, max_new_tokens: int) -> None:
    """Refuse what cannot be continued."""
    if not prompts:
        raise DataError("no prompts were given")
    if max_new_tokens < 1:
        raise DataError(f"max_new_tokens is {max_new_tokens}; give 1 or more")
    for prompt in prompts:
        if not prompt:
            raise DataError("the prompt is empty; give at least one token")
        if len(prompt) >= model.config.seq_len:
            raise DataError(
                f"the prompt has {len(prompt)} tokens and the model's context is {model.config.seq_len}: no room is "
                "left for an answer; shorten the prompt"
            )


def _generation(ids: list[int], depths: list[int], *, eos_id: int) -> Generation:
    return Generation(ids, "eos" if ids and ids[-1] == eos_id else "length", depths)
