"""What has no loops, or would be compared with itself, is refused before anything is trained."""

from pathlib import Path

import pytest

from commands import fails
from looplm.errors import FolderError
from looplm.files import lock_folder
from looplm.train.compare import Comparison
from looplm.train.run import resolve_run


@pytest.mark.parametrize(
    ("words", "mend"),
    [
        (["s3-iso-parameter"], "train.plan={kind: fixed"),
        (["s3-iso-flop"], "model.n_loops=4"),
        (["reason", "model.n_loops=1"], "model.n_loops=4"),
        (["reason", "train.plan={kind: fixed, n_loops: 1}"], "train.plan={kind: fixed"),
        (["reason", "train.plan={kind: uniform, low: 1, high: 1}"], "train.plan={kind: fixed"),
        (["s3", "data.max_len=1", "data.min_len=1"], "data.max_len=12"),
    ],
)
def test_a_recipe_without_loops_is_not_compared_with_itself(tmp_path: Path, words: list[str], mend: str) -> None:
    assert mend in fails("compare", *words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_comparisons_do_not_share_a_folder(tmp_path: Path) -> None:
    comparison = Comparison(resolve_run("s3"), tmp_path, minutes=1, n_seeds=2, n_jobs=1, say=print)
    with lock_folder(tmp_path), pytest.raises(FolderError, match="is being written into"):
        comparison.run()
    assert not (tmp_path / "runs").exists()
