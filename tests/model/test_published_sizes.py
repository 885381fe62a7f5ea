"""Every published count, from code; nothing is allocated."""

import resource
import time

import pytest

from looplm.config import load_preset, parse, preset_names
from looplm.model.count import count
from looplm.model.looped import ModelConfig

PUBLISHED = {
    "nrm-0.9m": 920_833,
    "mythos-1b": 1_064_028_034,
    "mythos-3b": 3_041_725_186,
    "mythos-10b": 9_981_316_994,
    "mythos-50b": 50_374_247_426,
    "mythos-100b": 99_545_072_130,
    "mythos-500b": 497_849_137_154,
    "mythos-1t": 999_326_352_386,
    "osrt-v3": 104_537_600,
    "osrt-v3-hra": 115_744_256,
    "osrt-v4": 356_497_926,
}


def preset(name: str) -> ModelConfig:
    return parse(ModelConfig, load_preset("model", name), source=name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_number(name: str) -> None:
    assert count(preset(name)).parameters == PUBLISHED[name]


@pytest.mark.parametrize(("name", "millions"), [("nanochat-d12", 286), ("nanochat-d20", 897), ("nanochat-d26", 1680)])
def test_nanochat_sizes(name: str, millions: int) -> None:
    assert count(preset(name)).parameters / 1e6 == pytest.approx(millions, rel=0.005)


def test_active_parameters_leave_out_idle_experts() -> None:
    assert count(preset("osrt-v4")).active == 229_095_942
    assert count(preset("mythos-1b")).active / 1e6 == pytest.approx(309.1, abs=0.1)


def test_counting_a_trillion_parameters_is_quick_and_small() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    count(preset("mythos-1t"))
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


def test_every_preset_is_a_valid_config() -> None:
    for name in preset_names("model"):
        preset(name)
