"""The base-to-new protocol: train on the first half of the classes, test on both halves, over several seeds.

Accuracies are averaged over seeds first and the harmonic mean is taken of the averages, as the published tables do
(datasets.md 3); the spread is the population standard deviation. Counts stay exact until the last step.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from vlprompt.engine.callbacks import write_text
from vlprompt.engine.config import RunConfig
from vlprompt.errors import ConfigError
from vlprompt.evaluation.folder import config_sha256, is_main_process, sha256_of
from vlprompt.evaluation.run import Run, harmonic_mean, run
from vlprompt.evaluation.tables import render

SCHEMA = 1


def base_to_new(
    configs: Sequence[RunConfig],
    seeds: Sequence[int] = (1, 2, 3),
    *,
    force: bool = False,
    report: Callable[[Run], None] | None = None,
) -> tuple[dict[str, Any], str]:
    """Run every configuration with every seed on base classes; return the results and the table.

    Finished runs are reused and unfinished ones resumed, so the same call goes on where it stopped.

    Args:
        configs: What to compare; ``data.classes`` is set to ``base`` and ``seed`` to each seed.
        seeds: Seeds of the shots and of the training.
        force: Run everything anew.
        report: Called after every run.

    Raises:
        ConfigError: No configurations, no seeds, or one of them twice.
        VlpromptError: Whatever a single run raises.
    """
    if not configs or not seeds:
        raise ConfigError("base-to-new needs at least one configuration and one seed, such as --seeds 1,2,3")
    if len(set(seeds)) != len(seeds):
        raise ConfigError(f"a seed stands twice in {list(seeds)}; each seed is one draw")
    cells = []
    for config in configs:
        config = replace(config, data=replace(config.data, classes="base"))
        runs = []
        for seed in seeds:
            done = run(replace(config, seed=seed), force=force)
            if report is not None and is_main_process():
                report(done)
            runs.append(done)
        cells.append(_cell(config, runs))
    results = {"schema": SCHEMA, "protocol": "base2new", "seeds": list(seeds), "cells": cells}
    if is_main_process():
        keys = sha256_of([[config_sha256(config) for config in configs], list(seeds)])[:8]
        write_text(Path(configs[0].output) / f"base_to_new-{keys}.json", json.dumps(results, indent=1) + "\n")
    return results, base_to_new_table(cells, list(seeds))


def _cell(config: RunConfig, runs: Sequence[Run]) -> dict[str, Any]:
    parts = {config.method: "results", "zero-shot": "zeroshot"}
    rows = {label: summary([one.results[part] for one in runs]) for label, part in parts.items()}
    first = runs[0].results["data"]
    return {"method": config.method, "data": first["name"], "shots": first["shots"], "rows": rows}


def summary(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and population deviation of base and new accuracy over runs, and the harmonic mean of the means."""
    found: dict[str, Any] = {"per_seed": list(scores)}
    for part in ("base", "new"):
        values = [score[part]["accuracy"] for score in scores if score.get(part)]
        if len(values) == len(scores):
            found[part] = {"mean": statistics.fmean(values), "deviation": statistics.pstdev(values)}
    if "base" in found and "new" in found:
        found["harmonic_mean"] = harmonic_mean(found["base"]["mean"], found["new"]["mean"])
    return found


def base_to_new_table(cells: Sequence[dict[str, Any]], seeds: Sequence[int]) -> str:
    """Return the table of all cells: zero-shot once per data set, then the methods."""
    many = f"mean and deviation over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    table = Table(title=f"base-to-new accuracy in %, {many}; H is of the means", title_justify="left")
    for name, side in (("data", "left"), ("method", "left"), ("base", "right"), ("new", "right"), ("H", "right")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    shown: set[str] = set()
    for cell in sorted(cells, key=lambda one: str(one["data"])):
        if cell["data"] not in shown:
            shown.add(cell["data"])
            table.add_row(cell["data"], "zero-shot", *_numbers(cell["rows"]["zero-shot"], len(seeds)))
        if cell["method"] != "zeroshot":
            table.add_row(cell["data"], cell["method"], *_numbers(cell["rows"][cell["method"]], len(seeds)))
    return render(table)


def _numbers(row: dict[str, Any], seeds: int) -> list[str]:
    def one(part: dict[str, float] | None) -> str:
        if part is None:
            return "-"
        return f"{part['mean']:.2f} ± {part['deviation']:.2f}" if seeds > 1 else f"{part['mean']:.2f}"

    mean = row.get("harmonic_mean")
    return [one(row.get("base")), one(row.get("new")), "-" if mean is None else f"{mean:.2f}"]
