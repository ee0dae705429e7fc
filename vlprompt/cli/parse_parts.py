"""The sections ``objectives`` and ``decomposition`` of a configuration: names with settings, typed by each name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, get_type_hints

from vlprompt.config.values import from_text
from vlprompt.config.yaml import Given, shown
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


@dataclass(frozen=True)
class _Section:
    """One of the two sections: its key, what an entry is called, and the ``Settings`` of every accepted name."""

    key: str
    word: str
    kinds: Mapping[str, type]


def judge_objectives(judge: Judge) -> dict[str, dict[str, Any]]:
    """Return the objectives that are asked for with their settings; what is wrong goes to the judge.

    A file has ``objectives: {knowledge: {weight: 4}}``; the command line has ``--objectives.knowledge.weight 4`` or,
    for the defaults, ``--objectives.knowledge {}``.
    """
    if not any(key.startswith("objectives.") for key in judge.given):
        return {}
    from vlprompt.objectives import get_objective_class, list_objectives

    kinds = {name: get_objective_class(name).Settings for name in list_objectives()}
    return _judge(judge, _Section("objectives", "objective", kinds))


def judge_decomposition(judge: Judge) -> dict[str, dict[str, Any]]:
    """Return the decomposition that is asked for, at most one, with its settings; written as objectives are."""
    if not any(key.startswith("decomposition.") for key in judge.given):
        return {}
    from vlprompt.prompts.decomposed import get_decomposition_class, list_decompositions

    kinds = {name: get_decomposition_class(name).Settings for name in list_decompositions()}
    found = _judge(judge, _Section("decomposition", "decomposition", kinds))
    if len(found) > 1:
        where = judge.sources([key for key in judge.given if key.startswith("decomposition.")])
        judge.problems.append(f"{where}: decomposition names {' and '.join(found)}; accepted: one of them, or none")
    return found


def _judge(judge: Judge, section: _Section) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    # A list, of what was given: a file's table in braces must not take the place of the command line's single settings.
    for key, given in [(key, one) for key, one in judge.given.items() if key.startswith(f"{section.key}.")]:
        _, name, inner = [*key.split(".", 2), ""][:3]
        if name not in section.kinds:
            near = did_you_mean(name, section.kinds)
            judge.fail(key, f"{given.source}: there is no {section.word} {shown(name)}.{near}")
            continue
        own = found.setdefault(name, {})
        for entry, value in ({inner: given} if inner else _table(judge, key, given)).items():
            _setting(judge, section, name, entry, value, own)
    for name, own in found.items():
        try:
            section.kinds[name](**own)
        except ConfigError as error:
            where = judge.sources([key for key in judge.given if key.startswith(f"{section.key}.{name}")])
            judge.problems.append(f"{where}: {error}")
    return found


def _setting(judge: Judge, section: _Section, name: str, entry: str, given: Given, own: dict[str, Any]) -> None:
    hints = get_type_hints(section.kinds[name])
    key = f"{section.key}.{name}.{entry}"
    if entry not in hints:
        near = did_you_mean(entry, hints)
        judge.fail(key, f"{given.source}: {section.word} {name} has no setting {shown(entry)}.{near}")
        return
    judge.given[key] = given
    judge.values.pop(key, None)
    judge.type_value(key, hints[entry])
    if key in judge.values:
        value = judge.values.pop(key)
        own[entry] = list(value) if isinstance(value, tuple) else value


def _table(judge: Judge, key: str, given: Given) -> dict[str, Given]:
    """Return the settings that stand in braces behind a name."""
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
