"""Pretraining on prepared text: from documents to a run that knows its tokenizer, scored in bits per byte."""

import json
import math
import os
import shutil
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from looplm.checkpoint import load_run
from looplm.data.bpe import load_tokenizer, train_bpe
from looplm.data.prepare import TOKENIZER, PrepareConfig, prepare
from looplm.data.sources import held_out_text
from looplm.errors import CheckpointError, ConfigError, DataError
from looplm.eval.loops import bits_per_byte, held_out_batches, held_out_loss, measure_dial
from looplm.eval.text import as_completer
from looplm.telemetry.sinks import Record
from looplm.train.run import RunConfig, resolve_run, resume_run, start_run

TINY = ["model.d_model=32", "model.block.attention={kind: gqa, n_heads: 2, n_kv_heads: 2, head_dim: 16}"]
TINY += ["model.block.ffn.d_ff=32", "data.n_rows=2", "data.row_len=32", "train.n_workers=0", "train.steps=6"]
TINY += ["train.minutes=null", "train.checkpoint_steps=3", "train.log_every=1", "train.validate_every=4"]
TINY += ["train.runtime={device: cpu, precision: fp32, compile: false, n_threads: 1}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("text")
    texts = [f"Line {number}: the cat {number * 7 % 13} sat on mat {number % 5}, äöü.\n" * 3 for number in range(300)]
    (made / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_bpe(texts, vocab_size=285)
    prepare(PrepareConfig(sources=[str(made / "text.jsonl")], held_out=0.1), tokenizer, made / "prepared")
    return made / "prepared"


def config(folder: Path, *overrides: str) -> RunConfig:
    return resolve_run(
        "pretrain", overrides=[f"data.folders={{{folder}: 1}}", "model.vocab_size=285", *TINY, *overrides]
    )


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    start_run(config(folder), out)
    return out


def test_a_run_keeps_its_tokenizer_and_says_bits_per_byte(run: Path, folder: Path) -> None:
    assert (run / TOKENIZER).read_text() == (folder / TOKENIZER).read_text()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert ["val_bpb" in record for record in records] == [False] * 3 + [True, False, True]
    loaded = load_run(run)
    resolved = config(folder)
    batches = held_out_batches(resolved.data)
    tokenizer, nats, n_bytes = load_tokenizer(run), 0.0, 0
    for batch in batches:
        with torch.no_grad():
            log_p = loaded.model(batch.ids).logits.log_softmax(-1)
        for row in range(len(batch.ids)):
            for place, target in enumerate(batch.targets[row].tolist()):
                if target >= 14:  # after the tags
                    nats -= float(log_p[row, place, target])
                    n_bytes += len(tokenizer.id_to_token(target))
    bits = records[-1]["val_bpb"]
    assert bits == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-4)
    assert 1 < bits < 8


def test_a_resumed_run_is_the_uninterrupted_one(run: Path, folder: Path, tmp_path: Path) -> None:
    def interrupt(record: Record) -> None:
        if record["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    start_run(config(folder), tmp_path / "run", observers=(interrupt,))
    resume_run(tmp_path / "run")
    again, whole = (load_run(each).model.state_dict() for each in (tmp_path / "run", run))
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_a_vocabulary_that_is_too_small_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"285 kinds of tokens and the model 200: give model\.vocab_size=285"):
        start_run(config(folder, "model.vocab_size=200"), tmp_path / "run")


def test_a_refused_resume_leaves_the_tokenizer_as_it_was(folder: Path, tmp_path: Path) -> None:
    run, moved = tmp_path / "run", tmp_path / "prepared"
    shutil.copytree(folder, moved)
    start_run(config(moved, "train.steps=3"), run)
    kept = (run / TOKENIZER).read_text()
    shutil.rmtree(moved)
    source = PrepareConfig(sources=[str(folder.parent / "text.jsonl")], held_out=0.2)
    prepare(source, train_bpe(["another text, " * 50], vocab_size=275), moved)
    with pytest.raises(CheckpointError, match="has changed since it began"):
        resume_run(run, overrides=["train.steps=6"])
    assert (run / TOKENIZER).read_text() == kept


def test_text_that_holds_nothing_out_is_refused_before_a_folder_is_made(folder: Path, tmp_path: Path) -> None:
    prepare(
        PrepareConfig(sources=[str(folder.parent / "text.jsonl")], held_out=0), load_tokenizer(folder), tmp_path / "p"
    )
    with pytest.raises(DataError, match="holds nothing out to be scored"):
        start_run(config(tmp_path / "p"), tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_texts_go_on_as_the_full_forward_says(run: Path) -> None:
    loaded = load_run(run)
    completer = as_completer(loaded, run=run)
    (reply,) = completer.complete(["Line 12: the"], max_new_tokens=5)
    ids = [2, *load_tokenizer(run).encode("Line 12: the").ids]
    with torch.no_grad():
        for _ in range(5):
            ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert reply.generation.ids == ids[-5:]
    assert reply.text == load_tokenizer(run).decode([each for each in ids[-5:] if each != 2], skip_special_tokens=False)
    both = completer.complete(["Line 12: the", ""], max_new_tokens=5)
    assert both[0] == reply


def test_bytes_go_on_too_and_questions_do_not(tmp_path: Path, tiny_reason: list[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, " * 100)
    start_run(resolve_run("text", overrides=[f"data.path={text}", *TINY]), tmp_path / "bytes")
    completer = as_completer(load_run(tmp_path / "bytes"), run=tmp_path / "bytes")
    (reply,) = completer.complete(["to be"], max_new_tokens=4)
    assert len(reply.generation.ids) == 4
    start_run(resolve_run("reason", overrides=tiny_reason), tmp_path / "reason")
    with pytest.raises(CheckpointError, match="not on text; give a run of `looplm train pretrain`"):
        as_completer(load_run(tmp_path / "reason"), run=tmp_path / "reason")


def test_the_dial_is_measured_on_held_out_tokens(run: Path, folder: Path) -> None:
    dial = measure_dial(load_run(run), n=1)
    assert dial.what == "held-out tokens, the likeliest next one right"
    batches = held_out_batches(config(folder).data)
    assert dial.rows[0].score.n == sum(batch.targets.numel() for batch in batches)


def test_bits_per_byte_of_bytes_is_the_loss(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, " * 100)
    resolved = resolve_run("text", overrides=[f"data.path={text}", *TINY])
    start_run(resolved, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    loaded, batches = load_run(tmp_path / "run"), held_out_batches(resolved.data)
    bits = held_out_loss(loaded.model, batches, n_loops=4) / math.log(2)
    assert records[-1]["val_bpb"] == pytest.approx(bits, rel=1e-5)
    token_bytes = held_out_text(resolved.data).token_bytes  # type: ignore[arg-type]
    assert bits_per_byte(loaded.model, batches, token_bytes, n_loops=4) == pytest.approx(bits, rel=1e-5)


def test_phases_lengthen_rows_and_are_told(folder: Path, tmp_path: Path) -> None:
    resolved = config(folder, "data.phases=[{n_batches: 8}, {row_len: 64}]", "train.accumulate=2")
    start_run(resolved, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["phase"] for record in records] == [1, 1, 1, 1, 2, 2]
    tokens = [record["tokens"] for record in records]
    assert [after - before for before, after in pairwise([0, *tokens])] == [128, 128, 128, 128, 256, 256]


def test_a_micro_batch_by_tokens_keeps_its_size_while_rows_grow(folder: Path, tmp_path: Path) -> None:
    resolved = config(folder, "data.phases=[{n_batches: 3}, {row_len: 64}]", "data.n_tokens=128")
    start_run(resolved, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["tokens"] for record in records] == [128 * step for step in range(1, 7)]
    assert [phase.n_rows for phase in resolved.data.in_full()] == [4, 2]  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="n_tokens 40 holds no row of 64: raise it"):
        config(folder, "data.phases=[{n_batches: 3}, {row_len: 64}]", "data.n_tokens=40")


def test_rates_grow_with_the_root_of_a_larger_step_alone(folder: Path, tmp_path: Path) -> None:
    changes = ["train.schedule={warmup: 0, decay: 0}", "train.optimizer.batch_tokens=64"]
    phases = "data.phases=[{n_batches: 2, n_rows: 1}, {n_batches: 2}, {row_len: 64, n_rows: 4}]"
    start_run(config(folder, phases, *changes), tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["lr_scale"] for record in records] == [1, 1, 1, 1, 2, 2]


def test_averaged_weights_are_what_is_scored(folder: Path, tmp_path: Path) -> None:
    resolved = config(folder, "train.ema=0.9")
    start_run(resolved, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    loaded, batches = load_run(tmp_path / "run"), held_out_batches(resolved.data)
    token_bytes = held_out_text(resolved.data).token_bytes  # type: ignore[arg-type]
    bits = bits_per_byte(loaded.model, batches, token_bytes, n_loops=loaded.model.config.n_loops)
    assert records[-1]["val_bpb"] == pytest.approx(bits, rel=1e-5)


def test_samples_of_a_killed_run_are_written_again(folder: Path, run: Path, tmp_path: Path) -> None:
    start_run(config(folder, "train.steps=3"), tmp_path / "run")
    samples = tmp_path / "run" / "samples.txt"
    with samples.open("a") as file:
        file.write("step 5: 'never saved'\nstep 6: 'cut sh")
    resume_run(tmp_path / "run", overrides=["train.steps=6"])
    told = [line.partition(":")[0] for line in samples.read_text().splitlines()]
    assert told == ["step 3", "step 4", "step 6"]
