"""The one training loop. Maths is inline; observers only watch.

Everything that decides the next step is a function of (config, seed, step) or is in the checkpoint: batches are
numbered, plans are drawn from (seed, step), so a resumed run repeats the uninterrupted one bit for bit (with a budget
in steps or tokens; a budget in minutes ties the learning rate to the clock).
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from looplm import dist
from looplm.checkpoint import checkpoints, load_average, load_checkpoint, own_tensors, read_state, save_checkpoint
from looplm.config import Config, NonNegativeInt, Number, PositiveFloat, PositiveInt, Seed
from looplm.data.loader import Loader
from looplm.data.pack import Batch
from looplm.data.prepared import PreparedSource
from looplm.data.sources import PermutationsSource, Source
from looplm.errors import CheckpointError, ConfigError, TrainingError
from looplm.eval.loops import next_token_score
from looplm.model.compiler import uncompiled
from looplm.model.count import FlopsPerToken
from looplm.model.loop.inject import NoInjectConfig
from looplm.model.loop.plan import CurriculumPlanConfig, LoopPlan, PlanConfig, PoissonPlanConfig
from looplm.model.looped import LoopedLM
from looplm.model.moe import total_loads
from looplm.optim.groups import OptimizerConfig, gradient_norm, make_optimizers, set_lr_scale
from looplm.optim.schedule import ScheduleConfig
from looplm.telemetry.meter import matmul_rate, memory_gb
from looplm.telemetry.sinks import Record, Sink, make_sinks
from looplm.train.average import MovingAverage
from looplm.train.interrupt import interruptible
from looplm.train.losses import ExitGateConfig, LoopLossConfig, StateLossConfig, exit_gate_loss, next_token_loss
from looplm.train.probes import probe_loops, worries
from looplm.train.runtime import Runtime, RuntimeConfig, choose_runtime

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

logger = logging.getLogger(__name__)

LONG_RUN_MINUTES = 3.0  # compiling the blocks costs up to 40 s; below this it does not come back
LONG_RUN_STEPS = 400
PROBE_BATCH = 10**6  # past any ramp: the probe times the batches most of the run will see
GATE_EVERY = 20  # steps between questions whether a gated curriculum goes on
MOST_WORKERS = 256  # processes that make batches
PLAN_STREAM = 1  # keeps plans independent of what sources draw from (seed, batch number)


class TrainConfig(Config):
    """How to train. At least one budget is set; the first one reached ends the run."""

    seed: Seed = 0
    """Seeds weights, data and plans."""
    minutes: PositiveFloat | None = None
    """Budget of wall time, compilation included."""
    steps: PositiveInt | None = None
    """Budget of optimizer updates."""
    tokens: PositiveInt | None = None
    """Budget of tokens processed."""
    flops: PositiveFloat | None = None
    """Budget of FLOPs as `looplm count` counts them, every loop with its gradient."""
    plan: PlanConfig
    """Loops per step."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizers and peak rates."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Rate over the budget."""
    label_smoothing: Number = Field(default=0.0, ge=0, lt=1)
    """Share of each target spread over all tokens."""
    loop_loss: LoopLossConfig | None = None
    """Learn from the states after the earlier loops too; null for the last one alone."""
    state_loss: StateLossConfig | None = None
    """Keep the state small, or later loops from moving it; null for neither."""
    exit_gate: ExitGateConfig | None = None
    """Train a learned exit gate (model.exit.kind=gate); null where there is none."""
    accumulate: PositiveInt = 1
    """Micro-batches per step, those of all ranks together: the same run whatever their number."""
    ema: Number | None = Field(default=None, gt=0, lt=1)
    """Decay per step of an average of the weights, which is then what a checkpoint is read as; null for none."""
    grad_clip: PositiveFloat | None = 1.0
    """Largest global gradient norm; null for no clipping."""
    n_workers: NonNegativeInt = Field(default=1, le=MOST_WORKERS)
    """Processes that make batches; 0 makes them between steps."""
    log_every: PositiveInt = 10
    """Steps between records."""
    probe_every: PositiveInt | None = None
    """Steps between probes of the loops (loss and state by loop, decays, adapters, routers); null for none. One costs
    some twenty forward passes of a model of two loops."""
    validate_every: PositiveInt | None = None
    """Steps between looks at held-out data (bits per byte of text, else the loss), and one at the end; null for none.
    Takes a forward pass of up to 32 batches."""
    checkpoint_minutes: PositiveFloat = 5.0
    """Wall time between checkpoints; one more is written at the end."""
    checkpoint_steps: PositiveInt | None = None
    """Steps between checkpoints, in place of the time."""
    keep: PositiveInt = 2
    """Newest checkpoints kept."""
    recompute: bool = False
    """Activation checkpointing: keep the state between loops only and compute each loop again in the backward pass."""
    wandb: str | None = None
    """Project of Weights & Biases that records go to as well; null for none. WANDB_MODE=offline keeps them here."""
    shard: bool = False
    """Share weights, gradients and optimizer state out to the ranks (FSDP2), for models that one GPU does not hold; the
    core is gathered once a micro-batch, whatever the number of loops. Else every rank has all of them (DDP)."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Device, precision, compilation, threads."""

    @model_validator(mode="after")
    def _has_budget(self) -> "TrainConfig":
        if all(budget is None for budget in (self.minutes, self.steps, self.tokens, self.flops)):
            raise ValueError("no budget: set minutes, steps, tokens or flops")
        for name, is_set in (("loop_loss", self.loop_loss), ("state_loss", self.state_loss)):
            if is_set is not None and isinstance(self.plan, PoissonPlanConfig):
                raise ValueError(
                    f"{name} looks at all sequences after the same loop; plan kind poisson ends them apart"
                )
        if self.exit_gate is not None:
            if self.loop_loss is not None or self.state_loss is not None or self.label_smoothing:
                raise ValueError("exit_gate has a loss of its own: leave out loop_loss, state_loss and label_smoothing")
            if isinstance(self.plan, PoissonPlanConfig) or getattr(self.plan, "n_grad", None) is not None:
                raise ValueError(f"exit_gate looks at all loops of all sequences; plan kind {self.plan.kind} does not")
        return self

    def progress(self, position: "Position") -> float:
        """Share of the budget used, 0 to 1 and beyond."""
        used = [
            position.seconds / 60 / self.minutes if self.minutes else 0.0,
            position.step / self.steps if self.steps else 0.0,
            position.tokens / self.tokens if self.tokens else 0.0,
            position.flops / self.flops if self.flops else 0.0,
        ]
        return max(used)


@dataclass
class Position:
    """How far a run has come; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    seconds_waited: float = 0.0
    level: int = 0
    """How often a curriculum that is gated on accuracy has gone on."""


@dataclass(frozen=True)
class FitResult:
    """How a run ended."""

    position: Position
    interrupted: bool
    checkpoint: Path
    final_loss: float
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
) -> FitResult:
    """Train `model` on `source` until the budget is used or Ctrl-C; resumes if `folder` holds a checkpoint. What
    `validate` makes is asked every `config.validate_every` steps."""
    n_threads = torch.get_num_threads()
    try:
        run = _Fit(model, source, config, folder=folder, observers=observers)
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
    ) -> None:
        self.model, self.source, self.config, self.folder, self.observers = model, source, config, folder, observers
        self.started = time.perf_counter()
        self.last_batch: Batch
        self.said: set[str] = set()  # worries
        self.failed: TrainingError | None = None  # on this rank, until all hear of it
        self.loads: list[tuple[int, torch.Tensor]] = []  # of a step's routers
        self.validate: Validate | None = None
        check_ranks(config)
        is_resumed = dist.from_main(bool(checkpoints(folder)))
        if is_resumed:
            self.position, self.runtime = self._saved_state()
        else:
            self.position = Position()
            chosen = dist.from_main(self._choose_runtime() if dist.is_main() else None)
            assert chosen is not None
            self.runtime = chosen
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
        loader = Loader(self.source, start=first, n_workers=config.n_workers, step=dist.n_ranks())
        batches = iter(loader)
        sinks = make_sinks(self.folder, from_step=position.step, wandb=config.wandb) if dist.is_main() else []
        last_saved, last_logged = time.perf_counter(), time.perf_counter()
        tokens_logged, flops_logged = position.tokens, position.flops
        record: Record = {"loss": float("nan")}
        is_stopped = False
        try:
            with interruptible() as interrupted:
                while config.progress(position) < 1 and not (is_stopped := self._any(interrupted())):
                    record = self._step(batches)
                    now = time.perf_counter()
                    clocks = [self.seconds_before + now - self.started, self.waited_before + loader.seconds_waited]
                    # ranks' clocks differ, and they have to do the same
                    told = dist.largest([*clocks, now - last_saved], device=self.device)
                    position.seconds, position.seconds_waited, since_saved = told
                    is_over = config.progress(position) >= 1
                    if is_over and config.validate_every is not None:
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
                return FitResult(position, is_stopped, checkpoint, float(record["loss"]), self.runtime)
        finally:
            for sink in sinks:
                sink.close()

    def _is_time(self, *every: int | None) -> bool:
        """Whether a number of steps is over for what is done every so many of them, null for never."""
        return any(n is not None and self.position.step % n == 0 for n in every)

    def _any(self, is_so: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(dist.largest([is_so], device=self.device)[0])

    def _step(self, batches: Iterator[Any]) -> Record:
        """One optimizer update."""
        config, position = self.config, self.position
        scale = config.schedule.scale(config.progress(position))
        loss = torch.zeros((), device=self.device)
        n_loops, n_tokens_seen, flops, deepest = 0.0, 0.0, 0.0, 0
        self.loads = []
        numbers = range(dist.rank(), config.accumulate, dist.n_ranks())
        for number, batch in zip(numbers, islice(batches, len(numbers)), strict=True):
            batch = self.last_batch = batch.to(self.device)
            # a stream for each micro-batch, so that it is the same whichever rank has it
            rng = np.random.default_rng([config.seed, position.step, PLAN_STREAM, *([number] if number else [])])
            n_rows, n_tokens = batch.ids.shape
            at_level = config.plan.at(position.level) if isinstance(config.plan, CurriculumPlanConfig) else config.plan
            plan = at_level.sample(rng, n_tokens=n_tokens, n_rows=n_rows)
            plan = replace(plan, recompute=config.recompute)
            seed = int(rng.integers(1 << 62)) if config.state_loss is not None else 0
            deepest = max(deepest, plan.n_loops)
            with self._synchronised(is_last=number == numbers[-1], deepest=deepest):
                with self.runtime.autocast():
                    part = self.loss(batch, plan, seed=seed)
                (part / len(numbers)).backward()
            loss += part.detach() / config.accumulate
            n_tokens_seen += batch.n_tokens
            n_loops += plan.mean_loops
            flops += batch.n_tokens * self.flops(plan.mean_loops, n_tokens=n_tokens)
        if dist.n_ranks() > 1:
            loss = dist.sum_tensor(loss)
            n_loops, n_tokens_seen, flops = dist.summed([n_loops, n_tokens_seen, flops], device=self.device)
            # ranks have run other numbers of loops, but the same layers
            self.loads = [(layer, dist.sum_tensor(load)) for layer, load in sorted(total_loads(self.loads).items())]
        position.tokens += int(n_tokens_seen)
        position.flops += flops
        norm = gradient_norm(self.model)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise TrainingError(self._non_finite(float(loss), float(norm)))
        if config.grad_clip is not None and norm > config.grad_clip:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(config.grad_clip / norm)
        scale *= config.optimizer.batch_scale(n_tokens_seen)
        set_lr_scale(self.optimizers, scale)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.model.balance(self.loads)
        position.step += 1
        if self.average is not None:
            self.average.update(position.step)
        self._go_on_if_learned()
        record: Record = {
            "step": position.step,
            "tokens": position.tokens,
            "loss": float(loss),
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

    def loss_of(self, batch: Batch, plan: LoopPlan, *, seed: int = 0) -> torch.Tensor:
        config = self.config
        if config.exit_gate is not None:
            alone = self._is_gate_alone
            return exit_gate_loss(self.model, batch, plan, config.exit_gate, alone=alone, loads=self.loads)
        return next_token_loss(
            self.model,
            batch,
            plan,
            label_smoothing=config.label_smoothing,
            loop_loss=config.loop_loss,
            state_loss=config.state_loss,
            seed=seed,
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
        with self.runtime.autocast():
            score = next_token_score(self.model, [asked], n_loops=n_loops)
        n_right, n = dist.summed([score.n_right, score.n], device=self.device)
        is_learned = n_right / n >= gate
        position.level = min(n_levels, position.level + is_learned)
        if isinstance(source, PermutationsSource):
            source.level = position.level

    def _probe(self) -> Record:
        """What the loops do, where it is time to ask; what is worrying about it is said once."""
        n_loops = self.model.config.n_loops
        if not self._is_time(self.config.probe_every):
            return {}
        model = self._whole_model(own_tensors(self.model))
        if model is None:
            return {}
        with self.runtime.autocast():
            found = probe_loops(model, self.last_batch, n_loops=n_loops)
        for kind, sentence in worries(found, n_loops=n_loops):
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
        try:
            with self.runtime.autocast():
                return self.validate(model, self.position.step)
        except OSError as error:  # of a sample: told where all ranks hear of it
            self.failed = TrainingError(
                f"{error.filename} could not be written ({error.strerror}); free space and resume"
            )
            return {}

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
        failed = self.failed
        try:
            for sink in sinks:
                sink.write(record)
        except TrainingError as error:
            failed = error
        said = dist.from_main(None if failed is None else str(failed))
        if said is not None:
            self._save()
            raise failed or TrainingError(said)
        for observer in self.observers if dist.is_main() else ():
            observer(record)

    def _saved_state(self) -> tuple[Position, Runtime]:
        """Position and runtime of the newest checkpoint."""
        state = read_state(self.folder)
        try:
            position, runtime = Position(**state["position"]), Runtime(**state["runtime"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"the newest checkpoint of {self.folder} holds no training state ({error})") from None
        if state.get("fingerprint", self.source.fingerprint) != self.source.fingerprint:
            raise CheckpointError(
                f"the data of {self.folder} has changed since it began: put back what it learned from, or begin anew"
            )
        if runtime.device == "cuda" and not torch.cuda.is_available():
            raise CheckpointError(
                f"{self.folder} was trained on a GPU and torch sees none: resume it where there is one"
            )
        if self.config.progress(position) >= 1:
            raise ConfigError(
                f"the budget of {self.folder} is used up: {position.seconds / 60:.1f} minutes, "
                f"{position.step:,} steps, {position.tokens:,} tokens. Give a larger --minutes, --steps or --tokens, "
                "counted from the start."
            )
        return position, runtime

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
                self.loss_of(batch, plan).backward()
            self.model.zero_grad(set_to_none=True)

        steps = min(config.steps or 10**12, (config.tokens or 10**18) // (batch.n_tokens * config.accumulate))
        long_run = (config.minutes or 1e9) >= LONG_RUN_MINUTES and steps >= LONG_RUN_STEPS
        return choose_runtime(config.runtime, trial=trial, long_run=long_run)

    def _checkpoint_due(self, seconds_since: float) -> bool:
        if self.config.checkpoint_steps is not None:
            return self.position.step % self.config.checkpoint_steps == 0
        return seconds_since >= 60 * self.config.checkpoint_minutes

    def _save(self) -> Path:
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


class _Loss(nn.Module):
    """The loss as a module's forward: what averages gradients over ranks wraps a module."""

    def __init__(self, run: _Fit) -> None:
        super().__init__()
        self.model = run.model
        self._of: Callable[..., torch.Tensor] = run.loss_of

    def forward(self, batch: Batch, plan: LoopPlan, **options: Any) -> torch.Tensor:
        return self._of(batch, plan, **options)
