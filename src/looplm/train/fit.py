"""The one training loop. Maths is inline; observers only watch.

Everything that decides the next step is a function of (config, seed, step) or is in the checkpoint: batches are
numbered, plans are drawn from (seed, step), so a resumed run repeats the uninterrupted one bit for bit (with a budget
in steps or tokens; a budget in minutes ties the learning rate to the clock).
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from looplm import dist
from looplm.checkpoint import checkpoints, load_average, load_checkpoint, own_tensors, read_state, save_checkpoint
from looplm.data.loader import Loader
from looplm.data.pack import Batch
from looplm.data.prepared import PreparedSource
from looplm.data.sources import PermutationsSource, Source
from looplm.errors import CheckpointError, ConfigError, DataError, TrainingError
from looplm.eval.interval import Score
from looplm.eval.loops import next_token_score
from looplm.model.compiler import uncompiled
from looplm.model.count import FlopsPerToken
from looplm.model.loop.inject import NoInjectConfig
from looplm.model.loop.plan import CurriculumPlanConfig, LoopPlan, PoissonPlanConfig
from looplm.model.looped import LoopedLM
from looplm.model.moe import total_loads
from looplm.optim.groups import gradient_norm, make_optimizers, set_lr_scale
from looplm.telemetry.meter import matmul_rate, memory_gb
from looplm.telemetry.sinks import Record, Sink, make_sinks
from looplm.telemetry.smooth import ShownLoss
from looplm.train.average import MovingAverage
from looplm.train.interrupt import interruptible
from looplm.train.looks import attempt
from looplm.train.losses import Share, exit_gate_loss, next_token_loss
from looplm.train.options import Position, TrainConfig
from looplm.train.probes import probe_loops, worries
from looplm.train.runtime import Runtime, choose_runtime

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

logger = logging.getLogger(__name__)

LONG_RUN_MINUTES = 3.0  # compiling the blocks costs up to 40 s; below this it does not come back
LONG_RUN_STEPS = 400
PROBE_BATCH = 10**6  # past any ramp: the probe times the batches most of the run will see
GATE_EVERY = 20  # steps between questions whether a gated curriculum goes on
PLAN_STREAM = 1  # keeps plans independent of what sources draw from (seed, batch number)


@dataclass(frozen=True)
class FitResult:
    """How a run ended."""

    position: Position
    interrupted: bool
    checkpoint: Path
    final_loss: float
    """Of the last step."""
    recent_loss: float
    """Mean over the last steps."""
    runtime: Runtime


Observer = Callable[[Record], None]
Validate = Callable[[LoopedLM, int], Record]


def fit(
    model: LoopedLM,
    source: Source,
    config: TrainConfig,
    *,
    folder: Path,
    observers: tuple[Observer, ...] = (),
    validate: Callable[[], Validate] | None = None,
    say: Callable[[str], None] | None = None,
) -> FitResult:
    """Train `model` on `source` until the budget is used or Ctrl-C; resumes if `folder` holds a checkpoint. What
    `validate` makes is asked every `config.validate_every` steps. `say` gets a phrase for each stage of the start."""
    n_threads = torch.get_num_threads()
    try:
        run = _Fit(model, source, config, folder=folder, observers=observers, say=say if dist.is_main() else None)
        if validate is not None and config.validate_every is not None:
            run.validate = validate()
        return run.run()
    finally:
        torch.set_num_threads(n_threads)  # the runtime's choice is this run's, not the process's


def check_ranks(config: TrainConfig) -> None:
    """Refuse a step that the ranks cannot share alike."""
    n_ranks = dist.n_ranks()
    if config.accumulate % n_ranks:
        raise ConfigError(
            f"a step of {config.accumulate} micro-batches cannot be shared by {n_ranks} ranks: give "
            f"train.accumulate={-(-config.accumulate // n_ranks) * n_ranks}"
        )


def saved_state(folder: Path, source: Source, config: TrainConfig) -> tuple[Position, Runtime]:
    """Position and runtime of the newest checkpoint.

    Raises:
        CheckpointError: it cannot be continued, because it is damaged or because data or machine are others.
        ConfigError: the budget is used up.
    """
    state = read_state(folder)
    try:
        position, runtime = Position(**state["position"]), Runtime(**state["runtime"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"the newest checkpoint of {folder} holds no training state ({error})") from None
    if state.get("fingerprint", source.fingerprint) != source.fingerprint:
        raise CheckpointError(
            f"the data of {folder} has changed since it began: put back what it learned from, or begin anew"
        )
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise CheckpointError(f"{folder} was trained on a GPU and torch sees none: resume it where there is one")
    if config.progress(position) >= 1:
        raise ConfigError(
            f"the budget of {folder} is used up: {position.seconds / 60:.1f} minutes, "
            f"{position.step:,} steps, {position.tokens:,} tokens. Give a larger --minutes, --steps or --tokens, "
            "counted from the start."
        )
    return position, runtime


class _Fit:
    """The state of one run while it runs."""

    def __init__(
        self,
        model: LoopedLM,
        source: Source,
        config: TrainConfig,
        *,
        folder: Path,
        observers: tuple[Observer, ...],
        say: Callable[[str], None] | None,
    ) -> None:
        self.say = say or (lambda phrase: None)
        self.model, self.source, self.config, self.folder, self.observers = model, source, config, folder, observers
        self.started = time.perf_counter()
        self.last_batch: Batch | None = None  # with a scored token
        self.loss_parts: list[tuple[int, torch.Tensor]] = []  # of a step's micro-batches, with their loops
        self.shown = ShownLoss()
        self.final_loss = float("nan")
        self.n_stepped_over = 0
        self.is_saved = False  # by this process, or the one before
        self.is_whole = True  # but while the optimizer moves the weights: what a checkpoint may be written of
        self.said: set[str] = set()  # worries
        self.loads: list[tuple[int, torch.Tensor]] = []  # of a step's routers
        self.validate: Validate | None = None
        check_ranks(config)
        is_resumed = dist.from_main(bool(checkpoints(folder)))
        if is_resumed:
            self.position, self.runtime = saved_state(folder, source, config)
            self.say(f"continuing from step {self.position.step:,}")
        else:
            self.position = Position()
            self.say("trying what this machine computes fastest")
            chosen = dist.from_main(self._choose_runtime() if dist.is_main() else None)
            assert chosen is not None
            self.runtime = chosen
        self.say("compiling with the first step" if self.runtime.compile else "the first step")
        self.seconds_before, self.waited_before = self.position.seconds, self.position.seconds_waited
        self.loss: _Loss | DistributedDataParallel = _Loss(self)
        self.sharded: FSDPModule | None = None
        if config.shard and dist.n_ranks() > 1:
            self.sharded = dist.shard(self.loss, layers=self._gathered_apart(), device=self.runtime.device)
        # the model moves before its optimizers are made: they hold its parameters, and their state follows those
        self.runtime.apply(model, rows_vary=isinstance(config.plan, PoissonPlanConfig))
        self.device = torch.device(self.runtime.device)
        if isinstance(source, PermutationsSource):
            source.level = self.position.level
        dtype = torch.bfloat16 if self.runtime.precision == "bf16" else torch.float32
        # a machine that multiplies faster in fp32 does so in the optimizer too
        on_gpu = self.device.type == "cuda"  # on a CPU compiling it gains nothing
        self.optimizers: list[Optimizer] = make_optimizers(
            model, config.optimizer, muon_dtype=dtype, muon_compiled=on_gpu and self.runtime.compile
        )
        if is_resumed:
            self.is_saved = True
            load_checkpoint(folder, model=model, optimizers=self.optimizers)
        self.average = None if config.ema is None else MovingAverage(model, decay=config.ema)
        if self.average is not None and is_resumed:
            load_average(folder, into=self.average.tensors)
        self.flops = FlopsPerToken(model.config)
        self.matmul_rate = dist.summed([matmul_rate(self.device, dtype)], device=self.device)[0]
        if dist.n_ranks() > 1 and self.sharded is None:
            # plans differ between ranks, and with them what is used of the parts that belong to one loop
            self.loss = DistributedDataParallel(
                self.loss, forward_sync_buffers=False, find_unused_parameters=True, gradient_as_bucket_view=True
            )

    def run(self) -> FitResult:
        config, position = self.config, self.position
        first = position.step * config.accumulate + dist.rank()
        n_ahead = config.accumulate // dist.n_ranks()  # all of the next step's: they are taken at once
        loader = Loader(self.source, start=first, n_workers=config.n_workers, step=dist.n_ranks(), n_ahead=n_ahead)
        batches = iter(loader)
        sinks = make_sinks(self.folder, from_step=position.step, wandb=config.wandb) if dist.is_main() else []
        last_saved, last_logged = time.perf_counter(), time.perf_counter()
        tokens_logged, flops_logged = position.tokens, position.flops
        is_stopped = False
        try:
            with interruptible(is_quiet=not dist.is_main()) as interrupted:
                while config.progress(position) < 1 and not (is_stopped := self._any(interrupted())):
                    record = self._step(batches)
                    now = time.perf_counter()
                    clocks = [self.seconds_before + now - self.started, self.waited_before + loader.seconds_waited]
                    # ranks' clocks differ, and they have to do the same
                    told = dist.largest([*clocks, now - last_saved], device=self.device)
                    position.seconds, position.seconds_waited, since_saved = told
                    is_over = config.progress(position) >= 1
                    if self._is_looked_at(is_over) and (is_over or not self.is_saved):
                        self._save()  # before what takes memory and a while
                    record |= self._probe() | self._validate()
                    # by the step, so that all ranks do the same
                    if is_over or self._is_time(config.log_every, config.probe_every, config.validate_every):
                        record["tokens_per_second"] = (position.tokens - tokens_logged) / (now - last_logged)
                        record["seconds"] = round(position.seconds, 3)
                        record["waiting_share"] = position.seconds_waited / position.seconds
                        record["progress"] = min(config.progress(position), 1.0)
                        record["tflops"] = (position.flops - flops_logged) / (now - last_logged) / 1e12
                        record["mfu"] = record["tflops"] * 1e12 / self.matmul_rate
                        record["memory_gb"] = memory_gb(self.device)
                        last_logged, tokens_logged, flops_logged = now, position.tokens, position.flops
                        self._report(record, sinks)
                    if self._checkpoint_due(since_saved):
                        self._save()
                        last_saved = now
                checkpoint = self._save()
        except Exception as error:
            # one rank alone cannot save what it shares with others; a TrainingError has saved what is worth it
            if dist.n_ranks() == 1 and self.is_whole and not isinstance(error, TrainingError) and position.step:
                self._save()
            raise
        finally:
            for sink in sinks:
                sink.close()
        if not is_stopped and self.n_stepped_over and math.isnan(self.final_loss):
            raise DataError(f"no token of {self.n_stepped_over} steps was scored, so nothing was learned: longer rows?")
        loss, recent = self.final_loss, self.shown.overall.value
        return FitResult(position, is_stopped, checkpoint, loss, recent, self.runtime)

    def _is_looked_at(self, is_over: bool) -> bool:
        """Whether this step is probed or validated."""
        config = self.config
        return self._is_time(config.probe_every, config.validate_every) or (
            is_over and config.validate_every is not None
        )

    def _is_time(self, *every: int | None) -> bool:
        """Whether a number of steps is over for what is done every so many of them, null for never."""
        return any(n is not None and self.position.step % n == 0 for n in every)

    def _any(self, is_so: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(dist.largest([is_so], device=self.device)[0])

    def _step(self, batches: Iterator[Any]) -> Record:
        """One optimizer update, or none where no token of all its micro-batches is scored."""
        config, position = self.config, self.position
        scale = config.schedule.scale(config.progress(position))
        parts = list(islice(batches, config.accumulate // dist.n_ranks()))
        counts = [
            (batch.n_scored, batch.n_tokens) for batch in parts
        ]  # on the CPU yet, so that no device is waited for
        n_scored, n_tokens = dist.summed([float(sum(each)) for each in zip(*counts, strict=True)], device=self.device)
        if not n_scored:
            return self._step_over(int(n_tokens))
        shares = [Share(scored / n_scored, tokens / n_tokens) for scored, tokens in counts]
        loss, n_loops, flops = self._backward(parts, shares)
        if dist.n_ranks() > 1:
            loss = dist.sum_tensor(loss)
            n_loops, flops = dist.summed([n_loops, flops], device=self.device)
            # ranks have run other numbers of loops, but the same layers
            self.loads = [(layer, dist.sum_tensor(load)) for layer, load in sorted(total_loads(self.loads).items())]
        norm = gradient_norm(self.model)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise TrainingError(self._non_finite(float(loss), float(norm)))
        if config.grad_clip is not None and norm > config.grad_clip:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(config.grad_clip / norm)
        scale *= config.optimizer.batch_scale(n_tokens)
        set_lr_scale(self.optimizers, scale)
        self.is_whole = False
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.model.balance(self.loads)
        position.step += 1
        position.tokens += int(n_tokens)
        position.flops += flops
        if self.average is not None:
            self.average.update(position.step)
        self.is_whole = True
        self._go_on_if_learned()
        self.final_loss = float(loss)
        self.shown.add(self.final_loss, [(each, float(part)) for each, part in self.loss_parts])
        record: Record = {
            "step": position.step,
            "tokens": position.tokens,
            "loss": self.final_loss,
            "grad_norm": float(norm),
            "lr_scale": scale,
            "n_loops": n_loops / config.accumulate,
        }
        if position.level:
            record["level"] = position.level
        if isinstance(self.source, PreparedSource) and len(self.source.phases) > 1:
            record["phase"] = 1 + self.source.phase(position.step * config.accumulate - 1)[0]
        if self.loads:
            record["max_load"] = float(torch.stack([load.max() / load.float().mean() for _, load in self.loads]).max())
        return record

    def _backward(self, batches: list[Batch], shares: list[Share]) -> tuple[torch.Tensor, float, float]:
        """Gradients of this rank's micro-batches; their part of the step's loss, their loops added up, their FLOPs."""
        config, n_ranks = self.config, dist.n_ranks()
        loss = torch.zeros((), device=self.device)
        n_loops, flops, deepest = 0.0, 0.0, 0
        self.loads, self.loss_parts = [], []
        numbers = range(dist.rank(), config.accumulate, n_ranks)
        for number, batch, share in zip(numbers, batches, shares, strict=True):
            batch = batch.to(self.device)
            if share.scored:
                self.last_batch = batch
            # a stream for each micro-batch, so that it is the same whichever rank has it
            rng = np.random.default_rng([config.seed, self.position.step, PLAN_STREAM, *([number] if number else [])])
            n_rows, n_tokens = batch.ids.shape
            plan = self._plan_config.sample(rng, n_tokens=n_tokens, n_rows=n_rows)
            plan = replace(plan, recompute=config.recompute)
            seed = int(rng.integers(1 << 62)) if config.state_loss is not None else 0
            deepest = max(deepest, plan.n_loops)
            with self._synchronised(is_last=number == numbers[-1], deepest=deepest):
                with self.runtime.autocast():
                    part = self.loss(batch, plan, share, seed=seed)
                (part * n_ranks if n_ranks > 1 else part).backward()  # the ranks' gradients are averaged, not summed
            loss += part.detach()
            if share.scored and plan.per_row is None:
                self.loss_parts.append((plan.n_loops, part.detach() / share.scored))
            n_loops += plan.mean_loops
            flops += batch.n_tokens * self.flops(plan.mean_loops, n_tokens=n_tokens)
        return loss, n_loops, flops

    def _step_over(self, n_tokens: int) -> Record:
        """Leave the weights, and what optimizers remember, as they are: there is nothing to learn in this step."""
        self.position.step += 1
        self.position.tokens += n_tokens
        if self.n_stepped_over == 0 and dist.is_main():
            logger.warning("step %d: no token is scored, so nothing is learned: longer rows?", self.position.step)
        self.n_stepped_over += 1
        return {"step": self.position.step, "tokens": self.position.tokens}

    @property
    def _plan_config(self) -> Any:
        plan = self.config.plan
        return plan.at(self.position.level) if isinstance(plan, CurriculumPlanConfig) else plan

    def _synchronised(self, *, is_last: bool, deepest: int) -> AbstractContextManager[None]:
        """Gradients are averaged over the ranks in the backward pass of a step's last micro-batch alone."""
        if self.sharded is not None:
            self.sharded.set_requires_gradient_sync(is_last)
            if is_last:  # what some ranks have used and others not, which is what belongs to later loops
                self.sharded.set_reduce_scatter_unused_params(self._any(deepest > 1) and not self._is_gate_alone)
        if isinstance(self.loss, DistributedDataParallel) and not is_last:
            return self.loss.no_sync()
        return nullcontext()

    def _gathered_apart(self) -> list[nn.Module]:
        """The layers that FSDP gathers when they run: those that every rank runs as often, whatever its plan."""
        config, model = self.config, self.model
        is_cut_off = getattr(config.plan, "n_grad", None) is not None and isinstance(
            model.config.inject, NoInjectConfig
        )
        reads_each_loop = any(each is not None for each in (config.loop_loss, config.state_loss, config.exit_gate))
        return [*(() if is_cut_off else model.prelude), *(() if reads_each_loop else model.coda)]

    @property
    def _is_gate_alone(self) -> bool:
        """Whether the exit gate is trained by itself."""
        gate = self.config.exit_gate
        return gate is not None and self.config.progress(self.position) >= 1 - gate.alone

    def loss_of(self, batch: Batch, plan: LoopPlan, share: Share, *, seed: int = 0) -> torch.Tensor:
        config = self.config
        if config.exit_gate is not None:
            return exit_gate_loss(
                self.model, batch, plan, config.exit_gate, alone=self._is_gate_alone, share=share, loads=self.loads
            )
        return next_token_loss(
            self.model,
            batch,
            plan,
            label_smoothing=config.label_smoothing,
            loop_loss=config.loop_loss,
            state_loss=config.state_loss,
            seed=seed,
            share=share,
            loads=self.loads,
        )

    @uncompiled()  # compiled layers would be compiled once more, for inference
    def _go_on_if_learned(self) -> None:
        """A curriculum that is gated on accuracy: ask now and then whether it goes on."""
        config, source, position = self.config, self.source, self.position
        if position.step % GATE_EVERY:
            return
        if isinstance(config.plan, CurriculumPlanConfig):
            asked, gate, n_levels = self.last_batch, config.plan.accuracy, config.plan.n_levels
            n_loops = config.plan.at(position.level).high
        elif isinstance(source, PermutationsSource) and source.config.gate is not None:
            asked, gate, n_levels = source.trial(position.step).to(self.device), source.config.gate, source.n_levels
            n_rows, n_tokens = asked.ids.shape
            rng = np.random.default_rng([config.seed, position.step, PLAN_STREAM])
            n_loops = config.plan.sample(rng, n_tokens=n_tokens, n_rows=n_rows).n_loops
        else:
            return
        look = partial(self._score, asked, n_loops)
        score: Score | None = attempt("the gate's question", look, otherwise=None, step=position.step)
        counts = [0.0, 0.0] if score is None else [float(score.n_right), float(score.n)]
        n_right, n = dist.summed(counts, device=self.device)
        is_learned = n > 0 and n_right / n >= gate
        position.level = min(n_levels, position.level + is_learned)
        if isinstance(source, PermutationsSource):
            source.level = position.level

    def _score(self, batch: Batch | None, n_loops: int) -> Score | None:
        if batch is None or not batch.n_scored:
            return None
        with self.runtime.autocast():
            return next_token_score(self.model, [batch], n_loops=n_loops)

    def _probe(self) -> Record:
        """What the loops do, where it is time to ask; what is worrying about it is said once."""
        n_loops = self.model.config.n_loops
        if not self._is_time(self.config.probe_every):
            return {}
        model, batch = self._whole_model(own_tensors(self.model)), self.last_batch
        if model is None or batch is None:
            return {}

        def look() -> dict[str, float]:
            with self.runtime.autocast():
                return probe_loops(model, batch, n_loops=n_loops)

        nothing: dict[str, float] = {}
        found = attempt("the probe of the loops", look, otherwise=nothing, step=self.position.step)
        for kind, sentence in worries(found, n_loops=n_loops) if found else ():
            if kind not in self.said:
                logger.warning("step %d: %s", self.position.step, sentence)
            self.said.add(kind)
        return dict(found)

    @uncompiled()  # as above
    def _validate(self) -> Record:
        """What held-out data says, where it is time to ask."""
        every = self.config.validate_every
        is_over = self.config.progress(self.position) >= 1
        if self.validate is None or every is None or not (is_over or self._is_time(every)):
            return {}
        # by the weights that a checkpoint is read as
        model = self._whole_model(own_tensors(self.model) if self.average is None else self.average.tensors)
        if model is None:
            return {}
        validate = self.validate

        def look() -> Record:
            with self.runtime.autocast():
                return validate(model, self.position.step)

        return attempt("validation", look, otherwise={}, step=self.position.step)

    def _whole_model(self, tensors: Mapping[str, torch.Tensor]) -> LoopedLM | None:
        """A model of these weights for rank 0 to look at, the model itself where it is whole and they are its own; None
        on the other ranks."""
        if self.sharded is None and (self.average is None or tensors is not self.average.tensors):
            return self.model if dist.is_main() else None
        model = LoopedLM.on(self.device, self.model.config, draw=False) if dist.is_main() else None
        own = {} if model is None else own_tensors(model)
        for name, tensor in tensors.items():  # one at a time: no rank has room for all of them twice
            whole = dist.gathered(dist.local(tensor), like=tensor)
            if model is not None:
                own[name].copy_(whole)
        return model

    def _report(self, record: Record, sinks: list[Sink]) -> None:
        """Write a record everywhere. If it cannot be written, what was learned so far still is."""
        failed: TrainingError | None = None
        try:
            for sink in sinks:
                sink.write(record)
        except TrainingError as error:
            failed = error
        said = dist.from_main(None if failed is None else str(failed))
        if said is not None:
            self._save()
            raise failed or TrainingError(said)
        record = record | self.shown.numbers()  # for who watches: the file keeps the single steps
        for observer in self.observers if dist.is_main() else ():
            look = partial(_show, observer, record)
            if not attempt("what watches the run", look, otherwise=False, step=self.position.step):
                self.observers = tuple(other for other in self.observers if other is not observer)  # it will fail again

    def _choose_runtime(self) -> Runtime:
        config = self.config
        if isinstance(self.source, PermutationsSource):
            self.source.level = self.source.n_levels
        batch = self.source.batch(PROBE_BATCH)
        n_rows, n_tokens = batch.ids.shape
        plan = config.plan.sample(np.random.default_rng(config.seed), n_tokens=n_tokens, n_rows=n_rows)
        plan = replace(plan, recompute=config.recompute)

        def trial(runtime: Runtime) -> None:
            with runtime.autocast():
                self.loss_of(batch, plan, Share()).backward()
            self.model.zero_grad(set_to_none=True)

        steps = min(config.steps or 10**12, (config.tokens or 10**18) // (batch.n_tokens * config.accumulate))
        long_run = (config.minutes or 1e9) >= LONG_RUN_MINUTES and steps >= LONG_RUN_STEPS
        return choose_runtime(config.runtime, trial=trial, long_run=long_run)

    def _checkpoint_due(self, seconds_since: float) -> bool:
        if self.config.checkpoint_steps is not None:
            return self.position.step % self.config.checkpoint_steps == 0
        return seconds_since >= 60 * self.config.checkpoint_minutes

    def _save(self) -> Path:
        self.is_saved = True
        return save_checkpoint(
            self.folder,
            step=self.position.step,
            model=self.model,
            optimizers=self.optimizers,
            state={
                "position": asdict(self.position),
                "runtime": asdict(self.runtime),
                "fingerprint": self.source.fingerprint,
            },
            keep=self.config.keep,
            average=None if self.average is None else self.average.tensors,
            is_sharded=self.sharded is not None,
        )

    def _non_finite(self, loss: float, norm: float) -> str:
        left = checkpoints(self.folder)
        back = f"the last checkpoint, {left[-1]}, holds finite weights" if left else "no checkpoint was written yet"
        return (
            f"step {self.position.step + 1}: loss is {loss}, gradient norm {norm}; stopped before the optimizer moved, "
            f"{back}. Lower train.optimizer.muon_lr and adamw_lr, or train.grad_clip."
        )


def _show(observer: Observer, record: Record) -> bool:
    observer(record)
    return True


class _Loss(nn.Module):
    """The loss as a module's forward: what averages gradients over ranks wraps a module."""

    def __init__(self, run: _Fit) -> None:
        super().__init__()
        self.model = run.model
        self._of: Callable[..., torch.Tensor] = run.loss_of

    def forward(self, batch: Batch, plan: LoopPlan, share: Share, **options: Any) -> torch.Tensor:
        return self._of(batch, plan, share, **options)
