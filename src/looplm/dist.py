"""Several processes that train as one: the rank of this one, and what all ranks must agree on. Without torchrun there
is one process, and nothing here does anything.

FSDP and DTensor are imported only where a model is sharded: with sympy, they take as long as torch itself.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from looplm.errors import ConfigError
from looplm.files import lock_folder

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

T = TypeVar("T")
TIMEOUT = timedelta(hours=1)  # of a rank that waits while another compiles or validates


@contextmanager
def process_group(*, device: str = "auto") -> Iterator[None]:
    """Join the processes that torchrun started, for as long as the context lasts; `device` as `train.runtime.device`.

    Raises:
        ConfigError: torchrun's variables are set in part.
    """
    n_ranks = os.environ.get("WORLD_SIZE", "1")
    if n_ranks == "1" or dist.is_initialized():
        yield
        return
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError(
                f"WORLD_SIZE is {n_ranks} and {name} is not set: start with torchrun, or unset WORLD_SIZE"
            )
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    try:
        yield
        dist.barrier()  # a rank that ends first would close the connections of the others
        gc.collect()  # what still holds the group (DDP, in a cycle) must be collected before it is destroyed
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, 0 for the only one; as torchrun says before and after they are joined."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def n_ranks() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def on_main(action: Callable[[], object]) -> None:
    """Call `action` on rank 0 while the others wait. If it fails, all fail, the others with an OSError that says
    why."""
    failed: Exception | None = None
    if is_main():
        try:
            action()
        except Exception as error:
            failed = error
    said = from_main(None if failed is None else str(failed))
    if failed is not None:
        raise failed
    if said is not None:
        raise OSError(said)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """`lock_folder` on rank 0, for all ranks: where it is refused, all fail."""
    with ExitStack() as stack:
        on_main(lambda: stack.enter_context(lock_folder(folder)))
        yield


def from_main(value: T) -> T:
    """The value of rank 0."""
    if not dist.is_initialized():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box)
    found: T = box[0]
    return found


def largest(values: list[float], *, device: torch.device) -> list[float]:
    """The largest of each number over all ranks."""
    return _reduced(values, device=device, how=dist.ReduceOp.MAX)


def summed(values: list[float], *, device: torch.device) -> list[float]:
    """The sum of each number over all ranks."""
    return _reduced(values, device=device, how=dist.ReduceOp.SUM)


def shard(module: nn.Module, *, layers: Iterable[nn.Module], device: str) -> "FSDPModule":
    """Shard the parameters of `module` over all ranks (FSDP2), and with them gradients and optimizer state. Each of
    `layers` is gathered when it runs. All else, the core too, is gathered once at the beginning of `module`'s forward
    and stays until its backward is done, however many loops there are.

    Raises:
        ValueError: a parameter is 0-d.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (n_ranks(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    sharded: FSDPModule = fully_shard(module, mesh=mesh, reshard_after_forward=False)
    return sharded


def is_shared_out(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether each rank has a part of it alone. There is no such tensor before its module is imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if is_shared_out(tensor) else tensor


def gathered(part: Tensor, *, like: Tensor) -> Tensor:
    """The whole of a tensor of which this rank has `part`, sharded as `like` is."""
    if not is_shared_out(like):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(part, mesh, placements, shape=like.shape, stride=like.stride()).full_tensor()


def part_of(tensor: Tensor, *, like: Tensor) -> Tensor:
    """This rank's part of `tensor`, which all ranks have, sharded as `like` is: the inverse of `gathered`."""
    if not is_shared_out(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = DTensor.from_local(tensor, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements).to_local()


def sum_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks."""
    if not dist.is_initialized():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def _reduced(values: list[float], *, device: torch.device, how: Any) -> list[float]:
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=how)
    return tensor.tolist()
