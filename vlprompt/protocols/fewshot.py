"""The few-shot protocol: all classes, several numbers of shots, several seeds; accuracy per data set and shot.

Accuracies are averaged over seeds; the average over data sets is unweighted.
The spread is the population standard deviation, over seeds for a data set and over data sets for the average.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from vlprompt.config.run import RunConfig
from vlprompt.config.source import ConfigSource
from vlprompt.datasets.records import counted, shots_in_words
from vlprompt.engine.metrics import measured
from vlprompt.errors import ConfigError
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
from vlprompt.runs.run import Run
from vlprompt.runs.tables import data_words, metric_words, render

SCHEMA = 1
AVERAGE = "average"


def few_shot(
    configs: Sequence[RunConfig | ConfigSource],
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: Sequence[int] = (1, 2, 3),
    *,
    datasets: Sequence[str] | None = None,
    metrics: Sequence[str] = (),
    force: bool = False,
    report: Callable[[Run], None] | None = None,
) -> tuple[dict[str, Any], str]:
    """Run every configuration with every number of shots and every seed; return the results and the table.

    Finished runs are reused and unfinished ones resumed, so the same call resumes where it stopped.

    Args:
        configs: The configurations to compare; ``data.classes`` is set to ``all``, ``data.shots`` and ``seed`` to the
            given values.
        shots: Training images per class; -1 for all.
        seeds: Seeds of the shots and of the training.
        datasets: Names, aliases or groups of data sets that replace ``data.name`` of every configuration.
        metrics: The metrics to show, a table each; empty for the headline metric of each data set.
        force: Run everything again.
        report: Called after every run.

    Raises:
        ConfigError: There are no configurations, shots, seeds or data sets, duplicates, or an unknown data set.
        DataError: Data sets are missing; the text lists all, and nothing is trained.
        VlpromptError: A single run fails.
    """
    if not shots or len(set(shots)) != len(shots):
        raise ConfigError(f"shots are {list(shots)}; accepted: different numbers of images per class, such as 1,2,4")
    plan = make_plan(configs, seeds, "few-shot", "same", datasets=datasets, shots=shots)
    return run_few_shot(plan, metrics=metrics, force=force, report=report)


def run_few_shot(
    plan: Plan,
    *,
    metrics: Sequence[str] = (),
    force: bool = False,
    report: Callable[[Run], None] | None = None,
) -> tuple[dict[str, Any], str]:
    """Run a plan of several numbers of shots; see :func:`few_shot`."""
    check_data(plan)
    runner = Runner(plan.seeds, force=force, report=report)
    groups = [
        [
            {training.config.data.shots: runner.runs(training.config) for training in trainings}
            for _, trainings in itertools.groupby(group, lambda training: training.config.data.name)
        ]
        for group in plan.groups
    ]
    shots, seeds = list(dict.fromkeys(config.data.shots for config in plan.configs)), list(plan.seeds)

    def build(metric: str | None) -> tuple[dict[str, Any], str]:
        cells, average = [], []
        for variant, group, on_data in zip(plan.variants, plan.groups, groups, strict=True):
            on_each = [named(_cell(group[0].config.method, runs, metric), variant) for runs in on_data]
            cells += on_each
            if len(on_each) > 1:
                average.append(_average(on_each))
        found = {"cells": cells, **({AVERAGE: average} if average else {})}
        return found, few_shot_table(cells, shots, seeds, average, plan.name)

    found, table = by_metric(build, metrics)
    results = {"schema": SCHEMA, "protocol": plan.name, "seeds": seeds, "shots": shots, **found}
    keep(plan.name.replace("-", "_"), results, plan.configs, seeds)
    return results, table


def _cell(method: str, runs: dict[int, list[Run]], metric: str | None) -> dict[str, Any]:
    rows = {
        label: {
            str(count): {
                "per_seed": [run.results[part]["all"] for run in shot_runs],
                **spread([measured(run.results[part]["all"], metric) for run in shot_runs]),
            }
            for count, shot_runs in runs.items()
        }
        for label, part in result_parts(method).items()
    }
    all_runs = [run for shot_runs in runs.values() for run in shot_runs]
    return {
        "method": method,
        "data": all_runs[0].results["data"]["name"],
        "rows": rows,
        "shots_per_class": {
            str(count): shot_runs[0].results["data"].get("shots_per_class") for count, shot_runs in runs.items()
        },
        **marks(all_runs, metric),
    }


def _average(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the unweighted average of one configuration's ``cells`` (one per data set) as a cell."""
    first = cells[0]
    rows = {
        label: {count: spread([cell["rows"][label][count]["mean"] for cell in cells]) for count in row}
        for label, row in first["rows"].items()
    }
    names = [cell["data"] for cell in cells]
    return {"method": first["method"], "data": AVERAGE, "datasets": names, "rows": rows, **shared_marks(cells)}


def few_shot_table(
    cells: Sequence[dict[str, Any]],
    shots: Sequence[int],
    seeds: Sequence[int],
    average: Sequence[dict[str, Any]] = (),
    name: str = "few-shot",
) -> str:
    """Return the table of all cells and averages by number of shots, with zero-shot once per data set.

    Args:
        cells: The cells of the data sets.
        shots: The numbers of training images per class.
        seeds: The seeds.
        average: The average of each configuration, if there are several data sets.
        name: The protocol's name.
    """
    words = metric_words(cell.get("metric", "accuracy") for cell in cells)
    title = f"{name} {words} in % by images per class, {over_seeds(seeds)}"
    table = Table("data", "method")
    for count in shots:
        table.add_column("all" if count == -1 else counted(count, "shot"), justify="right")
    sets = len(average[0]["datasets"]) if average else 0
    for part in (cells, average):
        for cell, label in table_rows(part):
            values = [cell["rows"][label][str(count)] for count in shots]
            texts = [
                seed_text(cell, label, value, seeds) if part is cells else spread_text(value, True) for value in values
            ]
            table.add_row(data_words(cell["data"], cell.get("metric", "accuracy")), row_name(cell, label), *texts)
        if average:
            table.add_section()
    captions = [f"average: unweighted mean and deviation over {sets} data sets"] if average else []
    notes = [seed_note(table_rows(cells), seeds), *captions, *_scarce(cells, shots)]
    return render(table, title, "\n".join(filter(None, notes)))


def _scarce(cells: Sequence[dict[str, Any]], shots: Sequence[int]) -> list[str]:
    """Return a line for each data set that has fewer training images in a class than some of ``shots``."""
    lines = []
    for cell in {cell["data"]: cell for cell in cells}.values():
        per_class = cell.get("shots_per_class", {})
        words = [shots_in_words(count, per_class.get(str(count))) for count in shots if count > 0]
        if scarce := [text for text in words if "available" in text]:
            lines.append(f"{cell['data']}: {', '.join(scarce)}")
    return lines
