"""Wrong arguments from Python: one error that names the value."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import looplm
from looplm.errors import CheckpointError, ConfigError, DataError, LooplmError
from looplm.infer.engine import generate
from looplm.infer.reasoner import Reasoner
from looplm.infer.speculate import Draft
from looplm.model.looped import LoopedLM

ONE = torch.tensor([[1]])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bfloat16", torch.float16, torch.float64])
def test_a_model_is_loaded_in_a_type_and_on_a_device(dtype: Any) -> None:
    model = looplm.load("builtin:reasoner", device="cpu", dtype=dtype)
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {names.get(dtype, dtype)}
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", 3, None, ""])
def test_a_device_that_is_not_there_is_named(device: Any) -> None:
    with pytest.raises(ConfigError, match=r"device '.*' cannot be used here"):
        looplm.load("builtin:reasoner", device=device)


@pytest.mark.parametrize("dtype", ["int8", "half?", torch.int8, 3, None, []])
def test_a_type_that_no_model_runs_in_is_named(dtype: Any) -> None:
    with pytest.raises(ConfigError, match=r"dtype .* is none that a model runs in"):
        looplm.load("builtin:reasoner", dtype=dtype)


@pytest.mark.parametrize("run", [None, 3, "", "a\0b", b"x", ["a"]])
def test_a_run_that_is_no_path_is_named(run: Any) -> None:
    with pytest.raises(CheckpointError):
        looplm.load(run)


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        *(([1, 2], "a list"), (None, "NoneType"), (torch.tensor([1, 2]), r"shape \(2,\)"), (ONE.float(), "float32")),
        *((ONE.bool(), "bool"), (ONE[:, :0], "no tokens"), (ONE[:0], "no tokens"), (ONE + 39, "40 to 40.* 0 to 39")),
        *((-ONE, "-1 to -1"), (ONE[None], r"shape \(1, 1, 1\)"), (ONE.expand(1, 65), "65 tokens do not fit")),
    ],
)
def test_ids_of_a_wrong_kind_are_refused(make_model: Callable[..., LoopedLM], ids: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        make_model()(ids)


@pytest.mark.parametrize("n_loops", [0, -1, 1.5, True, "2", [1]])
def test_numbers_of_loops_are_whole_and_at_least_one(make_model: Callable[..., LoopedLM], n_loops: Any) -> None:
    with pytest.raises(ConfigError, match="n_loops is "):
        make_model()(ONE, n_loops=n_loops)
    with pytest.raises(ConfigError, match="the plan is"):
        make_model()(ONE, plan=3)  # type: ignore[arg-type]


def test_positions_and_caches_of_wrong_sizes_are_refused(make_model: Callable[..., LoopedLM]) -> None:
    model = make_model("smear={kind: channel, n_back: 2}")
    cache, at = model.new_cache(batch_size=1, capacity=4), ONE - 1
    two = model.new_cache(batch_size=2, capacity=4)
    wrong: list[dict[str, Any]] = [
        *({"cache": two, "positions": at, "n_keys": 1}, {"cache": 3, "positions": at, "n_keys": 1}),
        *({"cache": cache}, {"cache": cache, "positions": at, "n_keys": 9}),
        *({"cache": cache, "positions": at[0], "n_keys": 1}, {"cache": cache, "positions": at.float(), "n_keys": 1}),
        *({"cache": cache, "positions": at + 9, "n_keys": 4}, {"cache": cache, "positions": at, "n_keys": 1.5}),
        {"cache": cache, "positions": at, "n_keys": 1, "before": ONE},
    ]
    for options in wrong:
        with pytest.raises(LooplmError):
            model(ONE, **options)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"prompts": "text"}, {"prompts": []}, {"prompts": [[]]}, {"prompts": [[1.5]]}, {"prompts": [[True]]}),
        *({"prompts": [[40]]}, {"prompts": [[-1]]}, {"prompts": [ONE[0]]}, {"prompts": [3]}, {"prompts": 3}),
        *({"max_new_tokens": 0}, {"max_new_tokens": 1.5}, {"max_new_tokens": True}, {"batch_size": 0}),
        *({"batch_size": 1.5}, {"eos_id": "x"}, {"sampling": {"temperature": 1}}, {"early": "latent:0.1"}),
        *({"n_loops": 0}, {"n_loops": 1.5}, {"n_loops": True}),
    ],
)
def test_generation_names_what_it_cannot_use(make_model: Callable[..., LoopedLM], wrong: dict[str, Any]) -> None:
    given: dict[str, Any] = {"prompts": [[1, 2]], "eos_id": 0, "max_new_tokens": 2} | wrong
    with pytest.raises((ConfigError, DataError)):
        generate(make_model(), given.pop("prompts"), **given)


@pytest.mark.parametrize("questions", ["What is 1 + 1?", 3, None, [None], [3], [b"What"], []])
def test_questions_are_a_list_of_texts(questions: Any) -> None:
    with pytest.raises(DataError):
        Reasoner(looplm.load("builtin:reasoner")).answer(questions)


@pytest.mark.parametrize(("n_loops", "n_tokens"), [(0, 1), (1.5, 1), (1, True), ("1", 1)])
def test_drafts_are_of_whole_numbers(n_loops: Any, n_tokens: Any) -> None:
    with pytest.raises(ConfigError, match="a draft's"):
        Draft(n_loops, n_tokens)
