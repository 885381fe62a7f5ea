"""What is typed as an override, or written in a config, is what was meant, or one error that names a key to type."""

from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

import looplm
from looplm.config import LARGEST, Config, parse, to_yaml
from looplm.errors import ConfigError
from looplm.reading import parse_yaml
from looplm.train.run import RunConfig, resolve_run

WORDS = [
    "2024-01-01",
    "12",
    "007",
    "1e5",
    "0x1F",
    ".5",
    "yes",
    "null",
    "~",
    "12:30",
    "a #b",
    "*.txt",
    "@a",
    "a: b",
    "nan",
]


@pytest.mark.parametrize("word", WORDS)
def test_an_override_is_text_where_text_is_wanted(word: str) -> None:
    config = resolve_run("text", overrides=[f"data.path={word}"])
    assert config.data.path == str(Path.cwd() / word)  # type: ignore[union-attr]
    # and what is saved says the same
    assert parse(RunConfig, parse_yaml(to_yaml(config)), source="saved") == config


def test_quotes_around_a_text_are_no_part_of_it() -> None:
    assert resolve_run("text", overrides=["data.path='12'"]).data.path == str(Path.cwd() / "12")  # type: ignore[union-attr]


def test_null_is_nothing_where_nothing_is_allowed() -> None:
    assert resolve_run("text", overrides=["train.wandb=null"]).train.wandb is None
    assert resolve_run("text", overrides=["train.wandb=007"]).train.wandb == "007"


@pytest.mark.parametrize(
    ("override", "folders"),
    [
        ("data.folders=2024", {"2024": 1.0}),
        ("data.folders=yes", {"yes": 1.0}),
        ("data.folders={2024: 1, 007: 2, no: 3}", {"2024": 1.0, "007": 2.0, "no": 3.0}),
    ],
)
def test_names_of_folders_are_text(override: str, folders: dict[str, float]) -> None:
    found = resolve_run("pretrain", overrides=[override]).data.folders  # type: ignore[union-attr]
    assert found == {str(Path.cwd() / name): weight for name, weight in folders.items()}


def test_texts_in_a_list_are_text() -> None:
    class Named(Config):
        names: list[str]

    assert parse(Named, {}, source="here", overrides=["names=[007, yes, 2024-01-01, null, a]"]).names == [
        "007",
        "yes",
        "2024-01-01",
        "null",
        "a",
    ]


@pytest.mark.parametrize(
    ("recipe", "override", "says"),
    [
        ("reason", "train.steps=true", "train.steps: true is not a number"),
        ("reason", "train.ema=yes", "train.ema: true is not a number"),
        ("reason", "train.grad_clip=on", "train.grad_clip: true is not a number"),
        ("reason", "train.seed='7'", "train.seed: the text '7' is not a number"),
        ("reason", "train.runtime.n_threads=true", "train.runtime.n_threads: Input should be a number or 'auto'"),
        ("reason", "data.weights={arithmetic: yes}", "data.weights.arithmetic: true is not a number"),
        ("reason", "train.optimizer.groups={'*': {lr: yes}}", "train.optimizer.groups.*.lr: true is not a number"),
        ("reason", "train.minutes=inf", "train.minutes: Input should be a finite number"),
        ("reason", "train.minutes=.nan", "train.minutes: Input should be a finite number"),
        ("reason", "train.minutes=1e999", "train.minutes: Input should be a finite number"),
        ("pretrain", "data.n_rows=yes", "data.n_rows: true is not a number"),
        ("pretrain", "data.n_row=3", "unknown key 'data.n_row'; did you mean 'n_rows'?"),
        ("pretrain", "data.phases=[{n_row: 3}]", "unknown key 'data.phases.0.n_row'; did you mean 'n_rows'?"),
        ("reason", "train.plan={kind: poisson}", "key 'train.plan.mean' is required"),
        ("reason", "train.plan={kind: poison}", "train.plan: unknown kind 'poison'; did you mean 'poisson'?"),
        (
            "reason",
            "train.plan={kind: poisson, mean: 3, n_grad: halb}",
            "or 'half', got 'halb'; did you mean 'half'",
        ),
        ("reason", "train.plan={kind: choice, weights: {2: true}}", "train.plan.weights.2: true is not a number"),
        ("reason", "train.runtime.device=gpu", "got 'gpu'; did you mean 'cpu'?"),
        ("reason", "train.runtime.compile=maybe", "train.runtime.compile: Input should be true or false or 'auto'"),
        ("reason", "train.optimizer.matrices=mun", "did you mean 'muon'?"),
        ("reason", "model.block.ffn={kind: moe, n_experts: yes, d_ff: 8, top_k: 5}", "model.block.ffn.n_experts: true"),
        ("reason", "model=3", "model: Input should be a mapping of keys to values"),
    ],
)
def test_errors_name_a_key_that_can_be_typed(recipe: str, override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_run(recipe, overrides=[override])
    assert says in str(caught.value)
    assert "constrained" not in str(caught.value)


def test_an_entry_of_a_list_can_be_overridden() -> None:
    phases = "data.phases=[{n_batches: 3, n_rows: 2}, {n_rows: 3}]"
    config = resolve_run("pretrain", overrides=[phases, "data.phases.0.n_rows=5"])
    assert [phase.n_rows for phase in config.data.phases] == [5, 3]  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="no entry of a list of 2"):
        resolve_run("pretrain", overrides=[phases, "data.phases.2.n_rows=5"])


@pytest.mark.parametrize(
    "override",
    [
        "=3",
        "a..b=3",
        "train.seed",
        ".".join("a" * 30_000) + "=3",
        "train.seed=" + "[" * 20_000,
        "train.seed=" + "9" * 100_000,
        "train.seed=99999999999999999999",
        f"train.seed={2**63}",
        "train.seed=-1",
        "model.d_model=99999999999999999999",
        "model.n_core=100000",
        "model.n_loops=100000000",
        "train.n_workers=100000",
        "train.runtime.n_threads=100000",
        "train.tokens=1e30",
        "train.plan={kind: lognormal_poisson, mean: 1e300}",
        "train.plan={kind: lognormal_poisson, mean: 8, sigma: 1000}",
        "train.plan={kind: length, max_extra: 99999999999}",
    ],
    ids=lambda text: text[:30],
)
def test_what_no_machine_can_have_is_one_short_error(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_run("reason", overrides=[override])
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600


def test_any_seed_of_64_bits_is_taken() -> None:
    assert resolve_run("reason", overrides=[f"train.seed={LARGEST}"]).train.seed == LARGEST


def test_no_config_takes_true_or_text_as_a_number() -> None:
    """Every number in every config has one of the types of looplm.config, or its class is strict."""
    for path in Path(looplm.__file__).parent.rglob("*.py"):
        if "(Config)" in path.read_text(encoding="utf-8"):
            import_module(".".join(["looplm", *path.relative_to(Path(looplm.__file__).parent).with_suffix("").parts]))
    wrong = [
        f"{cls.__name__}.{name}"
        for cls in every_config(Config)
        if cls.__module__.startswith("looplm.") and not cls.model_config.get("strict")
        for name, field in cls.model_fields.items()
        if takes_any_number(field.annotation, field.metadata)
    ]
    assert not wrong, wrong


def every_config(cls: type[BaseModel]) -> list[type[BaseModel]]:
    return [each for sub in cls.__subclasses__() for each in (sub, *every_config(sub))]


def takes_any_number(annotation: Any, metadata: list[Any]) -> bool:
    """Whether an int or float stands somewhere without the check of `looplm.config`; keys of mappings are text."""
    if annotation in (int, float):
        return not any("_as_number" in repr(each) for each in metadata)
    if hasattr(annotation, "__metadata__"):
        return takes_any_number(annotation.__origin__, [*metadata, *annotation.__metadata__])
    arguments = get_args(annotation)[1:] if getattr(annotation, "__origin__", None) is dict else get_args(annotation)
    return any(takes_any_number(each, metadata) for each in arguments if not isinstance(each, str))
