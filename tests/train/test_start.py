"""Starting and resuming: one process a folder, nothing left of a failed start, data found from anywhere."""

import sys
import threading
from pathlib import Path

import pytest

from commands import fails, looplm, succeeds
from looplm.checkpoint import CONFIG, latest_checkpoint, load_run
from looplm.config import to_yaml
from looplm.data.prepared import PreparedConfig
from looplm.errors import CheckpointError, ConfigError, DataError, FolderError
from looplm.reading import read_yaml
from looplm.telemetry.sinks import Record
from looplm.train.fit import FitResult
from looplm.train.run import RunConfig, resolve_run, resume_run, start_run, without_places

TEXT = "the cat sat on the mat. " * 200


@pytest.fixture
def tiny_text(tiny_reason: list[str]) -> list[str]:
    return [each for each in tiny_reason if not each.startswith("data.")] + ["data.n_rows=2", "data.row_len=32"]


def test_a_folder_that_is_being_written_into_is_refused_at_once(tmp_path: Path, tiny_reason: list[str]) -> None:
    run, config = tmp_path / "run", resolve_run("reason", overrides=tiny_reason)
    refused: list[BaseException] = []

    def second(record: Record) -> None:
        thread = threading.Thread(target=try_both)
        thread.start()
        thread.join()

    def try_both() -> None:
        for begin in (lambda: start_run(config, run), lambda: resume_run(run, overrides=["train.steps=60"])):
            try:
                begin()
            except FolderError as error:
                refused.append(error)

    before = to_yaml(config)
    assert start_run(config, run, observers=(second,)).position.step == 6
    assert len(refused) == 2 * 6
    assert all("is being written into" in str(error) for error in refused)
    assert (run / CONFIG).read_text() == before
    assert not (run / ".lock").exists()


def test_a_config_alone_does_not_block_a_start(tmp_path: Path, tiny_reason: list[str]) -> None:
    """What a start that was killed in its first second leaves."""
    run = tmp_path / "run"
    run.mkdir()
    (run / CONFIG).write_text("model: cut short")
    (run / ".lock").write_text("process 1 on nowhere\n")
    assert start_run(resolve_run("reason", overrides=tiny_reason), run).position.step == 6
    with pytest.raises(ConfigError, match="already holds a run; continue it with --resume"):
        start_run(resolve_run("reason", overrides=tiny_reason), run)


def test_a_model_is_not_written_over(tmp_path: Path, tiny_reason: list[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").touch()
    with pytest.raises(ConfigError, match="already holds a run"):
        start_run(resolve_run("reason", overrides=tiny_reason), tmp_path / "run")


@pytest.mark.parametrize("is_there", [False, True])
def test_a_failed_start_leaves_nothing(
    tmp_path: Path, tiny_text: list[str], monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    run = tmp_path / "runs" / "run"
    if is_there:
        run.mkdir(parents=True)
        (run / "notes.txt").write_text("mine")
    words = ["train", "text", *tiny_text, "--out", run]
    assert "cannot be read" in fails(*words, f"data.path={tmp_path / 'none.txt'}")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    with monkeypatch.context() as patch:  # fails in the middle of making the run
        patch.setitem(sys.modules, "wandb", None)
        assert "wandb, which is not installed" in fails(*words, f"data.path={text}", "train.wandb=x")
    if is_there:
        assert [path.name for path in run.iterdir()] == ["notes.txt"]
    else:
        assert not (tmp_path / "runs").exists()
    succeeds(*words, f"data.path={text}")


def test_a_start_interrupted_before_its_first_step_leaves_nothing(
    tmp_path: Path, tiny_reason: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("looplm.train.fit.make_optimizers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start_run(resolve_run("reason", overrides=tiny_reason), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_resume_that_is_refused_leaves_the_config_as_it_was(tmp_path: Path, tiny_reason: list[str]) -> None:
    start_run(resolve_run("reason", overrides=tiny_reason), tmp_path / "run")
    before = (tmp_path / "run" / CONFIG).read_text()
    with pytest.raises(ConfigError, match="is used up"):
        resume_run(tmp_path / "run", overrides=["train.steps=5"])
    assert (tmp_path / "run" / CONFIG).read_text() == before


def test_relative_data_is_found_from_another_folder(
    tmp_path: Path, tiny_text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    (here / "text.txt").write_text(TEXT)
    (here / "recipe.yaml").write_text("base: text\ndata: {kind: bytes, path: text.txt}\n")
    monkeypatch.chdir(here)
    succeeds("train", "recipe.yaml", *tiny_text, "--out", "run", "train.validate_every=3")
    assert read_yaml(here / "run" / CONFIG)["data"]["path"] == str(here / "text.txt")
    monkeypatch.chdir(elsewhere)
    assert "step 8" in succeeds("train", "--resume", here / "run", "--steps", "8")
    succeeds("eval", here / "run")


def test_data_that_has_moved_is_named_on_resume(tmp_path: Path, tiny_text: list[str]) -> None:
    text, moved, other = (tmp_path / name for name in ("text.txt", "moved.txt", "other.txt"))
    text.write_text(TEXT)
    other.write_text(TEXT.upper())
    run = tmp_path / "run"
    start_run(resolve_run("text", overrides=[*tiny_text, f"data.path={text}"]), run)
    text.rename(moved)
    more = ["train.steps=8"]
    with pytest.raises(DataError, match=r"data\.path=FILE"):
        resume_run(run, overrides=more)
    with pytest.raises(CheckpointError, match="has changed since it began"):
        resume_run(run, overrides=[*more, f"data.path={other}"])
    assert read_yaml(run / CONFIG)["data"]["path"] == str(text)
    assert resume_run(run, overrides=[*more, f"data.path={moved}"]).position.step == 8
    assert load_run(run).config["data"]["path"] == str(moved)
    with pytest.raises(ConfigError, match="cannot change on resume"):
        resume_run(run, overrides=["data.row_len=16"])


def test_where_data_is_may_change_and_how_it_is_mixed_may_not() -> None:
    def places(*folders: dict[str, float]) -> object:
        phases = [{"folders": each} for each in folders[1:]]
        return without_places(PreparedConfig.model_validate({"folders": folders[0], "phases": phases}))

    assert places({"/a": 1.0, "/b": 2.0}) == places({"/new/a": 1.0, "/new/b": 2.0})
    assert places({"/a": 1.0, "/b": 2.0}) != places({"/a": 2.0, "/b": 1.0})
    assert places({"/a": 1.0}) != places({"/a": 1.0, "/b": 1.0})
    assert places({"/a": 1.0}, {"/b": 1.0}) == places({"/c": 1.0}, {"/d": 1.0})
    assert places({"/a": 1.0}, {"/b": 1.0}) != places({"/a": 1.0}, {"/a": 1.0})


def test_relative_folders_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes = ["data.folders={a: 1, ./a: 2, builtin:python: 3}", "data.phases=[{folders: {b: 1}}]"]
    data = resolve_run("pretrain", overrides=changes).data
    assert isinstance(data, PreparedConfig)
    assert {name: data.folders[name] for name in (str(tmp_path / "a"), "builtin:python")} == {
        str(tmp_path / "a"): 3,
        "builtin:python": 3,
    }
    assert data.phases[0].folders == {str(tmp_path / "b"): 1}


def test_training_works_in_a_thread_that_is_not_the_main_one(tmp_path: Path, tiny_reason: list[str]) -> None:
    results: list[FitResult] = []
    config: RunConfig = resolve_run("reason", overrides=[*tiny_reason, "train.n_workers=1", "train.validate_every=3"])

    def train() -> None:
        results.append(start_run(config, tmp_path / "run"))
        results.append(resume_run(tmp_path / "run", overrides=["train.steps=7"]))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert [result.position.step for result in results] == [6, 7]
    assert latest_checkpoint(tmp_path / "run").name == "step-00000007"


@pytest.mark.parametrize("seed", [10**14, 2**63 - 1])
def test_large_seeds_train(tmp_path: Path, tiny_reason: list[str], seed: int) -> None:
    changes = ["train.state_loss={jacobian: 0.1}", "train.steps=2", "train.validate_every=1"]
    succeeds("train", "reason", *tiny_reason, *changes, "--seed", str(seed), "--out", tmp_path / "run")
    assert read_yaml(tmp_path / "run" / CONFIG)["train"]["seed"] == seed


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("train.seed=99999999999999999999", "train.seed"),
        (f"train.seed={2**63}", "train.seed"),
        ("train.seed=-1", "train.seed"),
        ("train.runtime.n_threads=100000", "train.runtime.n_threads"),
        ("train.runtime.n_threads=0", "train.runtime.n_threads"),
        ("train.n_workers=100000", "train.n_workers"),
        ("train.accumulate=1000000000", "train.accumulate"),
    ],
)
def test_sizes_that_cannot_be_had_are_refused_before_anything_is_written(
    tmp_path: Path, tiny_reason: list[str], change: str, key: str
) -> None:
    error = fails("train", "reason", *tiny_reason, change, "--out", tmp_path / "run")
    assert key in error
    assert change.partition("=")[2] in error
    assert not (tmp_path / "run").exists()


def test_train_says_what_it_is_at_and_from_which_step(tmp_path: Path, tiny_reason: list[str]) -> None:
    plan = ["train.plan={kind: uniform, low: 1, high: 3}", "train.runtime.precision=auto", "train.accumulate=2"]
    first = looplm("train", "reason", *tiny_reason, *plan, "--out", tmp_path / "run")
    at = [first.stdout.index(stage) for stage in ("starting", "reading the data", "trying what this machine", "loss ")]
    assert at == sorted(at)
    line = next(line for line in first.stderr.splitlines() if "100%" in line)
    assert "(1 loop " in line
    resumed = looplm("train", "--resume", tmp_path / "run", "--steps", "7").stdout
    assert "continuing from step 6" in resumed
