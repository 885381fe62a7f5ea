"""Generation in threads other than the main one."""

from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest

from looplm.infer.decoders import EarlyExit
from looplm.infer.engine import generate
from looplm.infer.exits import ExitRule
from looplm.infer.speculate import Draft, generate_or_draft
from looplm.model.looped import LoopedLM

PROMPTS = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9, 10]]
OPTIONS: dict[str, Any] = {"eos_id": -1, "max_new_tokens": 12}


def in_threads(works: list[Callable[[], Any]]) -> list[Any]:
    """What each of these gives or raises, all begun at once."""
    given: list[Any] = [None] * len(works)

    def run(number: int) -> None:
        try:
            given[number] = works[number]()
        except BaseException as error:
            given[number] = error

    threads = [Thread(target=run, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return given


def test_threads_generate_what_the_main_one_does(make_model: Callable[..., LoopedLM]) -> None:
    model = make_model()
    ways: list[dict[str, Any]] = [
        {"draft": None, "early": None, "batch_size": None},
        {"draft": None, "early": EarlyExit(ExitRule("latent", 0.3)), "batch_size": 1},
        {"draft": Draft(1), "early": None, "batch_size": None},
    ]
    works = [lambda way=way: generate_or_draft(model, PROMPTS, **way, **OPTIONS) for way in ways]
    assert in_threads([*works, *works]) == [work() for work in works] * 2


@pytest.mark.parametrize(
    "max_unrolled", [pytest.param(99, id="step"), pytest.param(0, id="parts", marks=pytest.mark.long)]
)
def test_first_calls_of_a_compiled_model_may_come_from_several_threads_at_once(
    max_unrolled: int, make_model: Callable[..., LoopedLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sizes to compile, one of them wanted twice, beside a model that is not compiled."""
    monkeypatch.setattr("looplm.model.looped.MAX_UNROLLED", max_unrolled)
    small: dict[str, Any] = {"n_prelude": 0, "n_core": 1, "n_coda": 0}
    overrides = [f"{key}={value}" for key, value in small.items()]
    plain, compiled = make_model(*overrides), make_model(*overrides)
    compiled.compile_decoding()
    asked = [(compiled, PROMPTS[:1]), (compiled, PROMPTS[:1]), (compiled, PROMPTS[:2]), (plain, PROMPTS[:1])]
    told = in_threads([lambda each=each: generate(*each, **OPTIONS) for each in asked])
    assert told == [generate(plain, prompts, **OPTIONS) for _, prompts in asked]
