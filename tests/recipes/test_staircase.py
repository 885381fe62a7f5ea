"""The README's picture is drawn from the scores beside it."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_picture_is_drawn_from_the_committed_scores(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("staircase", ROOT / "recipes" / "staircase.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    scores = ROOT / "docs" / "staircase.json"
    module.main([str(scores), str(tmp_path / "staircase.png")])
    assert (tmp_path / "staircase.png").read_bytes().startswith(b"\x89PNG")
    figure = module.staircase(json.loads(scores.read_text(encoding="utf-8"))["rows"])
    assert [text.get_text() for text in figure.axes[0].texts[1:]] == [f"length {n}" for n in (12, 24, 48, 64)]
