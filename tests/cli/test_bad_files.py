"""Whatever a file holds that a command reads: one error that names the file."""

import os
import shutil
from pathlib import Path

import pytest

from commands import fails
from looplm.checkpoint import run_folder

BAD = {
    "empty": b"",
    "not UTF-8": b"a: \xff",
    "zero bytes": b"{\0}",
    "nested deep": b"[" * 20_000,
    "long number": b'{"a": ' + b"1" * 100_000 + b"}",
    "key twice": b'{"a": 1, "a": 2}',
    "a list": b"[1]",
    "cut short": b'{"a": [1,',
}
bad = pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())


@bad
def test_recipes_models_and_fields_of_an_original(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(data)
    for words in (["config", path], ["count", path], ["config", "reason", "--model", path]):
        assert "bad.yaml" in fails(*words)
    out = tmp_path / "out"
    assert "bad.yaml" in fails("import", "nanochat", tmp_path / "model_1.pt", "--out", out, "--config", path)
    assert not out.exists()


@bad
def test_questions(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_bytes(data)
    assert "questions.jsonl" in fails("eval", "builtin:reasoner", "--questions", path)


@bad
def test_files_of_a_run_and_of_prepared_text(data: bytes, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_folder("builtin:reasoner"), run)
    for name in ("exit.json", "origin.json"):
        (run / name).write_bytes(data)
    assert "exit.json" in fails("generate", run, "--prompt", "a", "--exit", "calibrated")
    assert "origin.json" in fails("export", run, "--to", "nanochat", "--out", tmp_path / "out")
    (run / "config.yaml").write_bytes(data)
    assert "config.yaml" in fails("generate", run, "--prompt", "a")
    (tmp_path / "manifest.json").write_bytes(data)
    said = fails("train", "pretrain", "--steps", "1", "--out", tmp_path / "new", f"data.folders={tmp_path}")
    assert "manifest.json" in said
    assert not (tmp_path / "new").exists()


def test_pipes_devices_and_folders_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("pipe", "zero", "folder"):
        path = tmp_path / f"{name}.yaml"
        assert path.name in fails("config", path)
        assert path.name in fails("eval", "builtin:reasoner", "--questions", path)


def test_a_question_that_cannot_be_text_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    good = '{"task": "a", "question": "b", "answer": "c"}\n'
    for answer in (r'"\ud800"', "[" * 1000 + "]" * 1000):
        path.write_text(f'{good}{{"task": "a", "question": "b", "answer": {answer}}}\n', encoding="utf-8")
        assert "line 2" in fails("eval", "builtin:reasoner", "--questions", path)
