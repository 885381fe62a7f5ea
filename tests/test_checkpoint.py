import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import looplm
from looplm import checkpoint
from looplm.checkpoint import (
    MARKER,
    MODEL,
    checkpoints,
    latest_checkpoint,
    load,
    load_checkpoint,
    load_run,
    load_weights,
    read_state,
    run_folder,
    save_checkpoint,
    save_weights,
)
from looplm.config import to_yaml
from looplm.errors import CheckpointError, TrainingError
from looplm.model.looped import LoopedLM
from looplm.optim.groups import OptimizerConfig, make_optimizers
from looplm.train.run import RunConfig, resolve_run, start_run


def stepped(model: LoopedLM) -> list[torch.optim.Optimizer]:
    optimizers = make_optimizers(model, OptimizerConfig())
    model(torch.tensor([[1, 2, 3, 4]])).logits.square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    return optimizers


def write(folder: Path, model: LoopedLM, *, step: int, keep: int = 2) -> Path:
    return save_checkpoint(folder, step=step, model=model, optimizers=stepped(model), state={"step": step}, keep=keep)


@pytest.fixture
def run(tmp_path: Path, tiny_reason: list[str]) -> Path:
    """A trained run folder."""
    start_run(resolve_run("reason", overrides=tiny_reason), tmp_path / "run")
    return tmp_path / "run"


def test_a_checkpoint_restores_weights_optimizers_rng_and_state(
    tmp_path: Path, make_model: Callable[..., LoopedLM]
) -> None:
    model = make_model("smear={kind: channel, n_back: 1}", "inject.kind=diagonal")
    optimizers = stepped(model)
    torch.manual_seed(99)
    save_checkpoint(tmp_path, step=3, model=model, optimizers=optimizers, state={"a": 1}, keep=1)
    expected = torch.rand(3)
    other = make_model("smear={kind: channel, n_back: 1}", "inject.kind=diagonal", seed=5)
    restored = make_optimizers(other, OptimizerConfig())
    load_checkpoint(tmp_path, model=other, optimizers=restored)
    assert read_state(tmp_path) == {"a": 1}
    assert torch.equal(torch.rand(3), expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    ours, theirs = (checkpoint.optimizer_tensors(each) for each in (optimizers, restored))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert len(ours) > 2 * len(list(model.blocks()))


def test_only_the_newest_are_kept(tmp_path: Path, make_model: Callable[..., LoopedLM]) -> None:
    for step in (1, 2, 3, 20):
        write(tmp_path, make_model(), step=step, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003", "step-00000020"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_a_checkpoint_without_its_marker_does_not_count(tmp_path: Path, make_model: Callable[..., LoopedLM]) -> None:
    first, second = (write(tmp_path, make_model(), step=step) for step in (1, 2))
    (second / MARKER).unlink()
    assert latest_checkpoint(tmp_path) == first
    (first / MARKER).unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_file_cut_short_is_one_clear_error(run: Path, size: int) -> None:
    path = latest_checkpoint(run) / MODEL
    content = path.read_bytes()
    path.write_bytes(content[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut short or not a safetensors file"):
        load(run)


def test_weights_that_do_not_fit_are_listed_in_one_error(tmp_path: Path, make_model: Callable[..., LoopedLM]) -> None:
    model = make_model()
    save_weights(model, tmp_path / MODEL)
    tensors = load_file(tmp_path / MODEL)
    tensors.pop("norm.weight")
    tensors["embed.weight"] = tensors["embed.weight"][:5].clone()
    tensors["extra"] = torch.zeros(1)
    save_file(tensors, tmp_path / MODEL)
    with pytest.raises(CheckpointError, match=r"missing norm.weight; unexpected extra; embed.weight is \(5, 16\), not"):
        load_weights(model, tmp_path / MODEL)


def test_a_run_loads_for_inference_and_from_the_package_name(run: Path) -> None:
    model = looplm.load(run)
    assert not model.training
    logits = model(torch.tensor([[3, 4, 5]]), n_loops=2).logits
    assert logits.shape == (1, 3, 512)
    loaded = load_run(str(run))
    assert torch.equal(loaded.model(torch.tensor([[3, 4, 5]]), n_loops=2).logits, logits)
    assert RunConfig.model_validate(loaded.config).data.kind == "reasoning"


def test_bf16_weights_load_as_fp32(tmp_path: Path, run: Path) -> None:
    model = load(run)
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(resolve_run(str(run / "config.yaml"))))
    save_weights(model, folder / MODEL, dtype=torch.bfloat16)
    small = load(folder)
    assert small.embed.weight.dtype == torch.float32
    torch.testing.assert_close(small.embed.weight, model.embed.weight, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "says"),
    [("nowhere", "no run folder 'nowhere'"), ("builtin:nobody", "no built-in model 'builtin:nobody'")],
)
def test_runs_that_are_not_there_are_named(name: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        run_folder(name)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.yaml"):
        load(tmp_path)


def test_a_pickle_is_never_opened(run: Path) -> None:
    path = latest_checkpoint(run) / MODEL
    torch.save({"embed.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(run)


def test_a_failed_write_leaves_the_last_checkpoint_intact(
    tmp_path: Path, make_model: Callable[..., LoopedLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write(tmp_path, make_model(), step=1)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(TrainingError, match=r"No space left.*step-00000001, is intact"):
        write(tmp_path, make_model(), step=2)
    assert latest_checkpoint(tmp_path) == first
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real tmpfs of 500 kB where mounting is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=500k", "looplm-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs needs root; the same path runs above with a simulated full disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_stops_the_run_with_its_last_checkpoint_intact(small_disk: Path, tiny_reason: list[str]) -> None:
    # one checkpoint of this model takes about 320 kB: the second does not fit beside the first
    config = resolve_run("reason", overrides=[*tiny_reason, "train.checkpoint_steps=2", "train.keep=3"])
    with pytest.raises(TrainingError, match=r"is intact\. Free space and resume"):
        start_run(config, small_disk / "run")
    kept = checkpoints(small_disk / "run")
    assert [path.name for path in kept] == ["step-00000002"]
    load(small_disk / "run")
    assert json.loads((kept[0] / "state.json").read_text())["position"]["step"] == 2


def test_a_damaged_newest_checkpoint_names_the_one_before(tmp_path: Path, run: Path) -> None:
    from looplm.train.run import resume_run

    resume_run(run, overrides=["train.steps=8"])
    first, second = checkpoints(run)
    (second / MODEL).write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=rf"cut short.*delete .*{second.name} to go back to {first.name}"):
        load(run)
    (second / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"state\.json' cannot be read"):
        read_state(run)


def test_half_written_folders_are_cleared_at_the_next_checkpoint(
    tmp_path: Path, make_model: Callable[..., LoopedLM]
) -> None:
    for name in ("step-00000001.partial", "step-00000002"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    write(tmp_path, make_model(), step=3)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    checkpoint.write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match=r"No space left.*intact"):
        checkpoint.write_text(path, "new")
    assert path.read_text() == "old"
