"""Execution of protocols and plans by their kind of test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlprompt.config.run import RunConfig
from vlprompt.config.source import ConfigSource
from vlprompt.protocols.base_to_new import run_base_to_new
from vlprompt.protocols.cross import run_cross
from vlprompt.protocols.domains import run_domains
from vlprompt.protocols.fewshot import run_few_shot
from vlprompt.protocols.plan import Overrides, Plan, plan_protocol
from vlprompt.protocols.protocol_files import Part, Protocol
from vlprompt.runs.run import Run


def run_protocol(
    protocol: Protocol,
    configs: Sequence[RunConfig | ConfigSource],
    overrides: Overrides | None = None,
    *,
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
        force: Run everything again.
        report: Called after every run.

    Raises:
        ConfigError: There is nothing to run, a name is unknown or given twice, or overrides do not fit.
        DataError: Data sets are missing; the text lists all, and nothing is trained.
        VlpromptError: A single run fails.
    """
    return run_plan(plan_protocol(protocol, configs, overrides), force=force, report=report)


def run_plan(
    plan: Plan, *, force: bool = False, report: Callable[[Run], None] | None = None
) -> tuple[dict[str, Any], str]:
    """Run a plan; see :func:`run_protocol`."""
    return _RUN[plan.part](plan, force=force, report=report)


_RUN: Mapping[Part, Callable[..., tuple[dict[str, Any], str]]] = {
    "same": run_few_shot,
    "halves": run_base_to_new,
    "datasets": run_cross,
    "domains": run_domains,
}
