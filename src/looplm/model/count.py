"""Parameters and FLOPs, counted from the modules themselves on the meta device: nothing is allocated."""

from dataclasses import dataclass

import torch
from torch import nn

from looplm.model.looped import LoopedLM, ModelConfig


@dataclass(frozen=True)
class Count:
    """Sizes of one model at one number of loops."""

    parameters: int
    """Numbers stored, tied ones once."""
    embedding: int
    """Those in the embedding and an untied head."""
    core: int
    """Those inside the loop."""
    active: int
    """Parameters applied per token, the core once per loop: what a plain stack of the same compute would store."""
    n_loops: int
    flops_per_token: int
    """Forward FLOPs per token at a context of seq_len / 2, the mean of a full causal sequence."""
    training_flops_per_token: int
    """Forward and backward with gradient through every loop: three times the forward."""
    kv_bytes_per_token: int
    """fp32 cache bytes per token over all slots."""


def count(config: ModelConfig, *, n_loops: int | None = None) -> Count:
    """Count a model without building it in memory."""
    with torch.device("meta"):
        model = LoopedLM(config)
    loops = config.n_loops if n_loops is None else n_loops
    core = _size(model.core)
    total = sum(parameter.numel() for parameter in model.parameters())
    head = model.head.weight.numel()
    embedding = model.embed.weight.numel() + (0 if config.tied_head else head)
    attention = config.block.attention
    context = config.seq_len / 2 if attention.window is None else min(attention.window, config.seq_len / 2)
    n_applications = model.n_slots(loops)
    # 2 FLOPs per multiply-add: every matrix once per token per application, scores and values 2 * 2 * H * K * context
    matrices = _matrix_size(model.prelude) + loops * _matrix_size(model.core) + _matrix_size(model.coda)
    matrices += _matrix_size(model.inject) + head
    scores = 4 * attention.n_heads * attention.head_dim * context * n_applications
    flops = round(2 * matrices + scores)
    kv_bytes = 4 * 2 * attention.n_kv_heads * attention.head_dim * n_applications
    return Count(total, embedding, core, total + (loops - 1) * core, loops, flops, 3 * flops, kv_bytes)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _matrix_size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() == 2)
