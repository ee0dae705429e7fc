"""Runs a protocol's description or a plan by the functions of its kind."""

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
    """Run every configuration as ``protocol`` says; return the results, which are kept in a file, and the tables.

    Finished runs are reused and unfinished ones resumed, so the same call goes on where it stopped.

    Args:
        protocol: What :func:`~vlprompt.protocols.protocol_files.find_protocol` gives.
        configs: What to compare; its data set, classes, shots and seed are the protocol's where that names any. A
            :class:`ConfigSource` gives each training the values that its recipe book has for it.
        overrides: What to do otherwise than the protocol says.
        force: Run everything anew.
        report: Called after every run.

    Raises:
        ConfigError: Nothing to run, something named twice or not known, or overrides that do not fit.
        DataError: Data sets that are missing: all of them, before anything is trained.
        VlpromptError: Whatever a single run raises.
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
