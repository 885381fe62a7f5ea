"""One transformer layer: x + attention(norm(x)), then x + ffn(norm(x))."""

from pydantic import PositiveFloat
from torch import Tensor, nn

from looplm.config import Config
from looplm.model.attention import GQA, AttentionInputs, GQAConfig
from looplm.model.cache import Slot
from looplm.model.ffn import FFNConfig, make_ffn
from looplm.model.linear import FullConfig, LinearConfig
from looplm.model.norm import RMSNorm


class BlockConfig(Config):
    """The parts of a layer. All layers of a model share one BlockConfig."""

    attention: GQAConfig
    """Token mixing."""
    ffn: FFNConfig
    """Channel mixing."""
    linear: LinearConfig = FullConfig()
    """How the projections of attention and ffn are stored."""
    norm_eps: PositiveFloat = 1e-6
    """Added under the root of every RMSNorm."""


class Block(nn.Module):
    """Pre-norm residual layer, (B, T, D) to (B, T, D)."""

    def __init__(self, d_model: int, config: BlockConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(d_model, eps=config.norm_eps)
        self.attention = GQA(d_model, config.attention, config.linear, norm_eps=config.norm_eps)
        self.ffn_norm = RMSNorm(d_model, eps=config.norm_eps)
        self.ffn = make_ffn(d_model, config.ffn, config.linear)

    def forward(self, x: Tensor, inputs: AttentionInputs, slot: Slot | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), inputs, slot)
        return x + self.ffn(self.ffn_norm(x))
