"""Files that a disk or a copy has damaged are noticed by whatever reads them, with the checkpoint to go back to."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import looplm
from commands import fails
from looplm.checkpoint import (
    AVERAGE,
    MARKER,
    MODEL,
    STATE,
    TRAINING,
    checkpoints,
    load_checkpoint,
    load_run,
    run_folder,
    save_checkpoint,
)
from looplm.checksums import _say_unchecked, find_damage, write_checksums
from looplm.errors import CheckpointError
from looplm.model.looped import LoopedLM
from looplm.optim.groups import OptimizerConfig, make_optimizers
from looplm.train.average import average_checkpoints
from looplm.train.run import resolve_run, resume_run, start_run

FILES = (MODEL, AVERAGE, TRAINING, STATE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with two checkpoints."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    overrides = [
        "model.d_model=32",
        "model.block.attention={kind: gqa, n_heads: 2, n_kv_heads: 2, head_dim: 16}",
        "model.block.ffn.d_ff=32",
        "data.n_rows=2",
        *("train.minutes=null", "train.steps=4", "train.ema=0.5", "train.checkpoint_steps=2", "train.keep=3"),
        *("train.n_workers=0", "train.runtime={device: cpu, precision: fp32, compile: false, n_threads: 1}"),
    ]
    start_run(resolve_run("reason", overrides=overrides), folder)
    assert len(checkpoints(folder)) == 2
    return folder


@pytest.fixture
def run(tmp_path: Path, trained: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def flip(path: Path, *, at: int | None = None) -> None:
    """Change one bit, in the middle where nothing is said."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_noticed_by_load_and_resume(run: Path, name: str) -> None:
    earlier, newest = checkpoints(run)
    flip(newest / name)
    says = rf"{newest / name} is damaged: its checksum.*delete {newest} to go back to {earlier.name}"
    with pytest.raises(CheckpointError, match=says):
        looplm.load(run)
    with pytest.raises(CheckpointError, match=says):
        resume_run(run, overrides=["train.steps=6"])
    shutil.rmtree(newest)
    looplm.load(run)


def test_a_flipped_bit_is_noticed_by_every_command_that_reads_weights(run: Path, tmp_path: Path) -> None:
    newest = checkpoints(run)[-1]
    flip(newest / TRAINING)
    damaged = f"{newest / TRAINING} is damaged"
    assert damaged in fails("generate", run, "--prompt", "What is 1 + 1?")
    assert damaged in fails("eval", run, "--n", "1")
    assert damaged in fails("calibrate", run)
    assert damaged in fails("average", run, "--out", tmp_path / "mean")
    assert damaged in fails("train", "--resume", run, "--steps", "9")
    assert damaged in fails("chat", run, text="What is 1 + 1?\n")
    assert not (tmp_path / "mean").exists()


def test_an_earlier_checkpoint_that_is_damaged_too_is_not_recommended(run: Path) -> None:
    earlier, newest = checkpoints(run)
    for path in (earlier, newest):
        flip(path / MODEL)
    with pytest.raises(CheckpointError, match=rf"{newest / MODEL} is damaged.*retrain it$"):
        looplm.load(run)


@pytest.mark.parametrize("at", [0, 50, -70, -2])
def test_a_damaged_list_of_checksums_is_said_to_be_damaged(run: Path, at: int) -> None:
    newest = checkpoints(run)[-1]
    flip(newest / MARKER, at=at)
    with pytest.raises(CheckpointError, match=rf"{newest / MARKER} is damaged"):
        looplm.load(run)


def test_a_list_of_checksums_cut_short_is_damaged_and_an_empty_one_is_from_before(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    marker = checkpoints(run)[-1] / MARKER
    marker.write_bytes(marker.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match="COMPLETE is damaged"):
        looplm.load(run)
    marker.write_bytes(b"")
    _say_unchecked.cache_clear()
    for _ in range(2):
        looplm.load(run)
    said = [record.getMessage() for record in caplog.records if "no checksums" in record.getMessage()]
    assert said == [f"{marker} holds no checksums: the folder was written before there were any, and is not checked"]
    resume_run(run, overrides=["train.steps=5"])


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_of_a_checkpoint_is_named(run: Path, name: str) -> None:
    (checkpoints(run)[-1] / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        resume_run(run, overrides=["train.steps=6"])


def test_weights_that_were_not_written_with_the_checkpoint_are_not_read(tmp_path: Path, run: Path) -> None:
    newest = checkpoints(run)[-1]
    shutil.copy(newest / MODEL, newest / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors was not written with the others"):
        looplm.load(run)
    (newest / "other.safetensors").unlink()
    (newest / ".DS_Store").write_bytes(b"not ours")
    looplm.load(run)


def test_a_file_that_grew_is_noticed(run: Path) -> None:
    state = checkpoints(run)[-1] / STATE
    state.write_bytes(state.read_bytes() + b"\n")
    with pytest.raises(CheckpointError, match=r"state\.json has .* bytes, and .* were written"):
        looplm.load(run)


def test_averaged_weights_have_checksums_and_their_sources_are_checked(run: Path, tmp_path: Path) -> None:
    average_checkpoints(run, tmp_path / "mean", n=2)
    assert sorted(path.name for path in (tmp_path / "mean").iterdir()) == [MARKER, "config.yaml", MODEL]
    assert find_damage(tmp_path / "mean" / MARKER) is None
    flip(tmp_path / "mean" / MODEL)
    with pytest.raises(CheckpointError, match=rf"{tmp_path / 'mean' / MODEL} is damaged"):
        looplm.load(tmp_path / "mean")
    first = checkpoints(run)[0]
    flip(first / MODEL)
    with pytest.raises(CheckpointError, match=rf"{first / MODEL} is damaged"):
        average_checkpoints(run, tmp_path / "other", n=2)
    assert not (tmp_path / "other").exists()


def test_the_config_of_averaged_weights_is_copied_as_bytes(run: Path, tmp_path: Path) -> None:
    config = run / "config.yaml"
    config.write_bytes("# größer\r\n".encode() + config.read_bytes())
    average_checkpoints(run, tmp_path / "mean", n=2)
    assert (tmp_path / "mean" / "config.yaml").read_bytes() == config.read_bytes()


def test_the_built_in_models_have_checksums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("reasoner", "reasoner-deep"):
        folder = run_folder(f"builtin:{name}")
        assert (folder / MARKER).read_bytes()
        assert find_damage(folder / MARKER) is None
    copy = shutil.copytree(run_folder("builtin:reasoner"), tmp_path / "copy")
    flip(copy / MODEL)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_run(copy)


def test_a_run_without_checksums_beside_its_weights_is_read(tmp_path: Path, run: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / "config.yaml", bare)
    shutil.copy(checkpoints(run)[-1] / MODEL, bare)
    looplm.load(bare)


def test_shards_are_checked_file_by_file(tmp_path: Path, make_model: Callable[..., LoopedLM]) -> None:
    def save(step: int) -> Path:
        model = make_model()
        optimizers = make_optimizers(model, OptimizerConfig())
        model(torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        state = {"step": step}
        return save_checkpoint(
            tmp_path, step=step, model=model, optimizers=optimizers, state=state, keep=2, is_sharded=True
        )

    first, second = save(1), save(2)
    model = make_model()
    load_checkpoint(tmp_path, model=model, optimizers=make_optimizers(model, OptimizerConfig()))
    (shard,) = (second / "training.shards").iterdir()
    flip(shard)
    with pytest.raises(CheckpointError, match=rf"{shard} is damaged.*go back to {first.name}"):
        load_checkpoint(tmp_path, model=model, optimizers=make_optimizers(model, OptimizerConfig()))


def test_checkpoints_are_ordered_by_their_step_as_a_number(tmp_path: Path, make_model: Callable[..., LoopedLM]) -> None:
    model = make_model()
    for step in (99_999_999, 100_000_000):
        save_checkpoint(tmp_path, step=step, model=model, optimizers=[], state={"step": step}, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-99999999", "step-100000000"]


def test_checksums_find_what_changed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    write_checksums(tmp_path / MARKER, ["a", "b"])
    assert find_damage(tmp_path / MARKER) is None
    (tmp_path / "b").write_bytes(b"tWo")
    damage = find_damage(tmp_path / MARKER)
    assert damage is not None
    assert damage.path == tmp_path / "b"
    assert find_damage(tmp_path / MARKER, only=["a"]) is None
