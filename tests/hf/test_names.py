"""Names with what torch.compile, DDP and FSDP put into them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import looplm
from golden_files import Golden
from looplm.errors import CheckpointError
from looplm.hf.files import import_run

FILES = ("mythos_mla", "nanochat_a", "osrt_v3_hra", "osrt_v4")
PREFIXES = ("_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "module.module.")


def same(golden: Golden, state: dict[str, Tensor]) -> bool:
    model = looplm.load_foreign(golden.system, state, golden.config)
    own = golden.load().state_dict()
    return all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", FILES)
def test_prefixes_are_taken_off_in_any_order_and_depth(name: str) -> None:
    golden = Golden(name)
    for prefix in PREFIXES:
        assert same(golden, {prefix + key: tensor for key, tensor in golden.weights.items()}), prefix


@pytest.mark.parametrize("name", FILES)
def test_compiled_blocks_leave_their_mark_inside_names(name: str) -> None:
    golden = Golden(name)
    inside = {key.replace(".", "._orig_mod.", 1): tensor for key, tensor in golden.weights.items()}
    deep = {key.replace(".", "._orig_mod.module."): tensor for key, tensor in golden.weights.items()}
    assert same(golden, inside)
    assert same(golden, deep)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_a_compiled_model_is_imported(tmp_path: Path, name: str) -> None:
    golden = Golden(name)
    torch.save({f"module._orig_mod.{key}": t for key, t in golden.weights.items()}, tmp_path / "model_000001.pt")
    import_run(golden.system, tmp_path / "model_000001.pt", out=tmp_path / "run", config=golden.config)
    own = golden.load().state_dict()
    assert all(torch.equal(t, own[key]) for key, t in looplm.load(tmp_path / "run").state_dict().items())


def test_two_names_of_one_tensor_have_to_agree() -> None:
    golden = Golden("osrt_v4")
    twice = golden.weights | {f"_orig_mod.{key}": tensor.clone() for key, tensor in golden.weights.items()}
    assert same(golden, twice)
    twice["_orig_mod.model.norm_out.weight"] += 1
    with pytest.raises(
        CheckpointError, match=r"model\.norm_out\.weight and _orig_mod\.model\.norm_out\.weight .* differ"
    ):
        looplm.load_foreign("osrt", twice, golden.config)
