"""What a run needs: tokens, FLOPs, hours and dollars."""

import math

import pytest

from looplm.config import PRESETS, preset_names
from looplm.errors import ConfigError
from looplm.model.count import FlopsPerToken, count
from looplm.reading import read_yaml
from looplm.train.needs import GPUConfig, Needs, find_gpu, needs, plan_loops
from looplm.train.run import RunConfig, resolve_run

GPU = GPUConfig(tflops=100, memory_gb=80, price=3)
ROWS = ("data.row_len=64", "data.n_rows=2")


def config(*overrides: str, recipe: str = "pretrain") -> RunConfig:
    rows = ROWS if recipe == "pretrain" else ()
    return resolve_run(recipe, overrides=[*rows, *overrides])


def needed(*overrides: str, recipe: str = "pretrain", tokens: float | None = None, mfu: float = 0.5) -> Needs:
    return needs(config(*overrides, recipe=recipe), gpu=GPU, n_gpus=[1, 4], tokens=tokens, mfu=mfu)


def test_every_gpu_of_the_table_is_whole() -> None:
    names = list(read_yaml(PRESETS / "gpus.yaml"))
    assert {"h100", "h200", "a100-80", "a100-40", "l4", "l40s", "rtx-4090", "b200"} == set(names)
    assert all(find_gpu(name).tflops > 100 for name in names)
    with pytest.raises(ConfigError, match=r"no GPU named 'h10'; did you mean 'h100'\? GPUs: h100, h200"):
        find_gpu("h10")


def test_flops_are_those_that_training_counts() -> None:
    found = needed("train.plan={kind: fixed, n_loops: 3}", tokens=1e6)
    assert found.flops_per_token == FlopsPerToken(config().model)(3, n_tokens=64)
    assert found.flops == 1e6 * found.flops_per_token
    assert found.on[0].hours == pytest.approx(found.flops / (100e12 * 0.5) / 3600)
    assert found.on[1].hours == pytest.approx(found.on[0].hours / 4)
    assert found.on[0].dollars == pytest.approx(3 * found.on[0].hours)
    assert found.on[1].dollars == pytest.approx(found.on[0].dollars)


def test_loops_without_gradient_cost_a_third_and_those_computed_again_a_third_more() -> None:
    counted = FlopsPerToken(config().model)
    one, loop = counted(1, n_tokens=64), counted(2, n_tokens=64) - counted(1, n_tokens=64)
    truncated = needed("train.plan={kind: lognormal_poisson, mean: 1000, sigma: 0, n_grad: 4}", tokens=1e6)
    assert truncated.loops.mean_with_gradient == 4
    assert truncated.flops_per_token == pytest.approx(one + 3 * loop + (truncated.loops.mean - 4) * loop / 3)
    again = needed("train.plan={kind: fixed, n_loops: 3}", "train.recompute=true", tokens=1e6)
    assert again.flops_per_token == pytest.approx(one + 2 * loop + 3 * loop / 3)


@pytest.mark.parametrize(
    ("plan", "mean", "with_gradient", "most"),
    [
        ("{kind: fixed, n_loops: 5}", 5, 5, 5),
        ("{kind: uniform, low: 2, high: 5}", 3.5, 3.5, 5),
        ("{kind: choice, weights: {1: 1, 2: 2, 3: 0.5, 4: 0.5, 6: 4}}", 4.0625, 4.0625, 6),
        ("{kind: curriculum, low: 1, high: 4}", 2.5, 2.5, 4),
        ("{kind: poisson, mean: 8, n_grad: null}", 8 + math.exp(-8), 8, None),
        ("{kind: poisson, mean: 8}", 8, 4, 4),
        ("{kind: lognormal_poisson, mean: 8, n_grad: 2}", 9, 2, 2),
    ],
)
def test_numbers_of_loops(plan: str, mean: float, with_gradient: float, most: int | None) -> None:
    run = config(f"train.plan={plan}")
    loops = plan_loops(run.train.plan, run.data)
    assert loops.mean == pytest.approx(mean, rel=0.02)
    assert loops.mean_with_gradient == pytest.approx(with_gradient, rel=0.02)
    assert loops.most_with_gradient == most if most is not None else loops.most_with_gradient > 15


def test_loops_by_length_follow_the_lengths() -> None:
    run = config(recipe="s3")  # 2 to 12 permutations, and 0 to 2 loops more
    loops = plan_loops(run.train.plan, run.data)
    assert loops.mean == pytest.approx(8, rel=0.02)
    assert loops.most_with_gradient == 14


def test_who_says_how_many_tokens() -> None:
    n = count(config().model).parameters
    assert (needed().tokens, needed().tokens_from) == (20 * n, "20 a parameter")
    assert needed("train.steps=10", "train.accumulate=3").tokens == 10 * 3 * 2 * 64
    assert needed("train.steps=10", "train.tokens=99").tokens_from == "train.tokens"
    assert needed("train.tokens=99", tokens=5).tokens == 5
    by_flops = needed("train.flops=1e15", "train.plan={kind: fixed, n_loops: 2}")
    assert by_flops.flops == pytest.approx(1e15, rel=1e-3)
    assert by_flops.tokens_from == "train.flops=1e+15"


@pytest.mark.long
def test_phases_are_gone_through_in_order() -> None:
    run = resolve_run("pretrain-osrt-v4")
    found = needs(run, gpu=GPU, n_gpus=[8])
    assert found.tokens == 120_000 * 16_384 + 1_880_000 * 32_768 + 400_000 * 32_768
    assert (found.batch.n_tokens, found.accumulate) == (32_768, 8)
    short = needs(run, gpu=GPU, n_gpus=[8], tokens=1000)
    assert short.flops_per_token < found.flops_per_token  # the first phase has the shortest rows


def test_what_fits_leaves_a_tenth_of_the_gpu() -> None:
    run = config()
    total = needs(run, gpu=GPU, n_gpus=[1]).on[0].ddp.total
    for room, fits in ((0.99, False), (1.01, True)):
        gpu = GPUConfig(tflops=1, memory_gb=room * total / 1e9 / 0.9, price=1)
        on = needs(run, gpu=gpu, n_gpus=[1]).on[0]
        assert (on.ddp_fits, on.fsdp_fits) == (fits, fits)


@pytest.mark.parametrize("name", preset_names("run"))
def test_every_run_preset_has_its_needs(name: str) -> None:
    found = needs(resolve_run(name), gpu=GPU, n_gpus=[1])
    assert found.on[0].ddp.activations > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mfu": 0.0}, "--mfu 0 is no share"),
        ({"mfu": 40.0}, "--mfu 40 is no share"),
        ({"mfu": math.nan}, "--mfu nan is no share"),
        ({"price": -1.0}, "--price -1 is no price"),
        ({"tokens": 0.0}, "--tokens 0 is no number"),
        ({"tokens": math.inf}, "--tokens inf is no number"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        needs(config(), gpu=GPU, n_gpus=[1], **options)
