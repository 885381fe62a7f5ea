"""Text as bytes: windows of the part to learn from, the rest held out, and errors that name the mend."""

from pathlib import Path

import pytest
import torch

from looplm.data.bytes import BytesConfig, BytesSource
from looplm.errors import DataError


@pytest.fixture
def config(tmp_path: Path) -> BytesConfig:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(250)) * 4)
    return BytesConfig(path=str(path), n_rows=3, row_len=20)


def test_windows_predict_the_next_byte_and_repeat_by_number(config: BytesConfig) -> None:
    source = BytesSource(config, seed=1)
    batch, again = source.batch(7), BytesSource(config, seed=1).batch(7)
    assert torch.equal(batch.ids, again.ids)
    assert not torch.equal(batch.ids, source.batch(8).ids)
    assert torch.equal((batch.ids + 1) % 250, batch.targets)
    assert batch.ids.shape == (3, 20)


def test_what_is_held_out_is_gone_through_once_and_never_learned_from(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"a" * 1170 + bytes(range(130)))
    config = BytesConfig(path=str(path), n_rows=4, row_len=20)
    held_out, training = BytesSource(config, seed=1, held_out=True), BytesSource(config, seed=1)
    assert held_out.n_held_out == 2
    scored = [byte for number in range(2) for byte in held_out.batch(number).targets.flatten().tolist()]
    assert scored == list(range(1, 121))
    learned = torch.stack([training.batch(number).targets for number in range(200)])
    assert set(learned.flatten().tolist()) == {ord("a")}


def test_a_missing_or_short_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read \(No such file.*data\.path=FILE"):
        BytesSource(BytesConfig(path=str(tmp_path / "none")), seed=0)
    (tmp_path / "short").write_text("too short")
    with pytest.raises(DataError, match=r"leaves 8 bytes to learn from.*lower data\.row_len"):
        BytesSource(BytesConfig(path=str(tmp_path / "short")), seed=0)
