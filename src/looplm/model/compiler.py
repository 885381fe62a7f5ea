"""What torch.compile needs on the machine, and what compiled code checks before each call."""

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, fx, nn


@runtime_checkable
class LaysOut(Protocol):
    """A part that can put its weights in memory as products of few rows read them fastest."""

    def lay_out(self) -> None: ...


def has_compiler() -> bool:
    """Whether torch.compile can build CPU kernels here: it needs a C++ compiler and Python's headers."""
    has_headers = (Path(sysconfig.get_path("include")) / "Python.h").is_file()
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # as inductor chooses
    return has_headers and shutil.which(compiler) is not None


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled layers as they are written. There are none if torch's compiler is not loaded, and it stays so."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def only_arguments(guards: Sequence[Any]) -> list[bool]:
    """Which guards compiled code checks at each call: those of arguments. The model and the library stay as they are
    while it decodes, and checking them took a quarter of a small model's time."""
    of_model = torch.compiler.skip_guard_on_all_nn_modules_unsafe(guards)
    return [keep and not guard.is_global for keep, guard in zip(of_model, guards, strict=True)]


def compile_graph(part: nn.Module, arguments: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """A part's forward of tensors, compiled for inference. The result is for tensors of the shapes and layouts of
    `arguments`, and does not check them."""
    from torch import _inductor  # takes nearly as long as importing torch, and only this function needs it

    with torch.inference_mode(False), torch.no_grad():
        like = [torch.empty_like(argument) for argument in arguments]
        graph = torch.export.export(part, tuple(like), strict=False).module(check_guards=False)
        # what export makes cannot be pickled, and the compiler's cache warns of it
        plain = fx.GraphModule(graph, graph.graph)
        on_cpu = arguments[0].device.type == "cpu"
        return _inductor.compile(plain, [*like], options={"cpp_wrapper": on_cpu})
