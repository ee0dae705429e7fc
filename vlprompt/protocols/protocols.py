"""Execution of protocols and plans by their kind of test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlprompt.config.run import RunConfig
from vlprompt.config.source import ConfigSource
from vlprompt.datasets import find_card
from vlprompt.engine.metrics import check_metrics
from vlprompt.protocols.base_to_new import run_base_to_new
from vlprompt.protocols.cross import run_cross
from vlprompt.protocols.domains import run_domains
from vlprompt.protocols.fewshot import run_few_shot
from vlprompt.protocols.plan import Overrides, Plan, plan_protocol
from vlprompt.protocols.protocol_files import Part, Protocol
from vlprompt.protocols.test_time import run_test_time
from vlprompt.runs.run import Run


def run_protocol(
    protocol: Protocol,
    configs: Sequence[RunConfig | ConfigSource],
    overrides: Overrides | None = None,
    *,
    metrics: Sequence[str] = (),
    force: bool = False,
    report: Callable[[Run], None] | None = None,
) -> tuple[dict[str, Any], str]:
    """Run every configuration under ``protocol``; return the results, which are saved in a file, and the tables.

    Finished runs are reused and unfinished ones resumed, so the same call resumes where it stopped.

    Args:
        protocol: A protocol from :func:`~vlprompt.protocols.protocol_files.find_protocol`.
        configs: The configurations to compare; the protocol overrides data set, classes, shots and seed if it sets
            them. A :class:`ConfigSource` resolves the values of its recipe book for each training.
        overrides: Values that override the protocol.
        metrics: The metrics to show, a table each; empty for the headline metric of each data set.
        force: Run everything again.
        report: Called after every run.

    Raises:
        ConfigError: There is nothing to run, a name is unknown or given twice, or overrides or metrics do not fit.
        DataError: Data sets are missing; the text lists all, and nothing is trained.
        VlpromptError: A single run fails.
    """
    plan = plan_protocol(protocol, configs, overrides)
    return run_plan(plan, metrics=metrics, force=force, report=report)


def run_plan(
    plan: Plan,
    *,
    metrics: Sequence[str] = (),
    force: bool = False,
    report: Callable[[Run], None] | None = None,
) -> tuple[dict[str, Any], str]:
    """Run a plan; see :func:`run_protocol`."""
    check_plan_metrics(plan, metrics)
    return _RUN[plan.part](plan, metrics=metrics, force=force, report=report)


def check_plan_metrics(plan: Plan, metrics: Sequence[str]) -> None:
    """Raise ConfigError if ``metrics`` are unknown or do not fit the labels of a data set of ``plan``."""
    names = [run.config.data.name for training in plan.trainings for run in (training, *training.targets)]
    check_metrics(metrics, {name: find_card(name).multilabel for name in dict.fromkeys(names)})


_RUN: Mapping[Part, Callable[..., tuple[dict[str, Any], str]]] = {
    "same": run_few_shot,
    "halves": run_base_to_new,
    "datasets": run_cross,
    "domains": run_domains,
    "test-time": run_test_time,
}
