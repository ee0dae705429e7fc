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
from vlprompt.engine.metrics import headline
from vlprompt.protocols.plan import make_plan
from vlprompt.protocols.protocol import keep, over_seeds
from vlprompt.protocols.running import Runner
from vlprompt.runs.run import Run
from vlprompt.runs.tables import ZERO_SHOT, render

SCHEMA = 1
STARTS = ("usual start", "learned start", "learned start, regulated")
_COLUMNS = ("base", "new", "H")


def compare_starts(
    hosts: Sequence[tuple[RunConfig | ConfigSource, Path]],
    shots: Sequence[int],
    seeds: Sequence[int],
    *,
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
        force: Train again.
        report: Called after every run.

    Raises:
        ConfigError: There are no configurations or seeds, or a seed occurs twice.
        VlpromptError: A single run fails.
    """
    plan = make_plan([config for config, _ in hosts], seeds, "meta-eval", "halves", classes="base", shots=shots)
    runner = Runner(seeds, force=force, report=report)
    cells: list[dict[str, Any]] = []
    for trainings, (_, folder) in zip(plan.groups, hosts, strict=True):
        for config in (training.config for training in trainings):
            starts = (config, replace(config, init_from=str(folder)), replace(config, init_from=f"{GRAM}{folder}"))
            for label, started in zip(STARTS, starts, strict=True):
                runs = runner.runs(started)
                if label == STARTS[0]:
                    cells.append(_cell(config, ZERO_SHOT, [done.results["zeroshot"] for done in runs]))
                cells.append(_cell(config, label, [done.results["results"] for done in runs]))
    results = {"schema": SCHEMA, "protocol": "meta", "seeds": list(seeds), "cells": cells}
    keep("meta", results, plan.configs, [str(folder) for _, folder in hosts], list(seeds))
    return results, _table(results)


def _cell(config: RunConfig, label: str, scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    values = {
        "base": [headline(score["base"]) for score in scores],
        "new": [headline(score["new"]) for score in scores],
        "H": [float(score["harmonic_mean"]) for score in scores],
    }
    return {
        "method": config.method,
        "data": config.data.name,
        "shots": config.data.shots,
        "start": label,
        **{name: {**_mean(per_seed), "per_seed": per_seed} for name, per_seed in values.items()},
    }


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error}


def _table(results: dict[str, Any]) -> str:
    table = Table("method", "data", "shots", "start")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    before = None
    for cell in results["cells"]:
        place = (cell["method"], cell["data"], str(cell["shots"]))
        if before is not None and place != before:
            table.add_section()
        shown = place if place != before else ("", "", "")
        before = place
        table.add_row(*shown, cell["start"], *(_text(cell[name]) for name in _COLUMNS))
    seeds = over_seeds(results["seeds"]).replace("deviation", "standard error")
    return render(table, f"accuracy in %, {seeds}")


def _text(value: dict[str, Any]) -> str:
    error = value["standard_error"]
    return f"{value['mean']:.2f}" if error is None else f"{value['mean']:.2f} ± {error:.2f}"
