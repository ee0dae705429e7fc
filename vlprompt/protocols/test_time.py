"""The test-time protocol: methods that learn from no labelled images, on many data sets, in several random orders.

A seed draws the random views and, for methods that depend on it, the order of the test images. Accuracies are averaged
over seeds; the means over data sets are unweighted, and the spread of everything is the population standard deviation
over seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from vlprompt.config.run import RunConfig
from vlprompt.config.source import ConfigSource
from vlprompt.datasets.catalogue import list_groups
from vlprompt.engine.metrics import measured
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
    table_rows,
)
from vlprompt.protocols.running import Runner, check_data
from vlprompt.runs.run import Run
from vlprompt.runs.tables import data_words, metric_words, render

SCHEMA = 1
MEANS = "means"


def compare_test_time(
    configs: Sequence[RunConfig | ConfigSource],
    seeds: Sequence[int] = (1, 2, 3),
    *,
    datasets: Sequence[str] | None = None,
    with_groups: bool = False,
    metrics: Sequence[str] = (),
    force: bool = False,
    report: Callable[[Run], None] | None = None,
) -> tuple[dict[str, Any], str]:
    """Run every configuration with every seed on every data set; return the results and the table.

    Finished runs are reused, so the same call resumes where it stopped.

    Args:
        configs: The configurations to compare; ``data.classes`` is set to ``all`` and ``seed`` to each seed.
        seeds: Seeds of the views and of the order of the test images.
        datasets: Names, aliases or groups of data sets that replace ``data.name`` of every configuration.
        with_groups: Also report the mean over each group of data sets (``group:cross10``) whose members were all run.
        metrics: The metrics to show, a table each; empty for the headline metric of each data set.
        force: Run everything again.
        report: Called after every run.

    Raises:
        ConfigError: There are no configurations, seeds or data sets, duplicates, an unknown data set, or a method that
            learns from labelled images.
        DataError: Data sets are missing; the text lists all, and nothing is run.
        VlpromptError: A single run fails.
    """
    reported = ("mean_of_datasets", "mean_of_groups") if with_groups else ("mean_of_datasets",)
    plan = make_plan(configs, seeds, "test-time", "test-time", datasets=datasets, report=reported)
    return run_test_time(plan, metrics=metrics, force=force, report=report)


def run_test_time(
    plan: Plan,
    *,
    metrics: Sequence[str] = (),
    force: bool = False,
    report: Callable[[Run], None] | None = None,
) -> tuple[dict[str, Any], str]:
    """Run a plan of test-time methods; see :func:`compare_test_time`."""
    check_data(plan)
    runner, seeds = Runner(plan.seeds, force=force, report=report), list(plan.seeds)
    groups = [[runner.runs(training.config) for training in group] for group in plan.groups]

    def build(metric: str | None) -> tuple[dict[str, Any], str]:
        cells, means = [], []
        for variant, runs in zip(plan.variants, groups, strict=True):
            on_each = [named(_cell(of_data, metric), variant) for of_data in runs]
            cells += on_each
            if len(on_each) > 1:
                means.append(_means(runs, on_each, metric, with_groups="mean_of_groups" in plan.report))
        return {"cells": cells, MEANS: means}, datasets_table(cells, means, plan.name, seeds)

    found, table = by_metric(build, metrics)
    results = {"schema": SCHEMA, "protocol": plan.name, "seeds": seeds, **found}
    keep(plan.name.replace("-", "_"), results, plan.configs, seeds)
    return results, table


def _cell(runs: Sequence[Run], metric: str | None) -> dict[str, Any]:
    """Return the rows of a method on one data set, and the counts of each seed."""
    first = runs[0].results
    rows = {
        label: {"per_seed": [run.results[part]["all"] for run in runs], **spread(_values(runs, part, metric))}
        for label, part in result_parts(first["method"]).items()
    }
    cell = {"method": first["method"], "data": first["data"]["name"], "rows": rows}
    orders = [run.results["data"]["order"] for run in runs if "order" in run.results["data"]]
    return {**cell, **({"orders": orders} if orders else {}), **marks(runs, metric)}


def _means(
    runs: Sequence[Sequence[Run]], cells: Sequence[dict[str, Any]], metric: str | None, *, with_groups: bool
) -> dict[str, Any]:
    """Return the means of one configuration over its data sets, by the words of the mean.

    Args:
        runs: The runs on each data set, one per seed.
        cells: The cells of each data set.
        metric: The metric, or None for the headline metric of each data set.
        with_groups: Whether there are means over groups of data sets.
    """
    method, names = cells[0]["method"], [cell["data"] for cell in cells]
    sets = {f"mean of {len(names)} data sets": names}
    for group, members in list_groups().items() if with_groups else ():
        if 1 < len(members) < len(names) and set(members) <= set(names):
            sets[f"mean of {len(members)} in {group}"] = members
    rows = {}
    for label, part in result_parts(method).items():
        values = {name: _values(of_data, part, metric) for name, of_data in zip(names, runs, strict=True)}
        rows[label] = {
            words: spread(
                [statistics.fmean(of_seed) for of_seed in zip(*(values[name] for name in members), strict=True)]
            )
            for words, members in sets.items()
        }
    return {"method": method, "data": MEANS, "datasets": names, "rows": rows, **shared_marks(cells)}


def _values(runs: Sequence[Run], part: str, metric: str | None) -> list[float]:
    """Return the value in % of each run."""
    return [measured(run.results[part]["all"], metric) for run in runs]


def datasets_table(
    cells: Sequence[dict[str, Any]], means: Sequence[dict[str, Any]], name: str, seeds: Sequence[int]
) -> str:
    """Return the table of data sets and their means by method, with zero-shot first."""
    words = metric_words(cell.get("metric", "accuracy") for cell in cells)
    rows: dict[str, dict[str, str]] = {}
    for data in dict.fromkeys(cell["data"] for cell in cells):
        on_data = list(table_rows([cell for cell in cells if cell["data"] == data]))
        texts = {row_name(cell, label): seed_text(cell, label, cell["rows"][label], seeds) for cell, label in on_data}
        rows[data_words(data, on_data[0][0].get("metric", "accuracy"))] = texts
    of_means: dict[str, dict[str, str]] = {}
    for mean, label in table_rows(means):
        for name_of_mean, value in mean["rows"][label].items():
            text = seed_text(mean, label, value, seeds)
            of_means.setdefault(name_of_mean, {})[row_name(mean, label)] = text
    columns = dict.fromkeys(column for texts in rows.values() for column in texts)
    table = Table("data")
    for column in columns:
        table.add_column(column, justify="right")
    for part in (rows, of_means):
        for row, texts in part.items():
            table.add_row(row, *(texts.get(column, "-") for column in columns))
        table.add_section()
    return render(table, f"{name}: {words} in %, {over_seeds(seeds)}", seed_note(table_rows(cells), seeds))
