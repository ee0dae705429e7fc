"""The protocol guard: on which images hyperparameters may be chosen, and the stamp that a choice leaves.

A choice made on validation images is fair. One made on test images is an oracle's: it is refused, or, where it is asked
for by name, stamped in the results and in every table. Whatever searches (:mod:`vlprompt.protocols.search`, or a
method with a search of its own) asks :func:`judge` first and keeps what :func:`record` gives.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from vlprompt.errors import ConfigError, did_you_mean
from vlprompt.methods import PromptMethod

Split = Literal["val", "test"]
SPLITS: tuple[str, ...] = get_args(Split)
SELECTION = "selection.json"
_ORACLE = "an oracle, which says what could be reached and not what a user would get"


@dataclass(frozen=True)
class Verdict:
    """What :func:`judge` allows.

    Attributes:
        on: The images that candidates are scored on.
        oracle: Whether the choice sees test images.
        reason: Why it is one, in words; empty for a fair choice.
    """

    on: Split
    oracle: bool
    reason: str = ""


def judge(data: str, on: str, val_ids: Collection[str], test_ids: Collection[str], *, oracle: bool = False) -> Verdict:
    """Return whether hyperparameters may be chosen on the images ``on`` of a data set.

    Args:
        data: The data set's name, for the texts.
        on: ``val`` or ``test``.
        val_ids: Ids of the validation images.
        test_ids: Ids of the test images.
        oracle: Whether the user asked for a choice that sees test images.

    Raises:
        ConfigError: Another word than ``val`` or ``test``, no validation images, or test images without ``oracle``.
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
    """Return the stamp that goes into a results file as ``selection``.

    Args:
        verdict: What was allowed.
        grid: The values that were tried, by key.
        scores: Every candidate with its score.
        chosen: The values of the winner.
    """
    return {
        "on": verdict.on,
        "oracle": verdict.oracle,
        "reason": verdict.reason,
        "grid": {key: list(values) for key, values in grid.items()},
        "scores": [dict(one) for one in scores],
        "chosen": dict(chosen),
    }


def selection_of(output: str | Path) -> dict[str, Any] | None:
    """Return the stamp of the search in whose folder ``output`` runs are kept; None outside of a search's folder.

    Every run there has values that the search chose or tried, whatever its seed, classes or data set.

    Raises:
        ConfigError: The file cannot be read as a stamp.
    """
    path = Path(output) / SELECTION
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); search anew with --force") from error
    if not isinstance(found, dict) or not isinstance(found.get("oracle"), bool):
        raise ConfigError(f"{path} does not say how hyperparameters were chosen; search anew with --force")
    return found


def own_selection(method: PromptMethod) -> dict[str, Any] | None:
    """Return the stamp of a method that chose its hyperparameters on test images, as its settings asked; else None."""
    if method.needs.select_on != "test":
        return None
    return record(Verdict("test", oracle=True, reason=f"{method.name} chose on the test images"), {}, [], {})


def stamped(name: str, oracle: bool, test_images: str | None = None) -> str:
    """Return how tables call a row: its name, marked where an oracle chose, and by how it uses test images."""
    marked = [word for word in (test_images, "oracle" if oracle else None) if word]
    return f"{name} ({', '.join(marked)})" if marked else name


def is_oracle(results: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether an oracle chose the hyperparameters of any of these ``results.json`` contents."""
    return any((one.get("selection") or {}).get("oracle", False) for one in results)
