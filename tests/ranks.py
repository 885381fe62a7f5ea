"""Two ranks of one training without torchrun: forked from a server that has imported torch already, which saves three
imports of it a call. `tests/train/test_ranks.py` starts the real torchrun where that is what is tested."""

import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

from commands import Done

N_RANKS = 2
TIMEOUT = 300.0
"""Seconds until ranks that wait for each other are ended."""


def _rank(rank: int, port: int, words: list[str], folder: str, before: Callable[[], None] | None) -> None:
    """One rank: what torchrun sets, output into files, and the command."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(N_RANKS),
        "LOCAL_WORLD_SIZE": str(N_RANKS),
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = ["looplm", *words]
    if before is not None:
        before()
    from looplm.cli.main import main

    main()


def ranks(*words: str, before: Callable[[], None] | None = None) -> Done:
    """`torchrun --nproc-per-node 2 -m looplm WORDS`: where a rank fails, the others are ended and the status is its."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "looplm.train.run", "ranks"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        started = [
            context.Process(target=_rank, args=(rank, port, [*words], folder, before)) for rank in range(N_RANKS)
        ]
        for process in started:
            process.start()
        deadline = time.monotonic() + TIMEOUT
        while any(process.is_alive() for process in started) and time.monotonic() < deadline:
            if any(process.exitcode for process in started):
                deadline = min(deadline, time.monotonic() + 5)  # the others may have an error of their own to say
            time.sleep(0.01)
        for process in started:
            process.kill()
            process.join()
        printed = [
            "".join((Path(folder) / f"{rank}.{name}").read_text() for rank in range(N_RANKS)) for name in ("out", "err")
        ]
        return Done(next((p.exitcode for p in started if p.exitcode), 0), *printed)
