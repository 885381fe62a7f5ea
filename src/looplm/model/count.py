"""Parameters and FLOPs, counted from the modules themselves on the meta device: nothing is allocated."""

from dataclasses import dataclass

from torch import nn

from looplm.errors import ConfigError
from looplm.model.block import ResidualAdapter
from looplm.model.looped import LoopedLM, ModelConfig
from looplm.model.meta import without_memory
from looplm.model.moe import MoE


@dataclass(frozen=True)
class Count:
    """Sizes of one model at one number of loops."""

    parameters: int
    """Numbers stored, tied ones once."""
    embedding: int
    """Parameters of the embedding and of an untied head."""
    core: int
    """Parameters inside the loop."""
    active: int
    """Numbers one token uses: all but the experts it is not sent to."""
    unrolled: int
    """Active parameters with the core counted once per loop: what a plain stack of the same compute would store."""
    n_loops: int
    flops_per_token: int
    """Forward FLOPs per token at a context of seq_len / 2, the mean of a full causal sequence."""
    training_flops_per_token: int
    """Forward and backward with gradient through every loop: three times the forward."""
    kv_numbers_per_token: int
    """Numbers a cache keeps per token, over all slots."""
    kv_numbers_per_layer: int
    """Numbers that one slot keeps per token."""


def count(config: ModelConfig, *, n_loops: int | None = None) -> Count:
    """Count a model without building it in memory."""
    try:
        with without_memory():
            model = LoopedLM(config)
    except RuntimeError as error:  # a product of sizes that fits no 64-bit number
        raise ConfigError(f"a matrix of the model is too large to be counted ({error}); lower its sizes") from None
    loops = config.n_loops if n_loops is None else n_loops
    total = _size(model)
    idle, idle_core = _idle(model), _idle(model.core)
    core = _size(model.core) - idle_core
    active = total - idle
    embedding = model.embed.weight.numel() + (0 if config.tied_head else model.head.weight.numel())
    attention, n_layers = config.block.attention, config.n_layers
    # 2 FLOPs per multiply-add: every matrix once per token per application, scores and values over the mean context
    matrices = _matrices(model.prelude) + loops * (_matrices(model.core) + _matrices(model.loop_lora))
    matrices += (
        _matrices(model.coda) + _matrices(model.inject) + loops * _matrices(model.exit) + model.head.weight.numel()
    )
    contexts = [_context(config, layer_idx) for layer_idx in range(n_layers)]
    core_at = slice(config.n_prelude, config.n_prelude + config.n_core)
    seen = sum(contexts) + (loops - 1) * sum(contexts[core_at])
    flops = round(2 * matrices + 2 * attention.score_width * seen)
    kv = sum(heads * width for heads, width in attention.slot_shapes)
    return Count(
        parameters=total,
        embedding=embedding,
        core=_size(model.core),
        active=active,
        unrolled=active + (loops - 1) * core,
        n_loops=loops,
        flops_per_token=flops,
        training_flops_per_token=3 * flops,
        kv_numbers_per_token=model.n_slots(loops) * kv,
        kv_numbers_per_layer=kv,
    )


class FlopsPerToken:
    """Training FLOPs of a token by the number of loops, as `looplm count` counts them at the rows' length."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._by_length: dict[int, tuple[int, int]] = {}

    def __call__(self, n_loops: float, *, n_tokens: int) -> float:
        if n_tokens not in self._by_length:
            config = self.config.model_copy(update={"seq_len": n_tokens})
            one, two = (count(config, n_loops=n).training_flops_per_token for n in (1, 2))
            self._by_length[n_tokens] = one, two - one
        first, each = self._by_length[n_tokens]
        return first + (n_loops - 1) * each


def _context(config: ModelConfig, layer_idx: int) -> float:
    """Keys a query sees in one layer, the mean over a full sequence."""
    window = config.block.attention.window_at(layer_idx, config.n_layers)
    return config.seq_len / 2 if window is None else min(window, config.seq_len / 2)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _idle(module: nn.Module) -> int:
    """Parameters of the experts that a token is not sent to."""
    moes = (part for part in module.modules() if isinstance(part, MoE))
    return sum(
        parameter.numel() // moe.config.n_experts * (moe.config.n_experts - moe.config.top_k)
        for moe in moes
        for experts in (moe.gate, moe.up, moe.down)
        for parameter in experts.parameters()
    )


def _matrices(module: nn.Module | None) -> int:
    """Multiply-adds per token: the entries of every matrix that a token is multiplied with. Embeddings are looked
    up."""
    if module is None:
        return 0
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    dense = sum(p.numel() for p in module.parameters() if p.dim() >= 2 and id(p) not in tables)
    adapters = (part for part in module.modules() if isinstance(part, ResidualAdapter))
    unused = sum(p.numel() // p.shape[0] * (p.shape[0] - 1) for part in adapters for p in part.parameters())
    return dense - _idle(module) - unused
