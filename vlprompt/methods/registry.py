"""Registry of methods, filled by the class decorator :func:`register`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from vlprompt.backbone import Backbone
from vlprompt.config.hints import is_dataclass, is_texts
from vlprompt.config.texts import TEMPLATE, DataTexts
from vlprompt.config.types import Texts, field_hints, fill_templates, make
from vlprompt.errors import ConfigError
from vlprompt.methods.base import PromptMethod
from vlprompt.objectives.base import get_objective_class, objectives_in
from vlprompt.prompts.decomposed import decompositions_in
from vlprompt.registry import Registry

_METHODS: Registry[PromptMethod] = Registry("method", {"dept": "dept_lowrank", "apt": "apt_approximated"})
M = TypeVar("M", bound=type[PromptMethod])


def register(name: str) -> Callable[[M], M]:
    """Register a :class:`PromptMethod` under ``name``: in ``list_methods``, the command line and the shared test suite.

    Raises:
        ValueError: Another class has the name.
    """
    return _METHODS.enrol(name)


def list_methods(pattern: str = "*") -> list[str]:
    """Return the names of all methods that match a wildcard ``pattern``, sorted: ``list_methods("*coop*")``."""
    return _METHODS.names(pattern)


def get_method_class(name: str) -> type[PromptMethod]:
    """Return the class registered as ``name``.

    Raises:
        ConfigError: No such method; the message lists the nearest names.
    """
    return _METHODS.get(name)


def create_method(
    name: str,
    backbone: Backbone,
    class_names: Sequence[str],
    *,
    all_class_names: Sequence[str] | None = None,
    objectives: Mapping[str, Mapping[str, Any]] | None = None,
    decomposition: Mapping[str, Mapping[str, Any]] | None = None,
    data_template: str | DataTexts = TEMPLATE,
    **settings: Any,
) -> PromptMethod:
    """Return the method ``name`` around ``backbone`` for ``class_names``.

    Args:
        name: A registered name, see :func:`list_methods`.
        backbone: The frozen CLIP.
        class_names: Names of the C classes, in label order.
        all_class_names: Every class of the data set, those of ``class_names`` first. Default: ``class_names``.
        objectives: Further loss terms and regularisers with their settings: ``{"knowledge": {"weight": 8.0}}``. For an
            objective of the method's settings, this is equivalent to the field of the settings.
        decomposition: A low-rank update of the class tokens, in the same form: ``{"dept_lowrank": {"rank": 10}}``.
        data_template: The template of the data set, with ``{}`` for the class name, or all its templates
            (``task.texts``). They are used for templates that the settings do not define, and for references such as
            ``ensemble:clip`` (:mod:`vlprompt.config.texts`).
        **settings: Fields of the method's ``Settings``.

    Raises:
        ConfigError: Unknown method or setting, or a value that is not accepted.
        ClassNameError: Class names that cannot be turned into prompts.
    """
    method_class = get_method_class(name)
    settings, objectives, decomposition = merge_parts(method_class, settings, objectives or {}, decomposition or {})
    method = method_class(
        backbone,
        class_names,
        _METHODS.settings(name, settings),
        all_class_names,
        objectives,
        decomposition,
        data_template,
    )
    return method if backbone.device.type == "meta" else method.to(backbone.device)


def merge_parts(
    kind: type[PromptMethod],
    settings: Mapping[str, Any],
    objectives: Mapping[str, Any],
    decomposition: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return settings, objectives and decomposition, with those declared by the method moved to its settings.

    An objective of the method may be set as ``settings.NAME`` and as ``objectives.NAME``; both are merged by key.

    Raises:
        ConfigError: A key has different values in both places.
    """
    merged, conflicts = dict(settings), []
    rest: list[dict[str, Any]] = []
    for section, given, declared in (
        ("objectives", objectives, objectives_in(kind.Settings)),
        ("decomposition", decomposition, decompositions_in(kind.Settings)),
    ):
        if not isinstance(given, Mapping):  # refused when it is read
            rest.append(given)
            continue
        rest.append({name: values for name, values in given.items() if name not in declared})
        for name in (name for name in given if name in declared):
            values, known = given[name], merged.get(name) or {}
            if not isinstance(values, Mapping):
                raise ConfigError(f"{section}.{name} is {values!r}; accepted: its settings, {{}} for the defaults")
            known = known if isinstance(known, Mapping) else dataclasses.asdict(known)
            conflicts += [
                f"settings.{name}.{key} is {known[key]!r} and {section}.{name}.{key} {values[key]!r}; accepted: one"
                for key in values
                if key in known and known[key] != values[key]
            ]
            merged[name] = {**known, **values}
    if conflicts:
        raise ConfigError("\n".join(conflicts))
    return merged, rest[0], rest[1]


def check_start(name: str, init_from: str | None) -> None:
    """Raise ConfigError if method ``name`` has to start from a trained head and ``init_from`` names none."""
    start = get_method_class(name).starts_from
    if start is not None and init_from is None:
        raise ConfigError(
            f"init_from is null, and {name} starts from trained prompts: give --init_from RUN, a run of {start} "
            f"(vlprompt train --config {start}) or of {name}"
        )


def open_templates(
    name: str, settings: Mapping[str, Any], objectives: Mapping[str, Mapping[str, Any]], texts: DataTexts
) -> dict[str, Any]:
    """Return the templates that method ``name`` and ``objectives`` do not define, filled in with ``texts``.

    Returns:
        Templates by dotted key, such as ``settings.templates`` or ``objectives.knowledge.templates``.

    Raises:
        ConfigError: Unknown names, values that are not accepted, or references that cannot be resolved.
    """
    given = given_texts(name, settings, objectives)
    resolved = resolved_templates(name, settings, objectives, texts)
    return {key: entries for key, entries in resolved.items() if not given.get(key)}


def resolved_templates(
    name: str,
    settings: Mapping[str, Any],
    objectives: Mapping[str, Mapping[str, Any]],
    texts: DataTexts,
    class_names: Sequence[str] = (),
) -> dict[str, Any]:
    """Return all templates of method ``name`` and ``objectives``, with ensembles and files of ``texts`` in their place.

    Files of sentences must have the classes ``class_names``. Returns and raises are those of :func:`open_templates`.
    """
    sections = _sections(name, settings, objectives).items()
    return {
        key: entries
        for prefix, section in sections
        for key, entries in text_lists(prefix, fill_templates(section, texts, class_names))
    }


def given_texts(
    name: str, settings: Mapping[str, Any], objectives: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[Texts, ...]]:
    """Return the lists of templates of method ``name`` and ``objectives`` as given, by dotted key; empty if unset.

    Raises:
        ConfigError: Unknown names, or values that are not accepted.
    """
    sections = _sections(name, settings, objectives).items()
    return {key: entries for prefix, section in sections for key, entries in text_lists(prefix, section)}


def _sections(name: str, settings: Mapping[str, Any], objectives: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings of method ``name`` and of further ``objectives`` by the prefix of their keys."""
    kind = get_method_class(name)
    settings, objectives, _ = merge_parts(kind, settings, objectives, {})
    sections: dict[str, Any] = {"settings": make(kind.Settings, settings)}
    for objective, values in objectives.items():
        sections[f"objectives.{objective}"] = make(get_objective_class(objective).Settings, values)
    return sections


def text_lists(prefix: str, section: Any) -> Iterator[tuple[str, tuple[Texts, ...]]]:
    """Yield the lists of templates in settings by dotted key."""
    for name, hint in field_hints(type(section)).items():
        value = getattr(section, name)
        if is_texts(hint):
            yield f"{prefix}.{name}", value
        elif is_dataclass(type(value)):
            yield from text_lists(f"{prefix}.{name}", value)
