"""A run that is killed again and again, and one whose disk fills up.

python benchmarks/soak.py [--kills 20] [--steps 4000] [--out FOLDER]

Two processes train together. The run is killed (SIGKILL, all of its processes) at random moments and started again
until it ends; its weights and losses have to be those of an undisturbed run, bit for bit. Then a run on a file system
with room for one checkpoint has to stop with one clear error and leave its last checkpoint whole. Ends with status 1
where anything of that does not hold. Takes some ten minutes on two cores.
"""

import argparse
import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from looplm.checkpoint import checkpoints, load_run, write_text
from looplm.config import to_yaml
from looplm.train.run import resolve_run

TINY = ["model.d_model=64", "model.block.attention={kind: gqa, n_heads: 2, n_kv_heads: 2, head_dim: 32}"]
TINY += ["model.block.ffn.d_ff=128", "data.n_rows=2", "train.accumulate=2", "train.minutes=null", "train.log_every=1"]
TINY += ["train.checkpoint_steps=3", "train.runtime={device: cpu, precision: fp32, compile: false, n_threads: 1}"]
LONGEST_LIFE = 14.0  # seconds from start to kill; starting alone takes half of it
FILE_LIMIT = 600_000  # bytes of the largest file, where no small file system can be mounted


def train(words: list[str], *, limit: bool = False) -> subprocess.Popen[str]:
    """Start `looplm train` in two processes, in a new process group."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "looplm", "train", *words]

    def before() -> None:
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT))

    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        start_new_session=True,
        preexec_fn=before,
    )


def words_for(run: Path, recipe: Path) -> list[str]:
    """Begin the run, or resume it."""
    return ["--resume", str(run)] if (run / "config.yaml").exists() else [str(recipe), "--out", str(run)]


def finish(run: Path, recipe: Path) -> str:
    """Train to the end; what was printed."""
    process = train(words_for(run, recipe))
    said = process.communicate()[0]
    if process.returncode:
        sys.exit(f"the run ended with status {process.returncode}:\n{said}")
    return said


def killed(run: Path, recipe: Path, *, n_kills: int, rng: random.Random) -> None:
    """Kill the run `n_kills` times, then let it end."""
    for number in range(1, n_kills + 1):
        process = train(words_for(run, recipe))
        time.sleep(rng.uniform(1, LONGEST_LIFE))
        ended = process.poll() is not None
        for pid in [process.pid, *descendants(process.pid)]:  # each of torchrun's ranks is in its own session
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        said = process.communicate()[0]
        if ended and process.returncode and "is used up" not in said:
            sys.exit(f"after kill {number - 1} the run did not continue:\n{said}")
        whole = checkpoints(run)
        if whole:
            load_run(run)  # whatever is taken for a checkpoint can be read
        print(f"kill {number}: at {whole[-1].name if whole else 'no checkpoint yet'}", flush=True)
        if "is used up" in said:
            sys.exit(f"the run ended before kill {number}: give more --steps")
    finish(run, recipe)


def descendants(pid: int) -> list[int]:
    """All processes below one, by /proc."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


def same(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights, bit for bit, and wrote the same losses."""
    a, b = (load_run(run).model.state_dict() for run in (one, other))
    if not all(torch.equal(tensor, b[name]) for name, tensor in a.items()):
        return False
    return _losses(one) == _losses(other)


def _losses(run: Path) -> list[str]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line.split('"grad_norm"')[0] for line in lines]  # step, tokens, loss; then what the clock decides


@contextlib.contextmanager
def small_disk(folder: Path, *, n_bytes: int) -> Iterator[bool]:
    """A file system of n_bytes at `folder`; False where none can be mounted here."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(folder)]
    is_mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", str(folder)], check=False)


def full_disk(folder: Path, recipe: Path, *, checkpoint_bytes: int) -> None:
    """A run that runs out of room."""
    with small_disk(folder, n_bytes=int(1.6 * checkpoint_bytes)) as is_mounted:
        run = folder / "run"
        process = train([str(recipe), "--out", str(run)], limit=not is_mounted)
        said = process.communicate()[0]
        clear = [line for line in said.splitlines() if line.startswith("error: ")]
        print(f"{'small file system' if is_mounted else 'limit on file sizes'}: {clear[0] if clear else said}")
        if not process.returncode or len(clear) != 1:
            sys.exit("a full disk did not end in one clear error")
        if is_mounted:
            load_run(run)
            print(f"its last checkpoint, {checkpoints(run)[-1].name}, is whole")


def main() -> None:
    """See the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4000, help="of the run, a few more than its lives get through")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--out", type=Path, help="a new folder for the runs; else a temporary one")
    given = parser.parse_args()
    out = given.out or Path(tempfile.mkdtemp())
    out.mkdir(parents=True, exist_ok=True)
    recipe = out / "recipe.yaml"
    write_text(recipe, to_yaml(resolve_run("reason", overrides=[*TINY, f"train.steps={given.steps}"])))
    undisturbed, disturbed = out / "undisturbed", out / "disturbed"
    started = time.perf_counter()
    finish(undisturbed, recipe)
    print(f"undisturbed: {time.perf_counter() - started:.0f} s", flush=True)
    killed(disturbed, recipe, n_kills=given.kills, rng=random.Random(given.seed))
    if not same(undisturbed, disturbed):
        sys.exit("the run that was killed ended with other weights or losses")
    print("the same weights and losses, bit for bit")
    newest = checkpoints(undisturbed)[-1]
    size = sum(path.stat().st_size for path in newest.iterdir())
    full_disk(out / "small", recipe, checkpoint_bytes=size)


if __name__ == "__main__":
    main()
