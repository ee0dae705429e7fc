"""The base-to-new protocol: train on the first half of the classes, test on both halves, over several seeds.

Accuracies are averaged over seeds first and the harmonic mean is taken of the averages, as the published tables do
(MaPLe, PromptSRC); the spread is the population standard deviation. Over several data sets it is the same once more:
the average of the data sets' means, and the harmonic mean of these averages; the mean of the data sets' own harmonic
means is another number, kept and shown under its own name. Counts stay exact until the last step.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from vlprompt.config.run import RunConfig
from vlprompt.config.source import ConfigSource
from vlprompt.engine.metrics import headline
from vlprompt.protocols.plan import Plan, make_plan
from vlprompt.protocols.protocol import (
    ZERO_SHOT,
    keep,
    marks,
    over_seeds,
    result_parts,
    row_name,
    shared_marks,
    spread,
    spread_text,
    table_rows,
)
from vlprompt.protocols.running import Runner, check_data
from vlprompt.runs.run import Run, harmonic_mean
from vlprompt.runs.tables import data_words, metric_words, render

SCHEMA = 1
AVERAGE = "average"
_HALVES = ("base", "new")


def base_to_new(
    configs: Sequence[RunConfig | ConfigSource],
    seeds: Sequence[int] = (1, 2, 3),
    *,
    datasets: Sequence[str] | None = None,
    force: bool = False,
    report: Callable[[Run], None] | None = None,
) -> tuple[dict[str, Any], str]:
    """Run every configuration with every seed on base classes; return the results and the table.

    Finished runs are reused and unfinished ones resumed, so the same call goes on where it stopped.

    Args:
        configs: What to compare; ``data.classes`` is set to ``base`` and ``seed`` to each seed.
        seeds: Seeds of the shots and of the training.
        datasets: Names, aliases or groups (``group:fewshot11``) of data sets to run every configuration on, in place of
            its ``data.name``; results and table then have their average. A ``data.template`` that a configuration has
            stays.
        force: Run everything anew.
        report: Called after every run.

    Raises:
        ConfigError: No configurations, seeds or data sets, one of them twice, or an unknown data set.
        VlpromptError: Whatever a single run raises.
    """
    plan = make_plan(configs, seeds, "base-to-new", "halves", classes="base", datasets=datasets)
    return run_base_to_new(plan, force=force, report=report)


def run_base_to_new(
    plan: Plan, *, force: bool = False, report: Callable[[Run], None] | None = None
) -> tuple[dict[str, Any], str]:
    """Run a plan on base classes; see :func:`base_to_new`."""
    check_data(plan)
    runner, seeds = Runner(plan.seeds, force=force, report=report), list(plan.seeds)
    cells, average = [], []
    for group in plan.groups:
        on_each = [_cell(training.config, runner.runs(training.config)) for training in group]
        cells += on_each
        average.append(average_of(on_each))
    results: dict[str, Any] = {"schema": SCHEMA, "protocol": "base2new", "seeds": seeds, "cells": cells}
    if plan.datasets is not None:
        results[AVERAGE] = average
    # The file with an average is another one, even where it is over the configurations' own data set.
    more = [] if plan.datasets is None else [list(plan.datasets)]
    keep("base_to_new", results, plan.configs, seeds, *more)
    return results, base_to_new_table(cells, seeds, results.get(AVERAGE, ()))


def _cell(config: RunConfig, runs: Sequence[Run]) -> dict[str, Any]:
    rows = {label: summary([one.results[part] for one in runs]) for label, part in result_parts(config.method).items()}
    first = runs[0].results["data"]
    cost = _mean_cost([one.results["train"] for one in runs])
    found = {"method": config.method, "data": first["name"], "shots": first["shots"], "rows": rows, "train": cost}
    return found | marks(runs)


def _mean_cost(trained: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return the mean seconds and peak megabytes of trainings; None where one does not say."""
    found: dict[str, float | None] = {}
    for key in ("seconds", "peak_mb"):
        values = [one.get(key) for one in trained]
        found[key] = None if None in values else statistics.fmean(value for value in values if value is not None)
    return found


def average_of(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the average of one configuration's ``cells``, one per data set, in the form of a cell."""
    first = cells[0]
    rows = {}
    for label in first["rows"]:
        own = [cell["rows"][label] for cell in cells]
        rows[label] = _halves([{half: row[half]["mean"] for half in _HALVES if half in row} for row in own])
        if "harmonic_mean" in rows[label]:
            rows[label]["mean_of_harmonic_means"] = statistics.fmean(row["harmonic_mean"] for row in own)
    names = [cell["data"] for cell in cells]
    found = {"method": first["method"], "data": AVERAGE, "datasets": names, "shots": first["shots"], "rows": rows}
    return {**found, "train": _mean_cost([cell.get("train", {}) for cell in cells])} | shared_marks(cells)


def summary(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and population deviation of base and new accuracy over runs, and the harmonic mean of the means."""
    accuracies = [{half: headline(score[half]) for half in _HALVES if score.get(half)} for score in scores]
    return {"per_seed": list(scores), **_halves(accuracies)}


def _halves(accuracies: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return mean and deviation of the halves that all of ``accuracies`` have; with both, their harmonic mean."""
    found: dict[str, Any] = {}
    for half in _HALVES:
        values = [one[half] for one in accuracies if half in one]
        if len(values) == len(accuracies):
            found[half] = spread(values)
    if len(found) == len(_HALVES):
        found["harmonic_mean"] = harmonic_mean(found["base"]["mean"], found["new"]["mean"])
    return found


def base_to_new_table(
    cells: Sequence[dict[str, Any]], seeds: Sequence[int], average: Sequence[dict[str, Any]] = ()
) -> str:
    """Return the table of all cells, zero-shot once per data set before the methods, and of their averages."""
    words = metric_words(cell.get("metric", "accuracy") for cell in cells)
    title = f"base-to-new {words} in %, {over_seeds(seeds)}; H is of the means"
    table = Table()
    for name in ("data", "method"):
        table.add_column(name)
    for name in ("base", "new", "H", "seconds", "MB"):
        table.add_column(name, justify="right")
    count = len(average[0]["datasets"]) if average else 0
    for part, several in ((cells, len(seeds) > 1), (average, count > 1)):
        for cell, label in table_rows(part):
            data = data_words(cell["data"], cell.get("metric", "accuracy"))
            numbers = [*_numbers(cell["rows"][label], several), *_cost(cell, label)]
            table.add_row(data, row_name(cell, label), *numbers)
        if average:
            table.add_section()
    return render(table, title, _caption(average, count) if average else "")


def _caption(average: Sequence[dict[str, Any]], count: int) -> str:
    """Return what the average is, and the other mean of H, which must not be taken for it."""
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
    """Return the seconds of training and its peak of memory; zero-shot trains nothing."""
    if label == ZERO_SHOT or cell["method"] == "zeroshot":
        return ["-", "-"]
    cost = cell.get("train", {})
    values = [cost.get(key) for key in ("seconds", "peak_mb")]
    return ["-" if value is None else f"{value:,.0f}" for value in values]


def _numbers(row: dict[str, Any], several: bool) -> list[str]:
    mean = row.get("harmonic_mean")
    halves = [spread_text(row.get(half), several) for half in _HALVES]
    return [*halves, "-" if mean is None else f"{mean:.2f}"]
