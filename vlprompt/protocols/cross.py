"""Transfer from one source to many targets: cross-dataset transfer, and ImageNet's variants as domains.

One source model per seed is trained. Its head is tested on every target with the target's class names, new prompts for
them and no masked classes (CoOp: datasets/imagenet_a.py 32-46), and with the target's template unless the settings set
one. The mean is over the targets only; the spread over seeds is the population standard deviation. The scores of a
target are saved in the run folder, under a hash of everything they depend on, and reused.

A method that learns from no labelled images has nothing to transfer: it runs on every target by itself, with the
recipe book's values for the target, as the official scripts of test-time methods do. If it starts from a head, its
targets start from the head of the source's run, which also keeps statistics of the source.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from vlprompt._dist import is_main_process
from vlprompt._files import sha256_json, write_json
from vlprompt.config.run import RunConfig
from vlprompt.config.source import ConfigSource
from vlprompt.config.texts import identified
from vlprompt.datasets import FewShotTask
from vlprompt.datasets.kept_images import contents_by_id
from vlprompt.engine.fit import make_trainer
from vlprompt.engine.metrics import METRICS, measured
from vlprompt.errors import ConfigError
from vlprompt.io.head import Head
from vlprompt.io.head_files import CONFIG_FILE
from vlprompt.protocols.plan import Plan, make_plan
from vlprompt.protocols.protocol import (
    by_metric,
    classifier_mark,
    keep,
    marks,
    named,
    over_seeds,
    result_parts,
    row_name,
    seed_mark,
    seed_note,
    seed_text,
    spread,
    table_rows,
)
from vlprompt.protocols.running import Runner, check_data, place
from vlprompt.runs.class_tables import NamedCounts, write_class_tables
from vlprompt.runs.folder import TARGETS, config_sha256, data_record, read_json
from vlprompt.runs.run import Run, tested
from vlprompt.runs.session import Session
from vlprompt.runs.tables import ZERO_SHOT, classifier_of, data_words, render, shots_of

SCHEMA = 1
_TESTED = ("name", "class_names_sha256", "template", "split_sha256", "test", "pixels")
_DRAWN = ("shots", "shots_per_class", "seed", "sampler", "train", "val", "shots_sha256", "val_sha256")


def cross_dataset(
    configs: Sequence[RunConfig | ConfigSource],
    targets: Sequence[str],
    seeds: Sequence[int] = (1, 2, 3),
    *,
    name: str = "cross-dataset",
    with_source: bool = False,
    metrics: Sequence[str] = (),
    force: bool = False,
    report: Callable[[Run], None] | None = None,
) -> tuple[dict[str, Any], str]:
    """Train every configuration once per seed, test it on ``targets``, and return the results and the tables.

    Finished runs and tested targets are reused, so the same call resumes where it stopped.

    Args:
        configs: The configurations to compare; ``data`` is the source, with ``data.classes`` set to ``all``.
        targets: Names, aliases or groups of data sets to test on; the source is skipped in groups.
        seeds: Seeds of the shots and of the training.
        name: Name of the results.
        with_source: Also report the mean over the targets and the source (TPT's "average").
        metrics: The metrics to show, a table each; empty for the headline metric of each data set.
        force: Run and test everything again.
        report: Called after every run.

    Raises:
        ConfigError: There is nothing to run, a name occurs twice, a target is the source, or trained parameters are
            specific to the source's classes.
        DataError: A source or targets are missing; the text lists all, and nothing is trained.
        VlpromptError: A single run fails.
    """
    report_all = ("mean_of_targets", "mean_with_source") if with_source else ("mean_of_targets",)
    plan = make_plan(configs, seeds, name, "datasets", targets=targets, report=report_all)
    return run_cross(plan, metrics=metrics, force=force, report=report)


def run_cross(
    plan: Plan,
    *,
    metrics: Sequence[str] = (),
    force: bool = False,
    report: Callable[[Run], None] | None = None,
) -> tuple[dict[str, Any], str]:
    """Run a plan with other data sets as targets; see :func:`cross_dataset`."""
    tasks = check_data(plan)
    runner, seeds = Runner(plan.seeds, force=force, report=report), list(plan.seeds)
    for training in plan.trainings:
        if not training.per_target:
            configs = [training.config, *(target.config for target in training.targets)]
            source, *others = (tasks[place(config.data)] for config in configs)
            runner.session(training.config).check_moves(source, others)
    tested_runs = []
    for training in plan.trainings:
        runs = runner.runs(training.config)
        targets = [target.config for target in training.targets]
        if training.per_target:
            scores = [
                {target.data.name: _own_run(done, runner, replace(target, seed=seed)) for target in targets}
                for done, seed in zip(runs, seeds, strict=True)
            ]
        else:
            session = Session(training.config, after=runner.last)
            scores = [
                {target.data.name: _target(done, session, tasks[place(target.data)], force) for target in targets}
                for done in runs
            ]
        tested_runs.append((training.config, runs, scores))

    def build(metric: str | None) -> tuple[dict[str, Any], str]:
        cells = [
            named(_cell(*of_training, "mean_with_source" in plan.report, metric), variant)
            for of_training, variant in zip(tested_runs, plan.training_variants, strict=True)
        ]
        return {"cells": cells}, cross_tables(cells, plan.name, seeds)

    found, tables = by_metric(build, metrics)
    results = {"schema": SCHEMA, "protocol": plan.name, "seeds": seeds, **found}
    names = [[target.config.data.name for target in training.targets] for training in plan.trainings]
    own = [config_sha256(run.config) for training in plan.trainings if training.per_target for run in training.targets]
    keep(plan.name.replace("-", "_"), results, plan.configs, seeds, names, *([own] if own else []))
    return results, tables


def _own_run(source: Run, runner: Runner, config: RunConfig) -> dict[str, Any]:
    """Return the scores of a run of ``config`` on its target; a configured start is replaced by the source's head."""
    if config.init_from is not None:
        config = replace(config, init_from=str(source.folder))
    results = runner.run(config).results
    return {
        "data": results["data"],
        "zeroshot_classifier": results.get("zeroshot_classifier", {}),
        "seed_draws": results.get("seed_draws"),
        **{part: results[part]["all"] for part in ("results", "zeroshot")},
    }


def _target(done: Run, session: Session, task: FewShotTask, force: bool) -> dict[str, Any]:
    """Return the scores of the run's head and of zero-shot on ``task``'s test images, saved ones if they exist."""
    head_facts = read_json(done.head_dir / CONFIG_FILE) or {}
    data, contents = task.describe(), contents_by_id(task.test) if task.card.own else {}
    images = {"images_sha256": sha256_json(sorted(contents.items()))} if contents else {}
    # Everything these scores depend on: trained tensors, weights, classes, images and transforms.
    key = {
        "schema": SCHEMA,
        "head": head_facts.get("tensors_sha256"),
        "settings": head_facts.get("settings"),
        "backbone": done.results["backbone"]["fingerprint"],
        "data": {name: data[name] for name in _TESTED} | images,
        "preprocess": head_facts.get("preprocess"),
        "texts": sha256_json([identified(session.plain["settings"]), task.texts.ensembles]),
    }
    stem = f"{task.name}-{sha256_json(key)[:16]}"
    path = done.folder / TARGETS / f"{stem}.json"
    known = None if force else _kept(path, key)
    if known is not None:
        return known
    tested_scores, counts = _test(session, done.head(session.backbone), task, done.folder)
    scores = {"key": key, **tested_scores}
    if is_main_process():
        write_class_tables(path.parent, counts, f"{stem}-")
        write_json(path, scores)  # last, because it marks the target as tested
    return scores


def _kept(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """Return the saved scores of a target; None if they are missing or incomplete."""
    try:
        scores = read_json(path)
    except ConfigError:
        return None  # testing again is cheap and repairs the file
    parts = {"results", "zeroshot", "zeroshot_classifier", "data"}
    complete = scores is not None and parts <= scores.keys() and scores.get("key") == key
    return scores if complete else None


def _test(
    session: Session, head: Head, task: FewShotTask, folder: Path
) -> tuple[dict[str, Any], dict[str, dict[str, NamedCounts]]]:
    """Return the scores of the head and of zero-shot on a target, and their counts by class."""
    quiet = replace(session.config.trainer, loggers=())
    data = data_record(task, head.backbone, session.config.data.transform)
    # No shots were drawn from a target.
    scores: dict[str, Any] = {"data": {name: value for name, value in data.items() if name not in _DRAWN}}
    moved = session.moved(head.method, task).eval()
    zero_shot = session.zero_shot_on(task, moved)
    scores["zeroshot_classifier"] = session.classifier_facts(zero_shot, task, moved)
    counts: dict[str, dict[str, NamedCounts]] = {}
    for part, method in (("results", moved), ("zeroshot", zero_shot)):
        trainer = make_trainer(quiet, folder, 1, gradient=method.needs.gradient)
        scores[part], named = tested(session, trainer, method, task)
        counts[part] = {task.classes: named}
    return scores, counts


def _cell(
    config: RunConfig,
    runs: Sequence[Run],
    scores: Sequence[dict[str, dict[str, Any]]],
    with_source: bool,
    metric: str | None,
) -> dict[str, Any]:
    """Return the rows of one configuration, and the underlying counts.

    Args:
        config: The configuration.
        runs: The source runs, one per seed.
        scores: Scores of each run on each target.
        with_source: Whether rows also have the mean over the targets and the source.
        metric: The metric of the rows; None for the headline metric of each data set.
    """
    targets = list(scores[0])
    rows = {}
    for label, part in result_parts(config.method).items():
        source = [measured(run.results[part]["all"], metric) for run in runs]
        each = [[measured(of_seed[target][part], metric) for target in targets] for of_seed in scores]
        rows[label] = {
            "source": spread(source),
            "targets": {target: spread([values[i] for values in each]) for i, target in enumerate(targets)},
            "mean_of_targets": spread([statistics.fmean(values) for values in each]),
        }
        if with_source:
            both = [statistics.fmean([first, *values]) for first, values in zip(source, each, strict=True)]
            rows[label]["mean_with_source"] = spread(both)
    data = runs[0].results["data"]
    metrics = {target: metric or scores[0][target]["results"].get("metric", "accuracy") for target in targets}
    return {
        "method": config.method,
        "data": data["name"],
        "shots": data["shots"],
        "shots_per_class": data.get("shots_per_class"),
        "targets": targets,
        "metrics": metrics,
        "rows": rows,
        "runs": [
            {
                "seed": run.results["data"]["seed"],
                "folder": str(run.folder),
                "source": {part: run.results[part]["all"] for part in ("results", "zeroshot")},
                "targets": {
                    target: {part: found[part] for part in ("results", "zeroshot", "zeroshot_classifier")}
                    for target, found in of_seed.items()
                },
            }
            for run, of_seed in zip(runs, scores, strict=True)
        ],
        **marks(runs, metric),
        **classifier_mark([classifier_of(found) for found in (runs[0].results, *scores[0].values())]),
        **seed_mark([runs[0].results, *(found for found in scores[0].values() if "seed_draws" in found)]),
    }


def cross_tables(cells: Sequence[dict[str, Any]], name: str, seeds: Sequence[int]) -> str:
    """Return one table per source: source, targets and means by method, with zero-shot first."""
    tables = []
    for data in dict.fromkeys(cell["data"] for cell in cells):
        rows = list(table_rows([cell for cell in cells if cell["data"] == data]))
        first = rows[0][0]
        words = METRICS[first.get("metric", "accuracy")]
        title = f"{name}: {words} in %, trained on {data} with {shots_of(first)}; {over_seeds(seeds)}"
        table = Table("tested on")
        for cell, label in rows:
            table.add_column(row_name(cell, label), justify="right")

        def add(label: str, *keys: str, part: Any = rows, into: Table = table) -> None:
            values = []
            for cell, method in part:
                value = cell["rows"][method]
                for key in keys:
                    value = value[key]
                values.append(seed_text(cell, method, value, seeds))
            into.add_row(label, *values)

        add(f"{data} (source)", "source")
        table.add_section()
        for target in first["targets"]:
            add(data_words(target, first["metrics"][target]), "targets", target)
        table.add_section()
        add(f"mean of {len(first['targets'])} targets", "mean_of_targets")
        if "mean_with_source" in first["rows"][ZERO_SHOT]:
            add("mean with the source", "mean_with_source")
        tables.append(render(table, title, seed_note(rows, seeds)))
    return "\n\n".join(tables)
