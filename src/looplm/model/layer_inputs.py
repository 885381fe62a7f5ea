"""What every layer of one forward shares: tables, masks and positions, computed once and used by all layers in all
loops.

Shapes: B batch, T tokens, S keys, K head width.
"""

from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from looplm.model.rope import RopeConfig, rope_tables

# Up to this length a CPU trains faster with the scores written out than with the flash kernel, whose backward is slow
# there (docs/log.md, 2026-11-21). The mask is added, not filled in: compiled, a fill takes three times as long.
MAX_WRITTEN_OUT = 512


@cache
def has_amx() -> bool:
    """Whether this CPU multiplies bf16 matrices in tiles: products are then too cheap for blocks of queries to pay."""
    return bool(torch.cpu._is_amx_tile_supported())


@dataclass(frozen=True)
class Place:
    """Where a layer stands among all layers with weights, prelude first; a looped layer counts once."""

    layer_idx: int
    n_layers: int
    n_embeddings: int
    """Rows of the token embedding, for parts that have a table by token id."""


@dataclass
class Mask:
    """Which keys each query sees, for one window width."""

    seen: Tensor | None  # (1 or B, 1, T, S), True where a key is seen; None means plain causal over T
    bias: Tensor | None = None  # (1 or B, 1, T, S), 0 where a key is seen, -1e30 elsewhere: scores are written out
    in_blocks: bool = False  # written out in blocks of queries, without the keys that causality rules out

    def rows(self, index: Tensor) -> "Mask":
        """The mask of some rows of the batch."""
        seen, bias = (None if part is None else _rows(part, index) for part in (self.seen, self.bias))
        return Mask(seen, bias, self.in_blocks)


@dataclass
class Asides:
    """Auxiliary outputs of the parts. Only training and its probes hand one in: then parts append to it, and experts
    have a capacity."""

    losses: list[Tensor] = field(default_factory=list)  # auxiliary losses of the parts, weighted
    loads: list[tuple[int, Tensor]] = field(default_factory=list)  # (layer_idx, tokens per expert (E,)) of router calls

    def extend(self, other: "Asides") -> None:
        """Append all that another one holds."""
        self.losses.extend(other.losses)
        self.loads.extend(other.loads)


@dataclass
class LayerInputs:
    """Shared by the layers of one forward."""

    ids: Tensor  # (B, T)
    cos: Tensor  # (1 or B, 1, T, K/2)
    sin: Tensor
    masks: dict[int | None, Mask]  # by window width, None for all keys
    loop_idx: Tensor  # 0-d int64: a tensor, so that compiled layers serve every loop
    positions: Tensor | None = None  # (B, T), with a cache only
    n_keys: int | None = None  # keys of the cache that any row can see, with a cache only
    asides: Asides | None = None  # takes the parts' auxiliary outputs; None outside training
    first: Tensor | None = None  # (B, T, D), the stream as it entered the first layer
    streams: dict[int, Tensor] = field(default_factory=dict)  # the stream after each layer so far, by layer_idx

    def rows(self, index: Tensor) -> "LayerInputs":
        """The same for some rows of the batch, without a cache; `streams` begins empty."""
        assert self.positions is None
        return replace(
            self,
            ids=self.ids.index_select(0, index),
            cos=_rows(self.cos, index),
            sin=_rows(self.sin, index),
            masks={window: mask.rows(index) for window, mask in self.masks.items()},
            first=None if self.first is None else self.first.index_select(0, index),
            streams={},
        )


def _rows(shared: Tensor, index: Tensor) -> Tensor:
    """Rows of a tensor (1 or B, ...); a tensor that all rows share stays as it is."""
    return shared if len(shared) == 1 else shared.index_select(0, index)


def layer_inputs(
    ids: Tensor,
    *,
    rope_dim: int,
    rope: RopeConfig,
    windows: set[int | None],
    positions: Tensor | None = None,
    n_keys: int | None = None,
    documents: Tensor | None = None,
    asides: Asides | None = None,
) -> LayerInputs:
    """Tables and masks for a full forward over ids (B, T) (positions None) or for ids at `positions` (B, T) of a cache.

    `documents` (B, T), full forward only, numbers the documents packed in a row: a token sees its own document only.
    """
    device, n_tokens = ids.device, ids.shape[1]
    at = torch.arange(n_tokens, device=device) if positions is None else positions
    cos, sin = rope_tables(at, head_dim=rope_dim, config=rope)
    writes_out = torch.is_grad_enabled() and positions is None and device.type == "cpu" and n_tokens <= MAX_WRITTEN_OUT
    is_bf16 = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.bfloat16
    in_blocks = writes_out and not (is_bf16 and has_amx())
    key_at = torch.arange(n_tokens if n_keys is None else n_keys, device=device)
    query_at = at if at.dim() == 2 else at[None]
    masks: dict[int | None, Mask] = {}
    for window in windows:
        if positions is None and window is None and documents is None and not writes_out:
            masks[window] = Mask(None)
            continue
        distance = query_at[:, :, None] - key_at[None, None, :]  # (B, T, S)
        seen = distance >= 0
        if window is not None:
            seen = seen & (distance < window)
        if documents is not None:
            seen = seen & (documents[:, :, None] == documents[:, None, :])
        seen = seen[:, None]
        bias = torch.where(seen, 0.0, -1e30).bfloat16() if writes_out else None
        masks[window] = Mask(seen, bias, in_blocks)
    loop_idx = torch.zeros((), dtype=torch.long, device=device)
    return LayerInputs(ids, cos, sin, masks, loop_idx, positions=positions, n_keys=n_keys, asides=asides)
