"""One transformer layer: entry parts, then x + attention(norm(x)), then x + ffn(norm(x))."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, TypedDict

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from looplm.config import Config, Loops, Scale, Size
from looplm.model.attention import GQA, GQAConfig
from looplm.model.cache import Slot
from looplm.model.ffn import FFNConfig, Parallel, ParallelConfig, make_ffn
from looplm.model.layer_inputs import Asides, LayerInputs, Place
from looplm.model.linear import FullConfig, LinearConfig, LowRankConfig
from looplm.model.mla import MLA, MLAConfig
from looplm.model.moe import MoE, MoEConfig
from looplm.model.norm import RMSNorm

AttentionConfig = Annotated[GQAConfig | MLAConfig, Field(discriminator="kind")]


class AdapterConfig(Config):
    """x + scale * (x a) b before the layer, with another pair (a, b) for every loop (Nano-OSRT)."""

    rank: Size
    """Inner width."""
    scale: Scale = 1.0
    """Factor of the product."""
    n_loops: Loops
    """Loops that have a pair; later loops use the last pair."""


class BlockConfig(Config):
    """The parts of a layer. All layers of a model share one BlockConfig."""

    attention: AttentionConfig
    """Token mixing."""
    ffn: FFNConfig
    """Channel mixing."""
    linear: LinearConfig = FullConfig()
    """How the projections of attention and ffn are stored."""
    norm_eps: Scale = 1e-6
    """Added under the root of every RMSNorm."""
    norm_weight: bool = True
    """Learn a weight per channel in every RMSNorm."""
    stream_scales: bool = False
    """Each layer takes a * x + b * x0, a and b learned, x0 the stream before the first layer (nanochat)."""

    @model_validator(mode="after")
    def _possible(self) -> "BlockConfig":
        if isinstance(self.linear, LowRankConfig) and isinstance(self.ffn, MoEConfig | ParallelConfig):
            raise ValueError("experts are stored as full matrices: low_rank linears and a moe do not go together")
        return self


class StreamScales(nn.Module):
    """a * x + b * x0 (nanochat: resid_lambdas and x0_lambdas)."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.depth = place.layer_idx / max(1, place.n_layers - 1)
        self.stream = nn.Parameter(torch.empty(1))  # one entry: FSDP takes no 0-d parameter
        self.first = nn.Parameter(torch.empty(1))
        self.reset()

    def reset(self) -> None:
        """Early layers keep more of the stream and of its beginning."""
        nn.init.constant_(self.stream, 1.15 - 0.10 * self.depth)
        nn.init.constant_(self.first, 0.20 - 0.15 * self.depth)

    def forward(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        assert inputs.first is not None
        return self.stream[0] * x + self.first[0] * inputs.first  # 0-d: bf16 stays bf16


class ResidualAdapter(nn.Module):
    """x + scale * (x a[loop]) b[loop]; b starts at zero."""

    def __init__(self, d_model: int, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.a = nn.Parameter(torch.empty(config.n_loops, d_model, config.rank))
        self.b = nn.Parameter(torch.empty(config.n_loops, config.rank, d_model))

    def forward(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        loop_idx = inputs.loop_idx.clamp(max=self.config.n_loops - 1)[None]  # a tensor of one: no graph break
        a, b = self.a.index_select(0, loop_idx), self.b.index_select(0, loop_idx)  # (1, D, rank), (1, rank, D)
        return x + self.config.scale * (x.flatten(0, 1)[None] @ a @ b).view_as(x)


class NormOptions(TypedDict):
    """How every norm of a layer is made."""

    norm_eps: float
    norm_weight: bool


class Block(nn.Module):
    """Pre-norm residual layer, (B, T, D) to (B, T, D)."""

    def __init__(
        self,
        d_model: int,
        config: BlockConfig,
        *,
        place: Place,
        ffn: FFNConfig | None = None,
        adapter: AdapterConfig | None = None,
    ) -> None:
        super().__init__()
        self.place = place
        norms: NormOptions = {"norm_eps": config.norm_eps, "norm_weight": config.norm_weight}
        self.entry = nn.ModuleList()
        if config.stream_scales:
            self.entry.append(StreamScales(place))
        if adapter is not None:
            self.entry.append(ResidualAdapter(d_model, adapter))
        self.attention_norm = RMSNorm(d_model, eps=config.norm_eps, has_weight=config.norm_weight)
        self.attention: GQA | MLA
        if isinstance(config.attention, MLAConfig):
            self.attention = MLA(d_model, config.attention, config.linear, place=place, **norms)
        else:
            self.attention = GQA(d_model, config.attention, config.linear, place=place, **norms)
        self.ffn_norm, self.ffn = make_ffn(
            d_model, ffn or config.ffn, config.linear, layer_idx=place.layer_idx, **norms
        )

    @property
    def moe(self) -> MoE | None:
        """The layer's experts, if it has any."""
        part = self.ffn.moe if isinstance(self.ffn, Parallel) else self.ffn
        return part if isinstance(part, MoE) else None

    def forward(self, x: Tensor, inputs: LayerInputs, slot: Slot | None = None) -> Tensor:
        for part in self.entry:
            x = part(x, inputs)
        x = x + self.attention(self.attention_norm(x), inputs, slot)
        return x + self.ffn(self.ffn_norm(x), inputs)


def run_layers(layers: nn.ModuleList, x: Tensor, *, inputs: LayerInputs, slots: Sequence[Slot] | None) -> Tensor:
    """Apply layers in order, each with its cache slot."""
    for number, layer in enumerate(layers):
        assert isinstance(layer, Block)
        # a new list per layer: compiled code checks the length of a list before it appends, and would be compiled again
        beside = None if inputs.asides is None else Asides()
        x = layer(x, replace(inputs, asides=beside), None if slots is None else slots[number])
        inputs.streams[layer.place.layer_idx] = x
        if inputs.asides is not None and beside is not None:
            inputs.asides.extend(beside)
    return x
