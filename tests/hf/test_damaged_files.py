"""Checkpoints of other systems that hold something else than they should: one line that names the file."""

import json
import os
import pickle
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import looplm
from commands import fails
from golden_files import Golden
from looplm.errors import CheckpointError
from looplm.hf.files import ORIGIN, export_run, import_run, read_foreign

DEEP = "[" * 100_000
JSON_FILES = [
    *(
        '{"model_config": {"n_lay',
        "",
        "null",
        "[]",
        "3",
        '"text"',
        "{}",
        '{"model_config": 3}',
        '{"model_config": null}',
    ),
    *(DEEP, '{"model_config": ' + DEEP, '{"model_config": {"n_layer": ' + "9" * 5000 + "}}", "\ud83d", "\x00", "nan"),
]


class Runs:
    """Runs a command when unpickled by a careless loader."""

    def __init__(self, function: Callable[..., object]) -> None:
        self.function = function

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (self.function, ("exit 7",))


@pytest.mark.parametrize("number", range(len(JSON_FILES)))
def test_a_meta_file_that_is_no_config_is_named(tmp_path: Path, number: int) -> None:
    torch.save(Golden("nanochat_a").weights, tmp_path / "model_000010.pt")
    meta = tmp_path / "meta_000010.json"
    meta.write_bytes(JSON_FILES[number].encode("utf-8", "surrogatepass"))
    error = fails("import", "nanochat", tmp_path, "--out", tmp_path / "run")
    assert str(meta) in error or "layers" in error or "lacks" in error
    assert len(error) < 1500
    assert not (tmp_path / "run").exists()


def test_a_config_option_and_an_origin_that_are_no_config_are_named(tmp_path: Path) -> None:
    golden = Golden("nanochat_a")
    torch.save(golden.weights, tmp_path / "model_000010.pt")
    (tmp_path / "meta_000010.json").write_text(json.dumps({"model_config": golden.config}))
    run = tmp_path / "run"
    import_run("nanochat", tmp_path, out=run)
    (run / "COMPLETE").unlink()
    model, origin, wrong = looplm.load(run), run / ORIGIN, tmp_path / "wrong.json"
    for text in [*JSON_FILES, '{"system": "nanochat"}', '{"system": "nanochat", "config": {}, "dtypes": 3}']:
        data = text.encode("utf-8", "surrogatepass")
        wrong.write_bytes(data)
        if text in JSON_FILES[:6]:
            error = fails("import", "nanochat", tmp_path, "--out", tmp_path / "other", "--config", wrong)
            assert str(wrong) in error or "the nanochat config" in error
        origin.write_bytes(data)
        with pytest.raises(CheckpointError, match=ORIGIN):
            export_run(model, run, system="nanochat", out=tmp_path / "back")
        assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("function", [os.system, eval, print])
def test_the_error_for_a_pickle_that_runs_code_does_not_advise_to_run_it(
    tmp_path: Path, function: Callable[..., object]
) -> None:
    torch.save({"model": Runs(function)}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"model": Runs(function)}, protocol=2))
    for name in ("zip.pt", "plain.pt"):
        error = fails("import", "osrt", tmp_path / name, "--out", tmp_path / "run")
        assert f"{tmp_path / name} cannot be read as weights: it holds " in error
        assert function.__name__ in error
        for advice in ("weights_only", "trust", "safe_globals", "torch.load"):
            assert advice not in error


def test_an_unknown_system_is_said_before_the_file_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "cut.pt").write_bytes(b"cut")
    for words in (
        ["import", "nanochatt", tmp_path / "cut.pt", "--out", tmp_path / "run"],
        ["import", "nanochatt", tmp_path / "nowhere", "--config", tmp_path / "nowhere", "--out", tmp_path / "run"],
        ["export", tmp_path / "nowhere", "--to", "nanochatt", "--out", tmp_path / "run"],
    ):
        error = fails(*words)
        assert "unknown system 'nanochatt'; did you mean 'nanochat'? Systems: nanochat, openmythos, osrt." in error
    assert "unknown system 'foo'" in fails("import", "foo", tmp_path / "cut.pt", "--out", tmp_path / "run")


def test_bytes_changed_at_random_are_one_line_or_still_weights(tmp_path: Path) -> None:
    weights = Golden("osrt_v3_hra").weights
    save_file(weights, tmp_path / "a.safetensors")
    torch.save({"model": weights, "cfg": {"a": 1}}, tmp_path / "a.pt")
    rng = random.Random(0)
    for name in ("a.safetensors", "a.pt"):
        for _ in range(40):
            content = bytearray((tmp_path / name).read_bytes())
            for _ in range(rng.choice([1, 3, 20])):
                content[rng.randrange(3000)] = rng.randrange(256)
            path = tmp_path / f"changed{Path(name).suffix}"
            path.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
            with suppress(CheckpointError):
                read_foreign("osrt", path)


@pytest.mark.parametrize(
    "held", [[1, 2], 3, {"model": {}}, {"model": {"a": "text"}}, {"cfg": 3}, {"model": {"a": torch.tensor([1])}}]
)
def test_files_of_other_things_are_named(tmp_path: Path, held: object) -> None:
    torch.save(held, tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in fails("import", "openmythos", tmp_path / "x.pt", "--out", tmp_path / "run")
