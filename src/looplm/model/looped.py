"""LoopedLM: ids -> embed -> prelude -> [inject -> core] x n_loops -> coda -> norm -> head. Reads top to bottom.

Shapes: B batch, T tokens, D d_model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from looplm.config import Config
from looplm.errors import ConfigError, DataError
from looplm.model.attention import AttentionInputs, attention_inputs
from looplm.model.block import Block, BlockConfig
from looplm.model.cache import KVCache, Slot
from looplm.model.init import init_weights
from looplm.model.loop.inject import InjectConfig, NoInjectConfig, make_inject
from looplm.model.loop.plan import LoopPlan
from looplm.model.norm import RMSNorm
from looplm.model.smear import Smear


class ModelConfig(Config):
    """A looped language model. n_loops = 1 with no injection is a plain transformer."""

    vocab_size: PositiveInt
    """Rows of the embedding."""
    d_model: PositiveInt
    """Width of the state."""
    seq_len: PositiveInt
    """Longest context in tokens: prompt and answer together."""
    n_prelude: NonNegativeInt = 0
    """Layers before the loop."""
    n_core: PositiveInt
    """Layers inside the loop."""
    n_coda: NonNegativeInt = 0
    """Layers after the loop."""
    n_loops: PositiveInt
    """Loops run when the caller does not say."""
    block: BlockConfig
    """The parts of every layer."""
    inject: InjectConfig = NoInjectConfig()
    """How the prelude's output enters each loop."""
    smear: NonNegativeInt = 0
    """Tokens back whose embeddings each token takes in; 0 for none."""
    tied_head: bool = True
    """Use the embedding as the output head."""
    n_outputs: PositiveInt | None = None
    """Rows of an untied head, where the answers are not the input tokens; null for vocab_size."""
    init: Literal["normal", "scaled"] = "scaled"
    """normal: N(0, init_std) everywhere; scaled: N(0, 1/sqrt(d_in)), output projections zero."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the embedding, and of everything for `normal`."""

    @model_validator(mode="after")
    def _head_fits(self) -> "ModelConfig":
        if self.tied_head and self.n_outputs is not None:
            raise ValueError(f"n_outputs {self.n_outputs} needs a head of its own: set tied_head to false")
        return self

    @property
    def d_head_out(self) -> int:
        """Number of logits."""
        return self.n_outputs or self.vocab_size


@dataclass
class LoopedOutput:
    """What a forward returns."""

    logits: Tensor  # (B, T, n_outputs or vocab_size)
    hidden: Tensor  # (B, T, D), after the final norm
    n_loops: int


class LoopedLM(nn.Module):
    """A model of the family. Pure: no files, no randomness, no training branch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        eps = config.block.norm_eps
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.smear = Smear(config.d_model, n_back=config.smear) if config.smear else None
        self.prelude = nn.ModuleList(Block(config.d_model, config.block) for _ in range(config.n_prelude))
        self.inject = make_inject(config.d_model, config.inject, norm_eps=eps)
        self.core = nn.ModuleList(Block(config.d_model, config.block) for _ in range(config.n_core))
        self.coda = nn.ModuleList(Block(config.d_model, config.block) for _ in range(config.n_coda))
        self.norm = RMSNorm(config.d_model, eps=eps)
        self.head = nn.Linear(config.d_model, config.d_head_out, bias=False)
        if config.tied_head:
            self.head.weight = self.embed.weight
        init_weights(self, kind=config.init, std=config.init_std)

    def forward(
        self,
        ids: Tensor,
        *,
        n_loops: int | None = None,
        plan: LoopPlan | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        n_keys: int | None = None,
        before: Tensor | None = None,
    ) -> LoopedOutput:
        """Logits for ids (B, T). Give n_loops or a plan, or neither for the config's n_loops.

        With a cache, `positions` (B, T) says where each token stands, `n_keys` how many keys any row can see, and
        `before` (B, smear) which tokens came just before.
        """
        if plan is None:
            plan = LoopPlan(self.config.n_loops if n_loops is None else n_loops)
        elif n_loops is not None:
            raise ConfigError(f"n_loops {n_loops} and a plan of {plan.n_loops} loops were both given; give one")
        hidden = self.hidden(ids, plan=plan, cache=cache, positions=positions, n_keys=n_keys, before=before)
        return LoopedOutput(self.head(hidden).float(), hidden, plan.n_loops)

    def hidden(
        self,
        ids: Tensor,
        *,
        plan: LoopPlan,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        n_keys: int | None = None,
        documents: Tensor | None = None,
        before: Tensor | None = None,
    ) -> Tensor:
        """The state after coda and final norm, (B, T, D): everything but the head, so that a loss can apply the head
        to the positions it scores and to no others. `documents` (B, T) numbers the documents packed in a row."""
        if cache is None and ids.shape[1] > self.config.seq_len:
            raise DataError(
                f"{ids.shape[1]} tokens do not fit the model's context of {self.config.seq_len}; shorten them"
            )
        inputs = attention_inputs(
            self.config.block.attention,
            n_tokens=ids.shape[1],
            device=ids.device,
            positions=positions,
            n_keys=n_keys,
            documents=documents,
        )
        slots = iter(cache.slots) if cache is not None else None
        x = self.embed_tokens(ids, before=before, documents=documents)
        x = run_layers(self.prelude, x, inputs=inputs, slots=slots)
        x = self.run_core(x, plan=plan, inputs=inputs, slots=slots)
        x = run_layers(self.coda, x, inputs=inputs, slots=slots)
        return self.norm(x)

    def embed_tokens(self, ids: Tensor, *, before: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """Embeddings (B, T, D), smeared if the model does. `before` (B, smear) holds the ids just before a cached
        continuation, -1 where there is none."""
        x = self.embed(ids)
        if self.smear is None:
            return x
        if before is not None:
            before = self.embed(before.clamp(min=0)) * (before >= 0)[..., None]
        return self.smear(x, before=before, documents=documents)

    def run_core(
        self, entry: Tensor, *, plan: LoopPlan, inputs: AttentionInputs, slots: Iterator[Slot] | None = None
    ) -> Tensor:
        """The loop: inject, then the core layers, n_loops times."""
        tracking = torch.is_grad_enabled()
        entry = self.inject.prepare(entry)
        state: Tensor | None = None
        for loop_idx in range(plan.n_loops):
            with torch.set_grad_enabled(tracking and plan.carries_gradient(loop_idx)):
                state = self.inject(state, entry)
                state = run_layers(self.core, state, inputs=inputs, slots=slots)
        assert state is not None
        return self.inject.read_out(state)

    def n_slots(self, n_loops: int) -> int:
        """Cache slots of a forward with n_loops loops: one per layer application."""
        return self.config.n_prelude + n_loops * self.config.n_core + self.config.n_coda

    def new_cache(self, *, batch_size: int, capacity: int, n_loops: int | None = None) -> KVCache:
        """An empty cache for `batch_size` rows of at most `capacity` tokens."""
        attention = self.config.block.attention
        return KVCache(
            n_slots=self.n_slots(self.config.n_loops if n_loops is None else n_loops),
            batch_size=batch_size,
            n_kv_heads=attention.n_kv_heads,
            capacity=capacity,
            head_dim=attention.head_dim,
            dtype=self.embed.weight.dtype,
            device=self.embed.weight.device,
        )

    def blocks(self) -> Iterator[Block]:
        """Every layer with weights of its own, in order."""
        for part in (self.prelude, self.core, self.coda):
            for block in part:
                assert isinstance(block, Block)
                yield block


def run_layers(layers: nn.ModuleList, x: Tensor, *, inputs: AttentionInputs, slots: Iterator[Slot] | None) -> Tensor:
    """Apply layers in order, each with the next cache slot."""
    for layer in layers:
        x = layer(x, inputs, next(slots) if slots is not None else None)
    return x
