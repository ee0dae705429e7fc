"""Comparison of initialisations: the default, the meta-learned, and the meta-learned with its regulator.

Every run trains on a few images of the base classes and is tested on base and new classes (:mod:`base_to_new`).
Accuracies and their harmonic mean H are computed per seed. Tables show the mean over seeds with its standard error: the
sample deviation divided by the square root of the number of seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from vlprompt.config.run import GRAM, RunConfig
from vlprompt.config.source import ConfigSource
from vlprompt.engine.metrics import ERRORS, measured
from vlprompt.protocols.plan import make_plan
from vlprompt.protocols.protocol import by_metric, keep, marks, named, over_seeds
from vlprompt.protocols.protocols import check_plan_metrics
from vlprompt.protocols.running import Runner
from vlprompt.runs.run import Run
from vlprompt.runs.tables import ZERO_SHOT, harmonic_mean, metric_words, render, shots_of

SCHEMA = 1
STARTS = ("usual start", "learned start", "learned start, regulated")
_COLUMNS = ("base", "new", "H")


def compare_starts(
    hosts: Sequence[tuple[RunConfig | ConfigSource, Path]],
    shots: Sequence[int],
    seeds: Sequence[int],
    *,
    metrics: Sequence[str] = (),
    force: bool = False,
    report: Callable[[Run], None] | None = None,
) -> tuple[dict[str, Any], str]:
    """Train every method from each initialisation, with each number of shots and seed; return results and table.

    Finished runs are reused and unfinished ones resumed.

    Args:
        hosts: Configurations, each with the folder of its meta-training; ``data.classes``, ``data.shots``, ``seed`` and
            ``init_from`` are set here.
        shots: Training images per class.
        seeds: Seeds of the shots and of the training.
        metrics: The metrics to show, a table each; empty for the headline metric of each data set.
        force: Train again.
        report: Called after every run.

    Raises:
        ConfigError: There are no configurations or seeds, a seed occurs twice, or metrics do not fit.
        VlpromptError: A single run fails.
    """
    plan = make_plan([config for config, _ in hosts], seeds, "meta-eval", "halves", classes="base", shots=shots)
    check_plan_metrics(plan, metrics)
    runner = Runner(seeds, force=force, report=report)
    found: list[tuple[str, tuple[RunConfig, str, str, list[Run]]]] = []
    for variant, trainings, (_, folder) in zip(plan.variants, plan.groups, hosts, strict=True):
        for config in (training.config for training in trainings):
            starts = (config, replace(config, init_from=str(folder)), replace(config, init_from=f"{GRAM}{folder}"))
            for label, started in zip(STARTS, starts, strict=True):
                runs = runner.runs(started)
                if label == STARTS[0]:
                    found.append((variant, (config, ZERO_SHOT, "zeroshot", runs)))
                found.append((variant, (config, label, "results", runs)))

    def build(metric: str | None) -> tuple[dict[str, Any], str]:
        cells = [named(_cell(*row, metric), variant) for variant, row in found]
        return {"cells": cells}, _table(cells, seeds)

    part, table = by_metric(build, metrics)
    results = {"schema": SCHEMA, "protocol": "meta", "seeds": list(seeds), **part}
    keep("meta", results, plan.configs, [str(folder) for _, folder in hosts], list(seeds))
    return results, table


def _cell(config: RunConfig, label: str, part: str, runs: Sequence[Run], metric: str | None) -> dict[str, Any]:
    scores = [done.results[part] for done in runs]
    values = {half: [measured(score[half], metric) for score in scores] for half in ("base", "new")}
    if metric not in ERRORS:
        values["H"] = [harmonic_mean(*halves) for halves in zip(values["base"], values["new"], strict=True)]
    return {
        "method": config.method,
        "data": config.data.name,
        "shots": config.data.shots,
        "shots_per_class": runs[0].results["data"].get("shots_per_class"),
        "start": label,
        **marks(runs, metric),
        **{name: {**_mean(per_seed), "per_seed": per_seed} for name, per_seed in values.items()},
    }


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error}


def _table(cells: Sequence[dict[str, Any]], seeds: Sequence[int]) -> str:
    table = Table("method", "data", "shots", "start")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    before = None
    for cell in cells:
        shots = shots_of(cell).removesuffix(" shots").removesuffix(" shot")
        place = (cell.get("variant", cell["method"]), cell["data"], shots)
        if before is not None and place != before:
            table.add_section()
        shown = place if place != before else ("", "", "")
        before = place
        table.add_row(*shown, cell["start"], *(_text(cell.get(name), cell["start"] != ZERO_SHOT) for name in _COLUMNS))
    words = metric_words(cell.get("metric", "accuracy") for cell in cells)
    return render(table, f"{words} in %, {over_seeds(seeds).replace('deviation', 'standard error')}")


def _text(value: dict[str, Any] | None, varies: bool) -> str:
    if value is None:
        return "-"
    error = value["standard_error"] if varies else None
    return f"{value['mean']:.2f}" if error is None else f"{value['mean']:.2f} ± {error:.2f}"
