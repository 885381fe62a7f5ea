"""Configs of originals that leave fields out, or hold what cannot be."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import looplm
from commands import fails
from commands import looplm as command
from golden_files import Golden
from looplm.errors import CheckpointError, ConfigError
from looplm.hf.files import read_foreign

# fields that the weights do not tell, with the default of the original's code
DEFAULTS: dict[str, dict[str, Any]] = {
    "nanochat_a": {"sequence_len": 2048, "window_pattern": "L"},
    "mythos_mla": {"n_kv_heads": 4, "max_seq_len": 4096, "attn_type": "mla", "act_threshold": 0.99, "rope_theta": 5e5},
    "mythos_gqa": {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "rope_theta": 5e5},
    "osrt_v3_hra": {
        "seq_len": 4096,
        "real_vocab_size": 50277,
        "adapter_alpha": 16.0,
        "hra_scale": 1.0,
        "rope_theta": 1e4,
    },
    "osrt_v4": {
        **{"real_vocab_size": 65536, "adapter_alpha": 16.0, "top_k_experts": 2, "max_position_embeddings": 8192},
        **{"router_aux_loss_coeff": 0.01, "router_z_loss_coeff": 0.001, "rope_theta": 1e4, "num_experts": 12},
    },
}
WRONG: list[Any] = [0, -1, 10**6, 10**30, True, "4", None, [], {}, 1.5, float("nan"), float("inf")]


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_field_left_out_takes_the_originals_default(name: str, caplog: pytest.LogCaptureFixture) -> None:
    golden = Golden(name)
    for field, default in DEFAULTS[name].items():
        short = {key: value for key, value in golden.config.items() if key != field}
        model = looplm.load_foreign(golden.system, golden.weights, short)
        assert model.config == looplm.load_foreign(golden.system, golden.weights, short | {field: default}).config, (
            field
        )
    bare = {key: value for key, value in golden.config.items() if key not in DEFAULTS[name]}
    caplog.clear()
    looplm.load_foreign(golden.system, golden.weights, bare)
    (said,) = caplog.messages
    assert "are the original's defaults" in said
    assert ("rope_theta 10000.0" in said) == name.startswith("osrt")
    caplog.clear()
    golden.load()
    assert not caplog.messages


@pytest.mark.parametrize(
    ("name", "field"),
    [("mythos_gqa", "dim"), ("mythos_mla", "n_experts"), ("nanochat_a", "n_layer"), ("osrt_v3_hra", "recursive_loops")],
)
def test_a_default_that_does_not_fit_the_weights_is_named(name: str, field: str) -> None:
    golden = Golden(name)
    config = {key: value for key, value in golden.config.items() if key != field}
    with pytest.raises(ConfigError, match=rf"lacks '{field}', and with the original's defaults \({field} \d+\)"):
        looplm.load_foreign(golden.system, golden.weights, config)


@pytest.mark.parametrize("name", ["nanochat_a", "mythos_mla", "osrt_v4"])
def test_wrong_values_of_any_field_are_errors_of_ours(name: str) -> None:
    golden = Golden(name)
    for number, field in enumerate(key for key in golden.config if key != "note"):
        for value in WRONG[number % 3 :: 3]:
            with suppress(ConfigError, CheckpointError):
                looplm.load_foreign(golden.system, golden.weights, golden.config | {field: value})


def test_ranks_of_zero_and_heads_that_do_not_divide_are_refused() -> None:
    for name, wrong, says in (
        ("osrt_v3_hra", {"adapter_rank": 0}, "adapter_rank"),
        ("nanochat_a", {"n_head": 0}, "n_head"),
        ("nanochat_a", {"n_head": 3}, "n_embd 64 is not a multiple of n_head 3"),
        ("mythos_gqa", {"n_layer": 3, "n_heads": "four"}, "n_heads.*'four'"),
        ("mythos_gqa", {"attn_type": "mha"}, "attn_type"),
    ):
        golden = Golden(name)
        with pytest.raises(ConfigError, match=says):
            looplm.load_foreign(golden.system, golden.weights, golden.config | wrong)


@pytest.mark.parametrize("config", [None, "config", 3, ["dim"], {1: 2}])
def test_a_config_is_a_mapping(config: Any) -> None:
    with pytest.raises(ConfigError, match="mapping of field names"):
        looplm.load_foreign("nanochat", Golden("nanochat_a").weights, config)


@pytest.mark.parametrize(
    "state",
    [
        None,
        [],
        "weights",
        {"a": 1},
        {1: torch.zeros(2)},
        {"a": torch.zeros(2).int()},
        {"a": torch.zeros(2, device="meta")},
    ],
)
def test_a_state_dict_is_of_tensors(state: Any) -> None:
    with pytest.raises(CheckpointError, match="nanochat state dict"):
        looplm.load_foreign("nanochat", state, Golden("nanochat_a").config)


@pytest.mark.parametrize("system", [None, 3, "nanochat2", ""])
def test_an_unknown_system_lists_the_known_ones(system: Any) -> None:
    with pytest.raises(ConfigError, match="Systems: nanochat, openmythos, osrt"):
        looplm.load_foreign(system, {}, {})


def test_import_says_which_defaults_were_taken(tmp_path: Path) -> None:
    golden = Golden("nanochat_a")
    torch.save(golden.weights, tmp_path / "model_000001.pt")
    config = {key: value for key, value in golden.config.items() if key != "sequence_len"}
    (tmp_path / "meta_000001.json").write_text(json.dumps({"model_config": config}))
    done = command("import", "nanochat", tmp_path, "--out", tmp_path / "run")
    assert done.returncode == 0
    assert "sequence_len 2048 are the original's defaults" in done.stderr


def test_a_config_json_beside_the_weights_is_read(tmp_path: Path) -> None:
    golden = Golden("osrt_v3_hra")
    torch.save(golden.weights, tmp_path / "model.pt")
    (tmp_path / "config.json").write_text(json.dumps(golden.config))
    assert read_foreign("osrt", tmp_path).config.items() >= golden.config.items()
    assert read_foreign("osrt", tmp_path, config={"seq_len": 7}).config["seq_len"] == 7
    (tmp_path / "config.json").write_text("{")
    assert f"{tmp_path / 'config.json'}" in fails("import", "osrt", tmp_path, "--out", tmp_path / "run")
