"""The ``objectives`` section of a configuration: loss terms and regularisers with their settings, typed by each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, get_type_hints

from vlprompt.config_files import Given, shown
from vlprompt.config_values import from_text
from vlprompt.errors import ConfigError, did_you_mean


class Judge(Protocol):
    """What types values and takes problems: the judge of the whole configuration."""

    given: dict[str, Given]
    values: dict[str, Any]
    problems: list[str]

    def type_value(self, key: str, hint: Any) -> None:
        """Type the value given under ``key`` into ``values``."""

    def fail(self, key: str, text: str) -> None:
        """Note a problem of ``key``."""

    def sources(self, keys: Iterable[str]) -> str:
        """Return where ``keys`` were given."""


def judge_objectives(judge: Judge) -> dict[str, dict[str, Any]]:
    """Return the objectives that are asked for with their settings; what is wrong goes to the judge.

    A file has ``objectives: {knowledge: {weight: 4}}``; the command line has ``--objectives.knowledge.weight 4`` or,
    for the defaults, ``--objectives.knowledge {}``.
    """
    found: dict[str, dict[str, Any]] = {}
    keys = [key for key in judge.given if key.startswith("objectives.")]
    if not keys:
        return found
    from vlprompt.objectives import get_objective_class, list_objectives

    for key in keys:
        given = judge.given[key]
        _, name, inner = [*key.split(".", 2), ""][:3]
        if name not in list_objectives():
            near = did_you_mean(name, list_objectives())
            judge.fail(key, f"{given.source}: there is no objective {shown(name)}.{near}")
            continue
        own = found.setdefault(name, {})
        for entry, value in ({inner: given} if inner else _table(judge, key, given)).items():
            _setting(judge, name, entry, value, own)
    for name, own in found.items():
        try:
            get_objective_class(name).Settings(**own)
        except ConfigError as error:
            where = judge.sources([key for key in judge.given if key.startswith(f"objectives.{name}")])
            judge.problems.append(f"{where}: {error}")
    return found


def _setting(judge: Judge, name: str, entry: str, given: Given, own: dict[str, Any]) -> None:
    from vlprompt.objectives import get_objective_class

    hints = get_type_hints(get_objective_class(name).Settings)
    key = f"objectives.{name}.{entry}"
    if entry not in hints:
        near = did_you_mean(entry, hints)
        judge.fail(key, f"{given.source}: objective {name} has no setting {shown(entry)}.{near}")
        return
    judge.given[key] = given
    judge.values.pop(key, None)
    judge.type_value(key, hints[entry])
    if key in judge.values:
        value = judge.values.pop(key)
        own[entry] = list(value) if isinstance(value, tuple) else value


def _table(judge: Judge, key: str, given: Given) -> dict[str, Given]:
    """Return the settings that stand in braces behind an objective's name."""
    value = given.value
    if not given.typed and value is not None:
        try:
            value = from_text(dict[str, Any], value)
        except ValueError:
            value = given.value
    if not isinstance(value, Mapping):
        judge.fail(
            key, f"{given.source}: {key} is {shown(value)}; accepted: its settings in braces, {{}} for the defaults"
        )
        return {}
    return {str(entry): Given(one, given.source, True) for entry, one in value.items()}
