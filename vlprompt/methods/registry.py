"""The registry: a decorator on a class is the whole enrolment of a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from vlprompt.backbone import Backbone
from vlprompt.methods.base import TEMPLATE, PromptMethod
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
    data_template: str = TEMPLATE,
    **settings: Any,
) -> PromptMethod:
    """Return the method ``name`` around ``backbone`` for ``class_names``.

    Args:
        name: A registered name; :func:`list_methods` has them.
        backbone: The frozen CLIP.
        class_names: The C classes to tell apart, in label order.
        all_class_names: Every class of the data set, those of ``class_names`` first. Default: ``class_names``.
        objectives: Further loss terms and regularisers with their settings: ``{"knowledge": {"weight": 8.0}}``.
        decomposition: A low-rank update of the class tokens, in the same way: ``{"dept": {"rank": 10}}``.
        data_template: The data set's own prompt with ``{}`` for the class name (``task.template``). Templates that
            the settings leave open become it.
        **settings: Fields of the method's ``Settings``.

    Raises:
        ConfigError: Unknown method or setting, or a value that is not accepted.
        ClassNameError: Class names that cannot be turned into prompts.
    """
    kind = get_method_class(name)
    made = kind(
        backbone,
        class_names,
        _METHODS.settings(name, settings),
        all_class_names,
        objectives,
        decomposition,
        data_template,
    )
    return made if backbone.device.type == "meta" else made.to(backbone.device)
