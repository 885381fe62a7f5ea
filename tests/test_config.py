from pathlib import Path

import pytest

from conftest import tiny_config
from looplm.config import Config, apply_overrides, load_preset, merge, parse, preset_names, to_yaml
from looplm.errors import ConfigError
from looplm.model.looped import ModelConfig
from looplm.train.run import RunConfig, resolve_run


@pytest.mark.parametrize("name", preset_names("run"))
def test_every_run_preset_resolves_and_its_saved_form_is_the_same_config(name: str, tmp_path: Path) -> None:
    config = resolve_run(name)
    path = tmp_path / "saved.yaml"
    path.write_text(to_yaml(config))
    assert resolve_run(str(path)) == config


@pytest.mark.parametrize("name", preset_names("model"))
def test_every_model_preset_is_a_model(name: str) -> None:
    parse(ModelConfig, load_preset("model", name), source=name)


def test_configs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        tiny_config().d_model = 3  # type: ignore[misc]


def test_an_unknown_key_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"block.attention.gqa.n_haeds.*did you mean 'n_heads'|n_haeds.*n_heads"):
        tiny_config("block.attention.n_haeds=2")


def test_an_unknown_kind_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'diagonal'"):
        tiny_config("inject.kind=diagnal")


def test_an_unknown_preset_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'reason'"):
        load_preset("run", "reson")


def test_an_unknown_task_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'sorting'"):
        resolve_run("reason", overrides=["data.weights={sortign: 1}"])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.seed", "key.key=value"),
        ("train.seed=-1", "greater than or equal to 0"),
        ("train.minutes=null", "no budget"),
        ("model.n_loops=0", "greater than 0"),
        ("model.block.attention.n_kv_heads=4", "not a multiple"),
        ("train.schedule={warmup: 0.7, decay: 0.7}", "exceed the budget"),
        ("train.optimizer.adamw_lr=nan", "finite"),
        ("model.d_model=[", "not valid YAML"),
    ],
)
def test_a_wrong_value_is_one_clear_error(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        resolve_run("reason", overrides=[override])
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_preset("run", str(tmp_path / "none.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_preset("run", str(tmp_path / "broken.yaml"))
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="mapping"):
        load_preset("run", str(tmp_path / "list.yaml"))


def test_overrides_are_read_as_yaml_and_nest() -> None:
    assert apply_overrides({"a": {"b": 1, "c": 2}}, ["a.b=1e-3", "d.e=true"]) == {
        "a": {"b": 1e-3, "c": 2},
        "d": {"e": True},
    }


def test_another_kind_replaces_the_whole_mapping() -> None:
    assert merge({"x": {"kind": "a", "size": 1}}, {"x": {"kind": "b"}}) == {"x": {"kind": "b"}}
    assert merge({"x": {"kind": "a", "size": 1}}, {"x": {"kind": "a"}}) == {"x": {"kind": "a", "size": 1}}


def test_every_field_of_every_config_has_a_docstring_line() -> None:
    """Style rule 9. The docstrings are read from the source, since Python drops them."""
    import ast
    import inspect
    import sys

    def classes(cls: type[Config]) -> list[type[Config]]:
        return [cls, *(sub for child in cls.__subclasses__() for sub in classes(child))]

    missing = []
    for cls in classes(Config)[1:]:
        if not cls.__module__.startswith("looplm"):
            continue
        tree = ast.parse(inspect.getsource(sys.modules[cls.__module__]))
        body = next(n.body for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == cls.__name__)
        for item, following in zip(body, [*body[1:], None], strict=True):
            documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not documented:
                missing += [f"{cls.__name__}.{item.target.id}"] if item.target.id != "kind" else []
    assert not missing, missing


def test_the_model_of_a_run_can_be_exchanged() -> None:
    config = resolve_run("reason", model="nrm-0.9m")
    assert isinstance(config, RunConfig)
    assert config.model == parse(ModelConfig, load_preset("model", "nrm-0.9m"), source="nrm")
