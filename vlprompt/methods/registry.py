"""The registry: a decorator on a class is the whole enrolment of a method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from vlprompt.backbone import Backbone
from vlprompt.config.settings import check_types
from vlprompt.errors import ConfigError, did_you_mean
from vlprompt.methods.base import PromptMethod
from vlprompt.registry import Registry

_METHODS: Registry[PromptMethod] = Registry("method")
M = TypeVar("M", bound=type[PromptMethod])


def register(name: str) -> Callable[[M], M]:
    """Enrol a :class:`PromptMethod` under ``name``: in ``list_methods``, the command line and the shared test suite.

    Raises:
        ValueError: Another class holds the name.
    """
    return _METHODS.enrol(name)


def list_methods(pattern: str = "*") -> list[str]:
    """Return the names of all methods that match a wildcard ``pattern``, sorted: ``list_methods("*coop*")``."""
    return _METHODS.names(pattern)


def get_method_class(name: str) -> type[PromptMethod]:
    """Return the class registered as ``name``.

    Raises:
        ConfigError: No such method; the text names the nearest ones.
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
    **settings: Any,
) -> PromptMethod:
    """Return the method ``name`` around ``backbone`` for ``class_names``; ``settings`` are fields of its ``Settings``.

    ``objectives`` names further loss terms and regularisers with their settings: ``{"knowledge": {"weight": 8.0}}``.
    ``decomposition`` names a low-rank update of the class tokens in the same way: ``{"dept": {"rank": 10}}``.

    Raises:
        ConfigError: Unknown method or setting, or a value that is not accepted.
        ClassNameError: Class names that cannot be turned into prompts.
    """
    method = get_method_class(name)
    known = [entry.name for entry in dataclasses.fields(method.Settings)]
    wrong = [f"{key!r}.{did_you_mean(key, known)}" for key in settings if key not in known]
    if wrong:
        raise ConfigError(f"method {name!r} has no setting " + "; nor ".join(wrong))
    check_types(method.Settings, settings)
    made = method(backbone, class_names, method.Settings(**settings), all_class_names, objectives, decomposition)
    return made if backbone.device.type == "meta" else made.to(backbone.device)
