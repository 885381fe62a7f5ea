"""The picture of the README: what the same weights get right when they may loop more often.

    looplm train s3 --seed 0 --steps 3300 --out runs/s3 train.runtime.n_threads=1
    looplm eval runs/s3 --suite s3 --lengths 12,24,48,64 --loops 4,8,10,12,16,20,24,32,40,48,56,64,80,96 \
        --json docs/staircase.json
    python recipes/staircase.py docs/staircase.json docs/staircase.png
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from looplm.eval.plots import COLOURS

MOST_TRAINED = 14  # loops: lengths up to 12, and up to 2 more


def staircase(rows: list[dict[str, float]]) -> Figure:
    """Sequences that are all right over the number of loops, a line for each length, named where it reaches the top."""
    figure = Figure(figsize=(7.6, 3.6), dpi=140, layout="constrained")
    axes = figure.subplots()
    axes.axvspan(0, MOST_TRAINED, color="#EEEEEE", zorder=0)
    axes.text(0.8, 88, "trained", va="center", color="#666666")
    for colour, length in zip(COLOURS, sorted({int(row["length"]) for row in rows}), strict=False):
        line = sorted((row["loops"], 100 * row["exact"]) for row in rows if row["length"] == length)
        loops, right = zip(*line, strict=True)
        axes.plot(loops, right, color=colour, marker="o", markersize=3.5, linewidth=2)
        top = next(number for number, share in line if share >= 99)
        axes.text(top, 104, f"length {length}", ha="center", va="bottom", color=colour)
    axes.set(xlim=(0, max(row["loops"] for row in rows) + 2), ylim=(-3, 103), ylabel="sequences all right, %")
    axes.set_xlabel("loops per token: the dial at inference")
    axes.set_title("The same weights, run more often, solve longer problems", loc="left", pad=24)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", type=Path, help="what looplm eval --suite s3 --json has written")
    parser.add_argument("out", type=Path, help="the PNG")
    given = parser.parse_args(arguments)
    staircase(json.loads(given.scores.read_text(encoding="utf-8"))["rows"]).savefig(given.out)


if __name__ == "__main__":
    main()
