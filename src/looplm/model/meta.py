"""Models without memory: shapes and types of all tensors, on the meta device."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

DRAWS = (nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_)  # what modules call when they are built


@contextmanager
def without_memory() -> Iterator[None]:
    """Parameters and buffers made in this context have no memory, and no weights are drawn for them."""
    with torch.device("meta"), _NoDraws():
        yield


def give_memory(module: nn.Module, device: torch.device | str) -> None:
    """Memory on `device`, filled with anything, for all tensors of a module that has none. It is `module.to_empty`,
    which would load sympy."""
    module._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device))


class _NoDraws(TorchFunctionMode):
    """Leaves draws out. On the meta device they change nothing, but load torch's compiler, which takes as long as torch
    itself."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        return given["tensor"] if func in DRAWS else func(*args, **given)  # torch passes on all of a draw's by name
