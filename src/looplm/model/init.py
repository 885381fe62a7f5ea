"""All weight initialisation. Drawn from torch's global generator: seed it before building a model."""

from typing import Literal

from torch import nn

from looplm.model.loop.inject import DiagonalInject


def init_weights(model: nn.Module, *, kind: Literal["normal", "scaled"], std: float) -> None:
    """`normal` draws every matrix from N(0, std). `scaled` draws linears from N(0, 1/sqrt(d_in)), embeddings from
    N(0, std) and sets the layers' output projections to zero, so that every layer starts as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std if kind == "normal" else module.in_features**-0.5)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)  # after the linears: a tied head takes the embedding's draw
        elif isinstance(module, DiagonalInject):
            for linear in (module.B, module.C):
                if isinstance(linear, nn.Linear):
                    nn.init.eye_(linear.weight)
    if kind == "scaled":
        for name, parameter in model.named_parameters():
            if name.endswith(OUTPUT_PROJECTIONS):
                nn.init.zeros_(parameter)


# The matrix each layer part writes to the residual stream with; of a low-rank product only the outer factor is zeroed.
OUTPUT_PROJECTIONS = ("attention.o.weight", "attention.o.up.weight", "ffn.down.weight", "ffn.down.up.weight")
