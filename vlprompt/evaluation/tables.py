"""Tables of results as plain text, for the terminal and for files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def render(table: Table, title: str = "", caption: str = "") -> str:
    """Return a rich table as text of at most 120 columns.

    ``title`` and ``caption`` stand on lines of their own; a title of the table itself is broken at the table's width.
    """
    out = io.StringIO()
    Console(file=out, width=120, force_terminal=False, color_system=None).print(table)
    return "\n".join(text for text in (title, out.getvalue().rstrip(), caption) if text)


def results_table(runs: Sequence[dict[str, Any]]) -> str:
    """Return one row for zero-shot and one per run (the content of its ``results.json``), over one data set."""
    first = runs[0]
    data = first["data"]
    columns = [name for name in ("all", "base", "new") if name in first["results"]]
    title = f"{data['name']}: accuracy in %, {data['shots']} shots, seed {data['seed']}"
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for name in columns:
        table.add_column(f"{name} (correct/total)", justify="right")
    if "new" in columns:
        table.add_column("harmonic mean", justify="right")
    rows = [] if first["method"] == "zeroshot" else [("zero-shot", first["zeroshot"])]
    for label, scores in [*rows, *((one["method"], one["results"]) for one in runs)]:
        cells = [_score(scores.get(name)) for name in columns]
        if "new" in columns:
            mean = scores.get("harmonic_mean")
            cells.append("-" if mean is None else f"{mean:.2f}")
        table.add_row(label, *cells)
    return render(table)


def _score(score: dict[str, Any] | None) -> str:
    return "-" if score is None else f"{score['accuracy']:.2f} ({score['correct']}/{score['total']})"
