"""Comparison of two runs by the data, choices, backbone and versions in their results files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlprompt.config.yaml import shown
from vlprompt.errors import ConfigError
from vlprompt.runs.folder import RESULTS, read_json
from vlprompt.runs.results import misfits
from vlprompt.runs.selection import is_oracle

# Keys in results.json and their names. They define the data protocol: results that differ here are not comparable.
_PROTOCOL: Mapping[str, str] = {
    "data.name": "data set",
    "data.place_sha256": "folder of the images",
    "data.card_sha256": "the data set's card",
    "data.reader": "reader",
    "data.split": "split",
    "data.split_sha256": "content of the split file",
    "data.class_names_sha256": "class names or their order",
    "data.classes": "classes",
    "data.template": "template",
    "data.metric": "metric",
    "data.shots": "shots",
    "data.seed": "seed",
    "data.sampler": "few-shot sampler",
    "data.shots_sha256": "training images",
    "data.val_sha256": "validation images",
    "data.test": "number of test images",
    "data.source": "domains to train on",
    "data.target": "domains to test on",
    "data.transform.train": "training transform",
    "data.transform.test": "test transform",
    "data.order": "order of the test images",
    "data.images_sha256": "content of the images",
    "data.bank": "recipe of the generated images",
    "data.pixels": "reading of orientation tags and transparency",
}
_OTHER: Mapping[str, str] = {
    "method": "method",
    "config.settings": "settings of the method",
    "config.decomposition": "decomposition",
    "config.recipe": "recipe",
    "zeroshot_classifier.name": "zero-shot classifier",
    "zeroshot_classifier.sha256": "texts of the zero-shot classifier",
    "selection.on": "images that hyperparameters were chosen on",
    "backbone.name": "backbone",
    "backbone.pretrained": "weights",
    "backbone.precision": "precision of the backbone",
    "backbone.fingerprint": "content of the weights",
}
_OPTIONAL = (
    *("data.place_sha256", "data.images_sha256", "data.bank", "data.source", "data.target", "data.order"),
    "data.pixels",
    *("selection.", "config.decomposition", "zeroshot_classifier."),
)


@dataclass(frozen=True)
class Comparison:
    """Result of :func:`compare`.

    Attributes:
        data: Differences of the data protocol, as text.
        other: Other differences: method, recipe, backbone, versions.
    """

    data: Sequence[str]
    other: Sequence[str]

    @property
    def same_data(self) -> bool:
        """Whether both runs follow the same data protocol."""
        return not self.data

    def text(self) -> str:
        """Return all differences as printable lines."""
        lines = ["the data protocol is the same" if self.same_data else "the data protocol differs:"]
        lines += [f"  - {difference}" for difference in self.data]
        lines += ["also different:", *(f"  - {difference}" for difference in self.other)] if self.other else []
        return "\n".join(lines)


def compare(first: str | Path, second: str | Path) -> Comparison:
    """Return the differences between two runs, given as run folders or ``results.json`` files.

    Raises:
        ConfigError: One of them is not a finished run.
    """
    return compare_results(read_results(first), read_results(second))


def read_results(place: str | Path) -> dict[str, Any]:
    """Return the content of the results file ``place``, or of the one in the run folder ``place``.

    Raises:
        ConfigError: There is no results file, or it is damaged.
    """
    path = Path(place)
    if path.is_dir():
        path = path / RESULTS
    results = read_json(path)
    if results is None:
        raise ConfigError(f"{shown(str(place))} holds no {RESULTS}; give the folder of a finished run, or that file")
    if problems := misfits(results):
        raise ConfigError(f"{shown(str(place))} is no results file of a run: {'; '.join(problems[:4])}")
    return results


def compare_results(first: Mapping[str, Any], second: Mapping[str, Any]) -> Comparison:
    """Return the differences between the contents of two results files."""
    data = [line for key, words in _PROTOCOL.items() if (line := _difference(key, words, first, second))]
    oracles = [is_oracle([results]) for results in (first, second)]
    if oracles[0] != oracles[1]:
        data.append(f"hyperparameters: chosen by an oracle in the {'first' if oracles[0] else 'second'} run alone")
    other = [line for key, words in _OTHER.items() if (line := _difference(key, words, first, second))]
    versions = [results.get("versions") or {} for results in (first, second)]
    for package in sorted(versions[0].keys() | versions[1].keys()):
        ours, theirs = (results.get(package) for results in versions)
        if ours != theirs:
            other.append(f"version of {package}: {_words(ours)} against {_words(theirs)}")
    return Comparison(data, other)


def _difference(key: str, words: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> str | None:
    ours, theirs = _fact(key, first), _fact(key, second)
    if key.startswith(_OPTIONAL):  # older runs omit keys that newer runs record as empty
        ours, theirs = ours or None, theirs or None
    if ours == theirs:
        # Two runs that both lack a key that every run records are not known to be equal.
        missing = ours is None and not key.startswith(_OPTIONAL) and _parent_lacks(key, first)
        return f"{words}: neither run records it; run them again with --force" if missing else None
    if isinstance(ours, dict) and isinstance(theirs, dict):
        names = [name for name in dict.fromkeys([*ours, *theirs]) if ours.get(name) != theirs.get(name)]
        parts = [f"{name} {_words(ours.get(name))} against {_words(theirs.get(name))}" for name in names]
        return f"{words}: " + ", ".join(parts)
    return f"{words}: {_words(ours)} against {_words(theirs)}"


def _fact(key: str, results: Mapping[str, Any]) -> Any:
    value: Any = results
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _parent_lacks(key: str, results: Mapping[str, Any]) -> bool:
    """Return whether ``key`` is absent; a recorded null counts as present."""
    parent, _, name = key.rpartition(".")
    where = _fact(parent, results) if parent else results
    return not isinstance(where, Mapping) or name not in where


def _words(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = value if isinstance(value, str) else repr(value)
    if len(text) == 64 and all(letter in "0123456789abcdef" for letter in text):
        return text[:12] + "..."
    return repr(value) if len(text) < 250 else shown(value)
