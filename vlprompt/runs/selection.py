"""Checks and records of hyperparameter selection.

Selection on validation images is fair. Selection on test images is an oracle: it is refused unless requested
explicitly, and then marked in the results and in every table. Every search (:mod:`vlprompt.protocols.search`, or a
search inside a method) calls :func:`judge` first and saves the result of :func:`record`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from vlprompt._files import parse_json, read_text
from vlprompt.errors import ConfigError, did_you_mean
from vlprompt.methods import PromptMethod

Split = Literal["val", "test"]
SPLITS: tuple[str, ...] = get_args(Split)
SELECTION = "selection.json"
_ORACLE = "an oracle, which says what could be reached and not what a user would get"


@dataclass(frozen=True)
class Verdict:
    """Result of :func:`judge`.

    Attributes:
        on: The split that candidates are scored on.
        oracle: Whether the selection uses test images.
        reason: Why it is an oracle; empty for a fair selection.
    """

    on: Split
    oracle: bool
    reason: str = ""


def judge(data: str, on: str, val_ids: Collection[str], test_ids: Collection[str], *, oracle: bool = False) -> Verdict:
    """Check whether hyperparameters may be chosen on the split ``on`` of a data set.

    Args:
        data: The data set's name, for messages.
        on: ``val`` or ``test``.
        val_ids: Ids of the validation images.
        test_ids: Ids of the test images.
        oracle: Whether the user allows a selection that uses test images.

    Raises:
        ConfigError: ``on`` is neither ``val`` nor ``test``, there are no validation images, or test images would be
            used without ``oracle``.
    """
    if on not in SPLITS:
        raise ConfigError(f"--on is {on!r}; accepted: val or test.{did_you_mean(str(on), SPLITS)}")
    if on == "test":
        reason = "candidates are scored on the test images"
    elif not val_ids:
        raise ConfigError(
            f"{data} has no validation images to choose on. Cut some off the training list of its split file "
            "(key 'val'), choose on another data set, or say --on test --oracle for an oracle"
        )
    elif common := len(set(val_ids) & set(test_ids)):
        reason = f"{common} of {data}'s {len(val_ids)} validation images are test images, too"
    else:
        return Verdict("val", oracle=False)
    if not oracle:
        raise ConfigError(
            f"hyperparameters are chosen on validation images only; here {reason}. That would be {_ORACLE}. "
            "Add --oracle to do so all the same: results and tables will be marked (oracle)"
        )
    return Verdict("test" if on == "test" else "val", oracle=True, reason=reason)


def record(
    verdict: Verdict, grid: Mapping[str, Sequence[Any]], scores: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the record of a selection, the ``selection`` of a results file.

    Args:
        verdict: The result of :func:`judge`.
        grid: The candidate values by key.
        scores: Every candidate with its score.
        chosen: The values of the best candidate.
    """
    return {
        "on": verdict.on,
        "oracle": verdict.oracle,
        "reason": verdict.reason,
        "grid": {key: list(values) for key, values in grid.items()},
        "scores": [dict(score) for score in scores],
        "chosen": dict(chosen),
    }


_LARGEST = 2**28


def selection_of(output: str | Path) -> dict[str, Any] | None:
    """Return the record of the search that keeps its runs in ``output``, or None if there is no such search.

    All runs in that folder have values that the search chose or tried, for any seed, classes or data set.

    Raises:
        ConfigError: The file is not a valid record.
    """
    path = Path(output) / SELECTION
    if not os.path.lexists(path):
        return None
    try:
        selection = parse_json(read_text(path, _LARGEST))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); search again with --force") from error
    if not isinstance(selection, dict) or not isinstance(selection.get("oracle"), bool):
        raise ConfigError(f"{path} does not say how hyperparameters were chosen; search again with --force")
    return selection


def own_selection(method: PromptMethod) -> dict[str, Any] | None:
    """Return the record of a method with settings that choose its hyperparameters on test images, else None."""
    if method.needs.select_on != "test":
        return None
    return record(Verdict("test", oracle=True, reason=f"{method.name} chose on the test images"), {}, [], {})


def stamped(name: str, oracle: bool, test_images: str | None = None) -> str:
    """Return the name of a table row, with marks for an oracle selection and for the use of test images."""
    marks = [mark for mark in (test_images, "oracle" if oracle else None) if mark]
    return f"{name} ({', '.join(marks)})" if marks else name


def is_oracle(results: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether any of these ``results.json`` contents has hyperparameters chosen by an oracle."""
    return any((result.get("selection") or {}).get("oracle", False) for result in results)
