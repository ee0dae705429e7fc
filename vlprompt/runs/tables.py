"""Plain-text tables of results for the terminal and files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from vlprompt._terminal import text_of
from vlprompt.datasets.records import shots_in_words
from vlprompt.engine.metrics import ERRORS, METRICS, measured
from vlprompt.runs.selection import is_oracle, stamped

ZERO_SHOT = "zero-shot"
"""Name of the row of the template on a data set's card; other classifiers are named after it."""


_EPOCHS = 8


def render(table: Table, title: str = "", caption: str = "") -> str:
    """Return a rich table as text of at most 120 columns.

    ``title`` and ``caption`` are separate lines, unlike a title inside the table, which is wrapped at its width.
    """
    return "\n".join(text for text in (title, text_of(table).rstrip(), caption) if text)


def results_table(runs: Sequence[dict[str, Any]], metrics: Sequence[str] = ()) -> str:
    """Return a table of one data set with a row for zero-shot and a row per run (its ``results.json`` content).

    The zero-shot classifier is that of the first run.

    ``metrics`` are the metrics to show, a table each; empty for the headline metric of the data set.
    """
    first = runs[0]
    columns = [name for name in ("all", "base", "new") if name in first["results"]]
    shown = metrics or [str(first["results"][columns[0]].get("metric", "accuracy"))]
    return "\n\n".join(_results_table(runs, columns, metric) for metric in shown)


def _results_table(runs: Sequence[dict[str, Any]], columns: Sequence[str], metric: str) -> str:
    first = runs[0]
    data = first["data"]
    title = f"{data['name']}: {METRICS[metric]} in %, {shots_of(data)}, seed {data['seed']}"
    table = Table("method")
    for name in columns:
        table.add_column(f"{name} (correct/total)" if metric == "accuracy" else name, justify="right")
    if "new" in columns:
        table.add_column("harmonic mean", justify="right")
    rows = [] if first["method"] == "zeroshot" else [(zero_shot_name(classifier_of(first)), first["zeroshot"])]
    for label, scores in [
        *rows,
        *((stamped(run["method"], is_oracle([run]), run.get("test_images")), run["results"]) for run in runs),
    ]:
        cells = [score_text(scores.get(name), metric) for name in columns]
        if "new" in columns:
            halves = [measured(scores[name], metric) for name in ("base", "new") if scores.get(name)]
            cells.append(f"{harmonic_mean(*halves):.2f}" if len(halves) == 2 and metric not in ERRORS else "-")
        table.add_row(label, *cells)
    reasons = [(run["method"], run["results"].get("why_no_new")) for run in runs if "new" in columns]
    notes = dict.fromkeys(f"{method} has no scores on new classes: {why}" for method, why in reasons if why)
    return render(table, title, "\n".join(notes))


def shots_of(data: Mapping[str, Any]) -> str:
    """Return the number of shots of a data record in words, with that of the available images if they are fewer."""
    return shots_in_words(data["shots"], data.get("shots_per_class"))


def validation_text(values: Mapping[int, float], metric: str, selected: Mapping[str, Any] | None) -> str:
    """Return the scores on the validation images by epoch as text: the first, the last, some between and the best.

    Args:
        values: Scores by epoch, from 0.
        metric: Their metric.
        selected: The record of the epoch that was chosen, ``train.selected`` of the results, if any.
    """
    epochs, few = sorted(values), min(len(values), _EPOCHS)
    chosen = [epochs[round(at * (len(epochs) - 1) / max(few - 1, 1))] for at in range(few)]
    scores = ", ".join(f"{epoch}: {values[epoch]:.2f}" for epoch in chosen)
    text = f"validation: {METRICS.get(metric, metric)} in % after epoch {scores}"
    more = "" if few == len(epochs) else f" ({few} of {len(epochs)}; all are in metrics.jsonl)"
    best = max(epochs, key=lambda epoch: values[epoch])  # the first of equals
    if selected is None:
        kept = "kept is the last epoch (recipe.select best_val keeps the best)"
    else:
        kept = f"kept is epoch {selected.get('epoch')} (recipe.select best_val)"
    return f"{text}{more}\n            best {values[best]:.2f} after epoch {best}; {kept}"


def classifier_of(results: Mapping[str, Any]) -> str:
    """Return the name of a run's zero-shot classifier; empty for the template of the data set's card."""
    facts = results.get("zeroshot_classifier", {})  # runs of older versions have that template
    return "" if facts.get("published", True) else str(facts["name"])


def zero_shot_name(classifier: str) -> str:
    """Return the name of the row of a zero-shot classifier."""
    return f"{ZERO_SHOT} ({classifier})" if classifier else ZERO_SHOT


def score_text(score: Mapping[str, Any] | None, metric: str | None = None) -> str:
    """Return the ``metric`` of a score, by default its headline, with the counts of an accuracy; a dash for None."""
    if score is None:
        return "-"
    name = metric or score.get("metric", "accuracy")
    counts = f" ({score['correct']}/{score['total']})" if name == "accuracy" else ""
    return f"{measured(score, name):.2f}{counts}"


def harmonic_mean(base: float, new: float) -> float:
    """Return ``2 * base * new / (base + new)``, in the unit of its arguments; 0 when both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


def metric_words(metrics: Iterable[str]) -> str:
    """Return the measure of a table over data sets with these headline ``metrics``."""
    distinct = list(dict.fromkeys(metrics))
    return METRICS[distinct[0]] if len(distinct) == 1 else "score"


def data_words(name: str, metric: str) -> str:
    """Return a data set's name for a table, with the metric if it is not accuracy."""
    return name if metric == "accuracy" else f"{name} ({METRICS[metric]})"
