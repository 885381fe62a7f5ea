"""Parts of the smallest and oddest sizes work, or are refused with the reason."""

from typing import Any

import pytest
import torch

from looplm.config import parse
from looplm.errors import ConfigError
from looplm.infer.engine import generate
from looplm.model.looped import LoopedLM, ModelConfig

BASE: dict[str, Any] = {
    "vocab_size": 7,
    "d_model": 8,
    "seq_len": 16,
    "n_core": 1,
    "n_loops": 2,
    "block": {
        "attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1, "head_dim": 4},
        "ffn": {"kind": "swiglu", "d_ff": 8},
    },
}
GQA = "block.attention"
MLA = "block.attention={kind: mla, n_heads: 1, q_rank: 1, kv_rank: 1, nope_dim: 1, rope_dim: 2, v_dim: 1}"
MOE = "block.ffn={kind: moe, n_experts: 3, d_ff: 1, top_k: 1}"


def model_config(*overrides: str) -> ModelConfig:
    return parse(ModelConfig, BASE, source="model", overrides=overrides)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([f"{GQA}.head_dim=2", f"{GQA}.rope.ntk_factor=2"], "head_dim 2 is one pair of channels"),
        ([MLA, f"{GQA}.rope.ntk_factor=2"], "rope_dim 2 is one pair of channels"),
        ([f"{GQA}.head_dim=1"], "head_dim 1 is odd"),
        ([f"{GQA}.n_kv_heads=3"], "n_heads 2 is not a multiple of n_kv_heads 3"),
        ([f"{GQA}.window=0"], "block.attention.window: Input should be greater than 0"),
        ([f"{GQA}.window_pattern=L"], "needs a window"),
        ([f"{GQA}.window_pattern=''"], "block.attention.window_pattern: String should match"),
        ([f"{GQA}.value_embed={{n_channels: 9}}"], "block.attention.value_embed.n_channels 9 is more than d_model 8"),
        ([f"{GQA}.rope.base=1e-300"], "block.attention.rope.base: Input should be greater than or equal to 1"),
        (["smear={kind: gate}"], "smear.n_channels 24 is more than d_model 8"),
        (["smear={kind: channel, n_back: 0}"], "smear.n_back: Input should be greater than 0"),
        ([MOE, "block.ffn.top_k=4"], "top_k 4 is more than n_experts 3"),
        ([MOE, "block.ffn.top_k=0"], "block.ffn.top_k: Input should be greater than 0"),
        (["block.linear={kind: low_rank, rank: 0}"], "block.linear.rank: Input should be greater than 0"),
        (["exit={kind: act, threshold: 1.5}"], "exit.threshold: Input should be less than or equal to 1"),
        (["softcap=1e-300"], "softcap: Input should be greater than or equal to 1e-30"),
        (["init_std=1e300"], "init_std: Input should be less than or equal to 1e+30"),
        (["inject={kind: gate, init: 1e300}"], "inject.init: Input should be less than or equal to 1e+30"),
        (["inject={kind: lti, loop_embed_size: 1e300}"], "inject.loop_embed_size: Input should be less than"),
        (["used_vocab=8"], "used_vocab 8 is more than vocab_size 7"),
    ],
)
def test_impossible_parts_are_refused_with_the_reason(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model_config(*overrides)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [f"{GQA}.head_dim=2"],
        [f"{GQA}.head_dim=4", f"{GQA}.rope.ntk_factor=2"],
        [f"{GQA}.rope.base=1"],
        [f"{GQA}.window=1"],
        [f"{GQA}.window=1000"],
        [f"{GQA}.value_embed={{n_channels: 8}}"],
        [MLA],
        ["block.linear={kind: low_rank, rank: 100}"],
        ["block.linear={kind: hra, rank: 100}", MOE],
        ["block.ffn={kind: moe, n_experts: 1, d_ff: 1, top_k: 1, n_loop_embeds: 1}"],
        ["smear={kind: gate, n_channels: 8}"],
        ["smear={kind: channel, n_back: 50}"],
        ["d_model=1", "inject={kind: lti}"],
        ["exit={kind: act, threshold: 1e-9}", "n_loops=1"],
        ["vocab_size=1"],
        ["adapter={rank: 100, n_loops: 9}"],
    ],
    ids="; ".join,
)
def test_odd_sizes_work(overrides: list[str]) -> None:
    config = model_config(*overrides)
    torch.manual_seed(0)
    model = LoopedLM.on("cpu", config)
    out = model(torch.zeros(2, 5, dtype=torch.long))
    out.logits.sum().backward()
    assert out.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    generated = generate(model.eval(), [[0, 0], [0]], eos_id=config.vocab_size, max_new_tokens=3)
    assert [len(each.ids) for each in generated] == [3, 3]
