"""Any part with any other: random tiny configs build, train, and answer the same however they are computed."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cached import cached_logits
from looplm.config import load_preset, parse, preset_names
from looplm.data.pack import Batch
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM, ModelConfig
from looplm.optim.groups import OptimizerConfig, make_optimizers
from looplm.train.losses import next_token_loss

MOE = {"n_experts": 4, "d_ff": 8, "top_k": 2}
SLOTS: dict[str, list[Any]] = {
    "attention": [
        {"kind": "gqa", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "window": 3, "window_pattern": "SL"},
        {"kind": "gqa", "n_heads": 2, "n_kv_heads": 2, "head_dim": 8, "qk_norm": "before_rope", "fused_qkv": True},
        {
            "kind": "gqa",
            "n_heads": 2,
            "n_kv_heads": 1,
            "head_dim": 8,
            "qk_norm": "after_rope",
            "qk_gain": 1.2,
            "value_embed": {"n_channels": 4},
            "rope": {"pairing": "interleaved", "ntk_factor": 2},
        },
        {"kind": "mla", "n_heads": 2, "q_rank": 8, "kv_rank": 8, "nope_dim": 4, "rope_dim": 4, "v_dim": 8},
    ],
    "ffn": [{"kind": "swiglu", "d_ff": 24}, {"kind": "relu2", "d_ff": 24}],
    "core_ffn": [
        None,
        {"kind": "moe", **MOE, "n_shared": 1, "has_bias": True, "bias_rate": 0.1, "balance_loss": 0.01},
        {"kind": "moe", **MOE, "capacity_factor": 0.8},
        {"kind": "moe", **MOE, "gate": "sigmoid", "renormalise": False, "n_loop_embeds": 3, "z_loss": 0.001},
        {"kind": "parallel", "d_ff": 16, "moe": MOE},
    ],
    "linear": [{"kind": "full"}, {"kind": "low_rank", "rank": 4}, {"kind": "hra", "rank": 4}],
    "inject": [
        {"kind": "none"},
        {"kind": "add"},
        {"kind": "gate"},
        {"kind": "diagonal", "output_map": True},
        {"kind": "lti"},
        {"kind": "lti", "loop_embed": "raw", "bounded_decay": False},
    ],
    "exit": [{"kind": "none"}, {"kind": "act", "ponder_cost": 0.01}, {"kind": "act", "renormalise": False}],
    "adapter": [None, {"rank": 2, "n_loops": 3}],
    "loop_lora": [None, {"rank": 2, "n_loops": 3, "max_scale": 0.3}],
    "smear": [None, {"kind": "channel", "n_back": 2}, {"kind": "gate", "n_channels": 6}],
    "layers": [(0, 1, 0), (1, 2, 1), (2, 1, 0)],
    "stream": [{}, {"backout": True, "embed_norm": True, "loop_norm": True}, {"softcap": 5.0, "vocab_multiple": 16}],
    "block": [{}, {"stream_scales": True, "norm_weight": False}],
    "tied_head": [True, False],
}
SEQ_LEN, VOCAB = 12, 40


def config_of(choice: dict[str, Any]) -> ModelConfig:
    n_prelude, n_core, n_coda = choice["layers"]
    block = {key: choice[key] for key in ("attention", "ffn", "linear")} | choice["block"]
    parts = {key: choice[key] for key in ("core_ffn", "inject", "exit", "adapter", "loop_lora", "smear", "tied_head")}
    return ModelConfig.model_validate(
        {"vocab_size": VOCAB, "d_model": 16, "seq_len": SEQ_LEN, "n_loops": 2, "init": "normal", "init_std": 0.2}
        | {"n_prelude": n_prelude, "n_core": n_core, "n_coda": n_coda, "block": block}
        | parts
        | choice["stream"]
    )


def is_legal(choice: dict[str, Any]) -> bool:
    return not (choice["linear"]["kind"] == "low_rank" and choice["core_ffn"] is not None)


choices = st.fixed_dictionaries({name: st.sampled_from(options) for name, options in SLOTS.items()})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(choice=choices.filter(is_legal), seed=st.integers(0, 1000), recompute=st.booleans())
def test_legal_combinations_train_and_decode_alike(choice: dict[str, Any], seed: int, recompute: bool) -> None:
    torch.manual_seed(seed)
    model = LoopedLM(config_of(choice))
    ids = torch.randint(0, VOCAB, (3, SEQ_LEN))
    optimizers = make_optimizers(model, OptimizerConfig())
    for _ in range(2):
        loads: list[tuple[int, Tensor]] = []
        loss = next_token_loss(model, Batch(ids, ids.roll(-1, 1)), LoopPlan(2, recompute=recompute), loads=loads)
        loss.backward()
        model.balance(loads)
        assert torch.isfinite(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with torch.inference_mode():
        for n_loops in (1, 2, 5):
            full = model(ids, n_loops=n_loops).logits
            assert torch.isfinite(full).all()
            cached = cached_logits(model, ids, n_loops=n_loops, chunks=[5] + [1] * (SEQ_LEN - 5))
            torch.testing.assert_close(cached, full, rtol=1e-3, atol=1e-4)
        changed = ids.clone()
        changed[:, 8] = (changed[:, 8] + 1) % VOCAB
        torch.testing.assert_close(model(changed).logits[:, :8], model(ids).logits[:, :8], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(ids[1:2]).logits, model(ids).logits[1:2], rtol=1e-4, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(choice=choices.filter(lambda choice: not is_legal(choice)))
def test_illegal_combinations_are_refused_with_the_reason(choice: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="do not go together"):
        config_of(choice)


LARGEST = {
    "vocab_size": 96,
    "used_vocab": 90,
    "d_model": 64,
    "seq_len": 64,
    "n_loops": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 16,
    "window": 9,
    "q_rank": 16,
    "kv_rank": 16,
    "nope_dim": 8,
    "rope_dim": 8,
    "v_dim": 8,
    "d_ff": 48,
    "n_experts": 6,
    "shared_d_ff": 32,
    "rank": 4,
    "n_prelude": 2,
    "n_coda": 2,
}


def shrunk(data: dict[str, Any]) -> dict[str, Any]:
    """A preset with every size cut to one for tests; which parts there are, and how many layers, stays."""
    small: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            small[key] = shrunk(value)
        else:
            small[key] = min(value, LARGEST[key]) if key in LARGEST and value is not None else value
    if small.get("kind") == "moe":
        small["top_k"] = min(small["top_k"], LARGEST["n_experts"])
    if "n_heads" in small and "n_kv_heads" in small and small["n_heads"] % small["n_kv_heads"]:
        small["n_kv_heads"] = 1
    return small


@pytest.mark.parametrize("name", preset_names("model"))
@torch.inference_mode()
def test_presets_are_causal_and_rows_independent(name: str) -> None:
    torch.manual_seed(0)
    model = LoopedLM(parse(ModelConfig, shrunk(load_preset("model", name)), source=name)).eval()
    for parameter in model.parameters():
        if parameter.count_nonzero() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(0, model.config.vocab_size, (3, 40))
    changed = ids.clone()
    changed[:, 30] = (changed[:, 30] + 1) % model.config.vocab_size
    logits = model(ids).logits
    after = model(changed).logits
    torch.testing.assert_close(after[:, :30], logits[:, :30], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after[:, 30:], logits[:, 30:], atol=1e-4)
    torch.testing.assert_close(model(ids[1:2]).logits, logits[1:2], rtol=1e-4, atol=1e-5)
