"""LoopedLM: ids -> embed -> prelude -> [inject -> core -> exit] x n_loops -> coda -> norm -> head. Reads top to bottom.

Shapes: B batch, T tokens, D d_model.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from looplm.config import Config, Layers, Loops, Scale, Size
from looplm.errors import ConfigError, DataError
from looplm.model.arguments import check_cache, check_ids, check_rows, one_plan, out_of_range
from looplm.model.attention import GQAConfig
from looplm.model.block import AdapterConfig, Block, BlockConfig, run_layers
from looplm.model.cache import KVCache, Slot, join, left_behind
from looplm.model.cache_memory import check_cache_fits
from looplm.model.compiler import TURNS, LaysOut, has_compiler
from looplm.model.cross_entropy import LossChunk, cross_entropy
from looplm.model.ffn import FFNConfig, ParallelConfig
from looplm.model.init import init_weights
from looplm.model.layer_inputs import Asides, LayerInputs, Place, layer_inputs
from looplm.model.linear import MANY_ROWS, MOST_ROWS, Linear, LowRankConfig, join_weights
from looplm.model.loop.adapter import LoopLoRA, LoopLoRAConfig
from looplm.model.loop.exit import ExitConfig, Halting, NoExitConfig, make_exit
from looplm.model.loop.inject import InjectConfig, NoInjectConfig, make_inject
from looplm.model.loop.plan import LoopPlan
from looplm.model.loop.rows import run_rows
from looplm.model.meta import give_memory, without_memory
from looplm.model.moe import MoEConfig, total_loads
from looplm.model.norm import RMSNorm
from looplm.model.one_token import CompiledParts
from looplm.model.partial import begin, go_on
from looplm.model.smear import GateSmearConfig, SmearConfig, make_smear

BACKOUT_INIT = 0.2  # nanochat's
MAX_UNROLLED = 32  # layer applications that are compiled as one; a minute of compiling at most


class ModelConfig(Config):
    """A looped language model. n_loops = 1 with no injection is a plain transformer."""

    vocab_size: Size
    """Token ids that can be embedded and are given logits."""
    used_vocab: Size | None = None
    """Ids that are ever a target or sampled, the first of vocab_size; null for all of them."""
    vocab_multiple: Size = 1
    """The embedding's rows are rounded up to a multiple of this; the rows beyond vocab_size get no logits."""
    d_model: Size
    """Width of the state."""
    seq_len: Size
    """Longest context in tokens: prompt and answer together."""
    n_prelude: Layers = 0
    """Layers before the loop."""
    n_core: Layers = Field(gt=0)
    """Layers inside the loop."""
    n_coda: Layers = 0
    """Layers after the loop."""
    n_loops: Loops
    """Loops run when the caller does not say."""
    block: BlockConfig
    """The parts of every layer."""
    core_ffn: FFNConfig | None = None
    """Channel mixing of the core layers, where it differs."""
    inject: InjectConfig = NoInjectConfig()
    """How the prelude's output enters each loop."""
    adapter: AdapterConfig | None = None
    """A low-rank pair per loop before each core layer; null for none."""
    loop_lora: LoopLoRAConfig | None = None
    """A low-rank correction with a scale per loop after the core; null for none."""
    loop_norm: bool = False
    """RMS-normalise the state between loops."""
    exit: ExitConfig = NoExitConfig()
    """How the states of the loops become one output."""
    smear: SmearConfig | None = None
    """How each token takes in those just before it; null for not at all."""
    embed_norm: bool = False
    """RMS-normalise the embeddings, without weight."""
    backout: bool = False
    """Take a learned share of the stream after the middle layer out of the last one (nanochat)."""
    softcap: Scale | None = None
    """Logits become softcap * tanh(logits / softcap); null for as they are."""
    tied_head: bool = True
    """Use the embedding as the output head."""
    n_outputs: Size | None = None
    """Rows of an untied head, where the answers are not the input tokens; null for vocab_size."""
    init: Literal["normal", "scaled"] = "scaled"
    """normal: N(0, init_std) everywhere; scaled: N(0, 1/sqrt(d_in)), output projections zero."""
    init_std: Scale = 0.02
    """Standard deviation of the embedding, and of everything for `normal`."""

    @model_validator(mode="after")
    def _fits(self) -> "ModelConfig":
        if self.tied_head and self.n_outputs is not None:
            raise ValueError(f"n_outputs {self.n_outputs} needs a head of its own: set tied_head to false")
        if isinstance(self.core_ffn, MoEConfig | ParallelConfig) and isinstance(self.block.linear, LowRankConfig):
            raise ValueError("experts are stored as full matrices: low_rank linears and a moe do not go together")
        if self.used_vocab is not None and self.used_vocab > self.vocab_size:
            raise ValueError(f"used_vocab {self.used_vocab} is more than vocab_size {self.vocab_size}")
        attention = self.block.attention
        gates = {
            "smear": self.smear if isinstance(self.smear, GateSmearConfig) else None,
            "block.attention.value_embed": attention.value_embed if isinstance(attention, GQAConfig) else None,
        }
        for name, gate in gates.items():
            if gate is not None and gate.n_channels > self.d_model:
                raise ValueError(f"{name}.n_channels {gate.n_channels} is more than d_model {self.d_model}: lower it")
        return self

    @property
    def n_layers(self) -> int:
        """Layers with weights of their own."""
        return self.n_prelude + self.n_core + self.n_coda

    @property
    def n_embeddings(self) -> int:
        """Rows of the embedding, padding included."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def d_head_out(self) -> int:
        """Number of logits."""
        return self.n_outputs or self.vocab_size

    @property
    def n_targets(self) -> int:
        """Logits that are scored and sampled from."""
        return self.n_outputs or self.used_vocab or self.vocab_size


@dataclass
class LoopedOutput:
    """What a forward returns."""

    logits: Tensor  # (B, T, n_outputs or vocab_size)
    hidden: Tensor  # (B, T, D), after the final norm
    n_loops: int


class LoopedLM(nn.Module):
    """The whole family: which parts is the config's business, how many loops the caller's. No randomness, no training
    branch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        eps, has_weight = config.block.norm_eps, config.block.norm_weight
        self.embed = nn.Embedding(config.n_embeddings, config.d_model)
        self.embed_norm = RMSNorm(config.d_model, eps=eps, has_weight=False) if config.embed_norm else nn.Identity()
        self.smear = make_smear(config.d_model, config.smear) if config.smear is not None else None
        self.prelude = self._layers(config.n_prelude, first=0)
        self.inject = make_inject(config.d_model, config.inject, norm_eps=eps)
        self.core = self._layers(config.n_core, first=config.n_prelude, is_core=True)
        self.loop_lora = LoopLoRA(config.d_model, config.loop_lora) if config.loop_lora is not None else None
        self.loop_norm = RMSNorm(config.d_model, eps=eps, has_weight=has_weight) if config.loop_norm else nn.Identity()
        self.exit = make_exit(config.d_model, config.exit)
        self.coda = self._layers(config.n_coda, first=config.n_prelude + config.n_core)
        self.backout = nn.Parameter(torch.empty(1)) if config.backout else None
        self.norm = RMSNorm(config.d_model, eps=eps, has_weight=has_weight)
        self.head = Linear(config.d_model, config.n_outputs or config.n_embeddings)
        self.loss_chunk = LossChunk()
        self.source = "the model"  # what errors call it; once loaded, by its run
        self.one_token: CompiledParts | None = None  # what cached single tokens go through, once compiled
        self._finish()

    def _finish(self, *, draw: bool = True) -> None:
        """Tie the head and set all weights."""
        if self.config.tied_head:
            self.head.weight = self.embed.weight
        if draw and not self.embed.weight.is_meta:
            init_weights(self, kind=self.config.init, std=self.config.init_std)

    def reset(self) -> None:
        """The stream's own scalar; every part resets what it holds."""
        if self.backout is not None:
            nn.init.constant_(self.backout, BACKOUT_INIT)

    @classmethod
    def on(cls, device: torch.device | str, config: ModelConfig, *, draw: bool = True) -> "LoopedLM":
        """A model built on the meta device and given memory on `device` once, with fresh weights, or with `draw` false
        with whatever the memory held, for who loads weights next."""
        with without_memory():
            model = cls(config)
        give_memory(model, device)
        model._finish(draw=draw)
        return model

    def _layers(self, n_layers: int, *, first: int, is_core: bool = False) -> nn.ModuleList:
        config = self.config
        places = (Place(first + index, config.n_layers, config.n_embeddings) for index in range(n_layers))
        ffn, adapter = (config.core_ffn, config.adapter) if is_core else (None, None)
        return nn.ModuleList(
            Block(config.d_model, config.block, place=place, ffn=ffn, adapter=adapter) for place in places
        )

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
        `before` (B, n_back) which tokens came just before, as the smear takes them in.
        """
        plan = one_plan(plan, n_loops=n_loops, usual=self.config.n_loops)
        check_ids(ids, plan=plan, positions=positions, before=before, n_back=self.n_back)
        parts = self._parts(ids, cache=cache, n_keys=n_keys)
        if isinstance(parts, CompiledParts) and self._is_unrolled(plan) and before is not None:
            assert cache is not None
            check_cache(cache, n_rows=len(ids), n_keys=n_keys)
            at = self._check_cached(cache, plan=plan, positions=positions, n_keys=n_keys)
            hidden, logits = parts.step(ids, n_loops=plan.n_loops, cache=cache, positions=at, before=before)
        else:
            hidden = self.hidden(ids, plan=plan, cache=cache, positions=positions, n_keys=n_keys, before=before)
            logits = self.logits(hidden)
        return LoopedOutput(logits, hidden, plan.n_loops)

    def _parts(self, ids: Tensor, *, cache: KVCache | None, n_keys: int | None) -> "LoopedLM | CompiledParts":
        """What a forward goes through: compiled, single tokens that look at the whole cache."""
        if self.one_token is None or cache is None or ids.shape[1] != 1 or n_keys != cache.capacity:
            return self
        return self if torch.is_grad_enabled() else self.one_token

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., n_outputs or vocab_size) in fp32 for hidden states (..., D)."""
        logits = self.head(hidden).float()[..., : self.config.d_head_out]
        softcap = self.config.softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def cross_entropy(self, hidden: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy, nats, of targets (N,) given hidden states (N, D)."""
        weight, softcap, chunk = self.head.weight[: self.config.n_targets], self.config.softcap, self.loss_chunk
        return cross_entropy(hidden, weight, targets, softcap=softcap, label_smoothing=label_smoothing, chunk=chunk)

    def compile_parts(self, *, rows_vary: bool = False) -> None:
        """Compile the layers and the loss, for inputs of one shape or, with `rows_vary`, of any number of rows: not the
        unrolled loop, which takes most of a minute and gains nothing."""
        dynamo = torch._dynamo.config
        # layers share one code object: beyond the usual limit of 8 the last ones would silently run uncompiled
        dynamo.recompile_limit = max(dynamo.recompile_limit, 8 + 4 * self.config.n_layers)
        for block in self.blocks():
            block.compile(dynamic=None if rows_vary else False)
        self.loss_chunk = LossChunk(compiled=True)

    @TURNS.compilation()
    def compile_decoding(self, *, n_rows: int = 1) -> None:
        """Compile what a cached forward of one token per row runs, for inference on a CPU or a GPU: all of it as one
        where no loop can be left out and the layers are few, else begin, one loop and end, for any number of loops.
        Each is compiled for one batch size, cache capacity, n_keys and, as one, number of loops, the logits with it.

        A cached forward goes through it whose n_keys is the whole capacity and that is asked for nothing beside its
        output. The weights of the linear maps are laid out in memory as products of few rows read them fastest, or left
        as they are if `n_rows`, the texts that will mostly be decoded together, are many; their values and names stay.
        From then on the model can be neither copied nor moved to another device or type. Several threads may generate
        with it at once; while one of them compiles, the others wait.

        Raises:
            ConfigError: there is no C++ compiler for a model on a CPU.
        """
        weight = self.embed.weight
        on_cpu = weight.device.type == "cpu"
        if on_cpu and not has_compiler():
            raise ConfigError(
                "compiling for a CPU needs a C++ compiler (g++, on macOS clang++, or what CXX names) and Python.h; "
                "install them, or do without"
            )
        if on_cpu and weight.dtype == torch.float32 and MANY_ROWS <= n_rows <= MOST_ROWS:
            for part in self.modules():
                if isinstance(part, Linear):
                    part.for_many_rows = True
        else:
            for part in self.modules():
                if isinstance(part, LaysOut):
                    part.lay_out()
            if not self.config.tied_head:
                join_weights(self.head)
        self.one_token = CompiledParts.of(self)

    def __getstate__(self) -> dict[str, Any]:
        """Refuse copies and pickles of a compiled model: its compiled parts would go on with this one's weights."""
        if self.one_token is not None:
            raise ConfigError("a model whose decoding is compiled cannot be copied; copy it before compile_decoding")
        return self.__dict__.copy()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoopedLM":
        """Refuse to move a compiled model: the joined weights would stay behind."""
        if self.one_token is not None:
            raise ConfigError("a model whose decoding is compiled cannot be moved; move it before compile_decoding")
        super()._apply(fn, recurse)
        return self

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
        asides: Asides | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """The state after coda and final norm, (B, T, D): everything but the head, so that a loss can apply the head
        to the positions it scores and to no others. `documents` (B, T) numbers the documents packed in a row. What
        training wants to know of the parts is put into `asides`, the state after every loop that ran into `states`."""
        check_ids(ids, plan=plan, positions=positions, before=before, n_back=self.n_back)
        if cache is None and ids.shape[1] > self.config.seq_len:
            raise DataError(f"{ids.shape[1]} tokens do not fit the model's context of {self.config.seq_len}; cut them")
        if cache is not None:
            check_cache(cache, n_rows=len(ids), n_keys=n_keys)
            self._check_cached(cache, plan=plan, positions=positions, n_keys=n_keys)
        if plan.per_row is not None:
            check_rows(plan, n_rows=len(ids), exit=self.exit, has_backout=self.backout is not None)
        asks_beside = asides is not None or states is not None
        parts = self if self._is_unrolled(plan) or asks_beside else self._parts(ids, cache=cache, n_keys=n_keys)
        try:
            return self.run(
                ids,
                parts=parts,
                plan=plan,
                cache=cache,
                positions=positions,
                n_keys=n_keys,
                documents=documents,
                before=before,
                asides=asides,
                states=states,
            )
        except IndexError as error:  # of a CPU; a GPU would have to be waited for
            raise out_of_range(ids, n_ids=self.config.n_embeddings, positions=positions, error=error) from None

    def run(
        self,
        ids: Tensor,
        *,
        parts: "LoopedLM | CompiledParts",
        plan: LoopPlan,
        cache: KVCache | None,
        positions: Tensor | None,
        n_keys: int | None,
        documents: Tensor | None,
        before: Tensor | None,
        asides: Asides | None,
        states: list[Tensor] | None,
    ) -> Tensor:
        """`hidden`, its arguments checked, by this model's own parts or the compiled ones."""
        slots = None if cache is None else cache.slots[: self.config.n_prelude]
        x, inputs = parts.enter(
            ids, slots, positions=positions, n_keys=n_keys, documents=documents, before=before, asides=asides
        )
        slots = None if cache is None else cache.slots[len(cache.slots) - self.config.n_coda :]
        x = self.run_core(x, plan=plan, inputs=inputs, cache=cache, states=states, parts=parts)
        return parts.leave(x, inputs, slots)

    def _is_unrolled(self, plan: LoopPlan) -> bool:
        """Whether all loops are compiled as one, the step."""
        return not self.exit.can_settle and self.n_slots(plan.n_loops) <= MAX_UNROLLED

    def enter(
        self,
        ids: Tensor,
        slots: Sequence[Slot] | None,
        *,
        positions: Tensor | None,
        n_keys: int | None,
        documents: Tensor | None,
        before: Tensor | None,
        asides: Asides | None,
    ) -> tuple[Tensor, LayerInputs]:
        """The state (B, T, D) as it comes to the core, embeddings and prelude, and what all layers share."""
        inputs = self.inputs(ids, positions=positions, n_keys=n_keys, documents=documents, asides=asides)
        inputs.first = self.embed_tokens(ids, before=before, documents=documents)
        return run_layers(self.prelude, inputs.first, inputs=inputs, slots=slots), inputs

    def leave(self, x: Tensor, inputs: LayerInputs, slots: Sequence[Slot] | None) -> Tensor:
        """What comes of the core's state: coda and final norm, (B, T, D)."""
        x = run_layers(self.coda, x, inputs=inputs, slots=slots)
        if self.backout is not None:
            x = x - self.backout * inputs.streams[self.config.n_layers // 2]
        return self.norm(x)

    def _check_cached(self, cache: KVCache, *, plan: LoopPlan, positions: Tensor | None, n_keys: int | None) -> Tensor:
        """The positions; what would read or write the wrong places is refused."""
        if len(cache.slots) != self.n_slots(plan.n_loops):
            raise ConfigError(
                f"the cache has {len(cache.slots)} slots and {plan.n_loops} loops need {self.n_slots(plan.n_loops)}: "
                "a text is continued with the number of loops that it was begun with"
            )
        if positions is None or n_keys is None:
            raise ConfigError("a forward with a cache needs positions and n_keys: where its tokens stand in each row")
        if n_keys > cache.capacity:
            raise DataError(f"{n_keys} tokens do not fit the cache of {cache.capacity}; make it with more capacity")
        if plan.recompute:
            raise ConfigError("a plan with recompute is for training; with a cache nothing is computed again")
        if plan.per_row is not None:
            raise ConfigError("a plan with loops per row is for training; with a cache all rows run the same number")
        return positions

    def inputs(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        n_keys: int | None = None,
        documents: Tensor | None = None,
        asides: Asides | None = None,
    ) -> LayerInputs:
        """What all layers share in a forward over ids (B, T)."""
        attention, n_layers = self.config.block.attention, self.config.n_layers
        return layer_inputs(
            ids,
            rope_dim=attention.rope_dim,
            rope=attention.rope,
            windows={attention.window_at(layer_idx, n_layers) for layer_idx in range(n_layers)},
            positions=positions,
            n_keys=n_keys,
            documents=documents,
            asides=asides,
        )

    def embed_tokens(self, ids: Tensor, *, before: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """Embeddings (B, T, D), smeared if the model does. `before` (B, n_back) holds the ids just before a cached
        continuation, -1 where there is none."""
        x = self.embed_norm(self.embed(ids))
        if self.smear is None:
            return x
        if before is not None:
            before = self.embed_norm(self.embed(before.clamp(min=0))) * (before >= 0)[..., None]
        return self.smear(x, before=before, documents=documents)

    def run_core(
        self,
        entry: Tensor,
        *,
        plan: LoopPlan,
        inputs: LayerInputs,
        cache: KVCache | None = None,
        states: list[Tensor] | None = None,
        parts: "LoopedLM | CompiledParts | None" = None,
    ) -> Tensor:
        """The loop: inject, core layers, exit, n_loops times, or until no later loop can change the result."""
        tracking = torch.is_grad_enabled()
        entry = self.inject.prepare(entry)
        one_loop = self.recomputed_loop if plan.recompute else self.one_loop
        if plan.per_row is not None:
            return self.inject.read_out(run_rows(one_loop, entry, plan=plan, inputs=inputs, states=states))
        halting = self.exit.start(entry)
        state: Tensor | None = None
        for loop_idx in range(plan.n_loops):
            is_last = loop_idx == plan.n_loops - 1
            number = torch.full_like(inputs.loop_idx, loop_idx)
            with torch.set_grad_enabled(tracking and plan.carries_gradient(loop_idx)):
                if cache is not None:
                    state, asides = self.cached_loop(
                        state, entry, loop_idx, inputs, cache, halting, is_last=is_last, parts=parts or self
                    )
                else:
                    state, asides = one_loop(state, entry, number, inputs)
                if inputs.asides is not None and asides is not None:
                    inputs.asides.extend(asides)
                if cache is None:
                    self.exit.update(halting, state, is_last=is_last)
                if states is not None:
                    states.append(state)
            if not is_last and self.exit.is_settled(halting) and self.may_stop(inputs):
                if cache is not None:
                    cache.behind[loop_idx + 1].append(left_behind(inputs, entry, state))
                break
        assert state is not None
        return self.inject.read_out(self.exit.result(halting, state, asides=inputs.asides))

    def may_stop(self, inputs: LayerInputs) -> bool:
        """Whether loops after all positions have settled can be left out: nothing but the settled result is asked of
        them. A backout reads the last loop's stream; in training, routers that learn to be even want every loop."""
        has_balance = any(block.moe is not None and block.moe.config.is_balanced for block in self.blocks())
        return self.backout is None and (inputs.asides is None or not has_balance)

    def one_loop(
        self,
        state: Tensor | None,
        entry: Tensor,
        loop_idx: Tensor,
        inputs: LayerInputs,
        slots: Sequence[Slot] | None = None,
    ) -> tuple[Tensor, Asides | None]:
        """The state after loop number `loop_idx` (0-d: compiled code serves every loop), and what its parts say beside
        it. Depends on nothing else."""
        asides = None if inputs.asides is None else Asides()
        inputs = replace(inputs, loop_idx=loop_idx, asides=asides)
        state = None if state is None else self.loop_norm(state)
        out = run_layers(self.core, self.inject.enter(state, entry, loop_idx=loop_idx), inputs=inputs, slots=slots)
        if self.loop_lora is not None:
            out = self.loop_lora(out, inputs.loop_idx)
        return self.inject.leave(state, entry, out), asides

    def recomputed_loop(
        self, state: Tensor | None, entry: Tensor, loop_idx: Tensor, inputs: LayerInputs
    ) -> tuple[Tensor, Asides | None]:
        """`one_loop`, computed once more in the backward pass in place of keeping its activations."""
        if not torch.is_grad_enabled():
            return self.one_loop(state, entry, loop_idx, inputs)
        again: tuple[Tensor, Asides | None] = checkpoint(
            self.one_loop, state, entry, loop_idx, inputs, use_reentrant=False, preserve_rng_state=False
        )
        return again

    def loop_and_exit(
        self,
        state: Tensor | None,
        entry: Tensor,
        loop_idx: Tensor,
        inputs: LayerInputs,
        slots: Sequence[Slot],
        halting: Halting | None,
        *,
        is_last: bool,
    ) -> tuple[Tensor, Asides | None]:
        """`one_loop`, and its state taken into `halting`."""
        state, asides = self.one_loop(state, entry, loop_idx, inputs, slots)
        self.exit.update(halting, state, is_last=is_last)
        return state, asides

    def cached_loop(
        self,
        state: Tensor | None,
        entry: Tensor,
        loop_idx: int,
        inputs: LayerInputs,
        cache: KVCache,
        halting: Halting | None,
        *,
        is_last: bool,
        parts: "LoopedLM | CompiledParts",
    ) -> tuple[Tensor, Asides | None]:
        """`loop_and_exit` with the loop's slots. Earlier tokens that stopped before this loop run it now, beside the
        new ones, whose attention needs their keys: exactly what they would have computed then."""
        first = self.config.n_prelude + loop_idx * self.config.n_core
        slots = cache.slots[first : first + self.config.n_core]
        behind, number = cache.behind.pop(loop_idx, []), torch.full_like(inputs.loop_idx, loop_idx)
        if not behind or state is None:
            return parts.loop_and_exit(state, entry, number, inputs, slots, halting, is_last=is_last)
        n_new = state.shape[1]
        tokens = join([*behind, left_behind(inputs, entry, state)], scratch=cache.capacity)
        joint = self.inputs(tokens.ids, positions=tokens.positions, n_keys=inputs.n_keys, asides=inputs.asides)
        joint.first = tokens.first
        out, asides = self.one_loop(tokens.state, tokens.entry, number, joint, slots)
        if first + 2 * self.config.n_core + self.config.n_coda <= len(cache.slots):  # there is a loop after this one
            tokens.state = out
            cache.behind[loop_idx + 1].append(tokens.each(lambda tensor: tensor[:, :-n_new]))
        self.exit.update(halting, out[:, -n_new:], is_last=is_last)
        return out[:, -n_new:], asides

    begin, go_on = begin, go_on

    @property
    def n_back(self) -> int:
        """Tokens before a cached continuation that its first token takes in (`before`)."""
        return self.config.smear.n_back if self.config.smear is not None else 0

    def n_slots(self, n_loops: int) -> int:
        """Cache slots of a forward with n_loops loops: one per layer application."""
        return self.config.n_prelude + n_loops * self.config.n_core + self.config.n_coda

    def new_cache(self, *, batch_size: int, capacity: int, n_loops: int | None = None) -> KVCache:
        """An empty cache for `batch_size` rows of at most `capacity` tokens."""
        weight, shapes = self.embed.weight, self.config.block.attention.slot_shapes

        def slot() -> Slot:
            return Slot(*(weight.new_zeros(batch_size, heads, capacity + 1, width) for heads, width in shapes))

        n_loops = self.config.n_loops if n_loops is None else n_loops
        check_cache_fits(self, batch_size=batch_size, capacity=capacity, n_loops=n_loops)
        return KVCache([slot() for _ in range(self.n_slots(n_loops))], capacity=capacity)

    def balance(self, loads: Iterable[tuple[int, Tensor]]) -> None:
        """Move every router's bias one step towards an even load; `loads` are those of the `Asides` since the last."""
        total = total_loads(loads)
        for block in self.blocks():
            if block.moe is not None and block.place.layer_idx in total:
                block.moe.balance(total[block.place.layer_idx])

    def blocks(self) -> Iterator[Block]:
        """Every layer with weights of its own, in order."""
        for part in (self.prelude, self.core, self.coda):
            for block in part:
                assert isinstance(block, Block)
                yield block
