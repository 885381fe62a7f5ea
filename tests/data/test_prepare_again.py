"""Prepared again: what has changed is noticed, what failed does not block, and one process at a time writes."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from byte_level import byte_tokenizer
from looplm.data import prepare as module
from looplm.data.manifest import MANIFEST, TRAIN, Manifest, PrepareConfig, read_manifest
from looplm.data.prepare import prepare
from looplm.data.prepared import PreparedConfig, PreparedSource, TokenStream
from looplm.errors import ConfigError, DataError, FolderError
from looplm.files import lock_folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "abc":
        write(folder / f"{name}.jsonl", [f"{name} {number}" for number in range(700)])
    return folder


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "no record\n")


def run(source: Path, out: Path, **options: Any) -> Manifest:
    options = {"held_out": 0.1, "shard_tokens": 2000, **options}
    on_progress = options.pop("on_progress", None)
    config = PrepareConfig(sources=[str(source)], **options)
    return prepare(config, byte_tokenizer(), out, on_progress=on_progress)


def stop_after(n: int) -> Callable[[int], None]:
    seen: list[int] = []

    def on_progress(n_bytes: int) -> None:
        seen.append(n_bytes)
        if len(seen) == n:
            raise KeyboardInterrupt

    return on_progress


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


CHANGES: dict[str, Callable[[Path], None]] = {
    r"b\.jsonl' has changed": lambda folder: write(folder / "b.jsonl", ["b 0"]),
    r"a\.jsonl' has changed": lambda folder: write(folder / "a.jsonl", [f"A {n}" for n in range(700)]),
    r"c\.jsonl' is gone": lambda folder: (folder / "c.jsonl").unlink(),
    r"bb\.jsonl' is new": lambda folder: write(folder / "bb.jsonl", ["bb"] * 9),
}


@pytest.mark.parametrize("difference", CHANGES)
def test_a_complete_folder_of_other_text_is_refused(texts: Path, tmp_path: Path, difference: str) -> None:
    run(texts, tmp_path / "out")
    before = contents(tmp_path / "out")
    CHANGES[difference](texts)
    with pytest.raises(ConfigError, match=rf"from other text: .*{difference}; give another --out, or remove"):
        run(texts, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_complete_folder_of_the_same_text_is_left_as_it_is(texts: Path, tmp_path: Path) -> None:
    whole = run(texts, tmp_path / "out")
    before = contents(tmp_path / "out")
    os.utime(texts / "a.jsonl", (1, 1))  # a copy has another time and the same text
    assert run(texts / "*.jsonl", tmp_path / "out") == whole
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("option", [{"held_out": 0.2}, {"seed": 1}, {"shard_tokens": 999}, {"field": "text"}])
def test_another_option_is_named(texts: Path, tmp_path: Path, option: dict[str, Any]) -> None:
    run(texts, tmp_path / "out")
    ((name, value),) = option.items()
    with pytest.raises(ConfigError, match=rf"another config: {name} .*, not {value!r}; give another --out"):
        run(texts, tmp_path / "out", **option)


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("difference", CHANGES)
def test_a_stopped_folder_goes_on_with_the_text_of_today(texts: Path, tmp_path: Path, difference: str, n: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(texts, tmp_path / "out", on_progress=stop_after(n))
    assert read_manifest(tmp_path / "out").shards
    CHANGES[difference](texts)
    done: list[int] = []
    found = run(texts, tmp_path / "out", on_progress=done.append)
    assert found == run(texts, tmp_path / "whole")
    assert found.skipped == {"not JSON": len(list(texts.iterdir()))}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_file_that_changes_while_it_is_read_is_an_error(texts: Path, tmp_path: Path) -> None:
    def change(n_bytes: int) -> None:
        with (texts / "a.jsonl").open("a") as file:
            file.write('{"text": "more"}\n')

    with pytest.raises(DataError, match=r"a\.jsonl' has changed while it was read; run the command again"):
        run(texts, tmp_path / "out", on_progress=change)
    assert run(texts, tmp_path / "out") == run(texts, tmp_path / "whole")


def test_a_failed_prepare_does_not_block_the_mended_command(tmp_path: Path) -> None:
    source, out = tmp_path / "t.txt", tmp_path / "out"
    source.write_text(" ")
    with pytest.raises(DataError, match="no text to learn from"):
        run(source, out, held_out=0)
    assert not out.exists()
    source.write_text("a short text")
    with pytest.raises(DataError, match="give --held-out 0"):
        run(source, out, held_out=0.999)
    assert not out.exists()
    (tmp_path / "cut.gz").write_bytes(b"\x1f\x8b cut")
    with pytest.raises(DataError, match="is not whole gzip"):
        run(tmp_path / "cut.gz", out, held_out=0)
    assert run(source, out, held_out=0).complete


def test_a_killed_prepare_without_a_shard_does_not_block(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(texts, out)
    manifest = read_manifest(out)
    manifest.complete, manifest.shards, manifest.part = False, [], 0
    (out / MANIFEST).write_bytes(manifest.to_json())
    assert run(texts, out, seed=5).config.seed == 5


def test_a_folder_of_an_earlier_version_is_read(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole = run(texts, out)
    old = json.loads((out / MANIFEST).read_text())
    del old["origins"]
    old["shards"] = [{key: shard[key] for key in shard if key not in ("part", "n_done")} for shard in old["shards"]]
    (out / MANIFEST).write_text(json.dumps(old))
    assert run(texts, out).n_tokens(TRAIN) == whole.n_tokens(TRAIN)
    os.utime(texts / "a.jsonl", (2**32, 2**32))
    with pytest.raises(ConfigError, match=r"a\.jsonl' has changed"):
        run(texts, out)


def test_one_process_at_a_time_writes_into_a_folder(texts: Path, tmp_path: Path) -> None:
    with lock_folder(tmp_path / "out"), pytest.raises(FolderError, match="is being written into"):
        run(texts, tmp_path / "out")
    run(texts, tmp_path / "out")
    assert not (tmp_path / "out" / ".lock").exists()


@pytest.mark.parametrize(
    ("source", "out"),
    [
        ("texts", "texts"),
        ("texts", "texts/a/b"),
        ("texts/**/*.bin", "texts/out"),
        ("**/*.json", "out"),
        ("texts/out/*.txt", "texts/out"),
    ],
)
def test_shards_among_the_sources_are_refused(texts: Path, tmp_path: Path, source: str, out: str) -> None:
    (texts / "x.bin").write_text("x")
    (texts / "x.json").write_text("{}")
    (texts / "out").mkdir()
    (texts / "out" / "a.txt").write_text("text")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="would hold shards among the texts of"):
        run(tmp_path / source, tmp_path / out)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_beside_the_texts_of_a_glob_is_taken(texts: Path, tmp_path: Path) -> None:
    assert run(texts / "*.jsonl", texts / "out").complete
    assert run(tmp_path / "texts" / "**" / "*.jsonl", texts / "more").complete


def test_a_tokenizer_is_not_written_over(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("mine")
    with pytest.raises(ConfigError, match="already holds a tokenizer"):
        run(texts, tmp_path / "tok")
    assert (tmp_path / "tok" / "tokenizer.json").read_text() == "mine"


def test_a_full_disk_names_the_file_and_loses_nothing(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out, write_whole = run(texts, tmp_path / "whole"), tmp_path / "out", module.write_whole
    for n_written in (2, 3, 5, 8):
        n_left = [n_written]

        def fill(path: Path, data: bytes, n_left: list[int] = n_left) -> None:
            n_left[0] -= 1
            if n_left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            write_whole(path, data)

        monkeypatch.setattr(module, "write_whole", fill)
        with pytest.raises(DataError, match=r"out/.*' cannot be written \(No space left on device\).*command again"):
            run(texts, out)
        monkeypatch.setattr(module, "write_whole", write_whole)
        assert run(texts, out) == whole
        shutil.rmtree(out)


def test_long_documents_are_tokenised_few_at_a_time(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(texts, tmp_path / "whole")
    sizes: list[int] = []
    monkeypatch.setattr(module, "GROUP_TEXT", 100)
    run(texts, tmp_path / "few", on_progress=sizes.append)
    assert max(sizes) < 110
    assert contents(tmp_path / "few") == contents(tmp_path / "whole")
    monkeypatch.setattr(module, "MOST_KEPT", 1)
    assert len(run(texts, tmp_path / "many", shard_tokens=100).shards) > len(read_manifest(tmp_path / "whole").shards)


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "cut short": lambda data: json.dumps(data)[:200],
    "deep": lambda data: "[" * 100_000,
    "list": lambda data: [data],
    "text as a number": lambda data: {**data, "vocab_size": "many"},
    "no shards": lambda data: {key: data[key] for key in data if key != "config"},
    "shard of another folder": lambda data: {**data, "shards": [{**data["shards"][0], "name": "../x.bin"}]},
    "null": lambda data: {**data, "shards": None},
    "negative": lambda data: {**data, "shards": [{**data["shards"][0], "n_tokens": -1}]},
    "another type": lambda data: {**data, "dtype": "float64"},
    "true": lambda data: {**data, "end_id": True},
}


@pytest.mark.parametrize("how", BROKEN)
def test_whatever_a_manifest_holds_is_one_error_that_names_it(texts: Path, tmp_path: Path, how: str) -> None:
    run(texts, tmp_path / "out")
    path = tmp_path / "out" / MANIFEST
    broken = BROKEN[how](json.loads(path.read_text()))
    path.write_text(broken if isinstance(broken, str) else json.dumps(broken))
    for read in (lambda: TokenStream(tmp_path / "out", split=TRAIN), lambda: run(texts, tmp_path / "out")):
        with pytest.raises(DataError, match=r"manifest\.json' is no manifest \(.*\); remove"):
            read()


def test_damaged_shards_and_tokenizers_are_named(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(texts, out)
    shard = out / "train-00000.bin"
    shard.write_bytes(b"\xff\xff" * (shard.stat().st_size // 2))
    source = PreparedSource(PreparedConfig(folders={str(out): 1}, n_rows=64, row_len=8), seed=0)
    with pytest.raises(DataError, match=r"train-00000\.bin' is damaged: it holds id 65535 of 260"):
        _ = [source.batch(number) for number in range(9)]
    path = out / "tokenizer.json"
    path.write_text(path.read_text().replace("<|fim_prefix|>", "<|fim_prefix|} "))
    with pytest.raises(DataError, match=r"tokenizer\.json' is not what the text was prepared with"):
        _ = source.tokenizer
