"""One HTML file with everything in it: tables, plots as embedded images, worked examples."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from looplm.eval.interval import Score

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .25rem .8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #444; }
tbody td { border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } .dim { color: #777; } .interval { color: #777; font-size: .85em; }
.steps { color: #777; font-family: ui-monospace, monospace; white-space: pre-wrap; margin: .2rem 0 .2rem 1rem; }
pre { background: #f7f7f7; padding: .6rem; overflow-x: auto; white-space: pre-wrap; font-size: .85em; }
.answer { font-weight: 600; margin-left: 1rem; } code { background: #f3f3f3; padding: 0 .25rem; }
"""


@dataclass
class Report:
    """Collects sections; `html()` writes them out."""

    title: str
    _parts: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str, *, dim: bool = False) -> None:
        self._parts.append(f"<p{' class=dim' if dim else ''}>{html.escape(text)}</p>")

    def image(self, png: bytes, *, alt: str) -> None:
        data = base64.b64encode(png).decode()
        self._parts.append(f'<p><img alt="{html.escape(alt)}" src="data:image/png;base64,{data}"></p>')

    def scores(self, columns: Mapping[str, Mapping[str, Score | float]]) -> None:
        """Tasks down, models across; plain numbers are published ones, without an interval."""
        tasks = list(dict.fromkeys(task for scores in columns.values() for task in scores))
        rows = [[task, *(_cell(scores.get(task)) for scores in columns.values())] for task in tasks]
        self.table(["task", *columns], rows, escape=False)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], *, escape: bool = True) -> None:
        head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell) if escape else cell}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        self._parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def example(self, question: str, steps: Sequence[str], answer: str) -> None:
        written = html.escape("\n".join(steps))
        self._parts.append(
            f"<p>{html.escape(question)}</p><div class=steps>{written}</div>"
            f"<div class=answer>{html.escape(answer)}</div>"
        )

    def code(self, text: str) -> None:
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def html(self) -> str:
        """The whole page."""
        title = html.escape(self.title)
        return (
            f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
            f"</head><body><h1>{title}</h1>{''.join(self._parts)}</body></html>"
        )


def _cell(value: Score | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, Score):
        low, high = value.interval
        return f"{100 * value.accuracy:.1f} <span class=interval>[{100 * low:.1f}, {100 * high:.1f}]</span>"
    return f"{100 * value:.1f}"
