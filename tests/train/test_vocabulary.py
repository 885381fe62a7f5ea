"""A model that trains on prepared text has its vocabulary, unless the user gives one."""

from pathlib import Path

import pytest

from looplm.config import to_yaml
from looplm.data.bpe import train_bpe
from looplm.data.prepare import PrepareConfig, prepare
from looplm.errors import ConfigError
from looplm.train.run import resolve_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    text = "the cat sat on the mat and the dog sat on the log. " * 20
    (tmp_path / "t.txt").write_text(text)
    config = PrepareConfig(sources=[str(tmp_path / "t.txt")], held_out=0)
    prepare(config, train_bpe([text], vocab_size=285), tmp_path / "p")
    return tmp_path / "p"


def test_the_vocabulary_of_prepared_text_need_not_be_given(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = resolve_run("pretrain", overrides=[f"data.folders={folder}"], on_choice=said.append)
    assert config.model.vocab_size == 285
    assert said == ["model.vocab_size=285, as the prepared text has"]
    mixed = [f"data.folders={{{folder}: 1}}", "model.d_model=64", "model.used_vocab=280"]
    assert resolve_run("pretrain", overrides=mixed).model.vocab_size == 285
    assert resolve_run("pretrain", overrides=mixed).model.used_vocab == 280
    rows = [f"data.folders={folder}", "data.phases=[]", "data.row_len=128"]
    used = resolve_run("pretrain-osrt-v4", overrides=rows, model="osrt-v4-tiny").model
    assert (used.vocab_size, used.used_vocab) == (285, None)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert resolve_run(str(tmp_path / "run.yaml"), on_choice=said.append) == config
    assert len(said) == 1


def test_a_vocabulary_that_is_given_stays(folder: Path, tmp_path: Path) -> None:
    text = f"data.folders={folder}"
    assert resolve_run("pretrain", overrides=[text, "model.vocab_size=300"]).model.vocab_size == 300
    (tmp_path / "model.yaml").write_text("base: looplm-text-4k\nvocab_size: 301\n")
    (tmp_path / "run.yaml").write_text(f"base: pretrain\nmodel: {tmp_path}/model.yaml\ndata: {{folders: {folder}}}\n")
    assert resolve_run("pretrain", overrides=[text], model=str(tmp_path / "model.yaml")).model.vocab_size == 301
    assert resolve_run(str(tmp_path / "run.yaml")).model.vocab_size == 301
    (tmp_path / "run.yaml").write_text(f"base: pretrain\nmodel: looplm-text-4k\ndata: {{folders: {folder}}}\n")
    assert resolve_run(str(tmp_path / "run.yaml")).model.vocab_size == 285


def test_text_that_is_not_prepared_yet_changes_nothing(tmp_path: Path) -> None:
    assert resolve_run("pretrain").model.vocab_size == 4096
    assert resolve_run("pretrain", overrides=[f"data.folders={tmp_path}/none"]).model.vocab_size == 4096
    with pytest.raises(ConfigError, match="data"):
        resolve_run("pretrain", overrides=["data.folders=[1]"])
