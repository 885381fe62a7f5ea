"""Checkpoint files as the original systems write them."""

import json
import pickle
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

import looplm
from golden_files import Golden
from looplm.cli.app import app
from looplm.errors import CheckpointError, ConfigError
from looplm.hf.files import export_run, import_run, read_foreign


@pytest.fixture
def mythos_class(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class that pickles as OpenMythos's config does."""

    class MythosConfig:
        def __init__(self, **fields: Any) -> None:
            self.__dict__.update(fields)

    module = ModuleType("open_mythos.main")
    module.MythosConfig = MythosConfig  # type: ignore[attr-defined]
    MythosConfig.__module__, MythosConfig.__qualname__ = "open_mythos.main", "MythosConfig"
    monkeypatch.setitem(sys.modules, "open_mythos", ModuleType("open_mythos"))
    monkeypatch.setitem(sys.modules, "open_mythos.main", module)
    return MythosConfig


def same_logits(run: Path, golden: Golden) -> None:
    model = looplm.load(run)
    assert torch.equal(model(golden.ids).logits, golden.load()(golden.ids).logits)


def nanochat_folder(folder: Path, golden: Golden) -> Path:
    folder.mkdir()
    torch.save({"wrong": torch.zeros(1)}, folder / "model_000100.pt")
    torch.save(golden.weights, folder / "model_000200.pt")
    (folder / "meta_000200.json").write_text(json.dumps({"step": 200, "model_config": golden.config}))
    return folder


def test_nanochat_folder_and_back(tmp_path: Path) -> None:
    golden = Golden("nanochat_b")
    import_run("nanochat", nanochat_folder(tmp_path / "theirs", golden), out=tmp_path / "run")
    same_logits(tmp_path / "run", golden)
    path = export_run(looplm.load(tmp_path / "run"), tmp_path / "run", system="nanochat", out=tmp_path / "back")
    again = read_foreign("nanochat", path)
    assert again.config == golden.config
    assert all(torch.equal(again.state[name], tensor) for name, tensor in golden.weights.items())


@pytest.mark.parametrize("name", ["mythos_gqa", "mythos_mla"])
def test_openmythos_with_its_pickled_config(tmp_path: Path, mythos_class: type, name: str) -> None:
    golden = Golden(name)
    fields = {key: value for key, value in golden.config.items() if key != "note"}
    torch.save({"step": 3, "model": golden.weights, "cfg": mythos_class(**fields)}, tmp_path / "step_3.pt")
    sys.modules.pop("open_mythos.main")  # reading needs no module of theirs, nor does writing
    import_run("openmythos", tmp_path / "step_3.pt", out=tmp_path / "run")
    same_logits(tmp_path / "run", golden)
    path = export_run(looplm.load(tmp_path / "run"), tmp_path / "run", system="openmythos", out=tmp_path / "back")
    assert "open_mythos.main" not in sys.modules
    with torch.serialization.safe_globals([(mythos_class, "open_mythos.main.MythosConfig")]):
        held = torch.load(path, weights_only=True)
    assert vars(held["cfg"]) == fields
    tables = {"freqs_cis", "freqs_cis_mla", "head.weight"}  # what they expect beside what is learned
    assert held["model"].keys() == golden.weights.keys() | tables
    position, pair = 5, 1
    angle = held["model"]["freqs_cis"][position, pair].angle().item()
    head_dim = fields["dim"] // fields["n_heads"]
    assert angle == pytest.approx(position * fields["rope_theta"] ** (-2 * pair / head_dim), rel=1e-4)
    import_run("openmythos", path, out=tmp_path / "again")
    same_logits(tmp_path / "again", golden)


@pytest.mark.parametrize("name", ["mythos_gqa", "mythos_mla"])
def test_a_bare_openmythos_state_dict_tells_its_config(tmp_path: Path, name: str) -> None:
    golden = Golden(name)
    config = golden.config
    head_dim = config["dim"] // config["n_heads"]
    angles = torch.outer(
        torch.arange(config["max_seq_len"]).double(),
        config["rope_theta"] ** -(torch.arange(0, head_dim, 2).double() / head_dim),
    )
    tables = {"freqs_cis": torch.polar(torch.ones_like(angles), angles).to(torch.complex64)}
    torch.save(golden.weights | tables, tmp_path / "bare.pt")
    found = read_foreign("openmythos", tmp_path / "bare.pt").config
    for key, value in found.items():
        assert value == config[key] or value == pytest.approx(config[key], rel=1e-4), key
    import_run("openmythos", tmp_path / "bare.pt", out=tmp_path / "run", config={"rope_theta": config["rope_theta"]})
    same_logits(tmp_path / "run", golden)


@pytest.mark.parametrize("is_wrapped", [False, True])
@pytest.mark.parametrize("name", ["osrt_v3_hra", "osrt_v4"])
def test_osrt_bare_and_wrapped(tmp_path: Path, name: str, is_wrapped: bool) -> None:
    golden = Golden(name)
    held: dict[str, Any] = golden.weights
    if is_wrapped:
        held = {"model_state_dict": golden.weights, "training_stage": "sft", "total_steps": 3}
    torch.save(held, tmp_path / "osrt100m_step_3.pt")
    import_run("osrt", tmp_path, out=tmp_path / "run", config=golden.config)
    same_logits(tmp_path / "run", golden)
    path = export_run(looplm.load(tmp_path / "run"), tmp_path / "run", system="osrt", out=tmp_path / "back")
    assert torch.load(path, weights_only=True).keys() == golden.weights.keys()


def test_osrt_shapes_tell_all_but_what_every_release_shares() -> None:
    from looplm.hf.osrt import config_of_shapes

    for name in ("osrt_v3_hra", "osrt_v4"):
        golden = Golden(name)
        found = config_of_shapes(golden.weights)
        shared = {"heads", "head_dim", "seq_len", "max_position_embeddings", "adapter_alpha", "real_vocab_size"}
        for key, value in found.items():
            if key not in shared and key in golden.config:
                assert value == golden.config[key], key


def test_safetensors_are_read_too(tmp_path: Path) -> None:
    golden = Golden("osrt_v4")
    save_file(golden.weights, tmp_path / "model.safetensors")
    import_run("osrt", tmp_path / "model.safetensors", out=tmp_path / "run", config=golden.config)
    same_logits(tmp_path / "run", golden)


class Evil:
    """Runs a command when unpickled by a careless loader."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('a stranger ran code')",))


def test_files_that_are_not_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"model": Evil()}))
    torch.save({"model": SimpleNamespace(a=1)}, tmp_path / "object.pt")
    torch.save(Golden("osrt_v4").weights, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:3000])
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("evil.pt", "object.pt", "cut.pt", "empty.pt"):
        with pytest.raises(CheckpointError, match="cannot be read as weights"):
            read_foreign("osrt", tmp_path / name)
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no Nano-OSRT weights"):
        read_foreign("osrt", tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        read_foreign("osrt", tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no model_\*\.pt"):
        read_foreign("nanochat", tmp_path / "folder")
    torch.save({"a": torch.zeros(2)}, tmp_path / "folder" / "model_000001.pt")
    with pytest.raises(CheckpointError, match=r"meta_000001\.json is missing"):
        read_foreign("nanochat", tmp_path / "folder")


def test_a_run_goes_back_only_where_it_came_from(tmp_path: Path) -> None:
    golden = Golden("nanochat_a")
    import_run("nanochat", nanochat_folder(tmp_path / "theirs", golden), out=tmp_path / "run")
    model = looplm.load(tmp_path / "run")
    with pytest.raises(CheckpointError, match="came from nanochat"):
        export_run(model, tmp_path / "run", system="osrt", out=tmp_path / "back")
    with pytest.raises(ConfigError, match="already holds a run"):
        import_run("nanochat", tmp_path / "theirs", out=tmp_path / "run")


def test_the_commands(tmp_path: Path) -> None:
    golden = Golden("nanochat_a")
    theirs = nanochat_folder(tmp_path / "theirs", golden)
    run = str(tmp_path / "run")
    runner = CliRunner()
    done = runner.invoke(app, ["import", "nanochat", str(theirs), "--out", run])
    assert done.exit_code == 0, done.output
    assert "parameters of nanochat" in done.output
    done = runner.invoke(app, ["export", run, "--to", "nanochat", "--out", str(tmp_path / "back")])
    assert done.exit_code == 0, done.output
    weights: dict[str, Tensor] = torch.load(tmp_path / "back" / "model_000200.pt", weights_only=True)
    assert weights.keys() == golden.weights.keys()
    done = runner.invoke(app, ["count", run, "--loops", "1"])
    assert done.exit_code == 0, done.output
