"""A sample of sources: equal shares, a cap, text held out, the same each time."""

from pathlib import Path

import pytest

from looplm.data.sample import PIECE, Sample
from looplm.errors import ConfigError, DataError


def make(folder: Path, name: str, letter: str, *, n_files: int, size: int = 100) -> str:
    (folder / name).mkdir()
    for index in range(n_files):
        (folder / name / f"{index:03}.txt").write_text(letter * size)
    return str(folder / name)


def test_sources_give_equal_shares_and_a_small_one_leaves_its_rest(tmp_path: Path) -> None:
    big, other = make(tmp_path, "big", "a", n_files=50), make(tmp_path, "other", "b", n_files=50)
    small = make(tmp_path, "small", "c", n_files=3)
    sample = Sample([big, other, small], n_bytes=4300)
    assert sum(map(len, sample.texts())) <= 4300
    assert [source.n_bytes for source in sample.sources] == [2000, 2000, 300]


def test_nothing_beyond_the_cap_is_read_and_a_character_is_not_halved(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("é" * 1000)
    seen: list[int] = []
    assert list(Sample([str(path)], n_bytes=7).texts(seen.append)) == ["é" * 3]
    assert seen == [7]


def test_a_long_document_does_not_take_the_share_of_others(tmp_path: Path) -> None:
    long, short = tmp_path / "long.txt", make(tmp_path, "short", "b", n_files=200, size=PIECE // 2)
    long.write_text("a" * (PIECE * 100))
    sample = Sample([str(long), short], n_bytes=PIECE * 20)
    assert max(map(len, sample.texts())) <= PIECE
    assert sample.sources[0].n_bytes == pytest.approx(sample.sources[1].n_bytes, abs=PIECE)
    assert sample.sources[0].n_documents == 1


def test_what_is_measured_is_not_learned_where_there_is_enough(tmp_path: Path) -> None:
    source, small = tmp_path / "lines.jsonl", make(tmp_path, "small", "b", n_files=3)
    source.write_text("".join(f'{{"text": "number {index}"}}\n' for index in range(100)) + "no json\n")
    sample = Sample([str(source), small], n_bytes=10**6)
    learned = list(sample.texts())
    lines, few = sample.sources
    assert lines.is_held_out
    assert len(lines.measured) == 5
    assert not set(lines.measured) & set(learned)
    assert not few.is_held_out
    assert few.measured == ["b" * 100] * 3
    assert str(sample.skipped) == "1 not JSON"
    assert list(Sample([str(source), small], n_bytes=10**6).texts()) == learned


def test_mistakes_are_said_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no source given"):
        Sample([], n_bytes=10)
    with pytest.raises(ConfigError, match="0 bytes"):
        Sample(["builtin:python"], n_bytes=0)
    with pytest.raises(DataError, match="no such file"):
        Sample([str(tmp_path / "nowhere")], n_bytes=10)
