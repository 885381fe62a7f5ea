"""What a forward refuses, by shapes and types alone: looking at values would wait for a GPU.

Shapes: B batch, T tokens.
"""

import torch
from torch import Tensor

from looplm.errors import ConfigError, DataError
from looplm.model.cache import KVCache
from looplm.model.loop.exit import NoExit, check_last_state
from looplm.model.loop.plan import LoopPlan

WHOLE = (torch.int64, torch.int32)


def one_plan(plan: LoopPlan | None, *, n_loops: int | None, usual: int) -> LoopPlan:
    """The plan of a forward: the given one, or one of `n_loops` loops, or of the `usual` number."""
    if plan is None:
        return LoopPlan(usual if n_loops is None else n_loops)
    if n_loops is not None:
        raise ConfigError(f"n_loops {n_loops} and a plan of {plan.n_loops} loops were both given; give one")
    return plan


def check_ids(ids: Tensor, *, plan: LoopPlan, positions: Tensor | None, before: Tensor | None, n_back: int) -> None:
    """Refuse ids that are not whole numbers (B, T), and what is given beside them in another shape."""
    if not isinstance(ids, Tensor):
        raise DataError(f"ids are a {type(ids).__name__}; give a tensor of rows and tokens: torch.tensor([[1, 2, 3]])")
    if ids.dtype not in WHOLE:
        raise DataError(f"ids are {_kind(ids)}; give whole numbers: ids.long()")
    if ids.dim() != 2:
        raise DataError(f"ids have shape {tuple(ids.shape)}; give (rows, tokens), one text as ids[None]")
    if ids.numel() == 0:
        raise DataError(f"ids have shape {tuple(ids.shape)}, no tokens; give one row of one token or more")
    if not isinstance(plan, LoopPlan):
        raise ConfigError(f"the plan is {plan!r:.60}; give LoopPlan(n_loops), or n_loops instead")
    for name, tensor, width in (("positions", positions, ids.shape[1]), ("before", before, n_back)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in WHOLE:
            raise DataError(f"{name} are {_kind(tensor)}; give a tensor of whole numbers")
        if tuple(tensor.shape) != (len(ids), width):
            raise DataError(f"{name} have shape {tuple(tensor.shape)}; for these ids give {(len(ids), width)}")


def check_cache(cache: KVCache, *, n_rows: int, n_keys: int | None) -> None:
    """Refuse a cache of other rows than the batch has."""
    if not isinstance(cache, KVCache):
        raise ConfigError(f"the cache is {cache!r:.60}; make it with model.new_cache(batch_size=..., capacity=...)")
    if cache.slots and len(cache.slots[0].keys) != n_rows:
        raise DataError(f"the cache is for {len(cache.slots[0].keys)} rows and the batch has {n_rows}")
    if n_keys is not None and (isinstance(n_keys, bool) or not isinstance(n_keys, int) or n_keys < 1):
        raise ConfigError(f"n_keys is {n_keys!r}; give a whole number of 1 or more")


def check_rows(plan: LoopPlan, *, n_rows: int, exit: NoExit, has_backout: bool) -> None:
    """Refuse loops by row where they would mean nothing."""
    assert plan.per_row is not None
    if len(plan.per_row) != n_rows:
        raise ConfigError(f"the plan has loops for {len(plan.per_row)} rows and the batch has {n_rows}")
    check_last_state("loops per row need", exit=exit, has_backout=has_backout, mend="; take another plan")


def out_of_range(ids: Tensor, *, n_ids: int, positions: Tensor | None, error: IndexError) -> Exception:
    """What an IndexError of a forward is about: ids that the model has not, or positions beyond a cache."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= n_ids:
        return DataError(f"ids go from {low} to {high}, and this model has 0 to {n_ids - 1}")
    if positions is None:
        return error
    return DataError(f"positions go up to {int(positions.max())}, beyond the cache ({error})")


def _kind(value: object) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else f"a {type(value).__name__}"
