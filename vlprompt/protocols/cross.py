"""One source, many targets: cross-dataset transfer, and ImageNet's variants as domains.

One source model per seed is trained; its head is tested on every target with the target's own class names, prompts
built anew for them and nothing masked (CoOp: datasets/imagenet_a.py 32-46), and with the target's own template where
the settings leave it open. The mean is over the targets alone; the spread over seeds is the population standard
deviation. What a target gave is kept beside the run, under a name made from all that it depends on, so that it is
tested once.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from vlprompt._dist import is_main_process
from vlprompt._files import sha256_json, write_json
from vlprompt.config.run import RunConfig
from vlprompt.config.source import ConfigSource
from vlprompt.datasets import FewShotTask
from vlprompt.engine.fit import make_trainer
from vlprompt.engine.metrics import METRICS, headline
from vlprompt.errors import ConfigError
from vlprompt.io.head import Head
from vlprompt.io.head_files import CONFIG_FILE
from vlprompt.protocols.plan import Plan, make_plan
from vlprompt.protocols.protocol import (
    ZERO_SHOT,
    keep,
    marks,
    over_seeds,
    result_parts,
    row_name,
    spread,
    spread_text,
    table_rows,
)
from vlprompt.protocols.running import Runner, check_data, place
from vlprompt.runs.folder import TARGETS, data_record, read_json
from vlprompt.runs.run import Run, tested
from vlprompt.runs.session import Session
from vlprompt.runs.tables import data_words, render

SCHEMA = 1
_DRAWN = ("shots", "seed", "sampler", "train", "val", "shots_sha256", "val_sha256")


def cross_dataset(
    configs: Sequence[RunConfig | ConfigSource],
    targets: Sequence[str],
    seeds: Sequence[int] = (1, 2, 3),
    *,
    name: str = "cross-dataset",
    with_source: bool = False,
    force: bool = False,
    report: Callable[[Run], None] | None = None,
) -> tuple[dict[str, Any], str]:
    """Train every configuration once per seed, test it on ``targets``, and return the results and the tables.

    Finished runs and tested targets are reused, so the same call goes on where it stopped.

    Args:
        configs: What to compare; ``data`` is the source, with ``data.classes`` set to ``all``.
        targets: Names, aliases or groups of data sets to test on; a group's mention of the source is passed over.
        seeds: Seeds of the shots and of the training.
        name: What the results are called.
        with_source: Give the mean over the targets and the source, too (TPT's "average").
        force: Run and test everything anew.
        report: Called after every run.

    Raises:
        ConfigError: Nothing to run, something named twice, a target that is the source, or learnables that belong to
            the source's classes.
        DataError: A source or targets that are missing: all of them, before anything is trained.
        VlpromptError: Whatever a single run raises.
    """
    report_all = ("mean_of_targets", "mean_with_source") if with_source else ("mean_of_targets",)
    plan = make_plan(configs, seeds, name, "datasets", targets=targets, report=report_all)
    return run_cross(plan, force=force, report=report)


def run_cross(
    plan: Plan, *, force: bool = False, report: Callable[[Run], None] | None = None
) -> tuple[dict[str, Any], str]:
    """Run a plan with other data sets as targets; see :func:`cross_dataset`."""
    tasks = check_data(plan)
    runner, seeds = Runner(plan.seeds, force=force, report=report), list(plan.seeds)
    for training in plan.trainings:
        source, target = training.config.data, training.targets[0]
        runner.session(training.config).check_moves(tasks[place(source)], tasks[place(target)])
    cells = []
    for training in plan.trainings:
        runs = runner.runs(training.config)
        session = Session(training.config, after=runner.last)
        scores = [
            {target.name: _target(done, session, tasks[place(target)], force) for target in training.targets}
            for done in runs
        ]
        cells.append(_cell(training.config, runs, scores, "mean_with_source" in plan.report))
    results = {"schema": SCHEMA, "protocol": plan.name, "seeds": seeds, "cells": cells}
    targets = [[target.name for target in training.targets] for training in plan.trainings]
    keep(plan.name.replace("-", "_"), results, plan.configs, seeds, targets)
    return results, cross_tables(cells, plan.name, seeds)


def _target(done: Run, session: Session, task: FewShotTask, force: bool) -> dict[str, Any]:
    """Return what the run's head and zero-shot give on ``task``'s test images, tested now or kept from before."""
    head_facts = read_json(done.head_dir / CONFIG_FILE) or {}
    data = task.describe()
    # All that these scores depend on: the learned tensors, the weights, the classes and images, and how they are seen.
    key = {
        "schema": SCHEMA,
        "head": head_facts.get("tensors_sha256"),
        "settings": head_facts.get("settings"),
        "backbone": done.results["backbone"]["fingerprint"],
        "data": {name: data[name] for name in ("name", "class_names_sha256", "template", "split_sha256", "test")},
        "preprocess": head_facts.get("preprocess"),
    }
    path = done.folder / TARGETS / f"{task.name}-{sha256_json(key)[:16]}.json"
    known = None if force else _kept(path, key)
    if known is not None:
        return known
    found = {"key": key, **_test(session, done.head(session.backbone), task, done.folder)}
    if is_main_process():
        write_json(path, found)
    return found


def _kept(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """Return a target's scores that are kept; None where there are none, or what is there is not whole."""
    try:
        found = read_json(path)
    except ConfigError:
        return None  # testing again costs little and mends it
    whole = found is not None and {"results", "zeroshot", "data"} <= found.keys() and found.get("key") == key
    return found if whole else None


def _test(session: Session, head: Head, task: FewShotTask, folder: Path) -> dict[str, Any]:
    """Return what the head and zero-shot give on a target."""
    quiet = dataclasses.replace(session.config.trainer, loggers=())
    data = data_record(task, head.backbone, session.config.data.transform)
    # Nothing was drawn from a target.
    found: dict[str, Any] = {"data": {name: value for name, value in data.items() if name not in _DRAWN}}
    per_class = {}
    for part, method in (
        ("results", session.moved(head.method, task).eval()),
        ("zeroshot", session.zero_shot_on(task)),
    ):
        trainer = make_trainer(quiet, folder, 1, gradient=method.needs.gradient)
        found[part], per_class[part] = tested(session, trainer, method, task)
    return found | {"per_class": per_class}


def _cell(
    config: RunConfig, runs: Sequence[Run], scores: Sequence[dict[str, dict[str, Any]]], with_source: bool
) -> dict[str, Any]:
    """Return one configuration's rows, and the counts that they are made from.

    Args:
        config: The configuration.
        runs: The source runs, one per seed.
        scores: What each of them gives on each target.
        with_source: Whether rows have the mean over the targets and the source, too.
    """
    targets = list(scores[0])
    rows = {}
    for label, part in result_parts(config.method).items():
        source = [headline(one.results[part]["all"]) for one in runs]
        each = [[headline(of_seed[target][part]) for target in targets] for of_seed in scores]
        rows[label] = {
            "source": spread(source),
            "targets": {target: spread([own[i] for own in each]) for i, target in enumerate(targets)},
            "mean_of_targets": spread([statistics.fmean(own) for own in each]),
        }
        if with_source:
            both = [statistics.fmean([first, *own]) for first, own in zip(source, each, strict=True)]
            rows[label]["mean_with_source"] = spread(both)
    data = runs[0].results["data"]
    metrics = {target: scores[0][target]["results"].get("metric", "accuracy") for target in targets}
    return {
        "method": config.method,
        "data": data["name"],
        "shots": data["shots"],
        "targets": targets,
        "metrics": metrics,
        "rows": rows,
        "runs": [
            {
                "seed": one.results["data"]["seed"],
                "folder": str(one.folder),
                "source": {part: one.results[part]["all"] for part in ("results", "zeroshot")},
                "targets": {
                    target: {part: found[part] for part in ("results", "zeroshot", "per_class")}
                    for target, found in of_seed.items()
                },
            }
            for one, of_seed in zip(runs, scores, strict=True)
        ],
        **marks(runs),
    }


def cross_tables(cells: Sequence[dict[str, Any]], name: str, seeds: Sequence[int]) -> str:
    """Return one table per source: source, targets and means by method, zero-shot before the methods."""
    tables = []
    for data in dict.fromkeys(cell["data"] for cell in cells):
        rows = list(table_rows([cell for cell in cells if cell["data"] == data]))
        first = rows[0][0]
        words = METRICS[first.get("metric", "accuracy")]
        title = f"{name}: {words} in %, trained on {data} with {_shots(first['shots'])}; {over_seeds(seeds)}"
        table = Table("tested on")
        for cell, label in rows:
            table.add_column(row_name(cell, label), justify="right")

        def add(label: str, *keys: str, part: Any = rows, into: Table = table) -> None:
            values = []
            for cell, method in part:
                value = cell["rows"][method]
                for key in keys:
                    value = value[key]
                values.append(spread_text(value, len(seeds) > 1))
            into.add_row(label, *values)

        add(f"{data} (source)", "source")
        table.add_section()
        for target in first["targets"]:
            add(data_words(target, first["metrics"][target]), "targets", target)
        table.add_section()
        add(f"mean of {len(first['targets'])} targets", "mean_of_targets")
        if "mean_with_source" in first["rows"][ZERO_SHOT]:
            add("mean with the source", "mean_with_source")
        tables.append(render(table, title))
    return "\n\n".join(tables)


def _shots(shots: int) -> str:
    return "all images" if shots == -1 else f"{shots} shots"
