"""Which parameter is trained by which optimizer: Muon for the layers' matrices, AdamW for all others, or as asked."""

from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.optim import AdamW, Optimizer

from looplm.config import Config, NonNegativeFloat, Number, PositiveFloat, PositiveInt
from looplm.dist import is_shared_out
from looplm.errors import ConfigError
from looplm.optim.lion import Lion
from looplm.optim.muon import Muon


class GroupConfig(Config):
    """What is different for some parameters."""

    lr: PositiveFloat = 1.0
    """Factor of the optimizer's rate."""
    weight_decay: NonNegativeFloat | None = None
    """Weight decay instead of the optimizer's; null for the optimizer's."""


class OptimizerConfig(Config):
    """Optimizers and their peak rates; the schedule scales all of them together."""

    matrices: Literal["muon", "normuon", "adamw", "lion"] = "muon"
    """Optimizer of the layers' matrices."""
    others: Literal["adamw", "lion"] = "adamw"
    """Optimizer of embedding, head, norms and injection."""
    muon_lr: PositiveFloat = 0.02
    """Peak rate of Muon: the size of an orthogonal update, scaled by sqrt(max(1, rows / columns))."""
    muon_momentum: Number = Field(default=0.95, ge=0, lt=1)
    """Nesterov momentum of Muon."""
    muon_beta2: Number = Field(default=0.9, ge=0, lt=1)
    """NorMuon's decay of the squares."""
    adamw_lr: PositiveFloat = 2e-3
    """Peak rate of AdamW."""
    lion_lr: PositiveFloat = 1e-4
    """Peak rate of Lion."""
    beta1: Number = Field(default=0.9, ge=0, lt=1)
    """AdamW's and Lion's first decay."""
    beta2: Number = Field(default=0.95, ge=0, lt=1)
    """AdamW's second decay."""
    lion_beta2: Number = Field(default=0.99, ge=0, lt=1)
    """Lion's second decay."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled decay of matrices and embedding; never of norms, smear or injection."""
    batch_tokens: PositiveInt | None = None
    """Tokens per step that the rates are meant for; null for any. A step k times larger takes them times the root of k,
    a smaller one takes them as they are: below some size the best rate hardly falls any more (docs/log.md)."""
    groups: dict[str, GroupConfig] = Field(default_factory=dict)
    """Exceptions by parameter name, globs such as `*.router.weight`; the first match counts."""

    def batch_scale(self, n_tokens: float) -> float:
        """What the rates are multiplied by in a step of `n_tokens`."""
        return 1.0 if self.batch_tokens is None else max(1.0, n_tokens / self.batch_tokens) ** 0.5


def make_optimizers(
    model: nn.Module,
    config: OptimizerConfig,
    *,
    muon_dtype: torch.dtype = torch.bfloat16,
    muon_compiled: bool = False,
) -> list[Optimizer]:
    """Optimizers that together hold every parameter once. Muon orthogonalises in `muon_dtype`, compiled if asked.

    Raises:
        ConfigError: a group's pattern matches no parameter.
    """
    groups: dict[str, dict[tuple[float, float], list[nn.Parameter]]] = {}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    unmatched = set(config.groups)
    found: list[tuple[int, str, float, float, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        is_undecayed = name.startswith(("inject.", "smear.")) or parameter.dim() < 2
        is_matrix = name.startswith(("prelude.", "core.", "coda.", "loop_lora.")) and id(parameter) not in tables
        kind: str = config.matrices if is_matrix and not is_undecayed else config.others
        decay, scale = 0.0 if is_undecayed else config.weight_decay, 1.0
        for pattern, group in config.groups.items():
            if fnmatchcase(name, pattern):
                unmatched.discard(pattern)
                scale, decay = group.lr, decay if group.weight_decay is None else group.weight_decay
                break
        found.append((2 * is_undecayed + (is_matrix and not is_undecayed), kind, scale, decay, parameter))
    if unmatched:
        names = ", ".join(name for name, _ in model.named_parameters())
        raise ConfigError(f"train.optimizer.groups: {sorted(unmatched)} match no parameter; there is {names}")
    # embedding and head, then matrices, then what never decays: the order of saved optimizer states
    for _, kind, scale, decay, parameter in sorted(found, key=lambda each: each[0]):
        groups.setdefault(kind, {}).setdefault((scale, decay), []).append(parameter)
    order = sorted(groups, key=lambda kind: kind in ("muon", "normuon"))
    muon = {"dtype": muon_dtype, "compiled": muon_compiled}
    return [_optimizer(kind, groups[kind], config, muon=muon) for kind in order]


def _optimizer(
    kind: str,
    groups: dict[tuple[float, float], list[nn.Parameter]],
    config: OptimizerConfig,
    *,
    muon: dict[str, Any],
) -> Optimizer:
    peak = {"adamw": config.adamw_lr, "lion": config.lion_lr}.get(kind, config.muon_lr)
    given: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decay, "lr": scale * peak}
        for (scale, decay), parameters in groups.items()
    ]
    if kind == "adamw":
        return AdamW(given, lr=peak, betas=(config.beta1, config.beta2), fused=True)
    if kind == "lion":
        return Lion(given, lr=peak, betas=(config.beta1, config.lion_beta2))
    beta2 = config.muon_beta2 if kind == "normuon" else None
    return Muon(given, lr=peak, momentum=config.muon_momentum, beta2=beta2, **muon)


def set_lr_scale(optimizers: list[Optimizer], scale: float) -> None:
    """Set every group's rate to its peak times `scale`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * scale


def gradient_norm(model: nn.Module) -> torch.Tensor:
    """Global L2 norm of the gradients, without changing them."""
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if is_shared_out(norm) else norm
