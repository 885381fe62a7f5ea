"""The options of a training run: budgets, loop plan, losses, how often it is saved and watched."""

from dataclasses import dataclass

from pydantic import Field, model_validator

from looplm.config import Config, NonNegativeInt, Number, PositiveFloat, PositiveInt, Seed
from looplm.model.loop.plan import PlanConfig, PoissonPlanConfig
from looplm.optim.groups import OptimizerConfig
from looplm.optim.schedule import ScheduleConfig
from looplm.train.losses import ExitGateConfig, LoopLossConfig, StateLossConfig
from looplm.train.runtime import RuntimeConfig

MOST_MICRO_BATCHES, MOST_WORKERS = 1 << 16, 256  # more is a slip, and costs all memory before it is noticed


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
    accumulate: PositiveInt = Field(default=1, le=MOST_MICRO_BATCHES)
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
    """Steps between checkpoints, instead of the time."""
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
                raise ValueError("exit_gate has its own loss: leave out loop_loss, state_loss and label_smoothing")
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
