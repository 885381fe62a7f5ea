"""Lower rungs never import higher ones, and modules of one rung never import each other's packages."""

import ast
from pathlib import Path

SRC = Path(__file__).parents[1] / "src" / "looplm"
LADDER = [
    {"errors"},
    {"files", "reading"},
    {"config", "checksums"},
    {"dist"},
    {"telemetry"},
    {"model", "data", "optim"},
    {"checkpoint", "infer"},
    {"eval", "hf"},
    {"train", "serve"},
    {"cli"},
]
RUNG = {name: number for number, names in enumerate(LADDER) for name in names}


def imports(path: Path) -> set[str]:
    """Top-level parts of looplm that a file imports anywhere, `TYPE_CHECKING` blocks and functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [node.module] if node.module != "looplm" else [f"looplm.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("looplm.") and name != "looplm.__version__"}
    return found


def test_imports_only_go_down_the_ladder() -> None:
    wrong = []
    for path in SRC.rglob("*.py"):
        part = path.relative_to(SRC).parts[0].removesuffix(".py")
        if part in ("__init__", "__main__"):
            continue
        assert part in RUNG, f"{path} is on no rung: add it to the ladder"
        for other in imports(path) - {part}:
            if RUNG[other] >= RUNG[part]:
                wrong.append(f"{path.relative_to(SRC)} imports {other}")
    assert not wrong, wrong


def test_the_reader_sees_imports() -> None:
    assert {"data", "infer", "model"} <= imports(SRC / "infer" / "reasoner.py")
