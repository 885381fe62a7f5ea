"""Sizes that the machine cannot have are refused before they are tried, and before anything is written."""

from pathlib import Path

import pytest

from commands import fails, succeeds
from looplm.model.memory import memory_bytes


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.d_model=40000000", "model.d_model 40000000"),
        ("model.vocab_size=2000000000", "model.vocab_size 2000000000"),
        ("model.block.ffn.d_ff=2000000000", "model.block.ffn.d_ff 2000000000"),
        ("data.n_rows=2000000000", "data.n_rows 2000000000"),
    ],
)
def test_training_refuses_what_memory_cannot_hold(override: str, key: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = fails("train", "reason", "--steps", "1", "--out", out, override)
    assert said.startswith(f"error: {key}: ")
    assert "GB" in said
    assert not out.exists()


def test_a_model_that_no_machine_holds_is_counted_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_text("base: looplm-text-1m\nd_model: 40000000\n", encoding="utf-8")
    assert "1,600,287,240,000,384 parameters" in succeeds("count", path)


def test_a_matrix_beyond_64_bits_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_text("base: looplm-text-1m\nd_model: 2147483647\n", encoding="utf-8")
    assert "too large to be counted" in fails("count", path)


def test_a_run_whose_config_names_impossible_sizes_is_not_tried(tmp_path: Path) -> None:
    config = succeeds("config", "text", "data.path=x", "model.d_model=40000000")
    (tmp_path / "config.yaml").write_text(config, encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "model.d_model 40000000" in fails("generate", tmp_path, "--prompt", "a")


def test_memory_is_known() -> None:
    assert memory_bytes() > 1 << 28
