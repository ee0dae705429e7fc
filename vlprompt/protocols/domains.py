"""Domain generalisation: train on some domains of a data set and test on the others.

``leave-one-out`` trains once per domain on all the others; ``single-source`` trains on each domain alone and tests on
the others. Training uses only clean images; corrupted versions are tested together with their clean domain. Accuracies
are averaged over the runs tested on a target, then over targets, then over seeds; the spread over seeds is the
population standard deviation. Counts stay exact until the last step.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from vlprompt.config.run import RunConfig
from vlprompt.config.source import ConfigSource
from vlprompt.datasets.domains import CLEAN, DomainProtocol, DomainRound, split_domain
from vlprompt.engine.metrics import METRICS, measured
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
    spread,
    table_rows,
)
from vlprompt.protocols.running import Runner
from vlprompt.runs.run import Run
from vlprompt.runs.tables import render

SCHEMA = 1
_TRAINED_ON = {
    "leave-one-out": "trained on all others",
    "single-source": "mean over sources",
}


def domain_generalisation(
    configs: Sequence[RunConfig | ConfigSource],
    protocol: DomainProtocol,
    seeds: Sequence[int] = (1, 2, 3),
    *,
    metrics: Sequence[str] = (),
    force: bool = False,
    report: Callable[[Run], None] | None = None,
) -> tuple[dict[str, Any], str]:
    """Run every configuration with every seed for every round of ``protocol``; return the results and the tables.

    Finished runs are reused and unfinished ones resumed, so the same call resumes where it stopped.

    Args:
        configs: The configurations to compare, on data sets with domains; ``data.classes`` is set to ``all``, and
            ``data.source``, ``data.target`` and ``seed`` follow the protocol.
        protocol: ``leave-one-out`` or ``single-source`` (:func:`vlprompt.datasets.domains.domain_rounds`).
        seeds: Seeds of the shots and of the training.
        metrics: The metrics to show, a table each; empty for the headline metric of each data set.
        force: Run everything again.
        report: Called after every run.

    Raises:
        ConfigError: There are no configurations or seeds, duplicates, an unknown protocol, or a data set without
            domains.
        VlpromptError: A single run fails.
    """
    plan = make_plan(configs, seeds, protocol, "domains", domains=protocol)
    return run_domains(plan, metrics=metrics, force=force, report=report)


def run_domains(
    plan: Plan,
    *,
    metrics: Sequence[str] = (),
    force: bool = False,
    report: Callable[[Run], None] | None = None,
) -> tuple[dict[str, Any], str]:
    """Run a plan over domains; see :func:`domain_generalisation`."""
    runner, seeds = Runner(plan.seeds, force=force, report=report), list(plan.seeds)
    on_each = []
    for variant, group in zip(plan.variants, plan.groups, strict=True):
        for _, on_data in itertools.groupby(group, lambda training: training.config.data.name):
            trainings = list(on_data)
            runs = [runner.runs(training.config) for training in trainings]
            rounds = [training.domains for training in trainings if training.domains is not None]
            on_each.append((variant, (trainings[0].config, rounds, runs)))

    def build(metric: str | None) -> tuple[dict[str, Any], str]:
        cells = [named(_cell(*on_data, metric), variant) for variant, on_data in on_each]
        return {"cells": cells}, domains_tables(cells, str(plan.domains), seeds)

    found, tables = by_metric(build, metrics)
    results = {"schema": SCHEMA, "protocol": plan.domains, "seeds": seeds, **found}
    keep(f"domains-{plan.domains}", results, plan.configs, seeds)
    return results, tables


def _cell(
    config: RunConfig, rounds: Sequence[DomainRound], runs: Sequence[Sequence[Run]], metric: str | None
) -> dict[str, Any]:
    """Return the rows of one configuration, and the underlying counts.

    Args:
        config: The configuration.
        rounds: The protocol's rounds.
        runs: The runs of each round, one per seed.
        metric: The metric of the rows; None for the headline metric of the data set.
    """
    parts = result_parts(config.method)
    targets = [domain_round.domain for domain_round in rounds]
    domains = dict.fromkeys(domain for domain_round in rounds for domain in domain_round.target)
    tested = sorted(domains, key=lambda domain: targets.index(split_domain(domain)[0]))
    first = runs[0][0].results["data"]
    return {
        "method": config.method,
        "data": first["name"],
        "shots": first["shots"],
        "targets": targets,
        "versions": list(dict.fromkeys(split_domain(domain)[1] for domain in tested)),
        "rows": {
            label: _rows([_accuracies(of_seed, part, metric) for of_seed in zip(*runs, strict=True)], tested)
            for label, part in parts.items()
        },
        "runs": [
            {
                "source": list(domain_round.source),
                "seed": done.results["data"]["seed"],
                **{part: done.results[part]["domains"] for part in parts.values()},
            }
            for domain_round, of_round in zip(rounds, runs, strict=True)
            for done in of_round
        ],
        **marks([done for of_round in runs for done in of_round], metric),
    }


def _accuracies(runs: Sequence[Run], part: str, metric: str | None) -> dict[str, float]:
    """Return the ``metric`` in % on each domain, as mean over the ``runs`` of one seed that tested it."""
    values_of: dict[str, list[float]] = {}
    for done in runs:
        for domain, score in done.results[part]["domains"].items():
            values_of.setdefault(domain, []).append(measured(score, metric))
    return {domain: statistics.fmean(values) for domain, values in values_of.items()}


def _rows(per_seed: Sequence[dict[str, float]], tested: Sequence[str]) -> dict[str, Any]:
    """Return, for each version, the spread over seeds on each target and of the mean over targets.

    A version that some targets lack gets no mean: it would cover other domains than the clean mean.

    Args:
        per_seed: Accuracy by domain, for each seed.
        tested: All tested domains, corrupted versions included.
    """
    versions: dict[str, dict[str, str]] = {}
    for domain in tested:
        target, version = split_domain(domain)
        versions.setdefault(version, {})[target] = domain
    rows: dict[str, Any] = {}
    for version, domains in versions.items():
        rows[version] = {
            "targets": {target: spread([seed[domain] for seed in per_seed]) for target, domain in domains.items()}
        }
        if domains.keys() == versions[CLEAN].keys():
            means = [statistics.fmean(seed[domain] for domain in domains.values()) for seed in per_seed]
            rows[version]["mean"] = spread(means)
    return rows


def domains_tables(cells: Sequence[dict[str, Any]], protocol: str, seeds: Sequence[int]) -> str:
    """Return one table per data set: method and version by target domain, with zero-shot first."""
    tables = []
    for data in dict.fromkeys(cell["data"] for cell in cells):
        data_cells = [cell for cell in cells if cell["data"] == data]
        words = METRICS[data_cells[0].get("metric", "accuracy")]
        title = f"{data}, {protocol}: {words} in % by target domain, {_TRAINED_ON[protocol]}; {over_seeds(seeds)}"
        targets = data_cells[0]["targets"]
        # Six domains over several seeds need the full table width.
        table = Table("method", "version", padding=(0, 1 if len(targets) < 6 else 0))
        for name in (*targets, "mean"):
            table.add_column(name, justify="right", overflow="fold")
        for cell, label in table_rows(data_cells):
            for version, row in cell["rows"][label].items():
                numbers = [*(row["targets"].get(target) for target in targets), row.get("mean")]
                table.add_row(
                    row_name(cell, label),
                    version,
                    *(seed_text(cell, label, number, seeds) for number in numbers),
                )
            table.add_section()
        tables.append(render(table, title, seed_note(table_rows(data_cells), seeds)))
    return "\n\n".join(tables)
