"""What a narrow terminal, or one with ASCII alone, shows."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from commands import succeeds

WIDTHS = ["20", "40", "60"]


@pytest.mark.parametrize("columns", WIDTHS)
def test_count_and_plan_never_cut_a_number(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    counted = json.loads(succeeds("count", "mythos-1b", "--loops", "1,16", "--json"))
    shown = succeeds("count", "mythos-1b", "--loops", "1,16")
    for each in counted:
        for name in ("unrolled", "flops_per_token", "training_flops_per_token"):
            assert f"{each[name]:,}" in shown
    planned = succeeds("plan", "s3", "--gpus", "1,128", "--tokens", "1e12")
    assert "…" not in shown + planned
    assert planned.count("FSDP") == 1


@pytest.mark.parametrize("columns", WIDTHS)
def test_watch_never_cuts_a_number(columns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    records = [
        {"step": step, "loss": 2.34567 / step, "tokens": 123_456_789 * step, "tokens_per_second": 1e6, "progress": 0.5}
        for step in range(1, 30)
    ]
    lines = [*map(json.dumps, records), '{"step": 30, "loss": NaN}', '{"step": 31, "loss": Infinity}', "[]", "{", '"x"']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    shown = succeeds("watch", tmp_path, "--once")
    assert f"{123_456_789 * 29:,}" in shown
    assert "2.346" in shown
    assert "…" not in shown


def test_eval_tables_are_folded_or_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("eval", "builtin:reasoner", "--n", "1", "--no-harder", "--loops", "1,2")
    for columns, layout in (("30", "  2 loops 100.0 [20.7, 100.0]"), ("80", "│ 100.0 [20.7, 100.0] │")):
        monkeypatch.setenv("COLUMNS", columns)
        shown = succeeds(*words)
        assert layout in shown
        assert "…" not in shown


def test_what_the_terminal_cannot_show_is_no_traceback(tmp_path: Path) -> None:
    records = [{"step": step, "loss": 1 / step} for step in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "samples.txt").write_text("caf\xe9 \u2581\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "looplm", "watch", str(tmp_path), "--once"]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode("ascii")
    assert re.search(r"loss +[_.\-=+*%#]{8} ", shown)
    assert r"caf\xe9 \u2581" in shown
