"""Which parameter is trained by which optimizer: Muon for the layers' matrices, AdamW for all others."""

from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import nn
from torch.optim import AdamW, Optimizer

from looplm.config import Config
from looplm.optim.muon import Muon


class OptimizerConfig(Config):
    """Optimizers and their peak rates; the schedule scales all of them together."""

    matrices: Literal["muon", "adamw"] = "muon"
    """Optimizer of the layers' matrices; embedding, head, norms and injection always take AdamW."""
    muon_lr: PositiveFloat = 0.02
    """Peak rate of Muon: the size of an orthogonal update, scaled by sqrt(max(1, rows / columns))."""
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    """Nesterov momentum of Muon."""
    adamw_lr: PositiveFloat = 2e-3
    """Peak rate of AdamW."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's first decay."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's second decay."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled decay of matrices and embedding; never of norms, smear or the injection's own parameters."""


def make_optimizers(
    model: nn.Module, config: OptimizerConfig, *, muon_dtype: torch.dtype = torch.bfloat16
) -> list[Optimizer]:
    """Optimizers that together hold every parameter once. Muon orthogonalises in `muon_dtype`."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if name.startswith(("inject.", "smear.")) or parameter.dim() < 2:
            undecayed.append(parameter)
        elif name.startswith(("prelude.", "core.", "coda.", "loop_lora.")) and id(parameter) not in tables:
            matrices.append(parameter)
        else:
            others.append(parameter)
    if config.matrices == "adamw":
        others, matrices = others + matrices, []
    groups = [
        {"params": others, "weight_decay": config.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    optimizers: list[Optimizer] = [
        AdamW(groups, lr=config.adamw_lr, betas=(config.beta1, config.beta2), fused=True),
    ]
    if matrices:
        optimizers.append(
            Muon(
                matrices,
                lr=config.muon_lr,
                momentum=config.muon_momentum,
                weight_decay=config.weight_decay,
                dtype=muon_dtype,
            )
        )
    return optimizers


def set_lr_scale(optimizers: list[Optimizer], scale: float) -> None:
    """Set every group's rate to its peak times `scale`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * scale


def gradient_norm(model: nn.Module) -> torch.Tensor:
    """Global L2 norm of the gradients, without changing them."""
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
