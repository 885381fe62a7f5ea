"""Import and export give back what the original wrote: types and steps, from any form of file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import looplm
from commands import fails, succeeds
from golden_files import SYSTEM_OF, Golden
from looplm.checkpoint import MARKER, MODEL
from looplm.errors import CheckpointError, FolderError
from looplm.hf.files import EXACT, ORIGIN, export_run, import_run, read_foreign

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn)


def mixed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of all types; those of fp64 hold numbers that fp32 has not."""
    state = {name: tensor.to(TYPES[number % len(TYPES)]) for number, (name, tensor) in enumerate(weights.items())}
    return {name: t + 1e-12 if t.dtype == torch.float64 else t for name, t in state.items()}


def written(folder: Path, golden: Golden, state: dict[str, Tensor], *, form: str, step: int) -> Path:
    """A checkpoint as its system or Hugging Face writes it."""
    folder.mkdir()
    if form == "safetensors":
        save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(golden.config))
        return folder / "model.safetensors"
    if golden.system == "nanochat":
        meta = {"step": step, "val_bpb": 0.75, "model_config": golden.config}
        (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
        torch.save(state, folder / f"model_{step:06d}.pt")
        return folder
    if golden.system == "openmythos":
        torch.save({"model": state, "cfg": golden.config, "step": step}, folder / f"step_{step:07d}.pt")
    else:
        torch.save({"model_state_dict": state, "total_steps": 9}, folder / f"osrt100m_step_{step}.pt")
        (folder / "config.json").write_text(json.dumps(golden.config))
    return folder


@pytest.mark.parametrize("form", ["pt", "safetensors"])
@pytest.mark.parametrize("name", SYSTEM_OF)
def test_types_and_steps_survive_a_round_trip_bit_for_bit(tmp_path: Path, name: str, form: str) -> None:
    golden = Golden(name)
    state, run = mixed(golden.weights), tmp_path / "run"
    theirs = written(tmp_path / "theirs", golden, state, form=form, step=1234567)
    import_run(golden.system, theirs, out=run)
    path = export_run(looplm.load(run), run, system=golden.system, out=tmp_path / "back")
    held = read_foreign(golden.system, path).state
    for back in (held, load_file(tmp_path / "back" / MODEL)):
        for key, tensor in state.items():
            assert back[key].dtype == tensor.dtype, key
            one, other = (t.contiguous().reshape(-1).view(torch.uint8) for t in (back[key], tensor))
            assert torch.equal(one, other), key
    if form == "pt":
        assert "1234567" in path.name
    for again in (path, tmp_path / "back" / MODEL):
        found = read_foreign(golden.system, again)
        assert (found.step or 0) == (1234567 if form == "pt" else 0)
        assert found.config.items() >= golden.config.items()


def test_what_a_nanochat_meta_file_says_beside_the_config_survives(tmp_path: Path) -> None:
    golden = Golden("nanochat_a")
    theirs = written(tmp_path / "theirs", golden, golden.weights, form="pt", step=10)
    import_run("nanochat", theirs, out=tmp_path / "run")
    export_run(looplm.load(tmp_path / "run"), tmp_path / "run", system="nanochat", out=tmp_path / "back")
    meta, before = (json.loads((tmp_path / x / "meta_000010.json").read_text()) for x in ("back", "theirs"))
    assert meta == before


def test_a_run_that_was_imported_before_types_were_kept_is_exported_in_fp32(tmp_path: Path) -> None:
    golden = Golden("nanochat_a")
    run = tmp_path / "run"
    import_run("nanochat", written(tmp_path / "theirs", golden, golden.weights, form="pt", step=10), out=run)
    (run / ORIGIN).write_text(json.dumps({"system": "nanochat", "config": golden.config}))
    (run / MARKER).unlink()
    path = export_run(looplm.load(run), run, system="nanochat", out=tmp_path / "back")
    assert path.name == "model_000000.pt"
    assert all(torch.equal(torch.load(path, weights_only=True)[name], t) for name, t in golden.weights.items())


def test_weights_that_were_changed_since_are_the_ones_that_are_exported(tmp_path: Path) -> None:
    golden = Golden("nanochat_a")
    state = {name: tensor.double() + 1e-12 for name, tensor in golden.weights.items()}
    run = tmp_path / "run"
    import_run("nanochat", written(tmp_path / "theirs", golden, state, form="pt", step=10), out=run)
    assert (run / EXACT).is_file()
    model = looplm.load(run)
    with torch.no_grad():
        model.embed.weight += 1
    back = torch.load(export_run(model, run, system="nanochat", out=tmp_path / "back"), weights_only=True)
    name = "transformer.wte.weight"
    assert torch.equal(back[name], (golden.weights[name] + 1).double())
    assert torch.equal(back["lm_head.weight"], state["lm_head.weight"])


@pytest.mark.parametrize(
    ("system", "names"),
    [
        ("openmythos", ["step_200.pt", "step_1000.pt"]),
        ("osrt", ["osrt100m_step_50000.pt", "osrt100m_step_150000.pt"]),
        ("nanochat", ["model_999999.pt", "model_1000000.pt"]),
        ("osrt", ["step_9.safetensors", "step_10.safetensors"]),
    ],
)
def test_the_newest_of_a_folder_is_that_of_the_most_steps(tmp_path: Path, system: str, names: list[str]) -> None:
    golden = Golden({"openmythos": "mythos_gqa", "osrt": "osrt_v3_hra", "nanochat": "nanochat_a"}[system])
    for number, name in enumerate(names):
        state = {key: torch.full_like(tensor, float(number)) for key, tensor in golden.weights.items()}
        path = tmp_path / name
        save_file(state, path) if path.suffix == ".safetensors" else torch.save({"model": state}, path)
        meta = path.with_name(path.name.replace("model_", "meta_")).with_suffix(".json")
        meta.write_text(json.dumps({"model_config": golden.config}))
    (tmp_path / "config.json").write_text(json.dumps(golden.config))
    found = read_foreign(system, tmp_path, config=golden.config)
    assert all(bool((tensor == 1).all()) for tensor in found.state.values())
    assert found.step == int("".join(c for c in names[1].rpartition("_")[2] if c.isdigit()))


def test_what_was_imported_and_exported_has_checksums(tmp_path: Path) -> None:
    golden = Golden("nanochat_a")
    run, back = tmp_path / "run", tmp_path / "back"
    import_run("nanochat", written(tmp_path / "theirs", golden, golden.weights, form="pt", step=3), out=run)
    path = export_run(looplm.load(run), run, system="nanochat", out=back)
    for file in (path, back / "meta_000003.json", back / MODEL):
        content = file.read_bytes()
        file.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
        with pytest.raises(CheckpointError, match=rf"{file} is damaged"):
            read_foreign("nanochat", back if file.suffix != ".safetensors" else file)
        file.write_bytes(content)
    content = (run / MODEL).read_bytes()
    (run / MODEL).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    assert f"{run / MODEL} is damaged" in fails("export", run, "--to", "nanochat", "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("command", ["import", "export"])
def test_nothing_is_written_over_and_nothing_half_made_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    golden = Golden("nanochat_a")
    theirs = written(tmp_path / "theirs", golden, golden.weights, form="pt", step=3)
    import_run("nanochat", theirs, out=tmp_path / "run")
    run = tmp_path / "run"
    words = ["import", "nanochat", theirs] if command == "import" else ["export", run, "--to", "nanochat"]
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert "is not empty (it holds 'thesis.txt')" in fails(*words, "--out", out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    assert (out / "thesis.txt").read_text() == "mine"

    def make(place: Path) -> None:
        if command == "import":
            import_run("nanochat", theirs, out=place)
        else:
            export_run(looplm.load(run), run, system="nanochat", out=place)

    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):

        def stop(*args: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr("looplm.hf.files.write_text", stop)
        with pytest.raises((KeyboardInterrupt, FolderError)):
            make(tmp_path / "new")
        assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    (tmp_path / "new" / ".partial").mkdir(parents=True)  # of a process that was killed
    (tmp_path / "new" / ".partial" / MODEL).write_bytes(b"half")
    succeeds(*words, "--out", tmp_path / "new")
    assert not (tmp_path / "new" / ".partial").exists()
