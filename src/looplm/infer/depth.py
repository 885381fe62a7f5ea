"""Continuous depth batching of whole sequences: every token runs loops until its exit rule fires, tokens that are done
leave the computation, sequences that are done leave the batch, and waiting ones take their places.

A token stops only once all tokens before it have: until then what it sees can still change. A token that waits for
news from far back looks as settled as one that has its answer (docs/log.md, 2026-11-25).

All loops of a layer share one cache slot. A token that runs writes its keys and values there; one that has stopped is
seen by the others as its last loop left it. With a rule that never fires every loop rewrites every key, which is full
depth; else the error is what the keys of a stopped token would have changed in the loops left out: nothing for a state
that has settled. Shapes: R rows of the batch, L tokens of the longest sequence, W tokens that run, D width.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from looplm.errors import ConfigError, DataError
from looplm.infer.engine import SHRINK_BELOW
from looplm.infer.exits import ExitRule
from looplm.infer.sampling import check_finite
from looplm.model.cache import KVCache, Slot
from looplm.model.compiler import TURNS
from looplm.model.layer_inputs import LayerInputs
from looplm.model.loop.exit import check_last_state
from looplm.model.loop.inject import LTIInjectConfig
from looplm.model.looped import LoopedLM
from looplm.model.partial import relative_change


@dataclass(frozen=True)
class Scored:
    """One sequence, run until all its tokens had stopped."""

    logits: Tensor
    """(T, V), after each token's last loop."""
    depths: Tensor
    """Loops that each token ran (T,)."""


@dataclass
class _Rows:
    """The sequences in the batch, one a row; tokens beyond a sequence's end never run."""

    sequence: Tensor  # (R,) which one of the queue
    ids: Tensor  # (R, L)
    budget: Tensor  # (R,) most loops
    runs: Tensor  # (R, L) whether the token has not stopped
    depth: Tensor  # (R, L) loops run
    first: Tensor  # (R, L, D) the stream as it entered the first layer
    entry: Tensor  # (R, L, D) what every loop takes
    state: Tensor  # (R, L, D)
    kept: Tensor  # (R, L, n) what the rule remembers

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def select(self, index: Tensor) -> "_Rows":
        return _Rows(*(tensor.index_select(0, index) for tensor in self.tensors()))

    def join(self, other: "_Rows") -> "_Rows":
        return _Rows(*map(torch.cat, zip(self.tensors(), other.tensors(), strict=True)))


@torch.inference_mode()
def score_sequences(
    model: LoopedLM,
    sequences: Sequence[Tensor],
    *,
    n_loops: int | Sequence[int],
    rule: ExitRule,
    batch_size: int = 64,
    on_progress: Callable[[int], None] | None = None,
) -> list[Scored]:
    """Logits of all tokens of `sequences` of ids (T,), of any lengths, `batch_size` of them at a time. A token stops
    when `rule` fires and all tokens before it have stopped, or when its sequence's `n_loops` are run. `on_progress`
    hears how many more sequences are done.

    Raises:
        ConfigError: the model has an exit of its own, or a backout, which reads the last loop's stream.
        DataError: a sequence is empty or longer than the model's context.
        CheckpointError: logits are not finite.
    """
    budgets = [n_loops] * len(sequences) if isinstance(n_loops, int) else list(n_loops)
    _check(model, sequences, budgets, batch_size=batch_size)
    rule.check(model)
    batch = _DepthBatch(model, rule, longest=max((len(ids) for ids in sequences), default=0))
    waiting = deque(range(len(sequences)))
    done: dict[int, Scored] = {}
    while waiting or batch.n_rows:
        free = batch.free(batch_size, n_waiting=len(waiting))
        if waiting and free:
            numbers = [waiting.popleft() for _ in range(min(free, len(waiting)))]
            batch.admit(numbers, [sequences[number] for number in numbers], [budgets[number] for number in numbers])
        else:
            batch.step()
        finished = batch.take_finished(shrink=not waiting)
        done.update(finished)
        if finished and on_progress is not None:
            on_progress(len(finished))
    return [done[number] for number in range(len(sequences))]


class _DepthBatch:
    """The rows that are in the batch, with their cache."""

    @TURNS.forward()
    def __init__(self, model: LoopedLM, rule: ExitRule, *, longest: int) -> None:
        self.model = model
        self.rule = rule
        self.longest = longest
        self.loops_differ = _loops_differ(model)
        self.n_run = 0  # loops that all rows have run, where loops differ
        self.rows: _Rows | None = None
        self.cache = self._new_cache(0)

    @property
    def n_rows(self) -> int:
        """Sequences that are not done."""
        return 0 if self.rows is None else int((self.rows.sequence >= 0).sum())

    def free(self, batch_size: int, *, n_waiting: int) -> int:
        """Rows to fill now: few at a time would run the prelude and the first loop of few. Loops that differ are run by
        all rows together, so that the batch has to be empty."""
        if self.loops_differ:
            return 0 if self.n_rows else batch_size
        room = batch_size - self.n_rows
        return room if room >= min(n_waiting, max(1, batch_size // 4)) else 0

    @TURNS.forward()
    def admit(self, numbers: list[int], sequences: list[Tensor], budgets: list[int]) -> None:
        """Sequences of the queue join, their first loop run."""
        model, device = self.model, self.model.embed.weight.device
        lengths = torch.tensor([len(ids) for ids in sequences], device=device)
        ids = torch.zeros(len(sequences), self.longest, dtype=torch.long, device=device)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = sequence
        entry, inputs = model.enter(ids, None, positions=None, n_keys=None, documents=None, before=None, asides=None)
        first = inputs.first
        entry = model.inject.prepare(entry)
        assert first is not None
        at = torch.arange(self.longest, device=device)
        cache, self.n_run = self._new_cache(len(sequences)), 0
        inputs = self._inputs(ids, first, at.expand_as(ids))
        state, _ = model.one_loop(None, entry, inputs.loop_idx, inputs, self._slots(cache)[0])
        nothing = torch.full((*ids.shape, self.rule.n_kept(model.config.d_head_out)), torch.nan, device=device)
        stops, kept = self._judge(None, state, nothing, inputs, cache)
        budget = torch.tensor(budgets, device=device)
        runs = (at < lengths[:, None]) & (budget > 1)[:, None] & ~_in_order(stops)
        depth = (at < lengths[:, None]).long()
        joining = _Rows(torch.tensor(numbers, device=device), ids, budget, runs, depth, first, entry, state, kept)
        if self.rows is not None:
            self._leave_out(self.rows.sequence < 0)
            joining = self.rows.join(joining)
            for slot, new in zip(self.cache.slots, cache.slots, strict=True):
                new.keys, new.values = torch.cat((slot.keys, new.keys)), torch.cat((slot.values, new.values))
        self.rows, self.cache, self.n_run = joining, cache, 1

    @TURNS.forward()
    def step(self) -> None:
        """One loop for every token that runs. Rows with fewer of them are padded at a place that nobody reads."""
        rows = self.rows
        assert rows is not None
        width = int(rows.runs.sum(1).max())
        order = rows.runs.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]  # (R, W)
        runs = rows.runs.gather(1, order)

        def pick(each: Tensor) -> Tensor:
            return each.gather(1, order[..., None].expand(-1, -1, each.shape[-1]))

        before = pick(rows.state)
        inputs = self._inputs(rows.ids.gather(1, order), pick(rows.first), torch.where(runs, order, self.longest))
        after, _ = self.model.one_loop(before, pick(rows.entry), inputs.loop_idx, inputs, self._slots(self.cache)[0])
        stops, kept = self._judge(before, after, pick(rows.kept), inputs, self.cache)
        for mine, new in ((rows.state, torch.where(runs[..., None], after, before)), (rows.kept, kept)):
            mine.scatter_(1, order[..., None].expand_as(new), new)
        self.n_run += 1
        rows.depth += rows.runs
        rows.runs.scatter_(1, order, runs & ~_in_order(stops | ~runs))
        rows.runs &= rows.depth < rows.budget[:, None]

    @TURNS.forward()
    def take_finished(self, *, shrink: bool) -> dict[int, Scored]:
        """The sequences whose tokens have all stopped, by their number; with `shrink` their rows are left out."""
        rows = self.rows
        assert rows is not None
        index = ((rows.sequence >= 0) & ~rows.runs.any(1)).nonzero().flatten()
        if not len(index):
            return {}
        done, model = rows.select(index), self.model
        inputs = model.inputs(done.ids)
        inputs.first = done.first
        logits = model.logits(model.leave(model.inject.read_out(done.state), inputs, None))
        finished = {}
        for row, (number, depths) in enumerate(zip(done.sequence.tolist(), done.depth, strict=True)):
            length = int((depths > 0).sum())
            check_finite(logits[row, :length].amax(-1).tolist(), source=model.source)
            finished[number] = Scored(logits[row, :length], depths[:length])
        rows.sequence[index] = -1
        if shrink and self.n_rows < SHRINK_BELOW * len(rows.sequence):
            self._leave_out(rows.sequence < 0)
        return finished

    def _leave_out(self, is_done: Tensor) -> None:
        assert self.rows is not None
        kept = (~is_done).nonzero().flatten()
        self.rows = self.rows.select(kept)
        self.cache.take_rows(kept)

    def _inputs(self, ids: Tensor, first: Tensor, positions: Tensor) -> LayerInputs:
        """What the layers share over tokens at `positions`, in the loop that is next."""
        inputs = self.model.inputs(ids, positions=positions, n_keys=self.longest)
        inputs.first, inputs.loop_idx = first, torch.full_like(inputs.loop_idx, self.n_run)
        return inputs

    def _judge(
        self, before: Tensor | None, after: Tensor, kept: Tensor, inputs: LayerInputs, cache: KVCache
    ) -> tuple[Tensor, Tensor]:
        """`ExitRule.fires` for tokens (R, W)."""
        model, logits = self.model, None
        if self.rule.reads_logits:
            _, slots = self._slots(cache)
            logits = model.logits(model.leave(model.inject.read_out(after), inputs, slots)).flatten(0, 1)
        change = relative_change(before, after).flatten()
        done = model.exit.done(after)
        fires, new = self.rule.fires(change, logits, kept.flatten(0, 1), None if done is None else done.flatten())
        return fires.unflatten(0, kept.shape[:2]), new.unflatten(0, kept.shape[:2])

    def _new_cache(self, batch_size: int) -> KVCache:
        """Slots of one loop, which all loops share."""
        return self.model.new_cache(batch_size=batch_size, capacity=self.longest, n_loops=1)

    def _slots(self, cache: KVCache) -> tuple[list[Slot], list[Slot]]:
        """Those of the core layers and of the coda; the prelude is not run with a cache."""
        start = self.model.config.n_prelude
        end = start + self.model.config.n_core
        return cache.slots[start:end], cache.slots[end:]


def mean_depth(scored: Sequence[Scored]) -> float:
    """Loops per token over all sequences."""
    return torch.cat([each.depths for each in scored]).double().mean().item()


def _in_order(stops: Tensor) -> Tensor:
    """Those of tokens (R, W) that stop where a token stops only once all before it have stopped or do so now."""
    return stops.to(torch.int8).cumprod(dim=1).bool()


def _loops_differ(model: LoopedLM) -> bool:
    """Whether any part asks which loop it is in: rows at different loops cannot then share a step."""
    config = model.config
    has_loop_embed = isinstance(config.inject, LTIInjectConfig) and config.inject.loop_embed != "none"
    has_loop_router = any(block.moe is not None and block.moe.loop_embed is not None for block in model.blocks())
    return config.adapter is not None or config.loop_lora is not None or has_loop_embed or has_loop_router


def _check(model: LoopedLM, sequences: Sequence[Tensor], budgets: list[int], *, batch_size: int) -> None:
    """Refuse what cannot be run."""
    check_last_state("an exit rule needs", exit=model.exit, has_backout=model.backout is not None)
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; give 1 or more")
    if len(budgets) != len(sequences):
        raise ConfigError(f"n_loops names {len(budgets)} numbers for {len(sequences)} sequences; give one for each")
    if budgets and min(budgets) < 1:
        raise ConfigError(f"n_loops is {min(budgets)}; a looped model runs its core at least once: give 1 or more")
    for number, ids in enumerate(sequences):
        if not 0 < len(ids) <= model.config.seq_len:
            raise DataError(
                f"sequence {number} has {len(ids)} tokens; give 1 to {model.config.seq_len}, the model's context"
            )
