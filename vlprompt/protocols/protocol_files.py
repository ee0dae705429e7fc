"""Protocols as data: what is trained, what is tested and which averages are reported, read from YAML and checked.

vlprompt's own are in ``assets/protocols``; a user's file is given by its path. A file holds names and numbers only.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlprompt.config.values import accepted_values, convert, literals
from vlprompt.config.yaml import Given, read_config, shown
from vlprompt.datasets.card import ASSETS
from vlprompt.errors import ConfigError, bulleted, did_you_mean, nearest

Part = Literal["same", "halves", "datasets", "domains"]
CONFIG = "config"
"""In ``train.data``: the data set that the configuration names."""
REPORTS: Mapping[str, tuple[str, ...]] = {
    "same": ("mean_of_datasets",),
    "halves": ("h_of_averages", "average_of_h"),
    "datasets": ("mean_of_targets", "mean_with_source"),
    "domains": ("mean_of_targets",),
}
"""What each kind of test can report; the first is its headline, always reported, the others as asked."""


@dataclass(frozen=True)
class Protocol:
    """A protocol's description.

    Attributes:
        name: What it is called, in tables and file names.
        about: What it does, in a sentence or two.
        data: Data sets to train on: names, ``group:NAME``, or ``config`` alone for the configuration's own.
        classes: Classes to train on.
        shots: Numbers of training images per class; empty for the configuration's own.
        domains: Which domains are trained on at a time, where ``part`` is ``domains``.
        part: What is tested: the ``same`` classes, base and new ``halves``, other ``datasets``, or unseen ``domains``.
        targets: The other data sets, where ``part`` is ``datasets``.
        seeds: Seeds of the shots and of the training.
        report: The averages that are reported.
    """

    name: str
    about: str
    data: tuple[str, ...]
    classes: Literal["all", "base"]
    shots: tuple[int, ...]
    domains: Literal["all", "all-but-one", "one"]
    part: Part
    targets: tuple[str, ...]
    seeds: tuple[int, ...]
    report: tuple[str, ...]

    @property
    def domain_protocol(self) -> Literal["leave-one-out", "single-source"]:
        """What :func:`vlprompt.protocols.domains.domain_generalisation` calls its rounds."""
        return "leave-one-out" if self.domains == "all-but-one" else "single-source"


_FIELDS: Mapping[str, Any] = {
    "schema": int,
    "name": str,
    "about": str,
    "train.data": list[str],
    "train.classes": Literal["all", "base"],
    "train.shots": list[int],
    "train.domains": Literal["all", "all-but-one", "one"],
    "test.part": Part,
    "test.data": list[str],
    "seeds": list[int],
    "report": list[str],
}
_OPTIONAL: Mapping[str, Any] = {"train.shots": [], "train.domains": "all", "test.data": []}


def protocol_folder() -> Path:
    """Return the folder of vlprompt's own descriptions."""
    return ASSETS / "protocols"


def list_protocols(pattern: str = "*") -> list[str]:
    """Return the names of vlprompt's own protocols that match ``pattern`` (``*`` and ``?`` are wildcards), sorted."""
    return sorted(fnmatch.filter((path.stem for path in protocol_folder().glob("*.yaml")), pattern.lower()))


def find_protocol(name: str) -> Protocol:
    """Return the protocol ``name`` (``-``/``_`` and case make no difference), or the one in the file ``name``.

    Raises:
        ConfigError: No such protocol, with the nearest names; or a file with problems, all of them.
    """
    if name.lower().endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ConfigError(f"protocol {shown(name)}: there is no such file; vlprompt's own: {_own()}")
        return read_protocol(Path(name))
    plain = name.lower().replace("_", "-")
    if plain in list_protocols():
        return read_protocol(protocol_folder() / f"{plain}.yaml")
    near = nearest(name, list_protocols(), 1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"protocol is {shown(name)}; accepted: {_own()}, or a file of yours, my.yaml.{meant}")


def _own() -> str:
    return ", ".join(list_protocols())


def read_protocol(path: Path) -> Protocol:
    """Return the description in ``path``.

    Raises:
        ConfigError: It cannot be read, or fields are unknown, missing, of another type, or contradict each other; all
            problems are listed.
    """
    problems: list[str] = []
    given = read_config(path, ("train", "test"), problems)
    values: dict[str, Any] = {}
    for key, one in given.items():
        if key not in _FIELDS:
            problems.append(f"{one.source}: there is no field {shown(key)}.{did_you_mean(key, _FIELDS)}")
        else:
            _take(key, one, values, problems)
    for key in _FIELDS:
        if key not in given and key not in _OPTIONAL:
            problems.append(f"the field {key!r} is missing; accepted: {accepted_values(_FIELDS[key])}")
    if not problems:
        problems += _contradictions({**_OPTIONAL, **values})
    if problems:
        raise ConfigError(f"the protocol {path} cannot be used:\n{bulleted(problems)}")
    whole = {**_OPTIONAL, **values}
    return Protocol(
        name=whole["name"],
        about=whole["about"],
        data=tuple(whole["train.data"]),
        classes=whole["train.classes"],
        shots=tuple(whole["train.shots"]),
        domains=whole["train.domains"],
        part=whole["test.part"],
        targets=tuple(whole["test.data"]),
        seeds=tuple(whole["seeds"]),
        report=tuple(whole["report"]),
    )


def _take(key: str, given: Given, values: dict[str, Any], problems: list[str]) -> None:
    hint = _FIELDS[key]
    try:
        values[key] = convert(hint, given.value)
    except ValueError:
        near = nearest(str(given.value)[:100], [str(name) for name in literals(hint)], 1)
        meant = f". Did you mean {near[0]!r}?" if near else ""
        problems.append(f"{given.source}: {key} is {shown(given.value)}; accepted: {accepted_values(hint)}{meant}")


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with values that are each of the right type."""
    part, found = values["test.part"], []
    if values["schema"] != 1:
        found.append(f"schema is {values['schema']}; this version reads schema 1")
    if not values["name"].replace("-", "").replace("_", "").isalnum():
        found.append(f"name is {shown(values['name'])}; accepted: letters, digits, - and _ (files are named after it)")
    for key in ("train.data", "seeds"):
        if not values[key]:
            found.append(f"{key} is empty; name at least one")
    if CONFIG in values["train.data"] and len(values["train.data"]) > 1:
        found.append(f"train.data is {values['train.data']}; {CONFIG!r}, the configuration's own, stands alone")
    found += [
        f"{key} is {values[key]}; one stands twice"
        for key in ("train.data", "train.shots", "test.data", "seeds", "report")
        if len(set(values[key])) < len(values[key])
    ]
    if wrong := [count for count in values["train.shots"] if count < 1 and count != -1]:
        found.append(f"train.shots holds {wrong}; accepted: 1 or more images per class, or -1 for all of them")
    if wrong := [seed for seed in values["seeds"] if not 0 <= seed < 2**32]:
        found.append(f"seeds holds {wrong}; accepted: 0 to {2**32 - 1}")
    if part != "same" and len(values["train.shots"]) > 1:
        found.append(f"train.shots is {values['train.shots']}; several are for test.part: same")
    if part == "same" and not values["train.shots"]:
        found.append("train.shots is empty; test.part: same compares numbers of shots, such as [1, 2, 4, 8, 16]")
    classes = "base" if part == "halves" else "all"
    if values["train.classes"] != classes:
        found.append(f"train.classes is {values['train.classes']!r}; with test.part: {part} accepted: {classes!r}")
    if (part == "domains") == (values["train.domains"] == "all"):
        accepted = "'all-but-one' or 'one'" if part == "domains" else "'all'"
        found.append(f"train.domains is {values['train.domains']!r}; with test.part: {part} accepted: {accepted}")
    if (part == "datasets") != bool(values["test.data"]):
        text = "names the targets" if part == "datasets" else "has no meaning; leave it away"
        found.append(f"test.data is {values['test.data']}; with test.part: {part} it {text}")
    known = REPORTS[part]
    found += [f"report: {name!r}.{did_you_mean(name, known)}" for name in values["report"] if name not in known]
    if known[0] not in values["report"]:
        found.append(f"report is {values['report']}; with test.part: {part} it holds {known[0]!r}")
    return found
