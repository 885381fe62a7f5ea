"""Plots as PNG bytes. matplotlib is imported when one is drawn."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from looplm.eval.interval import Score, mean_and_half
from looplm.eval.loops import Dial
from looplm.eval.staircase import Row
from looplm.telemetry.history import series
from looplm.telemetry.sinks import Record

# Colour-blind safe (Okabe & Ito), one per line in order.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def staircase_plot(models: Mapping[str, Sequence[Row]]) -> bytes:
    """Exact accuracy over length, a line per model and loop rule; the first model solid, the others dashed."""
    figure, axes = _figure(7.2, 4.2)
    colour = iter(COLOURS)
    offset = 0.0
    for number, (name, rows) in enumerate(models.items()):
        for rule in dict.fromkeys(row.rule for row in rows):
            line = [row for row in rows if row.rule == rule]
            axes.errorbar(
                [row.length + offset for row in line],
                [100 * row.exact.accuracy for row in line],
                yerr=_errors([row.exact for row in line]),
                label=f"{name}, {_loops_label(line)}",
                color=next(colour),
                linestyle="-" if number == 0 else "--",
                marker="o" if number == 0 else "s",
                markersize=4,
                capsize=2,
                linewidth=1.6,
            )
            offset += 0.25  # lines that lie on each other stay visible
    longest = max(row.length for rows in models.values() for row in rows)
    axes.axvspan(0, 12.6, color="#EEEEEE", zorder=0)
    axes.text(6.3, 3, "trained", ha="center", color="#666666", fontsize=8)
    axes.set(
        xlim=(0, longest + 3), ylim=(-3, 103), xlabel="permutations in the sequence", ylabel="sequences all right, %"
    )
    axes.set_title("S3 permutation tracking: more loops, longer sequences", fontsize=11, loc="left")
    axes.legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


HISTORY = {  # panels of a run's page: what they are called, and the numbers drawn in them
    "loss, nats per token": ("loss",),
    "held out": ("val_bpb", "val_loss"),
    "gradient norm": ("grad_norm",),
    "share of the peak rate": ("lr_scale",),
    "loops per token": ("n_loops",),
    "tokens per second": ("tokens_per_second",),
}


def history_plot(records: Sequence[Record]) -> bytes:
    """A run's numbers over steps, a panel each; numbers that it has not logged are left out."""
    import matplotlib.pyplot as plt

    found = {
        title: {name: series(list(records), name) for name in names if any(name in record for record in records)}
        for title, names in HISTORY.items()
    }
    found = {title: lines for title, lines in found.items() if lines}
    n_rows = -(-len(found) // 2)
    figure, grid = plt.subplots(n_rows, 2, figsize=(9, 2.4 * n_rows), layout="constrained", squeeze=False)
    for axes, (title, lines) in zip(grid.flat, found.items(), strict=False):
        for colour, (name, (steps, values)) in zip(COLOURS, lines.items(), strict=False):
            style = {"marker": "o", "markersize": 3} if len(values) < 50 else {}
            axes.plot(steps, values, color=colour, linewidth=1, label=name, **style)
        axes.set_title(title, fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    for axes in list(grid.flat)[len(found) :]:
        axes.set_axis_off()
    return _png(figure)


def loops_plot(by_loops: Mapping[int, Mapping[str, Score]], *, trained: str) -> bytes:
    """Accuracy over the number of loops, a line per task."""
    figure, axes = _figure(7.2, 3.8)
    counts = sorted(by_loops)
    for colour, task in zip(COLOURS, by_loops[counts[0]], strict=False):
        scores = [by_loops[count][task] for count in counts]
        values = [100 * score.accuracy for score in scores]
        axes.errorbar(
            counts, values, yerr=_errors(scores), label=task, color=colour, marker="o", markersize=4, capsize=2
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set(ylim=(-3, 103), xlabel=f"loops per token (trained on {trained})", ylabel="right answers, %")
    axes.set_title("The dial: accuracy by number of loops", fontsize=11, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


def dial_plot(dial: Dial, *, form: str = "png") -> bytes:
    """Quality over the number of loops, and below it how much each loop still changes the state; `form` is png, svg or
    pdf."""
    figure, axes = _figure(7.2, 5.2, n_panels=2)
    above, below = axes
    counts = [row.loops for row in dial.rows]
    scores = [row.score for row in dial.rows]
    values = [100 * score.accuracy for score in scores]
    above.errorbar(counts, values, yerr=_errors(scores), color=COLOURS[0], marker="o", markersize=4, capsize=2)
    above.set(ylim=(-3, 103), ylabel="right answers, %")
    above.set_title("The dial: quality by number of loops", fontsize=11, loc="left")
    moved = [state for state in dial.states if state.change is not None]
    below.plot([state.loop for state in moved], [state.change for state in moved], color=COLOURS[1], marker="o", ms=3)
    below.set(yscale="log", xlabel="loops per token", ylabel="change by the loop, relative")
    for panel in axes:
        panel.axvline(dial.trained, color="#666666", linewidth=0.8, linestyle=":")
    above.text(dial.trained, 1, " trained", color="#666666", fontsize=8)
    return _drawn(figure, form)


def comparison_plot(columns: Mapping[str, Mapping[str, Score | float]]) -> bytes:
    """Bars per task, one per model; plain numbers (published ones) carry no interval."""
    figure, axes = _figure(7.6, 3.8)
    tasks = list(next(iter(columns.values())))
    width = 0.8 / len(columns)
    for number, (name, scores) in enumerate(columns.items()):
        places = [index + (number - (len(columns) - 1) / 2) * width for index in range(len(tasks))]
        values = [scores.get(task, 0.0) for task in tasks]
        heights = [100 * (value.accuracy if isinstance(value, Score) else value) for value in values]
        axes.bar(places, heights, width * 0.94, label=name, color=COLOURS[(1, 4, 0)[number % 3]])
        measured = [(place, value) for place, value in zip(places, values, strict=True) if isinstance(value, Score)]
        if measured:
            errors = _errors([value for _, value in measured])
            heights = [100 * value.accuracy for _, value in measured]
            axes.errorbar([p for p, _ in measured], heights, yerr=errors, fmt="none", ecolor="#333333", elinewidth=1)
    axes.set_xticks(range(len(tasks)), tasks, rotation=20, ha="right", fontsize=8.5)
    axes.set(ylim=(0, 108), ylabel="right answers, %")
    axes.set_title("Reasoning suite, held-out questions", fontsize=11, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


def arms_plot(arms: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """A panel per metric: every seed of every arm, and the mean with its interval."""
    metrics = list(next(iter(arms.values())))
    figure, panels = _figure(7.2, 0.7 + 1.5 * len(metrics), n_panels=len(metrics), share_x=False)
    for axes, metric in zip([panels] if len(metrics) == 1 else panels, metrics, strict=True):
        for number, scores in enumerate(arms.values()):
            mean, half = mean_and_half(scores[metric])
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(scores[metric], [number] * len(scores[metric]), "o", color=colour, alpha=0.5, markersize=4)
            axes.errorbar([mean], [number], xerr=[half], fmt="|", color=colour, capsize=3, markersize=12)
        axes.set_yticks(range(len(arms)), list(arms), fontsize=8)
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.set_xlabel(metric, fontsize=9)
    return _png(figure)


def loss_plot(records: Sequence[Mapping[str, float]]) -> bytes:
    """Training loss over minutes."""
    figure, axes = _figure(7.2, 3.0)
    told = [r for r in records if "loss" in r]  # a step without a scored token has none
    axes.plot([r["seconds"] / 60 for r in told], [r["loss"] for r in told], color=COLOURS[0], linewidth=1.2)
    axes.set(yscale="log", xlabel="minutes", ylabel="loss, nats per token")
    axes.set_title("Training", fontsize=11, loc="left")
    return _png(figure)


def _figure(width: float, height: float, *, n_panels: int = 1, share_x: bool = True) -> tuple[Any, Any]:
    """A figure and its axes: one, or several below each other."""
    from matplotlib.figure import Figure  # no pyplot: no global state and no display

    figure = Figure(figsize=(width, height), dpi=140, layout="constrained")
    panels = figure.subplots(n_panels, sharex=share_x, squeeze=False)[:, 0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, panels if n_panels > 1 else panels[0]


def _errors(scores: Sequence[Score]) -> list[list[float]]:
    """Distances from the value to its interval, in percent, as matplotlib wants them."""
    below = [100 * max(0.0, score.accuracy - score.interval[0]) for score in scores]
    above = [100 * max(0.0, score.interval[1] - score.accuracy) for score in scores]
    return [below, above]


def _loops_label(line: Sequence[Row]) -> str:
    same = {row.loops for row in line}
    rule = line[0].rule
    if len(same) == 1:
        return f"{rule} loop{'s' if rule != '1' else ''}"
    return f"{rule} loops"


def _png(figure: Any) -> bytes:
    return _drawn(figure, "png")


def _drawn(figure: Any, form: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form)
    return buffer.getvalue()
