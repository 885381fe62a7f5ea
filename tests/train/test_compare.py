"""Comparisons: the arms are what they are called, rates are chosen by loss, what is finished is not run again."""

import json
import statistics
from pathlib import Path

import pytest

from looplm.checkpoint import CONFIG
from looplm.errors import ConfigError, TrainingError
from looplm.eval.interval import mean_and_half
from looplm.reading import read_yaml
from looplm.train import compare
from looplm.train.compare import Arm, Comparison, arms, as_records, count_trained, is_finished, markdown, verdicts
from looplm.train.run import RunConfig, resolve_run, start_run


@pytest.fixture
def text(tmp_path: Path) -> RunConfig:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat. " * 400)
    tiny = ["model.d_model=32", "model.block.attention={kind: gqa, n_heads: 2, n_kv_heads: 2, head_dim: 16}"]
    tiny += ["model.block.ffn.d_ff=32", "data.n_rows=2", "data.row_len=32", "train.n_workers=0"]
    tiny += ["train.runtime={device: cpu, precision: fp32, compile: false, n_threads: 1}"]
    return resolve_run("text", overrides=[f"data.path={path}", *tiny])


@pytest.mark.parametrize("recipe", ["s3", "reason-deep", "text"])
def test_the_arms_are_equal_in_what_they_are_called(recipe: str) -> None:
    config = resolve_run(recipe, overrides=[f"data.path={__file__}"] if recipe == "text" else [])
    found = arms(config)
    depth = config.data.max_len if recipe == "s3" else config.model.n_loops  # type: ignore[union-attr]
    whole = count_trained(found["looped"], n_loops=depth)
    parameter, flop = (count_trained(found[name], n_loops=1) for name in compare.ARMS[1:3])
    assert parameter.parameters == whole.parameters
    assert parameter.flops_per_token < whole.flops_per_token
    assert flop.flops_per_token == pytest.approx(whole.flops_per_token, rel=0.03)
    assert flop.parameters > whole.parameters
    assert found["iso-wall-time"] == found["iso-parameter"]
    assert {found[name].train.plan.kind for name in compare.ARMS[1:]} == {"fixed"}
    assert {found[name].model.block.attention.window for name in compare.ARMS[1:]} == {None}  # type: ignore[union-attr]


def test_a_model_that_does_not_loop_has_nothing_to_compare(text: RunConfig) -> None:
    plain = text.model_copy(update={"model": text.model.model_copy(update={"n_loops": 1})})
    with pytest.raises(ConfigError, match="no loop to compare"):
        arms(plain)
    for options, message in (({"n_seeds": 1}, "1 seeds give no interval"), ({"n_jobs": 0}, "jobs 0")):
        chosen = {"minutes": 1.0, "n_seeds": 2, "n_jobs": 1, "say": print, **options}
        with pytest.raises(ConfigError, match=message):
            Comparison(text, Path("x"), **chosen)  # type: ignore[arg-type]


@pytest.mark.long
def test_all_runs_are_made_once_with_the_rate_of_the_lowest_loss(
    tmp_path: Path, text: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[compare.Run] = []

    def train_here(self: Comparison, runs: list[compare.Run]) -> None:
        for run in runs:
            if not is_finished(run):
                made.append(run)
                start_run(run.config, run.folder)

    monkeypatch.setattr(Comparison, "_train", train_here)
    options = {"minutes": 0.02, "n_seeds": 2, "n_jobs": 1, "say": lambda text: None}
    found = Comparison(text, tmp_path / "out", **options).run()  # type: ignore[arg-type]
    assert [arm.name for arm in found] == list(compare.ARMS)
    assert len(made) == 9 + 8
    for arm in found[:3]:
        assert arm.tuning[f"{arm.rate:g}"] == min(arm.tuning.values())
        assert len(arm.minutes) == len(arm.scores["bits per byte"]) == 2
    steps = {run.config.train.steps for run in made if "seed-1" in run.folder.name and run.arm != "iso-wall-time"}
    assert len(steps) == 1
    last = made[-1].config.train
    assert last.minutes == pytest.approx(statistics.mean(found[0].minutes))
    rated = text.train.optimizer.adamw_lr * found[1].rate
    assert last.optimizer.adamw_lr == pytest.approx(rated)
    n_made = len(made)
    assert all(map(is_finished, made))
    Comparison(text, tmp_path / "out", **options).run()  # type: ignore[arg-type]
    assert len(made) == n_made
    page = markdown(found, title="t", command="looplm compare text", machine="m")
    assert page.count("\n| ") == 1 + len(compare.ARMS)
    assert all(line in page for line in verdicts(found))
    assert json.loads(json.dumps(as_records(found)))[0]["name"] == "looped"


def test_a_run_is_trained_by_the_command_and_its_failure_told(tmp_path: Path, text: RunConfig) -> None:
    options = {"minutes": 1.0, "n_seeds": 2, "n_jobs": 2, "say": lambda text: None}
    comparison = Comparison(text, tmp_path / "out", **options)  # type: ignore[arg-type]
    runs = [comparison._run("looped", rate=0.5, seed=seed, steps=3) for seed in (0, 1)]
    comparison._train(runs)
    assert all(map(is_finished, runs))
    assert [read_yaml(run.folder / CONFIG)["train"]["seed"] for run in runs] == [0, 1]
    Path(text.data.path).unlink()  # type: ignore[union-attr]
    with pytest.raises(TrainingError, match=r"did not end(.|\n)*cannot be read"):
        comparison._train([comparison._run("looped", rate=2.0, seed=2, steps=3)])


def test_runs_of_another_recipe_are_not_taken_for_this_ones(tmp_path: Path, text: RunConfig) -> None:
    options = {"minutes": 1.0, "n_seeds": 2, "n_jobs": 1, "say": lambda text: None}
    one = Comparison(text, tmp_path / "out", **options)  # type: ignore[arg-type]
    run = one._run("looped", rate=1.0, seed=0, steps=2)
    start_run(run.config, run.folder)
    one._train([run])
    wider = text.model_copy(update={"model": text.model.model_copy(update={"d_model": 64})})
    other = Comparison(wider, tmp_path / "out", **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"trained with model\.d_model=32.*asks for 64: give another --out"):
        other._train([other._run("looped", rate=1.0, seed=0, steps=2)])


@pytest.mark.parametrize(
    ("change", "message"),
    [("data.gate=0.9", "give all the same, data.gate=null"), ("data.max_len=80", "321 tokens are scored.*seq_len=321")],
)
def test_what_would_fail_after_training_is_refused_before(change: str, message: str) -> None:
    changes = [change, "train.n_workers=0"]
    with pytest.raises(ConfigError, match=message):
        arms(resolve_run("s3", overrides=changes))


def test_baselines_have_no_exit_gate(text: RunConfig) -> None:
    gated = ["model.exit={kind: gate}", "train.exit_gate={}"]
    found = arms(resolve_run("text", overrides=[f"data.path={text.data.path}", *gated]))  # type: ignore[union-attr]
    assert found["looped"].model.exit.kind == "gate"
    for name in compare.ARMS[1:]:
        assert found[name].model.exit.kind == "none"
        assert found[name].train.exit_gate is None


def test_verdicts_say_no_more_than_the_seeds_show() -> None:
    def arm(name: str, values: list[float]) -> Arm:
        return Arm(name, 1, 1, 1, 1.0, {}, [1], [1.0], {"bits per byte": values})

    looped = arm("looped", [2.0, 2.1, 2.2])
    others = [arm("a", [2.5, 2.6, 2.7]), arm("b", [1.5, 1.6, 1.71]), arm("c", [2.3, 2.0, 2.2])]
    said = verdicts([looped, *others])
    assert [line.split(": ")[2].split(" (")[0] for line in said] == ["better", "worse", "not told apart"]
    mean, half = mean_and_half([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.303 / 3**0.5, rel=1e-3))
