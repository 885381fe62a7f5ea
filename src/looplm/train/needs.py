"""What a run of a config needs: parameters, FLOPs, memory per GPU, hours and dollars. Reads no data and needs no
GPU."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from looplm.config import PRESETS, Config, PositiveFloat, did_you_mean, parse
from looplm.data.prepared import PreparedConfig
from looplm.data.sources import DataConfig, PermutationsConfig, ReasoningConfig, row_length
from looplm.errors import ConfigError
from looplm.model.count import FlopsPerToken, count
from looplm.model.loop.plan import (
    ChoicePlanConfig,
    CurriculumPlanConfig,
    FixedPlanConfig,
    LengthPlanConfig,
    PlanConfig,
    UniformPlanConfig,
)
from looplm.reading import read_yaml
from looplm.train.footprint import Footprint, Shape, measure
from looplm.train.run import RunConfig

TOKENS_PER_PARAMETER = 20  # where neither the command nor the config says how many (Hoffmann et al. 2022)
USABLE = 0.9  # of a GPU's memory: what is not counted (footprint.py) needs room too
N_DRAWS = 20_000  # of a loop plan that has no list of its numbers: means to half a percent


class GPUConfig(Config):
    """One kind of GPU, a line of presets/gpus.yaml."""

    tflops: PositiveFloat
    """Dense bf16 TFLOP/s of the data sheet."""
    memory_gb: PositiveFloat
    """Memory in GB."""
    price: PositiveFloat
    """Dollars an hour, an assumption."""


def find_gpu(name: str) -> GPUConfig:
    """The GPU of that name in the table."""
    table = read_yaml(PRESETS / "gpus.yaml")
    if name not in table:
        raise ConfigError(f"no GPU named {name!r}{did_you_mean(name, table)} GPUs: {', '.join(table)}.")
    return parse(GPUConfig, table[name], source=f"GPU {name!r}")


@dataclass(frozen=True)
class Loops:
    """A loop plan's numbers."""

    mean: float
    """Loops run."""
    mean_with_gradient: float
    """Loops that carry gradient."""
    most_with_gradient: int
    """The most loops with gradient, which memory must hold; for a plan without a limit, the most of N_DRAWS draws."""


@dataclass(frozen=True)
class OnGPUs:
    """A run on some number of GPUs."""

    n_gpus: int
    ddp: Footprint
    """Everything on every GPU."""
    ddp_fits: bool
    fsdp: Footprint
    """Weights, gradients and optimizer state shared by the GPUs."""
    fsdp_fits: bool
    hours: float
    dollars: float


@dataclass(frozen=True)
class Work:
    """What a run does, whatever it runs on."""

    parameters: int
    active: int
    """Parameters that one token uses."""
    loops: Loops
    tokens: int
    tokens_from: str
    """Where the number comes from."""
    flops_per_token: float
    """Forward, backward and recomputed loops; the mean over all tokens."""
    flops: float
    batch: Shape
    """The micro-batch with the most tokens."""
    accumulate: int
    """Micro-batches of a step, of all GPUs together."""


@dataclass(frozen=True)
class Needs(Work):
    """What a run needs."""

    on: list[OnGPUs]


def needs(
    config: RunConfig,
    *,
    gpu: GPUConfig,
    n_gpus: Sequence[int],
    tokens: float | None = None,
    mfu: float = 0.4,
    price: float | None = None,
    on_work: Callable[[Work], None] | None = None,
) -> Needs:
    """What training `config` needs on each number of GPUs that reach `mfu` of their peak; `price` in dollars per GPU
    and hour. `on_work` is called before the memory is measured, which takes seconds.

    Raises:
        ConfigError: mfu is not a share, or a price or a number of tokens is out of range.
    """
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu:g} is no share of a GPU's peak; give more than 0 and at most 1, as 0.4")
    price = gpu.price if price is None else price
    if not 0 <= price < math.inf:
        raise ConfigError(f"--price {price:g} is no price; give dollars per GPU and hour, as 2.5")
    if tokens is not None and not 1 <= tokens < math.inf:
        raise ConfigError(f"--tokens {tokens:g} is no number of tokens; give 1 or more, as 20e9")
    loops = plan_loops(config.train.plan, config.data)
    sizes, cost = count(config.model), _Cost(config, loops)
    n_tokens, tokens_from = _tokens(config, cost, sizes.parameters) if tokens is None else (int(tokens), "as given")
    flops = cost.of(n_tokens)
    batch = max(_shapes(config.data), key=lambda shape: shape.batch.n_tokens).batch
    work = Work(
        parameters=sizes.parameters,
        active=sizes.active,
        loops=loops,
        tokens=n_tokens,
        tokens_from=tokens_from,
        flops_per_token=flops / n_tokens,
        flops=flops,
        batch=batch,
        accumulate=config.train.accumulate,
    )
    if on_work is not None:
        on_work(work)
    parts = measure(config.model, config.train, batch, n_loops=loops.most_with_gradient)
    on = []
    for n in n_gpus:
        hours = flops / (n * gpu.tflops * 1e12 * mfu) / 3600
        ddp, fsdp = parts.replicated(), parts.sharded(n, accumulates=config.train.accumulate > n)
        ddp_fits, fsdp_fits = (each.total <= USABLE * gpu.memory_gb * 1e9 for each in (ddp, fsdp))
        on.append(OnGPUs(n, ddp, ddp_fits, fsdp, fsdp_fits, hours, hours * n * price))
    return Needs(**vars(work), on=on)


def plan_loops(plan: PlanConfig, data: DataConfig) -> Loops:
    """The numbers of a plan; of a curriculum, when it has fully grown."""
    weights, n_grad = _weights(plan, data)
    total = sum(weights.values())
    kept = {n: min(n, n_grad or n) for n in weights}
    mean = sum(n * weight for n, weight in weights.items()) / total
    mean_kept = sum(kept[n] * weight for n, weight in weights.items()) / total
    return Loops(mean, mean_kept, max(kept.values()))


def _weights(plan: PlanConfig, data: DataConfig) -> tuple[Mapping[int, float], int | None]:
    """Relative weight of each number of loops, and how many of them at most carry gradient."""
    if isinstance(plan, CurriculumPlanConfig):
        plan = plan.at(plan.n_levels)
    if isinstance(plan, FixedPlanConfig):
        return {plan.n_loops: 1}, None
    if isinstance(plan, UniformPlanConfig):
        return dict.fromkeys(range(plan.low, plan.high + 1), 1), None
    if isinstance(plan, ChoicePlanConfig):
        return plan.weights, None
    rng, n_tokens = np.random.default_rng(0), row_length(data)
    drawn: Counter[int] = Counter()
    for _ in range(N_DRAWS):
        if isinstance(plan, LengthPlanConfig) and isinstance(data, PermutationsConfig):
            n_tokens = 1 + int(rng.integers(data.min_len, data.max_len + 1))
        one = plan.sample(rng, n_tokens=n_tokens, n_rows=1)
        drawn[one.n_loops] += 1
    return drawn, one.n_grad


@dataclass(frozen=True)
class _Phase:
    """Micro-batches of one shape, without an end if `n_batches` is None."""

    n_batches: int | None
    batch: Shape


def _shapes(data: DataConfig) -> list[_Phase]:
    """The shapes of the micro-batches, phase by phase; the last phase has no end."""
    if not isinstance(data, PreparedConfig):
        n_rows = data.batch_size if isinstance(data, PermutationsConfig) else data.n_rows
        return [_Phase(None, Shape(n_rows, row_length(data), has_documents=isinstance(data, ReasoningConfig)))]
    phases = data.in_full()
    ends = [phase.n_batches for phase in phases[:-1]] + [None]
    shapes = [Shape(phase.n_rows, phase.row_len, has_documents=data.mask_documents) for phase in phases]
    return [_Phase(end, shape) for end, shape in zip(ends, shapes, strict=True)]


class _Cost:
    """FLOPs of a run's first tokens, phase by phase: attention over longer rows costs more."""

    def __init__(self, config: RunConfig, loops: Loops) -> None:
        self.loops, self.recomputes = loops, config.train.recompute
        self.phases = _shapes(config.data)
        self.counted = FlopsPerToken(config.model)

    def of(self, n_tokens: int) -> float:
        """FLOPs of the first `n_tokens`."""
        total, left = 0.0, n_tokens
        for phase in self.phases:
            here = left if phase.n_batches is None else min(left, phase.n_batches * phase.batch.n_tokens)
            total += here * self._per_token(phase.batch.row_len)
            left -= here
        return total

    def tokens_in(self, n_batches: int) -> int:
        """Tokens of the first micro-batches."""
        total, left = 0, n_batches
        for phase in self.phases:
            here = left if phase.n_batches is None else min(left, phase.n_batches)
            total += here * phase.batch.n_tokens
            left -= here
        return total

    def _per_token(self, row_len: int) -> float:
        """A loop without gradient runs forward only, a third of the cost; a recomputed loop runs forward once more."""
        once, twice = (self.counted(n, n_tokens=row_len) for n in (1, 2))
        loop, with_gradient = twice - once, self.loops.mean_with_gradient
        forward_only = self.loops.mean - with_gradient + (with_gradient if self.recomputes else 0)
        return once + (with_gradient - 1) * loop + forward_only * loop / 3


def _tokens(config: RunConfig, cost: _Cost, parameters: int) -> tuple[int, str]:
    """How many tokens, and where the number comes from: the smallest of the config's budgets but time, else
    TOKENS_PER_PARAMETER for each parameter."""
    train = config.train
    budgets: list[tuple[int, str]] = []
    if train.tokens is not None:
        budgets.append((train.tokens, "train.tokens"))
    if train.steps is not None:
        budgets.append((cost.tokens_in(train.steps * train.accumulate), f"train.steps={train.steps}"))
    if train.flops is not None:  # which counts every loop with its gradient
        each = cost.counted(cost.loops.mean, n_tokens=cost.phases[0].batch.row_len)
        budgets.append((max(1, round(train.flops / each)), f"train.flops={train.flops:g}"))
    return min(budgets, default=(TOKENS_PER_PARAMETER * parameters, f"{TOKENS_PER_PARAMETER} a parameter"))
