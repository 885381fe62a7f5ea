"""What the stages of recipes/modal_app.py run; Modal itself is neither needed nor imported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from typer.testing import CliRunner

from looplm.cli.app import app
from looplm.config import PRESETS
from looplm.train.run import resolve_run

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def stages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("modal_stages", RECIPES / "modal_stages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["modal_stages"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def test_pretraining_prepares_without_a_gpu_and_trains_with_torchrun(stages: ModuleType) -> None:
    found = stages.stage("pretrain", n_gpus=8)
    assert [command[-1] for command in found.on_cpu] == ["tokenizer", "data"]
    (train,), (resumed,) = found.on_gpu, found.resumed
    torchrun = ["torchrun", "--standalone", "--nproc-per-node=8", "--shutdown-timeout=900", "-m", "looplm", "train"]
    assert train == [*torchrun, "pretrain-osrt-v4", "train.accumulate=8", "--out", stages.RUN]
    assert resumed == [*torchrun, "--resume", stages.RUN]


@pytest.mark.parametrize("n_gpus", [1, 2, 3, 8, 16])
def test_any_number_of_gpus_shares_a_step(stages: ModuleType, n_gpus: int) -> None:
    (train,) = stages.stage("pretrain", n_gpus=n_gpus).on_gpu
    config = resolve_run("pretrain-osrt-v4", overrides=[word for word in train if word.startswith("train.")])
    assert config.train.accumulate >= 8
    assert config.train.accumulate % n_gpus == 0


def test_evaluation_is_a_command_that_looplm_has(stages: ModuleType) -> None:
    found = stages.stage("eval")
    (scores,) = found.on_gpu
    assert found.resumed == [scores]  # the run has begun
    said = CliRunner().invoke(app, ["eval", "--help"], env={"COLUMNS": "200"}).stdout
    assert scores[:3] == ["looplm", "eval", stages.RUN]
    assert all(word in said for word in scores if word.startswith("--"))


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_what_does_not_exist_is_said_before_anything_starts(stages: ModuleType, name: str) -> None:
    with pytest.raises(SystemExit, match="does not exist in looplm yet, nothing was started; there is tokenizer, pre"):
        stages.stage(name)
    with pytest.raises(SystemExit, match="no stage 'sleep'; stages: tokenizer, pretrain"):
        stages.stage("sleep")


def test_the_app_without_modal_says_what_to_install() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['modal'] = None; import modal_app"],
        cwd=RECIPES,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == "error: recipes/modal_app.py needs modal: pip install modal==1.6.4, then modal setup\n"


def test_the_script_makes_every_folder_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "looplm").write_text('#!/usr/bin/env bash\necho "$@" >> log.txt\n')
    (tmp_path / "looplm").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = {}
    for words in (["tokenizer"], ["data"], []):
        subprocess.run(["bash", str(RECIPES / "osrt-v4-data.sh"), *words], cwd=tmp_path, env=environment, check=True)
        said[" ".join(words)] = (tmp_path / "log.txt").read_text().splitlines()
        (tmp_path / "log.txt").unlink()
    assert len(said["tokenizer"]) == 1
    assert said["tokenizer"][0].startswith("tokenizer train --vocab 65536 --out prepared/tokenizer hub:")
    assert sorted(said[""]) == sorted(said["tokenizer"] + said["data"])
    data = yaml.safe_load((PRESETS / "run" / "pretrain-osrt-v4.yaml").read_text())["data"]
    wanted = {name for phase in (data, *data["phases"]) for name in phase.get("folders", {})}
    assert {line.split()[-1] for line in said["data"]} == wanted
