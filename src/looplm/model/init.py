"""All weight initialisation. Drawn from torch's global generator: seed it before building a model."""

import re
from typing import Literal, Protocol, runtime_checkable

from torch import nn

from looplm.model.block import ResidualAdapter
from looplm.model.linear import HRALinear
from looplm.model.loop.adapter import LoopLoRA
from looplm.model.loop.inject import DiagonalInject
from looplm.model.moe import ExpertLinear

ADAPTER_STD = 0.01


@runtime_checkable
class HasConstants(Protocol):
    """A part with parameters or buffers that start at fixed values."""

    def reset(self) -> None:
        """Set those it holds itself."""
        ...


def init_weights(model: nn.Module, *, kind: Literal["normal", "scaled"], std: float) -> None:
    """Set every parameter and buffer, what it held before being ignored. `normal` draws every matrix from N(0, std).
    `scaled` draws linears from N(0, 1/sqrt(d_in)), embeddings from N(0, std) and sets the layers' output projections to
    zero, so that every layer starts as the identity. What is added beside a matrix (adapters, HRA) starts as nothing in
    both."""
    for module in model.modules():
        if isinstance(module, HasConstants):
            module.reset()
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std if kind == "normal" else module.in_features**-0.5)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -(module.in_features**-0.5), module.in_features**-0.5)
        elif isinstance(module, ExpertLinear):
            nn.init.normal_(module.weight, std=std if kind == "normal" else module.weight.shape[1] ** -0.5)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)  # after the linears: a tied head takes the embedding's draw
        elif isinstance(module, DiagonalInject):
            for linear in (module.B, module.C):
                if isinstance(linear, nn.Linear):
                    nn.init.eye_(linear.weight)
        elif isinstance(module, HRALinear) or (isinstance(module, ExpertLinear) and module.scale):
            nn.init.normal_(module.a, std=(2 / module.a.shape[-2]) ** 0.5)
            nn.init.zeros_(module.b)
        elif isinstance(module, ResidualAdapter):
            nn.init.normal_(module.a, std=ADAPTER_STD)
            nn.init.zeros_(module.b)
        elif isinstance(module, LoopLoRA):
            nn.init.normal_(module.b, std=std)
    if kind == "scaled":
        for name, parameter in model.named_parameters():
            if OUTPUT_PROJECTION.search(name):
                nn.init.zeros_(parameter)


# The matrix each layer part writes to the residual stream with; of a low-rank product only the outer factor is zeroed.
OUTPUT_PROJECTION = re.compile(
    r"(attention\.o|ffn\.down|ffn\.dense\.down|ffn\.moe\.down|shared\.\d+\.down)(\.base|\.up)?\.weight$"
)
