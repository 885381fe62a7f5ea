"""Numbers on the command line."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commands import fails, succeeds
from looplm.cli.arguments import LARGEST, numbers, whole_number
from looplm.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("5e3", 5000),
        ("5E+3", 5000),
        ("1.5e3", 1500),
        ("10_000", 10000),
        (" 12 ", 12),
        (str(LARGEST), LARGEST),
    ],
)
def test_a_count_may_be_written_with_an_exponent_or_underscores(text: str, value: int) -> None:
    assert whole_number(text, option="--n") == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1.5", "--n '1.5' is not a whole number"),
        ("5e-3", "not a whole number"),
        ("1.55e1", "not a whole number"),
        ("", "not a whole number"),
        ("nan", "not a whole number"),
        ("inf", "not a whole number"),
        ("٣", "not a whole number"),
        ("1__0", "not a whole number"),
        ("0", "--n 0 is too small; give 1 or more"),
        ("-3", "--n -3 is too small"),
        ("1e999", "--n 1e999 is too large; give at most 9,223,372,036,854,775,807"),
        (str(2**70), "too large"),
        ("9" * 100_000, "too large"),
    ],
)
def test_what_is_no_count_is_refused_with_the_option_and_the_mend(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=r"^--n ") as refused:
        whole_number(text, option="--n")
    assert says in str(refused.value)
    assert len(str(refused.value)) < 200


@given(st.integers(1, LARGEST))
def test_every_integer_reads_as_itself(value: int) -> None:
    assert whole_number(str(value), option="--n") == value
    assert whole_number(f"{value:_}", option="--n") == value
    assert numbers(f"{value},{value}", option="--n") == [value, value]


def test_train_takes_a_budget_written_with_an_exponent(tmp_path: Path, tiny_reason: list[str]) -> None:
    overrides = [each for each in tiny_reason if not each.startswith(("train.minutes", "train.steps"))]
    out = succeeds("train", "reason", *overrides, "--tokens", "1.2e3", "--out", tmp_path / "run")
    assert "done: step 2" in out


def test_plan_takes_tokens_written_with_an_exponent() -> None:
    assert json.loads(succeeds("plan", "s3", "--tokens", "2e9", "--json"))["tokens"] == 2_000_000_000


@pytest.mark.parametrize(
    "words",
    [
        "train reason --steps 1.5 --out {tmp}/x",
        "train reason --tokens -1 --out {tmp}/x",
        "train reason --seed 1e30 --out {tmp}/x",
        "train reason --keep 0 --out {tmp}/x",
        "compare s3 --seeds 2.5 --out {tmp}/x",
        "compare s3 --jobs 0 --out {tmp}/x",
        "demo --seed -1 --out {tmp}/x",
        "eval builtin:reasoner --n 0",
        "eval builtin:reasoner --loops 1,1e30",
        "calibrate builtin:reasoner --n 99999999999999999999",
        "generate builtin:reasoner --prompt 1+1 --seed 99999999999999999999",
        "generate builtin:reasoner --prompt 1+1 --max-new-tokens 0",
        "generate builtin:reasoner --prompt 1+1 --top-k 0",
        "generate builtin:reasoner --prompt 1+1 --loops 99999999999999999999",
        "chat --draft 1.5",
        "plan s3 --tokens 0",
        "plan s3 --gpus 1,-2",
        "count nrm-0.9m --loops 0",
        "average {tmp} --last 0 --out {tmp}/x",
        "tokenizer train builtin:python --vocab 1.5 --out {tmp}/x",
        "data prepare builtin:python --shard-tokens 0 --tokenizer {tmp} --out {tmp}/x",
    ],
)
def test_a_wrong_count_of_any_command_is_refused_before_anything_is_written(words: str, tmp_path: Path) -> None:
    error = fails(*words.format(tmp=tmp_path).split())
    assert "--" in error
    assert not (tmp_path / "x").exists()
