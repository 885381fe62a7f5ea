"""The speed of a machine, and the memory that a process takes."""

import sys
import time

import torch


def matmul_rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """FLOPs per second of a large matrix product, the best of twelve: a model's rate is compared with it."""
    device = torch.device(device)
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)  # not the process's generator, whose next draws must not change
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    times = []
    for _ in range(12):
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times)


def memory_gb(device: torch.device) -> float:
    """Most memory taken so far: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return float("nan")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
