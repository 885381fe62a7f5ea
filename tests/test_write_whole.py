"""Files are replaced whole or stay as they were."""

from pathlib import Path
from unittest.mock import patch

import pytest

from looplm.files import write_whole


def test_a_write_that_fails_leaves_the_file_before_and_nothing_half_made(tmp_path: Path) -> None:
    path = tmp_path / "kept.txt"
    write_whole(path, b"before")
    for broken in ("os.fsync", "pathlib.Path.replace"):
        with patch(broken, side_effect=OSError(28, "No space left on device")), pytest.raises(OSError, match="space"):
            write_whole(path, b"after")
        assert [each.name for each in tmp_path.iterdir()] == ["kept.txt"]
        assert path.read_bytes() == b"before"
