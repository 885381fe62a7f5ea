"""Where results go: refused before the work, whole when it is done."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import fails, looplm, succeeds
from looplm.eval import loops, reasoning
from looplm.eval.interval import Score
from looplm.eval.loops import Dial, DialRow, StateAt

FEW = ("--n", "1", "--no-harder")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--suite loops --plot {tmp}/x.txt", "has to end in .png, .svg or .pdf"),
        ("--suite loops --plot {tmp}/x", "has to end in .png, .svg or .pdf"),
        ("--suite loops --plot {tmp}/none/x.png", "does not exist; make it first"),
        ("--suite loops --plot {tmp}/folder.png", "cannot be written"),
        ("--json {tmp}", "cannot be written"),
        ("--json {tmp}/none/x.json", "does not exist; make it first"),
        ("--suite reasonng", "did you mean 'reasoning'? Suites: reasoning, s3, loops."),
        ("--exit calibratd", "did you mean 'calibrated'?"),
        ("--device gpu", "cannot be used here; give cpu, cuda"),
        ("--dtype bf61", "did you mean 'bf16'?"),
    ],
)
def test_what_cannot_be_written_or_does_not_exist_is_refused_before_the_work(
    words: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*given: Any, **options: Any) -> Any:
        raise AssertionError("the work was begun")

    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(reasoning, "evaluate", work)
    monkeypatch.setattr(loops, "evaluate", work)
    assert says in fails("eval", "builtin:reasoner", *words.format(tmp=tmp_path).split())
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_a_plot_is_of_the_kind_that_its_name_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [DialRow(count, Score(9, 10), 0.1) for count in (1, 2, 4)]
    states = [StateAt(1, 1.0, None), StateAt(2, 1.0, 0.1), StateAt(3, 1.0, 0.05)]
    monkeypatch.setattr(loops, "measure_dial", lambda *given, **options: Dial(2, "questions", rows, states))
    for name, start in (("x.svg", b"<?xml"), ("x.PDF", b"%PDF"), ("x.png", b"\x89PNG")):
        succeeds("eval", "builtin:reasoner", "--suite", "loops", "--plot", tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)


def test_json_on_standard_output_stands_alone(tmp_path: Path) -> None:
    done = looplm("eval", "builtin:reasoner", *FEW, "--json", "-")
    assert json.loads(done.stdout)["suite"] == "reasoning"
    assert "cot_format" in done.stderr  # the table is still shown
    assert not Path("-").exists()
    path = tmp_path / "scores.json"
    assert f"wrote {path}" in succeeds("eval", "builtin:reasoner", *FEW, "--json", path)
    assert json.loads(path.read_text()) == json.loads(done.stdout)


def test_a_switch_takes_no_file() -> None:
    for words in (("count", "nrm-0.9m"), ("plan", "s3")):
        assert "--json is a switch here and takes no file: write --json > out.json" in fails(
            *words, "--json", "out.json"
        )


def test_a_report_is_html(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    for out, says in (("r.txt", "has to end in .html or .htm"), ("none/r.html", "does not exist; make it first")):
        assert says in fails("report", tmp_path, "--out", tmp_path / out)
    succeeds("report", tmp_path, "--out", tmp_path / "r.html")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_one_line() -> None:
    for words in (["generate", "--prompt", "1"], ["eval"], ["calibrate"], ["chat"]):
        verb, *more = words
        assert "device 'cuda' cannot be used here" in fails(verb, "builtin:reasoner", *more, "--device", "cuda")


def test_weights_of_another_type_answer_too() -> None:
    words = ("--prompt", "Is 7 even or odd?", "--dtype", "bf16", "--device", "auto")
    assert succeeds("generate", "builtin:reasoner", *words).splitlines()[-1] == "odd"
