"""Imported weights against logits that the original systems computed (tests/golden)."""

import pytest
import torch
from torch import Tensor

from cached import cached_logits
from golden_files import SYSTEM_OF, Golden
from looplm.data.pack import IGNORE, Batch
from looplm.errors import CheckpointError, ConfigError
from looplm.hf.convert import dump_foreign, load_foreign
from looplm.model.layer_inputs import Asides
from looplm.model.loop.plan import LoopPlan
from looplm.train.losses import next_token_loss

CLOSE = {"rtol": 0.0, "atol": 2e-5}


@pytest.fixture(params=SYSTEM_OF)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@torch.inference_mode()
def test_logits_are_the_originals_at_every_number_of_loops(golden: Golden) -> None:
    model = golden.load()
    n_compared = 0
    for key, expected in golden.saved.items():
        if key.startswith("logits"):
            n_loops = int(key.rpartition("_")[2]) if "loops" in key else model.config.n_loops
            if "cached" in key:
                logits = cached_logits(
                    model, golden.ids, n_loops=n_loops, chunks=[16] + [1] * (golden.ids.shape[1] - 16)
                )
            else:
                logits = model(golden.ids, n_loops=n_loops).logits
            torch.testing.assert_close(logits, expected, **CLOSE)
            n_compared += 1
    assert n_compared >= (5 if golden.system == "openmythos" else 1)


@torch.inference_mode()
def test_cached_logits_are_the_originals_too(golden: Golden) -> None:
    model = golden.load()
    ids = golden.ids[:, :200]
    full = model(ids).logits
    n_first = ids.shape[1] // 2
    logits = cached_logits(model, ids, chunks=[n_first] + [1] * (ids.shape[1] - n_first))
    torch.testing.assert_close(logits, full, **CLOSE)


@torch.inference_mode()
def test_prefill_in_chunks_is_the_original_too(golden: Golden) -> None:
    model = golden.load()
    n_tokens = golden.ids.shape[1]
    sevens = [min(7, n_tokens - start) for start in range(0, n_tokens, 7)]
    logits = cached_logits(model, golden.ids, chunks=sevens)
    torch.testing.assert_close(logits, model(golden.ids).logits, **CLOSE)


def test_round_trip_is_exact(golden: Golden) -> None:
    dumped = dump_foreign(golden.system, golden.load())
    assert dumped.keys() == golden.weights.keys()
    for name, tensor in golden.weights.items():
        assert torch.equal(dumped[name], tensor), name


@pytest.mark.parametrize("name", ["nanochat_a", "nanochat_b"])
def test_nanochat_loss_is_the_originals(name: str) -> None:
    golden = Golden(name)
    targets = golden.ids.roll(-1, dims=1)
    targets[:, -1] = IGNORE
    loss = next_token_loss(golden.load(), Batch(golden.ids, targets), LoopPlan(1))
    torch.testing.assert_close(loss.detach(), golden.saved["loss"][0], **CLOSE)


@pytest.mark.parametrize("name", ["osrt_v3_hra", "osrt_v4"])
def test_osrt_states_have_the_originals_size(name: str) -> None:
    golden = Golden(name)
    model = golden.load()
    states: list[Tensor] = []
    model.hidden(golden.ids, plan=LoopPlan(model.config.n_loops), states=states)
    sizes = torch.stack([state.square().mean().sqrt() for state in states]).detach()
    torch.testing.assert_close(sizes, golden.saved["loop_rms"], rtol=1e-5, atol=1e-6)


def test_osrt_v4_training_loss_and_router_losses_are_the_originals() -> None:
    golden = Golden("osrt_v4")
    targets = golden.ids.roll(-1, dims=1)
    targets[:, -1] = IGNORE
    for weights, expected in (
        ((0.01, 0.001), golden.saved["loss_train"]),
        ((1.0, 0.0), golden.saved["sum_aux1"]),
        ((0.0, 1.0), golden.saved["sum_aux2"]),
    ):
        config = golden.config | {"router_aux_loss_coeff": weights[0], "router_z_loss_coeff": weights[1]}
        model = load_foreign("osrt", golden.weights, config)
        asides = Asides()
        model.hidden(golden.ids, plan=LoopPlan(3), asides=asides)
        computed = torch.stack(asides.losses).sum()
        if weights == (0.01, 0.001):
            computed = next_token_loss(model, Batch(golden.ids, targets), LoopPlan(3))
        torch.testing.assert_close(computed.detach(), expected, rtol=1e-5, atol=2e-5)


def test_wrong_keys_are_listed_in_one_error() -> None:
    golden = Golden("mythos_gqa")
    weights = dict(golden.weights)
    del weights["norm.weight"]
    weights["surplus"] = torch.zeros(1)
    weights["embed.weight"] = torch.zeros(3, 4)
    with pytest.raises(CheckpointError, match=r"missing norm.weight; unexpected surplus; embed.weight is \(3, 4\)"):
        load_foreign("openmythos", weights, golden.config)


def test_an_unknown_system_or_a_config_with_a_hole_is_refused() -> None:
    golden = Golden("mythos_gqa")
    with pytest.raises(ConfigError, match="did you mean 'openmythos'"):
        load_foreign("openmyth", golden.weights, golden.config)
    config = {key: value for key, value in golden.config.items() if key != "dim"}
    with pytest.raises(ConfigError, match="lacks 'dim'"):
        load_foreign("openmythos", golden.weights, config)
    with pytest.raises(CheckpointError, match="no tensors"):
        load_foreign("openmythos", {}, golden.config)


def test_old_nanochat_checkpoints_are_taken() -> None:
    golden = Golden("nanochat_a")
    ones = golden.weights | {"resid_lambdas": torch.ones(4), "x0_lambdas": torch.zeros(4)}
    newest = load_foreign("nanochat", ones, golden.config)
    old = {f"_orig_mod.{k}": v for k, v in golden.weights.items() if k not in ("resid_lambdas", "x0_lambdas")}
    loaded = load_foreign("nanochat", old, golden.config)
    assert torch.equal(loaded(golden.ids).logits, newest(golden.ids).logits)


def test_openmythos_tables_and_tied_head_are_left_out() -> None:
    golden = Golden("mythos_mla")
    weights = golden.weights | {
        "freqs_cis": torch.zeros(64, 8, dtype=torch.complex64),
        "freqs_cis_mla": torch.zeros(64, 4, dtype=torch.complex64),
        "head.weight": golden.weights["embed.weight"],
    }
    model = load_foreign("openmythos", weights, golden.config)
    assert torch.equal(model(golden.ids).logits, golden.load()(golden.ids).logits)
