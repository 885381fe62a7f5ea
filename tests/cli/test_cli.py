"""The command line as a user meets it: what it prints, and what it says to a mistake."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from commands import looplm, succeeds
from looplm.train.run import resolve_run, start_run

SUM = "What is 47 + 85?"


@pytest.fixture(scope="module")
def s3_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "s3"
    start_run(resolve_run("s3", overrides=["train.minutes=null", "train.steps=3", "data.batch_size=4"]), folder)
    return folder


def test_help_imports_no_torch() -> None:
    code = "import sys, looplm.cli.app; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    out = succeeds("--help")
    for verb in (
        "train",
        "eval",
        "calibrate",
        "chat",
        "generate",
        "count",
        "config",
        "plan",
        "demo",
        "data",
        "tokenizer",
    ):
        assert verb in out
        assert succeeds(verb, "--help")


def test_count_prints_the_published_number_and_flops_by_loops() -> None:
    out = succeeds("count", "nrm-0.9m")
    assert "920,833 parameters" in out
    counts = json.loads(succeeds("count", "nrm-0.9m", "--loops", "1,3", "--json"))
    assert [count["n_loops"] for count in counts] == [1, 3]
    assert counts[1]["flops_per_token"] > counts[0]["flops_per_token"]
    assert re.search(r"parameters\W+920,833\W+920,833", out)  # ours, and what the card says


def test_count_prints_published_sizes_beside_ours() -> None:
    out = succeeds("count", "mythos-1b", "--loops", "16")
    assert "Published: OpenMythos" in out
    for ours, theirs in (("1,064,028,034", "1,064,028,034"), ("288", "768"), ("309,", "309.1M")):
        assert any(ours in line and theirs in line.split(ours, 1)[1] for line in out.splitlines()), ours


def test_config_prints_a_valid_input(tmp_path: Path) -> None:
    printed = succeeds("config", "reason", "train.seed=7")
    path = tmp_path / "again.yaml"
    path.write_text(printed)
    assert succeeds("config", str(path)) == printed
    assert "seed: 7" in printed
    assert "nrm-0.9m" in succeeds("config")


def test_generate_prints_one_object_a_prompt() -> None:
    out = succeeds("generate", "builtin:reasoner", "--prompt", SUM, "--prompt", "Is 7 even or odd?", "--json")
    first, second = map(json.loads, out.splitlines())
    assert first["answer"] == "132"
    assert first["steps"]
    assert first["well_formed"]
    assert first["stopped_by"] == "eos"
    assert second["answer"] == "odd"
    assert succeeds("generate", "builtin:reasoner", "--prompt", SUM, "--loops", "3").strip().endswith("132")
    asked = [word for prompt in (SUM, "Is 7 even or odd?", SUM) for word in ("--prompt", prompt)]
    answers = [
        json.loads(line)["answer"]
        for line in succeeds("generate", "builtin:reasoner", *asked, "--batch-size", "2", "--json").splitlines()
    ]
    assert answers == ["132", "odd", "132"]


def test_chat_answers_and_turns_the_dial() -> None:
    out = succeeds("chat", text=f"{SUM}\n/loops 4\n{SUM}\n/loops none\n/nonsense\n\n/help\n/quit\nIs 3 even or odd?\n")
    assert out.count("132") >= 4  # as the last step and as the answer, twice
    assert "4 loops per token" in out
    assert "/loops takes a whole number" in out
    assert "unknown command '/nonsense'" in out
    assert "Which is larger" in out
    assert "odd" not in out.split("Commands:")[1]


def test_chat_ends_with_its_input() -> None:
    assert "132" in succeeds("chat", text=SUM)


def test_eval_writes_scores_with_intervals(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    out = succeeds(
        "eval",
        "builtin:reasoner",
        "--suite",
        "reasoning",
        "--n",
        "2",
        "--loops",
        "1,2",
        "--no-harder",
        "--json",
        str(path),
    )
    assert "cot_format" in out
    scores = json.loads(path.read_text())
    assert set(scores["tasks"]) == set(scores["by_loops"]["1"])
    assert len(scores["tasks"]) == 8
    for entry in scores["tasks"].values():
        assert set(entry) == {"accuracy", "n", "low", "high"}
        assert 0 <= entry["low"] <= entry["accuracy"] <= entry["high"] <= 1


def test_eval_scores_anyones_questions(tmp_path: Path) -> None:
    questions, path = tmp_path / "questions.jsonl", tmp_path / "q.json"
    records = [
        {"task": "sums", "question": SUM, "answer": "132"},
        {"task": "sums", "question": "What is 1 + 1?", "answer": "3"},
        {"task": "parity", "question": "Is 8 even or odd?", "answer": "even"},
    ]
    questions.write_text("\n".join(map(json.dumps, records)))
    succeeds("eval", "builtin:reasoner", "--questions", str(questions), "--json", str(path))
    scores = json.loads(path.read_text())
    assert {task: (entry["accuracy"], entry["n"]) for task, entry in scores["tasks"].items()} == {
        "sums": (0.5, 2),
        "parity": (1.0, 1),
        "cot_format": (1.0, 3),
    }
    assert scores["mistakes"][0]["expected"] == "3"


def test_eval_of_s3_writes_rows(tmp_path: Path, s3_run: Path) -> None:
    path = tmp_path / "s.json"
    succeeds(
        "eval", str(s3_run), "--suite", "s3", "--lengths", "3,4", "--loops", "1.5n,n/2", "--n", "5", "--json", str(path)
    )
    rows = json.loads(path.read_text())["rows"]
    assert [(row["length"], row["loops"]) for row in rows] == [(3, 5), (3, 2), (4, 6), (4, 2)]
    assert all(0 <= row["exact"] <= 1 for row in rows)


def test_a_calibrated_rule_is_stored_and_used(tmp_path: Path) -> None:
    run, path = tmp_path / "run", tmp_path / "s.json"
    short = ["data.max_len=2", "data.n_ramp=0", "data.batch_size=32"]  # learned in seconds
    start_run(resolve_run("s3", overrides=["train.minutes=null", "train.steps=120", *short]), run)
    out = succeeds("calibrate", str(run), "--lengths", "2", "--max-loss", "0.02", "--n", "150", "--json", str(path))
    trials = json.loads(path.read_text())["trials"]
    rule = json.loads((run / "exit.json").read_text())["rule"]
    assert f"{rule}: " in out
    assert rule in [trial["rule"] for trial in trials]
    words = ("--lengths", "2", "--loops", "2n", "--n", "5", "--json", str(path))
    succeeds("eval", str(run), *words, "--exit", "calibrated")
    scores = json.loads(path.read_text())
    assert scores["exit"] == rule
    assert 2 <= scores["rows"][0]["mean_loops"] <= 4


def test_text_is_prepared_looked_at_trained_on_and_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The cat sat on the mat and the dog sat on the log. " * 40)
    (tmp_path / "b.jsonl").write_text('{"text": "The cat ran."}\nno record\n{"text": " "}\n')
    tokenizer, out = str(tmp_path / "tok"), str(tmp_path / "prepared")
    succeeds("tokenizer", "train", str(tmp_path / "a.txt"), "--vocab", "280", "--out", tokenizer)
    words = (str(tmp_path / "*.[tj]*"), "--tokenizer", tokenizer, "--held-out", "0", "--out", out)
    said = succeeds("data", "prepare", *words)
    assert "0 held out" in said
    assert "left out: 1 documents, not JSON" in said
    assert "looplm train pretrain data.folders=" in said
    assert succeeds("data", "prepare", *words) == said  # nothing is done again
    looked = succeeds("data", "prepare", "--inspect", "--out", out)
    assert "train-00000.bin" in looked
    assert "right" in looked
    assert "The cat" in looked
    tiny = ["model.d_model=32", "model.block.attention={n_heads: 1, n_kv_heads: 1}", "model.vocab_size=280"]
    tiny += ["data.n_rows=1", "data.row_len=16", "train.validate_every=null", "train.n_workers=0"]
    runtime = "train.runtime={device: cpu, precision: fp32, compile: false, n_threads: 1}"
    run = str(tmp_path / "run")
    succeeds("train", "pretrain", f"data.folders={out}", *tiny, runtime, "--steps", "2", "--out", run)
    record = json.loads(succeeds("generate", run, "--prompt", "The cat", "--max-new-tokens", "3", "--json"))
    assert record["n_tokens"] <= 3
    assert "answer" not in record
    assert succeeds("generate", run, "--prompt", "The cat", "--max-new-tokens", "3").startswith("The cat")
    shard = tmp_path / "prepared" / "train-00000.bin"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    looked_again = looplm("data", "prepare", "--inspect", "--out", out)
    assert looked_again.returncode == 1
    assert "WRONG" in looked_again.stdout
    assert "error: train-00000.bin" in looked_again.stderr


def test_a_run_is_watched_and_reported(tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = ["train.minutes=null", "train.steps=4", "train.log_every=1", "data.batch_size=4"]
    start_run(resolve_run("s3", overrides=[*overrides, "train.validate_every=2"]), run)
    out = succeeds("watch", str(run), "--once")
    assert "step 4" in out
    assert "100%" in out
    assert re.search(r"loss +[▁▂▃▄▅▆▇█]{4} ", out)
    assert re.search(r"val_loss +\d\.\d{4} held out", out)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # being written
    assert succeeds("watch", str(run), "--once") == out
    assert "report.html" in succeeds("report", str(run))
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "kind: permutations" in page


def test_train_trains_says_where_and_resumes(tmp_path: Path, tiny_reason: list[str]) -> None:
    folder = tmp_path / "r"
    out = succeeds("train", "reason", "--steps", "3", "--seed", "5", "--out", str(folder), *tiny_reason)
    assert "done: step 6" in out  # a later key=value wins over the option
    out = succeeds("train", "--resume", str(folder), "--steps", "8")
    assert "done: step 8" in out
    assert "seed: 5" in (folder / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train"], "no recipe given"),
        (["train", "reson"], "did you mean 'reason'"),
        (["train", "reason", "model.d_modle=3", "--out", "{tmp}/x"], "did you mean 'd_model'"),
        (["train", "reason", "--model", "nrm-0.8m", "--out", "{tmp}/x"], "did you mean 'nrm-0.9m'"),
        (["train", "reason", "--minutes", "-1", "--out", "{tmp}/x"], "greater than 0, got -1"),
        (["train", "reason", "--out", "/proc/x"], "cannot be written"),
        (["train", "--resume", "{tmp}"], "holds no config.yaml"),
        (["train", "reason", "--resume", "{tmp}"], "--resume continues a run as it is"),
        (["eval", "{tmp}/nothing"], "no run folder"),
        (["eval", "builtin:reasonr"], "There is builtin:reasoner"),
        (["eval", "builtin:reasoner", "--suite", "resoning"], "no suite 'resoning'"),
        (["eval", "builtin:reasoner", "--n", "0"], "--n 0 is too small"),
        (["eval", "builtin:reasoner", "--loops", "0"], "--loops 0 is too small"),
        (["eval", "builtin:reasoner", "--loops", "two"], "not a list of whole numbers"),
        (["eval", "builtin:reasoner", "--suite", "s3"], "not trained on permutations"),
        (["eval", "builtin:reasoner", "--questions", "{tmp}/none.jsonl"], "cannot be read"),
        (["eval", "builtin:reasoner", "--json", "{tmp}/no/where.json"], "does not exist"),
        (["eval", "{s3}", "--suite", "reasoning"], "has no questions"),
        (["eval", "{s3}", "--loops", "n*n"], "is not a number or a rule"),
        (["eval", "{s3}", "--no-harder"], "is for the reasoning suite"),
        (["eval", "{s3}", "--lengths", "1000", "--loops", "1"], "not fit the model's context"),
        (["eval", "builtin:reasoner", "--lengths", "12"], "--lengths is for the s3 suite"),
        (["eval", "builtin:reasoner", "--json", "{tmp}"], "cannot be written"),
        (["generate", "builtin:reasoner", "--prompt", SUM, "--top-k", "3"], "raise temperature"),
        (["train", "reason", "--model", "looplm-s3-54k", "--out", "{tmp}/x"], "raise vocab_size"),
        (["eval", "{s3}", "--exit", "laten:0.1"], "did you mean 'latent'"),
        (["eval", "{s3}", "--exit", "calibrated"], "has no calibrated exit rule"),
        (["eval", "builtin:reasoner", "--missing", "last"], "give --exit too"),
        (["eval", "builtin:reasoner", "--exit", "latent", "--missing", "lasst"], "did you mean 'last'"),
        (["eval", "builtin:reasoner", "--exit", "gate:0.5"], "reads a learned gate"),
        (["eval", "{s3}", "--exit", "latent", "--missing", "last"], "--missing is for the reasoning suite"),
        (["eval", "{s3}", "--suite", "loops", "--exit", "latent:0.1"], "--exit is for the other suites"),
        (["data", "prepare", "--out", "{tmp}/none"], "no source given"),
        (["data", "prepare", "builtin:python", "--out", "{tmp}/none"], "looplm tokenizer train"),
        (["watch", "{tmp}/none", "--once"], "holds no metrics.jsonl"),
        (["watch", "{s3}", "--every", "0"], "--every 0 has to be more than 0"),
        (["report", "{tmp}"], "holds no config.yaml"),
        (["average", "{s3}", "--out", "{tmp}/a"], "has 1 checkpoints, and an average takes 2 or more"),
        (["data", "prepare", "--inspect", "--out", "{s3}"], "is not prepared text"),
        (
            ["train", "pretrain", "data.folders={s3}", "--out", "{tmp}/x"],
            "is not prepared text; make it: looplm data prepare",
        ),
        (["eval", "{s3}", "--plot", "x.png"], "add --suite loops"),
        (["calibrate", "{s3}", "--max-loss", "5"], "--max-loss 5 is a share"),
        (["calibrate", "{s3}", "--rule", "latent:0.1"], "give the kind alone"),
        (["calibrate", "{s3}", "--lengths", "3", "--n", "10"], "give --n 598 or more"),
        (["calibrate", "builtin:reasoner", "--lengths", "3"], "--lengths is for s3"),
        (["calibrate", "builtin:reasoner", "--loops", "2,4"], "give one number"),
        (["calibrate", "{s3}", "--missing", "last"], "--missing is for text"),
        (["generate", "builtin:reasoner", "--prompt", SUM, "--draft", "1", "--exit", "latent"], "give one of them"),
        (["generate", "builtin:reasoner", "--prompt", SUM, "--draft", "2"], "leaves none of 2"),
        (["generate", "builtin:reasoner", "--prompt", SUM, "--draft", "0"], "--draft 0 is too small; give 1 or more"),
        (
            ["generate", "builtin:reasoner", "--prompt", SUM, "--draft", "1", "--batch-size", "2"],
            "leave batch_size out",
        ),
        (["generate", "builtin:reasoner", "--prompt", SUM, "--batch-size", "0"], "--batch-size 0 is too small"),
        (["generate", "builtin:reasoner", "--prompt", SUM, "--missing", "last"], "give --exit too"),
        (["compare", "s3", "--seeds", "1"], "1 seeds give no interval"),
        (["compare", "s4"], "did you mean 's3'"),
        (["compare", "s3-iso-flop"], "no loop to compare"),
        (["train", "text", "data.path={tmp}/none.txt", "--out", "{tmp}/x"], "cannot be read"),
        (["eval", "{s3}", "--lengths", "12,x"], "not a list of whole numbers"),
        (["chat", "{s3}"], "has no questions"),
        (["chat", "--loops", "0"], "--loops 0 is too small"),
        (["generate", "builtin:reasoner", "--prompt", ""], "the prompt is empty"),
        (["generate", "builtin:reasoner", "--prompt", SUM, "--loops", "-1"], "--loops -1 is too small"),
        (["generate", "builtin:reasoner", "--prompt", "1 " * 600], "context is 512"),
        (["generate", "builtin:reasoner", "--prompt", SUM, "--temperature", "-1"], "greater than or equal to 0"),
        (["count", "nrm"], "no model preset named 'nrm'; did you mean 'nrm-0.9m'"),
        (["config", "reason", "train.sed=1"], "did you mean 'seed'"),
        (["demo", "--minutes", "0"], "is not a wall time"),
        (["tokenizer", "train", "--out", "{tmp}/t"], "no source given"),
        (["tokenizer", "train", "{tmp}/nowhere", "--out", "{tmp}/t"], "no such file, folder or glob"),
        (["tokenizer", "train", "builtin:python", "--vocab", "99", "--out", "{tmp}/t"], "14 tags and 256 bytes"),
        (["tokenizer", "train", "builtin:python", "--digits", "4", "--out", "{tmp}/t"], "digits is 4"),
        (["tokenizer", "train", "builtin:python", "--sample-bytes", "0", "--out", "{tmp}/t"], "--sample-bytes 0 is"),
    ],
)
def test_a_mistake_is_one_clear_line(words: list[str], says: str, tmp_path: Path, s3_run: Path) -> None:
    done = looplm(*(word.format(tmp=tmp_path, s3=s3_run) for word in words), text="")
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_tokenizer_train_saves_and_reports(tmp_path: Path) -> None:
    texts, small, folder = tmp_path / "texts.jsonl", tmp_path / "small.txt", tmp_path / "tok"
    texts.write_text("".join(f'{{"body": "line {i} of 100"}}\n' for i in range(100)) + '{"body": 1}\n\nno json\n')
    small.write_text("a small text")
    words = ("tokenizer", "train", str(texts), str(small), "--vocab", "275", "--field", "body", "--out", str(folder))
    out = succeeds(*words)
    assert "skipped" in out
    assert "1 without body" in out
    assert "1 not JSON" in out
    assert re.search(r"│ +1,[0-9]{3} │ +[0-9]{2} │", out)  # read, and of that measured, held out
    assert re.search(r"│ +12 │ +12 \* │", out)
    assert f"saved {folder}: 275 tokens, from 101 documents" in out
    saved = json.loads((folder / "tokenizer.json").read_text())
    assert [token["content"] for token in saved["added_tokens"][10:12]] == ["<|/answer|>", "<|user|>"]
    for changed, says in (
        ([], "already holds a tokenizer"),
        (["--vocab", "9999", "--out", f"{folder}2"], "ask for 27"),
    ):
        refused = looplm(*words, *changed)
        assert refused.returncode == 1
        assert says in refused.stderr
        assert "Traceback" not in refused.stderr
    assert not (tmp_path / "tok2").exists()


def test_tokenizer_train_stops_and_writes_nothing(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "looplm", "tokenizer", "train", "builtin:python", "--vocab", "30000"]
    process = subprocess.Popen(
        [*words, "--out", str(tmp_path / "tok")],
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background jobs, and with them these tests, begin with SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    assert "reading up to 1,000 MB" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert rest == "stopped; nothing was written\n"
    assert not (tmp_path / "tok").exists()


def test_an_unknown_option_is_refused() -> None:
    done = looplm("eval", "builtin:reasoner", "--lops", "2")
    assert done.returncode == 2
    assert "--lops" in done.stderr
    assert "Traceback" not in done.stderr
