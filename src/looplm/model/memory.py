"""Whether a machine has the memory that a model cannot do without: a lower bound, to refuse what cannot be before it is
tried. `looplm plan` says what a run really takes."""

from collections.abc import Mapping
from typing import Any

from looplm.errors import ConfigError
from looplm.model.cache_memory import memory_bytes
from looplm.model.count import count
from looplm.model.looped import ModelConfig

WEIGHT_BYTES = 4  # fp32
TOKEN_BYTES = 16  # an id and a target
TRAINED_COPIES = 3  # weights, gradients, and at least one moment
# These make no tensor of the model larger.
NO_SIZES = ("seq_len", "window", "n_loops", "used_vocab")


def check_model_fits(config: ModelConfig, *, device: str = "cpu", copies: int = 1, share: int = 1) -> None:
    """Refuse a model of which `device` cannot hold `copies`, shared out to `share` of them.

    Raises:
        ConfigError: it names the largest size and what it would take.
    """
    n_parameters = count(config).parameters
    needed, memory = copies * WEIGHT_BYTES * n_parameters // share, memory_bytes(device)
    if needed > memory:
        key, size = _largest(config.model_dump(), prefix="model.")
        raise ConfigError(
            f"{key} {size}: the model has {n_parameters:,} parameters and takes at least {_gigabytes(needed)} of "
            f"memory, and this machine has {_gigabytes(memory)}; lower it"
        )


def check_batch_fits(data: Mapping[str, Any], *, n_tokens: int, d_model: int, device: str = "cpu") -> None:
    """Refuse micro-batches of `n_tokens` tokens that `device` cannot hold: ids, targets, a state and its gradient.

    Raises:
        ConfigError: it names the largest size of `data`, a data config as plain data.
    """
    needed, memory = n_tokens * (TOKEN_BYTES + 2 * WEIGHT_BYTES * d_model), memory_bytes(device)
    if needed > memory:
        key, size = _largest(data, prefix="data.")
        raise ConfigError(
            f"{key} {size}: a micro-batch has {n_tokens:,} tokens and takes at least {_gigabytes(needed)} of "
            f"memory, and this machine has {_gigabytes(memory)}; lower it"
        )


def _largest(data: Mapping[str, Any], *, prefix: str) -> tuple[str, int]:
    """The key with the largest whole number."""
    found = {
        key: value
        for key, value in _flat(data, prefix=prefix).items()
        if isinstance(value, int) and key.rpartition(".")[2] not in NO_SIZES
    }
    key = max(found, key=lambda key: found[key])
    return key, found[key]


def _flat(data: Mapping[str, Any], *, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in data.items():
        found |= _flat(value, prefix=f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.0f} GB" if n_bytes >= 1e10 else f"{n_bytes / 1e9:.1f} GB"
