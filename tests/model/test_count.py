import pytest
import torch

from conftest import tiny_config
from looplm.config import load_preset, parse
from looplm.model.count import count
from looplm.model.looped import LoopedLM, ModelConfig


def preset(name: str) -> ModelConfig:
    return parse(ModelConfig, load_preset("model", name), source=name)


def test_nrm_has_exactly_the_published_number_of_parameters() -> None:
    assert count(preset("nrm-0.9m")).parameters == 920_833
    assert sum(p.numel() for p in LoopedLM(preset("nrm-0.9m")).parameters()) == 920_833


def test_our_reasoner_has_at_most_as_many() -> None:
    assert count(preset("looplm-reason-0.9m")).parameters <= 920_833


def test_the_staircase_model_has_about_54_thousand() -> None:
    assert 53_000 <= count(preset("looplm-s3-54k")).parameters <= 55_500


def test_the_iso_flop_baseline_has_the_flops_of_twelve_loops() -> None:
    looped, stacked = count(preset("looplm-s3-54k"), n_loops=12), count(preset("s3-iso-flop"), n_loops=1)
    assert stacked.flops_per_token == pytest.approx(looped.flops_per_token, rel=0.02)
    assert 10.5 < stacked.parameters / looped.parameters < 11.5


def test_flops_match_what_torch_counts() -> None:
    """torch's own counter over a real forward; attention scores are counted over the full square there."""
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_config("inject.kind=none", "seq_len=32")
    model = LoopedLM(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 32, dtype=torch.long), n_loops=3)
    attention = config.block.attention
    scores = 4 * attention.n_heads * attention.head_dim * 32 * model.n_slots(3)
    ours = count(config, n_loops=3).flops_per_token + scores / 2  # we count the causal half
    assert counter.get_total_flops() / 32 == pytest.approx(ours)


def test_unrolled_parameters_count_the_core_once_per_loop() -> None:
    config = tiny_config()
    once, thrice = count(config, n_loops=1), count(config, n_loops=3)
    assert once.active == once.unrolled == once.parameters
    assert thrice.active == once.parameters
    assert thrice.unrolled == once.parameters + 2 * once.core
