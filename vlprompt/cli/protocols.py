"""Commands with several runs: ``base-to-new``, ``domains``, ``eval --protocol``, ``search`` and ``compare``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlprompt._terminal import show
from vlprompt.cli.parse import COMMAND_LINE, CommandLine, check_run, read_command_line, refuse, source_of
from vlprompt.config.keys import to_yaml
from vlprompt.config.run import RunConfig
from vlprompt.config.source import ConfigSource
from vlprompt.config.yaml import shown, yaml_node, yaml_value
from vlprompt.errors import ConfigError, VlpromptError

if TYPE_CHECKING:
    from vlprompt.protocols.plan import Plan

PROTOCOL_FLAGS = ("print-config", "dry-run", "force")


# -- shared by all commands -----------------------------------------------------------------------------------------
def say(text: str) -> None:
    """Print ``text`` once: Lightning starts all further processes with the same command line."""
    from vlprompt._dist import is_main_process

    if is_main_process():
        show(text)


def need_config(line: CommandLine) -> None:
    """Add a problem to ``line`` if it has neither a configuration nor a method."""
    if not line.configs and "method" not in line.overrides:
        line.problems.append(f"{COMMAND_LINE}: no --config FILE; for a first run: --config mocoop/demo")


def need_no_config(line: CommandLine) -> None:
    """Add a problem for every ``--config`` and override of a command that accepts none."""
    for key in (*line.overrides, *(["config"] if line.configs else [])):
        line.refuse(key, ())


# -- protocols ------------------------------------------------------------------------------------------------------
def base_to_new_command(words: list[str]) -> int:
    """Run ``vlprompt base-to-new`` and return its exit status."""
    line = read_command_line(words, "base-to-new", flags=PROTOCOL_FLAGS, options=("seeds", "datasets", "metrics"))
    datasets = _names(line, "datasets")
    fixed = {"seed": "--seeds says which", "data.classes": "base and new classes are both run"}
    if datasets is not None:
        fixed["data.name"] = "--datasets says which, so omit one of the two"
    seeds = numbers(line, "seeds") or [1, 2, 3]
    sources = sources_of(line, fixed)
    from vlprompt.protocols.plan import make_plan

    return _planned(
        line, lambda dry: make_plan(sources, seeds, "base-to-new", "halves", classes="base", datasets=datasets, dry=dry)
    )


def domains_command(words: list[str]) -> int:
    """Run ``vlprompt domains`` and return its exit status."""
    from vlprompt.datasets.domains import check_protocol

    line = read_command_line(words, "domains", flags=PROTOCOL_FLAGS, options=("seeds", "protocol", "metrics"))
    protocol: Any = line.options.get("protocol", "")
    try:
        check_protocol(protocol)
    except ConfigError as error:
        line.problems.append(f"{COMMAND_LINE}: --{error}")
    seeds = numbers(line, "seeds") or [1, 2, 3]
    sources = sources_of(line, {"seed": "--seeds says which", "data.classes": "all classes are run"} | _BY_DOMAIN)
    from vlprompt.protocols.plan import make_plan

    return _planned(line, lambda dry: make_plan(sources, seeds, protocol, "domains", domains=protocol, dry=dry))


_BY_DOMAIN = dict.fromkeys(("data.source", "data.target"), "the protocol says which domains")


def protocol_command(words: list[str]) -> int:
    """Run ``vlprompt eval --protocol`` and return its exit status."""
    from vlprompt.protocols.protocol_files import CONFIG, find_protocol

    options = ("protocol", "seeds", "datasets", "targets", "shots", "metrics")
    line = read_command_line(words, "eval", flags=PROTOCOL_FLAGS, options=options)
    seeds, shots = numbers(line, "seeds"), numbers(line, "shots")
    datasets, targets = _names(line, "datasets"), _names(line, "targets")
    protocol = None
    try:
        protocol = find_protocol(line.options.get("protocol", ""))
    except ConfigError as error:
        line.problems.append(f"{COMMAND_LINE}: --{error}")
    fixed = {"seed": "--seeds says which", "data.classes": "the protocol says which classes"}
    if protocol is not None:
        if datasets is not None or protocol.train.data != (CONFIG,):
            fixed["data.name"] = f"{protocol.name} names its own data sets; --datasets says which others"
        if shots is not None or protocol.train.shots:
            fixed["data.shots"] = "--shots says how many"
        fixed |= _BY_DOMAIN if protocol.test.part == "domains" else {}
    sources = sources_of(line, fixed)
    if protocol is None:
        refuse(line.problems, "eval")
    from vlprompt.protocols.plan import Overrides, plan_protocol

    chosen, overrides = protocol, Overrides(seeds, datasets, targets, shots)
    return _planned(line, lambda dry: plan_protocol(chosen, sources, overrides, dry=dry))


def _planned(line: CommandLine, plan: Callable[[bool], Plan]) -> int:
    """Print or run the result of ``plan``; its argument is True if nothing will be run."""
    metrics = metrics_of(line)
    dry = bool(line.flags & {"dry-run", "print-config"})
    planned = plan(dry)
    if dry and metrics:
        from vlprompt.protocols.protocols import check_plan_metrics

        check_plan_metrics(planned, metrics)
    if "dry-run" in line.flags:
        show(planned.text())
        return 0
    if dry:
        return _print_configs(planned.configs)
    from vlprompt.protocols.protocols import run_plan

    _, table = run_plan(planned, metrics=metrics, force="force" in line.flags, report=print_run)
    say(table)
    return 0


def sources_of(line: CommandLine, fixed: Mapping[str, str]) -> list[ConfigSource]:
    """Return the source of each ``--config`` of ``line``; raise ConfigError for its problems.

    Args:
        line: The command line, with the problems of the command's options.
        fixed: Keys that the command sets, with the reason why they cannot be overridden.
    """
    need_config(line)
    for key, why in fixed.items():
        if key in line.overrides:
            line.problems.append(f"{COMMAND_LINE}: --{key} has no meaning for `vlprompt {line.command}`: {why}")
    sources, problems = [], []
    for files in [[name] for name in line.configs] or [[]]:
        problems += check_run(line, files)[1]
        sources.append(source_of(line, files))
    if problems:
        refuse(problems, line.command)
    return sources


def _print_configs(configs: Sequence[RunConfig]) -> int:
    show("---\n".join(to_yaml(config) for config in configs), end="")
    return 0


def print_run(run: Any) -> None:
    """Print the folder of a finished run, and the epoch that was chosen, if any."""
    show(f"run folder: {run.folder}")
    if run.selected:
        show(f"            kept is epoch {run.selected.get('epoch')} (recipe.select best_val)")


def _names(line: CommandLine, option: str) -> list[str] | None:
    """Return the data sets of ``--datasets`` or ``--targets`` with groups resolved; None without the option."""
    from vlprompt.protocols.groups import dataset_names

    if option not in line.options:
        return None
    try:
        return dataset_names([name.strip() for name in line.options[option].split(",")], option)
    except ConfigError as error:
        line.problems.append(f"{COMMAND_LINE}: --{error}")
        return []


def metrics_of(line: CommandLine) -> list[str]:
    """Return the names of ``--metrics``; empty without the option."""
    return [name.strip() for name in line.options["metrics"].split(",")] if "metrics" in line.options else []


def metrics_on(line: CommandLine, config: RunConfig) -> list[str]:
    """Return the names of ``--metrics``; raise ConfigError if they do not fit the data set."""
    if not (metrics := metrics_of(line)):
        return []
    from vlprompt.datasets import find_card
    from vlprompt.engine.metrics import check_metrics

    check_metrics(metrics, {config.data.name: find_card(config.data.name).multilabel})
    return metrics


def numbers(line: CommandLine, option: str) -> list[int] | None:
    """Return the numbers of ``--seeds`` or ``--shots``; None without the option."""
    if option not in line.options:
        return None
    text = line.options[option]
    parts = [part.strip() for part in text.split(",")]
    if option == "seeds":
        accepted = f"accepted: different whole numbers from 0 to {2**32 - 1} with commas, such as 1,2,3"
        good = all(re.fullmatch(r"[0-9]{1,10}", part) and int(part) < 2**32 for part in parts)
    else:
        accepted = "accepted: different numbers of images per class with commas, such as 1,2,4,8,16; -1 for all of them"
        good = all(part == "-1" or re.fullmatch(r"[1-9][0-9]{0,6}", part) for part in parts)
    if not good:
        line.problems.append(f"{COMMAND_LINE}: --{option} is {text!r}; {accepted}")
        return []
    numbers = [int(part) for part in parts]
    if len(set(numbers)) < len(numbers):
        line.problems.append(
            f"{COMMAND_LINE}: --{option} is {text!r}, which names a {option.rstrip('s')} twice; {accepted}"
        )
    return numbers


# -- choosing and comparing -----------------------------------------------------------------------------------------
def search_command(words: list[str]) -> int:
    """Run ``vlprompt search`` and return its exit status."""
    words, grids = _taken(words, "grid")
    line = read_command_line(words, "search", flags=("print-config", "force", "oracle"), options=("on", "metrics"))
    grid = _grid(line, grids)
    need_config(line)
    for key in grid:
        if key in line.overrides:
            line.problems.append(f"{COMMAND_LINE}: --{key} is given, and --grid tries values of {key}; leave one away")
    config, problems = check_run(line)
    if config is None or problems:
        refuse(problems, "search")
    metrics = metrics_on(line, config)
    from vlprompt.protocols.search import candidates_of, search

    if "print-config" in line.flags:
        return _print_configs([candidate for _, candidate in candidates_of(config, grid)])
    on, oracle, force = line.options.get("on", "val"), "oracle" in line.flags, "force" in line.flags
    result = search(config, grid, on, oracle, force=force, report=print)
    say(f"{result.table(metrics)}\nbest:       {result.folder / 'best.yaml'}\nrun folder: {result.run.folder}")
    return 0


def _taken(words: Sequence[str], option: str) -> tuple[list[str], list[str | None]]:
    """Return ``words`` without the occurrences of ``--option VALUE``, and the values."""
    remaining, values, rest = [], list[str | None](), list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith(f"--{option}="):
            values.append(word.partition("=")[2])
        elif word == f"--{option}":
            values.append(rest.pop(0) if rest and not rest[0].startswith("--") else None)
        else:
            remaining.append(word)
    return remaining, values


def _grid(line: CommandLine, texts: Sequence[str | None]) -> dict[str, list[Any]]:
    """Return the values of each ``--grid KEY=VALUE,VALUE``, parsed as YAML lists."""
    grid: dict[str, list[Any]] = {}
    if not texts:
        line.problems.append(f"{COMMAND_LINE}: no --grid KEY=VALUE,VALUE, such as --grid recipe.lr=0.002,0.02")
    for text in texts:
        key, equals, values = (text or "").partition("=")
        if not equals or not key or not values:
            line.problems.append(f"{COMMAND_LINE}: --grid is {shown(text or '')}; accepted: KEY=VALUE,VALUE")
            continue
        if key in grid:
            line.problems.append(f"{COMMAND_LINE}: --grid {key} is given twice; write all values in one")
            continue
        try:
            loader, node = yaml_node(f"[{values}]")
            grid[key] = list(yaml_value(loader, node)) if node is not None else []
        except VlpromptError as error:
            why = str(error).removeprefix("line 1: ")
            line.problems.append(f"{COMMAND_LINE}: --grid {key} has {shown(values)} ({why}); put texts in quotes")
    return grid


def compare_command(words: list[str]) -> int:
    """Run ``vlprompt compare`` and return its exit status: 1 if the data protocol differs."""
    line = read_command_line(words, "compare", operands=True)
    need_no_config(line)
    if len(line.operands) != 2:
        line.problems.append(f"{COMMAND_LINE}: compare takes two runs, got {len(line.operands)}: vlprompt compare A B")
    if line.problems:
        refuse(line.problems, "compare")
    from vlprompt.protocols.compare import compare

    comparison = compare(*line.operands)
    show(comparison.text())
    return 0 if comparison.same_data else 1
