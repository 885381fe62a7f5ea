"""What `generate`, `chat` and the commands that score answers say to odd weights, texts and numbers."""

from pathlib import Path

import pytest
import torch

from bare_runs import bare_run, tiny
from commands import fails, looplm
from looplm.model.looped import LoopedLM

SUM = "What is 4 + 7?"


def damaged(model: LoopedLM, value: float) -> LoopedLM:
    """One number of the final norm's weight is `value`."""
    with torch.no_grad():
        model.norm.weight[3] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "words",
    [
        ["generate", "{}", "--prompt", SUM],
        ["generate", "{}", "--prompt", SUM, "--temperature", "0.7", "--top-k", "3"],
        ["generate", "{}", "--prompt", SUM, "--draft", "1"],
        ["generate", "{}", "--prompt", SUM, "--exit", "latent:0.1"],
        ["eval", "{}", "--n", "1"],
        ["eval", "{}", "--suite", "loops", "--n", "1"],
        ["calibrate", "{}", "--n", "10", "--max-loss", "0.9"],
    ],
    ids=" ".join,
)
def test_a_reasoner_with_damaged_weights_is_refused_by_name(words: list[str], value: float, tmp_path: Path) -> None:
    run = bare_run(tmp_path / "run", damaged(tiny(), value), data={"kind": "reasoning"})
    said = fails(*(word.format(run) for word in words))
    assert f"run {run!r} gives logits that are not finite" in said


@pytest.mark.parametrize("words", [["eval", "{}", "--n", "5"], ["eval", "{}", "--n", "5", "--exit", "latent"]])
def test_a_staircase_with_damaged_weights_is_refused_by_name(words: list[str], tmp_path: Path) -> None:
    model = damaged(tiny(vocab_size=7, n_outputs=6, tied_head=False), float("nan"))
    run = bare_run(tmp_path / "run", model, data={"kind": "permutations"})
    said = fails(*(word.format(run) for word in words), "--lengths", "4", "--loops", "2")
    assert f"run {run!r} gives logits that are not finite" in said


def test_a_model_of_text_with_damaged_weights_is_refused_by_name(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat. " * 100)
    model = damaged(tiny(vocab_size=256), float("nan"))
    run = bare_run(tmp_path / "run", model, data={"kind": "bytes", "path": str(text), "n_rows": 2, "row_len": 16})
    for words in (["generate", run, "--prompt", "The"], ["eval", run]):
        assert f"run {run!r} gives logits that are not finite" in fails(*words)


def test_a_chat_with_damaged_weights_says_so_to_every_question(tmp_path: Path) -> None:
    run = bare_run(tmp_path / "run", damaged(tiny(), float("nan")), data={"kind": "reasoning"})
    done = looplm("chat", run, text=f"{SUM}\n{SUM}\n")
    assert done.returncode == 0
    assert done.stdout.count(f"error: run {run!r} gives logits that are not finite") == 2
