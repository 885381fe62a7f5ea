"""`looplm data prepare` and `looplm tokenizer train`: what they read, what they say, what they refuse."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from commands import fails, looplm, succeeds
from looplm.data.manifest import TRAIN
from looplm.data.prepared import TokenStream
from looplm.files import lock_folder

LINE = "The cat sat on the mat and the dog sat on the log. "


@pytest.fixture
def tok(tmp_path: Path) -> Path:
    (tmp_path / "learn").write_text(LINE * 40)
    succeeds("tokenizer", "train", tmp_path / "learn", "--vocab", "280", "--out", tmp_path / "tok")
    return tmp_path / "tok"


def decoded(folder: Path, tok: Path) -> str:
    from looplm.data.bpe import load_tokenizer

    stream = TokenStream(folder, split=TRAIN)
    return load_tokenizer(tok).decode(stream.read(0, stream.n_tokens).tolist())


def test_what_is_left_out_is_said_and_kept(tok: Path, tmp_path: Path) -> None:
    image = {"type": "image_url", "image_url": {}}
    chats = [
        [{"role": "user", "content": [{"type": "text", "text": "hi"}, image]}, {"role": "assistant", "content": "yo"}],
        [{"role": "user", "content": [image]}, {"role": "assistant", "content": "a cat"}],
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    words = ("data", "prepare", tmp_path / "chats.jsonl", "--tokenizer", tok, "--held-out", "0", "--out")
    said = succeeds(*words, tmp_path / "out")
    wanted = ["left out: 2 parts of type 'image_url'", "left out: 1 documents, with a turn without text"]
    assert [line for line in said.splitlines() if line.startswith("left out")] == wanted
    assert decoded(tmp_path / "out", tok) == "user: hi\nassistant: yo"
    looked = succeeds("data", "prepare", "--inspect", "--out", tmp_path / "out")
    assert all(line in looked for line in wanted)
    learned = looplm("tokenizer", "train", tmp_path / "chats.jsonl", "--vocab", "270", "--out", tmp_path / "more")
    assert "2 parts of type 'image_url', 1 with a turn without text" in learned.stdout


@pytest.mark.parametrize("fields", [("--field", "q,a"), ("--field", "q", "--field", "a")])
def test_several_fields_are_a_line_each(tok: Path, tmp_path: Path, fields: tuple[str, ...]) -> None:
    (tmp_path / "r.jsonl").write_text('{"q": "The cat", "a": "sat"}\n{"q": "alone"}\n')
    words = ("data", "prepare", tmp_path / "r.jsonl", "--tokenizer", tok, "--held-out", "0", "--out", tmp_path / "out")
    assert "left out: 1 documents, without a" in succeeds(*words, *fields)
    assert decoded(tmp_path / "out", tok) == "The cat\nsat"


def test_a_folder_of_any_files_is_read(tok: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("GPL-3", "README", "a.rst", "b.html", "10.c", "9.csv"):
        (folder / name).write_text(name)
    (folder / "c.png").write_bytes(b"\x89PNG\0")
    words = ("data", "prepare", folder, "--tokenizer", tok, "--held-out", "0", "--out", tmp_path / "out")
    assert "left out: 1 documents, binary" in succeeds(*words)
    assert TokenStream(tmp_path / "out", split=TRAIN).shards[0].n_documents == 6
    for words in (
        ("data", "prepare", folder / "c.png", "--tokenizer", tok, "--out", tmp_path / "none"),
        ("tokenizer", "train", folder / "c.png", "--out", tmp_path / "none"),
    ):
        assert "no text" in fails(*words)
    assert not (tmp_path / "none").exists()


def test_prepared_again_it_says_so_or_what_differs(tok: Path, tmp_path: Path) -> None:
    words = ("data", "prepare", tmp_path / "learn", "--tokenizer", tok, "--held-out", "0", "--out", tmp_path / "out")
    first, again = looplm(*words), looplm(*words)
    assert (first.returncode, again.returncode, again.stdout) == (0, 0, first.stdout)
    assert "was complete already" in again.stderr
    assert "was complete already" not in first.stderr
    (tmp_path / "learn").write_text("another text")
    assert "learn' has changed; give another --out, or remove" in fails(*words)
    assert "held_out 0.0, not 0.5" in fails(*words, "--held-out", "0.5")


def test_a_folder_that_is_being_written_is_refused(tok: Path, tmp_path: Path) -> None:
    with lock_folder(tmp_path / "out"):
        for words in (("data", "prepare", tmp_path / "learn", "--tokenizer", tok), ("tokenizer", "train", tmp_path)):
            assert "is being written into" in fails(*words, "--out", tmp_path / "out")
    assert "shards among the texts" in fails("data", "prepare", tmp_path, "--tokenizer", tok, "--out", tmp_path / "o")


def test_text_of_a_device_or_a_pipe_is_refused_at_once(tok: Path, tmp_path: Path) -> None:
    for path, kind in (("/dev/zero", "device"), (str(tmp_path), "folder")):
        assert f"is a {kind}, not a file of text" in fails(
            "train", "text", f"data.path={path}", "--out", tmp_path / "r"
        )
        assert not (tmp_path / "r").exists()
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(100 << 30)
    assert "make tokens of it" in fails("train", "text", f"data.path={tmp_path / 'sparse'}", "--out", tmp_path / "r")
    assert "is a device" in fails("data", "prepare", "/dev/zero", "--tokenizer", tok, "--out", tmp_path / "r")
    assert "is a device" in fails("tokenizer", "train", "/dev/zero", "--out", tmp_path / "r")


@pytest.mark.long
def test_ctrl_c_says_how_to_go_on(tok: Path, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text((json.dumps({"text": LINE * 20}) + "\n") * 20_000)
    words = ("data", "prepare", tmp_path / "long.jsonl", "--tokenizer", tok, "--shard-tokens", "50000")
    command = [sys.executable, "-m", "looplm", *map(str, words), "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as job:
        while not (tmp_path / "out" / "train-00001.bin").exists():
            time.sleep(0.05)
        job.send_signal(signal.SIGINT)
        assert job.communicate()[1] == "stopped; the same command continues from the last finished shard\n"
    assert job.returncode == 130
    succeeds(*words, "--out", tmp_path / "out")
    succeeds(*words, "--out", tmp_path / "whole")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
