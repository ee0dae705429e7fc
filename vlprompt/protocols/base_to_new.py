"""The base-to-new protocol: train on the first half of the classes, test on both halves, over several seeds.

Accuracies are averaged over seeds, and the harmonic mean is computed from the averages, as in published tables (MaPLe,
PromptSRC); the spread is the population standard deviation. Over several data sets, the means of the data sets are
averaged, and the harmonic mean is computed from these averages; the mean of the harmonic means per data set is a
different number and is reported separately. Counts stay exact until the last step.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from vlprompt.config.run import RunConfig
from vlprompt.config.source import ConfigSource
from vlprompt.engine.metrics import ERRORS, measured
from vlprompt.protocols.plan import Plan, make_plan
from vlprompt.protocols.protocol import (
    by_metric,
    keep,
    marks,
    named,
    over_seeds,
    result_parts,
    row_name,
    seed_note,
    seed_text,
    shared_marks,
    spread,
    spread_text,
    table_rows,
)
from vlprompt.protocols.running import Runner, check_data
from vlprompt.runs.run import Run, harmonic_mean
from vlprompt.runs.tables import ZERO_SHOT, data_words, metric_words, render

SCHEMA = 1
AVERAGE = "average"
_HALVES = ("base", "new")


def base_to_new(
    configs: Sequence[RunConfig | ConfigSource],
    seeds: Sequence[int] = (1, 2, 3),
    *,
    datasets: Sequence[str] | None = None,
    metrics: Sequence[str] = (),
    force: bool = False,
    report: Callable[[Run], None] | None = None,
) -> tuple[dict[str, Any], str]:
    """Run every configuration with every seed on base classes; return the results and the table.

    Finished runs are reused and unfinished ones resumed, so the same call resumes where it stopped.

    Args:
        configs: The configurations to compare; ``data.classes`` is set to ``base`` and ``seed`` to each seed.
        seeds: Seeds of the shots and of the training.
        datasets: Names, aliases or groups (``group:fewshot11``) of data sets that replace ``data.name`` of every
            configuration; results and table then include the average. A configured ``data.template`` is kept.
        metrics: The metrics to show, a table each; empty for the headline metric of each data set.
        force: Run everything again.
        report: Called after every run.

    Raises:
        ConfigError: There are no configurations, seeds or data sets, duplicates, or an unknown data set.
        VlpromptError: A single run fails.
    """
    plan = make_plan(configs, seeds, "base-to-new", "halves", classes="base", datasets=datasets)
    return run_base_to_new(plan, metrics=metrics, force=force, report=report)


def run_base_to_new(
    plan: Plan,
    *,
    metrics: Sequence[str] = (),
    force: bool = False,
    report: Callable[[Run], None] | None = None,
) -> tuple[dict[str, Any], str]:
    """Run a plan on base classes; see :func:`base_to_new`."""
    check_data(plan)
    runner, seeds = Runner(plan.seeds, force=force, report=report), list(plan.seeds)
    groups = [[(training.config, runner.runs(training.config)) for training in group] for group in plan.groups]

    def build(metric: str | None) -> tuple[dict[str, Any], str]:
        cells, average = [], []
        for variant, group in zip(plan.variants, groups, strict=True):
            on_each = [named(_cell(config, runs, metric), variant) for config, runs in group]
            cells += on_each
            if plan.datasets is not None:
                average.append(average_of(on_each))
        found = {"cells": cells, **({AVERAGE: average} if average else {})}
        return found, base_to_new_table(cells, seeds, average)

    found, table = by_metric(build, metrics)
    results = {"schema": SCHEMA, "protocol": "base2new", "seeds": seeds, **found}
    # Results with an average go to a different file, even for the data set of the configurations.
    more = [] if plan.datasets is None else [list(plan.datasets)]
    keep("base_to_new", results, plan.configs, seeds, *more)
    return results, table


def _cell(config: RunConfig, runs: Sequence[Run], metric: str | None) -> dict[str, Any]:
    parts = result_parts(config.method)
    rows = {label: summary([run.results[part] for run in runs], metric) for label, part in parts.items()}
    first = runs[0].results["data"]
    cost = _mean_cost([run.results["train"] for run in runs])
    cell = {"method": config.method, "data": first["name"], "shots": first["shots"], "rows": rows, "train": cost}
    reasons = [run.results["results"]["why_no_new"] for run in runs if run.results["results"].get("why_no_new")]
    return cell | marks(runs, metric) | ({"why_no_new": reasons[0]} if reasons else {})


def _mean_cost(trained: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return the mean seconds and peak megabytes of trainings; None if a value is missing."""
    means: dict[str, float | None] = {}
    for key in ("seconds", "peak_mb"):
        values = [training.get(key) for training in trained]
        means[key] = None if None in values else statistics.fmean(value for value in values if value is not None)
    return means


def average_of(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the average of one configuration's ``cells`` (one per data set) as a cell."""
    first = cells[0]
    rows = {}
    for label in first["rows"]:
        data_rows = [cell["rows"][label] for cell in cells]
        halves = [{half: row[half]["mean"] for half in _HALVES if half in row} for row in data_rows]
        rows[label] = _halves(halves, all("harmonic_mean" in row for row in data_rows))
        if "harmonic_mean" in rows[label]:
            rows[label]["mean_of_harmonic_means"] = statistics.fmean(row["harmonic_mean"] for row in data_rows)
    names = [cell["data"] for cell in cells]
    average = {"method": first["method"], "data": AVERAGE, "datasets": names, "shots": first["shots"], "rows": rows}
    return {**average, "train": _mean_cost([cell.get("train", {}) for cell in cells])} | shared_marks(cells)


def summary(scores: Sequence[dict[str, Any]], metric: str | None = None) -> dict[str, Any]:
    """Return mean and population deviation of base and new accuracy over runs, and the harmonic mean of the means.

    Another ``metric`` takes the place of the accuracy; errors have no harmonic mean.
    """
    accuracies = [{half: measured(score[half], metric) for half in _HALVES if score.get(half)} for score in scores]
    return {"per_seed": list(scores), **_halves(accuracies, metric not in ERRORS)}


def _halves(accuracies: Sequence[dict[str, float]], harmonic: bool) -> dict[str, Any]:
    """Return mean and deviation of the halves present in all ``accuracies``; of both the ``harmonic`` mean too."""
    halves: dict[str, Any] = {}
    for half in _HALVES:
        values = [accuracy[half] for accuracy in accuracies if half in accuracy]
        if len(values) == len(accuracies):
            halves[half] = spread(values)
    if harmonic and len(halves) == len(_HALVES):
        halves["harmonic_mean"] = harmonic_mean(halves["base"]["mean"], halves["new"]["mean"])
    return halves


def base_to_new_table(
    cells: Sequence[dict[str, Any]], seeds: Sequence[int], average: Sequence[dict[str, Any]] = ()
) -> str:
    """Return the table of all cells and averages, with zero-shot once per data set before the methods."""
    words = metric_words(cell.get("metric", "accuracy") for cell in cells)
    title = f"base-to-new {words} in %, {over_seeds(seeds)}; H is of the means"
    table = Table()
    for name in ("data", "method"):
        table.add_column(name)
    for name in ("base", "new", "H", "seconds", "MB"):
        table.add_column(name, justify="right")
    count = len(average[0]["datasets"]) if average else 0
    for part in (cells, average):
        for cell, label in table_rows(part):
            data = data_words(cell["data"], cell.get("metric", "accuracy"))
            row = cell["rows"][label]
            halves = [
                seed_text(cell, label, row.get(half), seeds) if part is cells else spread_text(row.get(half), count > 1)
                for half in _HALVES
            ]
            mean = row.get("harmonic_mean")
            numbers = [*halves, "-" if mean is None else f"{mean:.2f}", *_cost(cell, label)]
            table.add_row(data, row_name(cell, label), *numbers)
        if average:
            table.add_section()
    notes = [seed_note(table_rows(cells), seeds), *_reasons(cells), _caption(average, count) if average else ""]
    return render(table, title, "\n".join(filter(None, notes)))


def _reasons(cells: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each method without scores on new classes, with the reason."""
    reasons = {row_name(cell, cell["method"]): cell["why_no_new"] for cell in cells if "why_no_new" in cell}
    return [f"{name} has no scores on new classes: {why}" for name, why in reasons.items()]


def _caption(average: Sequence[dict[str, Any]], count: int) -> str:
    """Return the definition of the average, and the separate mean of the harmonic means."""
    lines = [f"average: mean and deviation over {count} data sets; its H is the harmonic mean of these averages"]
    means = [
        f"{row_name(cell, label)} {cell['rows'][label]['mean_of_harmonic_means']:.2f}"
        for cell, label in table_rows(average)
        if "mean_of_harmonic_means" in cell["rows"][label]
    ]
    if means:
        lines.append("not to be confused with the mean of the data sets' H: " + ", ".join(means))
    return "\n".join(lines)


def _cost(cell: dict[str, Any], label: str) -> list[str]:
    """Return the training time and the peak memory; zero-shot has none."""
    if label == ZERO_SHOT or cell["method"] == "zeroshot":
        return ["-", "-"]
    cost = cell.get("train", {})
    values = [cost.get(key) for key in ("seconds", "peak_mb")]
    return ["-" if value is None else f"{value:,.0f}" for value in values]
