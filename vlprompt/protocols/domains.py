"""Domain generalisation: train on some domains of a data set, test on those that the training never saw.

``leave-one-out`` trains once per domain on all the others; ``single-source`` trains on each domain alone and tests on
the others. Only clean images are trained on; corrupted versions are tested where their clean domain is. Accuracies are
averaged over what trained for a target first, then over targets, then over seeds; the spread over seeds is the
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
from vlprompt.engine.metrics import METRICS, headline
from vlprompt.protocols.plan import Plan, make_plan
from vlprompt.protocols.protocol import (
    keep,
    marks,
    over_seeds,
    result_parts,
    row_name,
    spread,
    spread_text,
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
    force: bool = False,
    report: Callable[[Run], None] | None = None,
) -> tuple[dict[str, Any], str]:
    """Run every configuration with every seed for every round of ``protocol``; return the results and the tables.

    Finished runs are reused and unfinished ones resumed, so the same call goes on where it stopped.

    Args:
        configs: What to compare, on data sets that have domains; ``data.classes`` is set to ``all``, and
            ``data.source``, ``data.target`` and ``seed`` as the protocol says.
        protocol: ``leave-one-out`` or ``single-source`` (:func:`vlprompt.datasets.domains.domain_rounds`).
        seeds: Seeds of the shots and of the training.
        force: Run everything anew.
        report: Called after every run.

    Raises:
        ConfigError: No configurations, no seeds, or one of them twice; an unknown protocol; a data set without domains.
        VlpromptError: Whatever a single run raises.
    """
    return run_domains(make_plan(configs, seeds, protocol, "domains", domains=protocol), force=force, report=report)


def run_domains(
    plan: Plan, *, force: bool = False, report: Callable[[Run], None] | None = None
) -> tuple[dict[str, Any], str]:
    """Run a plan over domains; see :func:`domain_generalisation`."""
    runner, seeds = Runner(plan.seeds, force=force, report=report), list(plan.seeds)
    cells = []
    for group in plan.groups:
        for _, on_data in itertools.groupby(group, lambda training: training.config.data.name):
            trainings = list(on_data)
            runs = [runner.runs(training.config) for training in trainings]
            rounds = [training.domains for training in trainings if training.domains is not None]
            cells.append(_cell(trainings[0].config, rounds, runs))
    results = {"schema": SCHEMA, "protocol": plan.domains, "seeds": seeds, "cells": cells}
    keep(f"domains-{plan.domains}", results, plan.configs, seeds)
    return results, domains_tables(cells, str(plan.domains), seeds)


def _cell(config: RunConfig, rounds: Sequence[DomainRound], runs: Sequence[Sequence[Run]]) -> dict[str, Any]:
    """Return one configuration's rows, and the counts that they are made from.

    Args:
        config: The configuration.
        rounds: The protocol's rounds.
        runs: The runs of each round, one per seed.
    """
    parts = result_parts(config.method)
    targets = [one.domain for one in rounds]
    found = dict.fromkeys(domain for one in rounds for domain in one.target)
    tested = sorted(found, key=lambda domain: targets.index(split_domain(domain)[0]))
    first = runs[0][0].results["data"]
    return {
        "method": config.method,
        "data": first["name"],
        "shots": first["shots"],
        "targets": targets,
        "versions": list(dict.fromkeys(split_domain(domain)[1] for domain in tested)),
        "rows": {
            label: _rows([_accuracies(of_seed, part) for of_seed in zip(*runs, strict=True)], tested)
            for label, part in parts.items()
        },
        "runs": [
            {
                "source": list(one.source),
                "seed": done.results["data"]["seed"],
                **{part: done.results[part]["domains"] for part in parts.values()},
            }
            for one, of_round in zip(rounds, runs, strict=True)
            for done in of_round
        ],
        **marks([done for of_round in runs for done in of_round]),
    }


def _accuracies(runs: Sequence[Run], part: str) -> dict[str, float]:
    """Return the headline number in % on each domain, the mean over those of one seed's ``runs`` that tested it."""
    found: dict[str, list[float]] = {}
    for done in runs:
        for domain, score in done.results[part]["domains"].items():
            found.setdefault(domain, []).append(headline(score))
    return {domain: statistics.fmean(values) for domain, values in found.items()}


def _rows(per_seed: Sequence[dict[str, float]], tested: Sequence[str]) -> dict[str, Any]:
    """Return, for each version, the spread over seeds on each target and of the mean over targets.

    A version that not every target has gets no mean: it would be over other domains than the clean one's.

    Args:
        per_seed: Accuracy by domain, for each seed.
        tested: All domains that were tested, corrupted versions included.
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
    """Return one table per data set: method and version by target domain, zero-shot before the methods."""
    tables = []
    for data in dict.fromkeys(cell["data"] for cell in cells):
        own = [cell for cell in cells if cell["data"] == data]
        words = METRICS[own[0].get("metric", "accuracy")]
        title = f"{data}, {protocol}: {words} in % by target domain, {_TRAINED_ON[protocol]}; {over_seeds(seeds)}"
        targets = own[0]["targets"]
        # Six domains over several seeds are as wide as a table may be.
        table = Table("method", "version", padding=(0, 1 if len(targets) < 6 else 0))
        for name in (*targets, "mean"):
            table.add_column(name, justify="right", overflow="fold")
        for cell, label in table_rows(own):
            for version, row in cell["rows"][label].items():
                numbers = [*(row["targets"].get(target) for target in targets), row.get("mean")]
                table.add_row(row_name(cell, label), version, *(spread_text(one, len(seeds) > 1) for one in numbers))
            table.add_section()
        tables.append(render(table, title))
    return "\n\n".join(tables)
