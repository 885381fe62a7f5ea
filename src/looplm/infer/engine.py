"""Batched generation with a cache. Prompts of different lengths share a batch; finished rows leave it, unless
decoding is compiled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from looplm.errors import DataError
from looplm.infer.sampling import Sampler, SamplingConfig
from looplm.model.cache import KVCache
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


OnToken = Callable[[int, int], None]  # (number of the prompt, token id)


@torch.inference_mode()
def generate(
    model: LoopedLM,
    prompts: Sequence[Sequence[int]],
    *,
    eos_id: int,
    max_new_tokens: int,
    n_loops: int | None = None,
    sampling: SamplingConfig | None = None,
    on_token: OnToken | None = None,
) -> list[Generation]:
    """Continue every prompt until EOS, `max_new_tokens` or the model's seq_len. Greedy unless `sampling` is given.

    A model whose decoding is compiled (`LoopedLM.compile_decoding`) keeps its shapes: finished rows stay in the batch,
    and the cache has one of a few capacities, all of which attention looks at.
    """
    plan = LoopPlan(model.config.n_loops if n_loops is None else n_loops)
    check_prompts(prompts, model=model, max_new_tokens=max_new_tokens)
    device = model.embed.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    is_compiled = model.one_token is not None
    capacity = int(lengths.max()) + max_new_tokens
    if is_compiled:
        capacity = max(MIN_CAPACITY, 2 ** (capacity - 1).bit_length())
    capacity = min(capacity, model.config.seq_len)
    cache = model.new_cache(batch_size=len(prompts), capacity=capacity, n_loops=plan.n_loops)
    sampler = Sampler(sampling or SamplingConfig(), n_rows=len(prompts))
    contexts = [list(prompt) for prompt in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the batch is
    active = rows
    logits = prefill(model, prompts, lengths, plan=plan, cache=cache)
    for n_new in range(1, max_new_tokens + 1):
        chosen = sampler.choose(logits, rows=rows, contexts=[contexts[row] for row in rows])
        still_open = set(active)
        for row, token in zip(rows, chosen, strict=True):
            if row in still_open:
                contexts[row].append(token)
                if on_token is not None:
                    on_token(row, token)
        active = [row for row in active if contexts[row][-1] != eos_id and len(contexts[row]) < model.config.seq_len]
        if not active or n_new == max_new_tokens:
            break
        tokens = torch.tensor(chosen, device=device)
        if len(active) < SHRINK_BELOW * len(rows) and not is_compiled:
            still_open = set(active)
            kept = torch.tensor([index for index, row in enumerate(rows) if row in still_open], device=device)
            cache.keep_rows(kept)
            tokens, lengths, rows = tokens[kept], lengths[kept], active
        n_keys = capacity if is_compiled else max(len(contexts[row]) for row in active)
        before = previous_ids([contexts[row][:-1] for row in rows], n_back=model.n_back).to(device)
        # finished rows that still sit in the batch write over their last place: harmless, nobody reads them
        positions = lengths.clamp(max=capacity - 1)[:, None]
        hidden = model.hidden(
            tokens[:, None], plan=plan, cache=cache, positions=positions, n_keys=n_keys, before=before
        )
        logits = next_token_logits(model, hidden[:, -1])
        lengths = lengths + 1
    return [_generation(contexts[row][len(prompts[row]) :], eos_id) for row in range(len(prompts))]


def prefill(
    model: LoopedLM, prompts: Sequence[Sequence[int]], lengths: Tensor, *, plan: LoopPlan, cache: KVCache
) -> Tensor:
    """Run all prompts into an empty cache; logits (B, V) after the last token of each.

    Short prompts are padded on the right. The padding's keys lie beyond the row's length, where no query looks before
    decoding has overwritten them.
    """
    n_rows, longest = len(prompts), max(map(len, prompts))
    ids = torch.zeros(n_rows, longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(list(prompt))
    device = lengths.device
    positions = torch.arange(longest, device=device).expand(n_rows, longest)
    hidden = model.hidden(ids.to(device), plan=plan, cache=cache, positions=positions, n_keys=longest)
    return next_token_logits(model, hidden[torch.arange(n_rows, device=device), lengths - 1])


def next_token_logits(model: LoopedLM, hidden: Tensor) -> Tensor:
    """Logits (B, n_targets) for hidden states (B, D): of the ids that may be sampled."""
    return model.logits(hidden)[:, : model.config.n_targets]


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


def _generation(ids: list[int], eos_id: int) -> Generation:
    return Generation(ids, "eos" if ids and ids[-1] == eos_id else "length")
