"""A text through the cache in chunks, for every test that holds cached logits against others."""

from collections.abc import Iterable

import torch
from torch import Tensor

from looplm.model.looped import LoopedLM


def cached_logits(
    model: LoopedLM, ids: Tensor, *, chunks: Iterable[int], n_loops: int | None = None, spare: int = 0
) -> Tensor:
    """Logits (B, T, V) of ids (B, T) fed in chunks of the given lengths, `spare` places of the cache left over."""
    n_rows, n_tokens = ids.shape
    cache = model.new_cache(batch_size=n_rows, capacity=n_tokens + spare, n_loops=n_loops)
    padded = torch.cat([torch.full((n_rows, model.n_back), -1), ids], dim=1)
    parts, start = [], 0
    for length in chunks:
        end = start + length
        positions = torch.arange(start, end).expand(n_rows, length)
        before = padded[:, start : start + model.n_back]
        out = model(ids[:, start:end], n_loops=n_loops, cache=cache, positions=positions, n_keys=end, before=before)
        parts.append(out.logits)
        start = end
    assert start == n_tokens
    return torch.cat(parts, dim=1)
