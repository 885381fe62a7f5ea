"""What torch.compile needs of the machine and of other threads, and what its code checks before each call."""

import os
import shutil
import sys
import sysconfig
import threading
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


class Turns:
    """Forwards of many threads at a time, or the compilation of one.

    Tracing puts placeholders where a model's weights are and sets state of the whole process. The forward of another
    thread would compute with them, and two compilations would take each other's state.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._forwards: dict[int, int] = {}  # how many are running, by thread
        self._compiling: int | None = None  # the thread
        self._n_waiting = 0  # compilations

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Run a forward, at once or after the compilations that run or wait. May be nested."""
        me = threading.get_ident()
        with self._changed:
            outer = self._forwards.get(me, 0)
            if not outer and self._compiling != me:
                while self._compiling is not None or self._n_waiting:
                    self._changed.wait()
            self._forwards[me] = outer + 1
        try:
            yield
        finally:
            with self._changed:
                self._give_back(me, outer)

    @contextmanager
    def compilation(self) -> Iterator[None]:
        """Compile, once the forwards of all other threads have ended. A forward that is running in this thread may
        compile too."""
        me = threading.get_ident()
        with self._changed:
            mine, is_inner = self._forwards.pop(me, 0), self._compiling == me  # its own forwards wait for it
            self._n_waiting += 1
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._compiling in (None, me) and not self._forwards)
                self._compiling = me
            finally:
                self._n_waiting -= 1
                self._give_back(me, mine)
        try:
            yield
        finally:
            with self._changed:
                self._compiling = me if is_inner else None
                self._changed.notify_all()

    def _give_back(self, thread: int, n_forwards: int) -> None:
        if n_forwards:
            self._forwards[thread] = n_forwards
        else:
            self._forwards.pop(thread, None)
        self._changed.notify_all()


TURNS = Turns()  # of the process, as what tracing sets is


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
