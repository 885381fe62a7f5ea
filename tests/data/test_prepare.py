"""Prepared text: every token is learned from, what is held out is not, and a run that was stopped goes on as it was."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from byte_level import TAGS, byte_tokenizer
from looplm.data.manifest import HELD_OUT, MANIFEST, TRAIN, PrepareConfig, read_manifest
from looplm.data.pack import IGNORE
from looplm.data.prepare import is_held_out, prepare
from looplm.data.prepared import (
    BLOCK,
    PhaseConfig,
    PreparedConfig,
    PreparedSource,
    TokenStream,
    mixture_block,
    shuffled,
)
from looplm.errors import ConfigError, DataError

END, PREFIX, SUFFIX, MIDDLE = range(4)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Prepares texts, a record each."""

    def make(texts: list[str], *, name: str = "out", **options: Any) -> Path:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare(PrepareConfig(sources=[str(path)], **{"held_out": 0, **options}), byte_tokenizer(), tmp_path / name)
        return tmp_path / name

    return make


def words(n: int, *, seed: int) -> str:
    return "".join(random.Random(f"{seed}").choices("abcdefgh ", k=n))


def source(folders: Any, *, seed: int = 0, held_out: bool = False, **options: Any) -> PreparedSource:
    return PreparedSource(PreparedConfig(folders=folders, **options), seed=seed, held_out=held_out)


LENGTHS: dict[str, Callable[[random.Random], int]] = {
    "T + 1": lambda rng: 513,
    "T": lambda rng: 512,
    "50 to 400": lambda rng: rng.randint(50, 400),
    "log-normal, median 800": lambda rng: int(rng.lognormvariate(6.68, 1)) + 1,
    "20,000": lambda rng: 20_000,
}


@pytest.mark.parametrize("lengths", LENGTHS)
def test_under_1_percent_of_the_tokens_are_wasted_at_any_length(lengths: str, make: Callable[..., Path]) -> None:
    rng = random.Random(1)
    n_left, texts = 120_000, []
    while n_left > 0:
        texts.append(words(LENGTHS[lengths](rng) - 1, seed=len(texts)))
        n_left -= len(texts[-1]) + 1
    folder = make(texts)
    n_tokens = TokenStream(folder, split=TRAIN).n_tokens
    assert n_tokens == sum(map(len, texts)) + len(texts)
    rows = source(str(folder), n_rows=1, row_len=512)
    n_windows = (n_tokens - 1) // 512
    learned = [rows.batch(index) for index in range(n_windows)]
    assert sum(int((batch.targets != IGNORE).sum()) for batch in learned) / n_tokens > 0.99
    assert len({tuple(batch.ids[0].tolist()) for batch in learned}) == n_windows  # each once, before any again


def test_rows_are_the_stream_and_predict_its_next_token(make: Callable[..., Path]) -> None:
    texts = [words(30 + number % 40, seed=number) for number in range(1100)]
    folder = make(texts, shard_tokens=512)
    stream = TokenStream(folder, split=TRAIN)
    assert len(stream.shards) > 1
    whole = stream.read(0, stream.n_tokens)
    tokenizer = byte_tokenizer()
    read = tokenizer.decode(whole.tolist(), skip_special_tokens=False).split(TAGS[END])
    assert sorted(read[:-1]) == sorted(texts)
    assert whole[stream.ends - 1].tolist() == [END] * len(texts)
    rows = source(str(folder), n_rows=2, row_len=50, seed=3)
    batch = rows.batch(4)
    for ids, targets in zip(batch.ids, batch.targets, strict=True):
        start = next(n for n in range(0, len(whole), 50) if whole[n : n + 50].tolist() == ids.tolist())
        assert targets.tolist() == whole[start + 1 : start + 51].tolist()
    assert torch.equal(source(str(folder), n_rows=2, row_len=50, seed=3).batch(4).ids, batch.ids)
    assert not torch.equal(source(str(folder), n_rows=2, row_len=50, seed=4).batch(4).ids, batch.ids)


def test_masked_documents_are_told_apart_and_do_not_predict_each_other(make: Callable[..., Path]) -> None:
    folder = make([words(7 + number % 5, seed=number) for number in range(60)])
    batch = source(str(folder), n_rows=3, row_len=40, mask_documents=True).batch(0)
    assert batch.documents is not None
    for ids, targets, documents in zip(batch.ids, batch.targets, batch.documents, strict=True):
        expected = 1
        for place in range(40):
            assert documents[place] == expected
            assert (targets[place] == IGNORE) == (ids[place] == END)
            expected += int(ids[place] == END)


def test_what_is_held_out_is_decided_by_the_text_and_never_learned_from(make: Callable[..., Path]) -> None:
    texts = [words(60, seed=number) for number in range(200)]
    folder = make([*texts, *texts[:50]], held_out=0.2)  # copies fall on the same side
    found = {}
    for split in (TRAIN, HELD_OUT):
        stream = TokenStream(folder, split=split)
        text = byte_tokenizer().decode(stream.read(0, stream.n_tokens).tolist(), skip_special_tokens=False)
        found[split] = set(text.split(TAGS[END])[:-1])
    assert found[TRAIN] & found[HELD_OUT] == set()
    assert found[HELD_OUT] == {text for text in texts if is_held_out(text, share=0.2)}
    assert 20 <= len(found[HELD_OUT]) <= 60
    scored = source(str(folder), held_out=True, n_rows=4, row_len=16)
    held = TokenStream(folder, split=HELD_OUT)
    rows = [row for index in range(scored.n_held_out) for row in scored.batch(index).targets.tolist()]
    whole = held.read(1, held.n_tokens - 1).tolist()
    assert sorted(rows) == sorted(whole[start : start + 16] for start in range(0, len(whole) - 15, 16))
    assert rows != [whole[start : start + 16] for start in range(0, len(whole) - 15, 16)]  # any few are of all parts
    targets = [token for row in rows for token in row]
    assert held.n_tokens - len(targets) <= 16


@pytest.mark.parametrize("stop_after", [1, 2, 4])
def test_what_was_stopped_goes_on_to_the_same_bytes(tmp_path: Path, stop_after: int) -> None:
    for number in range(3):
        texts = [words(20, seed=1000 * number + each) for each in range(900)]
        data = "".join(json.dumps({"text": text}) + "\n" for text in texts) + "no record\n"
        (tmp_path / f"{number}.jsonl").write_text(data)
    config = PrepareConfig(sources=[str(tmp_path / "*.jsonl")], shard_tokens=15_000, held_out=0.1)
    whole = prepare(config, byte_tokenizer(), tmp_path / "whole")
    heard: list[int] = []

    def stop(n_bytes: int) -> None:
        heard.append(n_bytes)
        if len(heard) == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, byte_tokenizer(), tmp_path / "parts", on_progress=stop)
    if (tmp_path / "parts" / MANIFEST).exists():
        with pytest.raises(DataError, match="is not finished: run its"):
            TokenStream(tmp_path / "parts", split=TRAIN)
    assert prepare(config, byte_tokenizer(), tmp_path / "parts") == whole
    assert whole.skipped == {"not JSON": 3}
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes()


def test_another_request_for_a_prepared_folder_is_refused(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make(["a text"])
    with pytest.raises(ConfigError, match="was prepared with another config"):
        make(["a text"], seed=1)
    again = PrepareConfig(sources=[str(tmp_path / "out.jsonl")], held_out=0)
    with pytest.raises(ConfigError, match="was prepared with another tokenizer"):
        prepare(again, byte_tokenizer([*TAGS, "<|more|>"]), folder)
    with pytest.raises(ConfigError, match="no end-of-text token"):
        prepare(again, byte_tokenizer([]), tmp_path / "other")


def test_no_text_and_too_little_of_it_are_clear_errors(make: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no text to learn from in .*1 empty"):
        make([" "], name="nothing")
    with pytest.raises(DataError, match="are held out: there are few; give --held-out 0"):
        make(["a short text"], name="held", held_out=0.999)
    folder = make(["a short text"])
    with pytest.raises(DataError, match=r"has 13 tokens to learn from, and a row has 512 and one more"):
        source(str(folder))
    with pytest.raises(DataError, match=r"holds nothing out to be scored: prepare it with a larger --held-out"):
        source(str(folder), row_len=4, held_out=True)
    with pytest.raises(DataError, match=r"is not prepared text; make it: looplm data prepare"):
        source(str(tmp_path / "none"))
    shard = folder / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match="has 24 bytes instead of 26"):
        source(str(folder), row_len=4)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(DataError, match="is no manifest"):
        read_manifest(folder)


def test_held_out_rows_of_a_mixture_are_of_all_its_folders(make: Callable[..., Path]) -> None:
    a, b = (make([letter * 50 + str(n) for n in range(300)], name=letter, held_out=0.5) for letter in "ab")
    held = source({str(a): 1, str(b): 9}, held_out=True, n_rows=4, row_len=16)
    codes = {letter: byte_tokenizer().encode(letter).ids[0] for letter in "ab"}
    first = held.batch(0).ids, held.batch(1).ids
    assert {letter for letter, code in codes.items() if bool((torch.stack(first) == code).any())} == {"a", "b"}
    other = make([words(60, seed=number) for number in range(50)], name="c", held_out=0.25)
    with pytest.raises(ConfigError, match="different --held-out shares"):
        source({str(a): 1, str(other): 1}, held_out=True, n_rows=1, row_len=16)


def test_a_tokenizer_that_truncates_and_pads_does_neither_here(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(max_length=5)
    tokenizer.enable_padding(length=64)
    (tmp_path / "a.txt").write_text("a text of thirty-odd letters")
    made = prepare(PrepareConfig(sources=[str(tmp_path / "a.txt")], held_out=0), tokenizer, tmp_path / "out")
    assert made.n_tokens(TRAIN) == len("a text of thirty-odd letters") + 1


def test_ends_that_are_not_of_their_shard_are_one_clear_error(make: Callable[..., Path]) -> None:
    folder = make(["a text", "another"])
    path = folder / "train-00000.ends.npy"
    whole = path.read_bytes()
    for data, message in ((whole[:20], "cannot be read"), (whole[:-1] + b"\x01", "is not of its shard")):
        path.write_bytes(data)
        with pytest.raises(DataError, match=message):
            _ = TokenStream(folder, split=TRAIN).ends


def test_fim_keeps_every_byte_and_leaves_what_is_held_out_as_it_is(make: Callable[..., Path]) -> None:
    texts = [words(40, seed=number) + "ä漢" for number in range(100)]
    folder = make(texts, fim=0.5, held_out=0.2)
    stream = TokenStream(folder, split=TRAIN)
    tokens = stream.read(0, stream.n_tokens).tolist()
    starts = [0, *stream.ends[:-1].tolist()]
    cut, found = 0, []
    for start, end in zip(starts, stream.ends.tolist(), strict=True):
        document = tokens[start : end - 1]
        if document[0] == PREFIX:
            cut += 1
            suffix, middle = document.index(SUFFIX), document.index(MIDDLE)
            document = [*document[1:suffix], *document[middle + 1 :], *document[suffix + 1 : middle]]
        found.append(byte_tokenizer().decode(document))
    assert sorted(found) == sorted(text for text in texts if not is_held_out(text, share=0.2))
    assert 0.3 < cut / len(found) < 0.7
    held = TokenStream(folder, split=HELD_OUT)
    assert PREFIX not in held.read(0, held.n_tokens)


def test_a_tag_that_stands_in_a_text_is_text(make: Callable[..., Path]) -> None:
    text = "before <|end_of_text|> after"
    stream = TokenStream(make([text]), split=TRAIN)
    assert stream.read(0, stream.n_tokens).tolist().count(END) == 1
    assert byte_tokenizer().decode(stream.read(0, stream.n_tokens - 1).tolist()) == text


@given(st.integers(1, 5000), st.integers(0, 2**31))
def test_the_order_is_a_permutation(n: int, seed: int) -> None:
    assert sorted(shuffled(number, n, seed=(seed, 1)) for number in range(n)) == list(range(n))


def test_the_order_is_a_shuffle() -> None:
    order = np.array([shuffled(number, 10_000, seed=(1,)) for number in range(10_000)])
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
    steps = Counter(np.diff(order).tolist())
    assert steps.most_common(1)[0][1] < 10


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=8), st.integers(0, 50))
def test_a_mixture_is_exact_and_counts_every_row_once(weights: list[float], n_blocks: int) -> None:
    seen: dict[int, list[int]] = {number: [] for number in range(len(weights))}
    for block in range(n_blocks, n_blocks + 2):
        which, numbers = mixture_block(tuple(weights), block, seed=(1,))
        for source_idx, number in zip(which.tolist(), numbers.tolist(), strict=True):
            seen[source_idx].append(number)
    for source_idx, found in seen.items():
        share = weights[source_idx] / sum(weights)
        assert len(found) == pytest.approx(2 * BLOCK * share, abs=len(weights) + 1)
        assert found == list(range(found[0], found[0] + len(found))) if found else True


def test_phases_follow_each_other_with_their_own_mixture_and_rows(make: Callable[..., Path]) -> None:
    a, b = (make([letter * 50] * 400, name=letter) for letter in "ab")
    phases = [PhaseConfig(n_batches=3, row_len=20), PhaseConfig(folders={str(a): 1, str(b): 3}, n_rows=512)]
    rows = source({str(a): 1}, n_rows=4, row_len=40, phases=phases)
    assert [tuple(rows.batch(index).ids.shape) for index in (0, 2, 3)] == [(4, 20), (4, 20), (512, 40)]
    codes = {letter: byte_tokenizer().encode(letter).ids[0] for letter in "ab"}
    for index, wanted in ((2, 0), (3, 0.75), (9, 0.75)):
        ids = rows.batch(index).ids
        n_b, n_a = (int((ids == codes[letter]).any(1).sum()) for letter in "ba")
        assert n_b / (n_a + n_b) == pytest.approx(wanted, abs=0.1)
    assert rows.config.longest_row == 40
    with pytest.raises(ValueError, match="without n_batches lasts for ever"):
        PreparedConfig(folders={"a": 1}, phases=[PhaseConfig(), PhaseConfig()])
    with pytest.raises(ValueError, match="lasts as long as the run, not n_batches 7: leave that out"):
        PreparedConfig(folders={"a": 1}, phases=[PhaseConfig(n_batches=3), PhaseConfig(n_batches=7)])


def test_folders_of_two_tokenizers_are_refused(make: Callable[..., Path], tmp_path: Path) -> None:
    one = make(["some text"] * 9)
    other = PrepareConfig(sources=[str(tmp_path / "out.jsonl")], held_out=0)
    prepare(other, byte_tokenizer([*TAGS, "<|more|>"]), tmp_path / "other")
    with pytest.raises(ConfigError, match="prepared with different tokenizers"):
        source({str(one): 1, str(tmp_path / "other"): 1}, row_len=8)
