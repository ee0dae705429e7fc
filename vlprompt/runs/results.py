"""The shape of a results file, which is checked before its content is shown or compared."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from vlprompt.engine.metrics import METRICS, measured
from vlprompt.errors import ConfigError

_OBJECTS = ("config", "backbone", "data", "results", "zeroshot", "train")
_OPTIONAL = ("selection", "versions", "zeroshot_classifier", "per_class", "images")
_HALVES = ("all", "base", "new")


def is_score(value: Any) -> bool:
    """Return whether ``value`` is the score of a set of images: finite numbers by metric, with the headline metric."""
    if not isinstance(value, Mapping) or not isinstance(value.get("metric", "accuracy"), str):
        return False
    numbers = [value.get(name, 0) for name in (*METRICS, "correct", "total")]
    if not all(isinstance(number, int | float) and isfinite(number) for number in numbers):
        return False
    try:
        measured(value, None)
    except ConfigError:
        return False
    return value.get("metric") is not None or {"correct", "total"} <= value.keys()


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(number, int) for number in value)


def misfits(results: Mapping[str, Any]) -> list[str]:
    """Return what in the content of a results file is missing or of a wrong type, in words."""
    wrong = [name for name in _OBJECTS if not isinstance(results.get(name), dict)]
    wrong += [name for name in _OPTIONAL if not isinstance(results.get(name) or {}, dict)]
    wrong += ["method"] if not isinstance(results.get("method"), str) else []
    if wrong:
        return [f"{name} is missing or of a wrong type" for name in wrong]
    data = results["data"]
    wrong += [f"data.{name}" for name in ("name", "seed") if isinstance(data.get(name, []), list | dict)]
    if not isinstance(data.get("shots"), int) or not _is_range(data.get("shots_per_class", [0, 0])):
        wrong.append("data.shots is not a number of images")
    wrong += [] if isinstance(results["train"].get("selected", {}), dict) else ["train.selected"]
    wrong += [f"{part} has no score" for part in ("results", "zeroshot") if not results[part].keys() & {*_HALVES}]
    for part in ("results", "zeroshot"):
        scores = {half: results[part][half] for half in _HALVES if results[part].get(half) is not None}
        wrong += [f"{part}.{half} is not a score" for half, score in scores.items() if not is_score(score)]
    return wrong
