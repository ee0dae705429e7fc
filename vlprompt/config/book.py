"""Recipe books: one folder per method, with tables of values per protocol, backbone, data set and shots.

``configs/<method>/base.yaml`` holds the sections of a configuration and the tables of :data:`TABLES`. A table maps
names to further values and tables::

    method: maple
    recipe: {epochs: 5}
    datasets:
      imagenet: {recipe: {epochs: 2}}
      demo*: {backbone: {name: demo}}
    protocols:
      cross-dataset: {settings: {depth: 3}, shots: {1: {recipe: {epochs: 1}}}}

A key may list several names (``dtd, eurosat``) and contain wildcards; ``any`` in ``shots`` matches every number. A
data set may have a separate file next to ``base.yaml``; its content is the entry of that data set.
``configs/base.yaml`` holds the entries that all methods share.

An entry applies if all tables that contain it match the run. Entries are merged key by key, and more specific entries
override less specific ones: entries with shots override those without, then data sets, backbones and protocols; exact
names override wildcards; a method's book overrides the shared entries. ``recipe.epochs`` and ``recipe.steps``, and
their warm-ups, exclude each other: an entry that sets one of them overrides both.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from vlprompt.config.keys import NAMED, SECTIONS, rival_of
from vlprompt.config.yaml import BASE, Given, Leaves, config_root, read_mapping, shown, shown_path
from vlprompt.errors import ConfigError, did_you_mean

TABLES: Mapping[str, str] = {
    "shots": "shots", "datasets": "dataset", "backbones": "backbone", "protocols": "protocol"
}  # fmt: skip
"""The tables and the field of :class:`Selectors` that each table matches, most specific first."""
ANY = "any"
_FIXED: Mapping[str, Collection[str]] = {
    "method": ("shots", "dataset", "backbone", "protocol"),
    "data.name": ("shots", "dataset", "backbone"),
    "backbone.name": ("shots", "backbone"),
    "data.shots": ("shots",),
}
"""Keys that select entries, with the tables in which they cannot be set."""
_SHOTS = re.compile(r"-1|[1-9][0-9]*")


@dataclass(frozen=True)
class Selectors:
    """Values that select the entries of a book; None matches no entry of that table."""

    shots: int | None = None
    dataset: str | None = None
    backbone: str | None = None
    protocol: str | None = None


@dataclass(frozen=True)
class Known:
    """The names that tables may use."""

    datasets: Collection[str]
    protocols: Collection[str]


@dataclass(frozen=True)
class Entry:
    """Values for some runs; ``where`` holds the matching names and wildcards by field of Selectors."""

    where: Mapping[str, tuple[str, ...]]
    given: Mapping[str, Given]
    shared: bool = False

    def rank(self, selectors: Selectors) -> tuple[int, ...] | None:
        """Return how specific the entry is (larger is more specific), or None if it does not match."""
        levels = []
        for name in TABLES.values():
            level = _level(self.where[name], getattr(selectors, name)) if name in self.where else 0
            if level is None:
                return None
            levels.append(level)
        return (*(int(level > 0) for level in levels), *levels, int(not self.shared))


def _level(names: Sequence[str], value: str | int | None) -> int | None:
    """Return 2 if ``names`` contains ``value``, 1 if a wildcard matches, None otherwise."""
    if value is None:
        return None
    if str(value) in names:
        return 2
    return 1 if any(name == ANY or fnmatch.fnmatchcase(str(value), name) for name in names) else None


@dataclass
class Book:
    """The entries of one folder and those that all methods share; each file is read once.

    Attributes:
        folder: The folder of ``base.yaml``.
        known: The names that tables may use.
        entries: Entries read so far; the file of a data set is read when the data set is first resolved.
        problems: Problems in the files.
    """

    folder: Path
    known: Known
    entries: list[Entry] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    read: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Read ``base.yaml``, and the shared ``base.yaml`` if the book is part of vlprompt.

        Raises:
            ConfigError: A file as a whole cannot be used.
        """
        root = config_root()
        if root is not None and root.resolve() == self.folder.resolve().parent and (root / BASE).is_file():
            self._read(root / BASE, {}, shared=True)
        self._read(self.folder / BASE, {})

    def resolve(self, selectors: Selectors) -> dict[str, Given]:
        """Return the values for ``selectors`` by dotted key, each with its file and line."""
        self._read_dataset(selectors.dataset)
        ranked = [(rank, entry) for entry in self.entries if (rank := entry.rank(selectors)) is not None]
        given: dict[str, Given] = {}
        set_by: dict[str, tuple[int, ...]] = {}
        for rank, entry in sorted(ranked, key=lambda pair: pair[0]):
            for key, value in entry.given.items():
                if set_by.get(key) == rank and given[key].value != value.value:
                    self._problem(
                        f"{value.source}: {key} is {shown(value.value)}, and {shown(given[key].value)} in "
                        f"{given[key].source}, which is as specific; accepted: one of the two"
                    )
                given[key], set_by[key] = value, rank
                if (rival := rival_of(key, value.value)) in given and set_by[rival] != rank:
                    del given[rival], set_by[rival]
        return given

    def base(self) -> dict[str, Given]:
        """Return the values outside all tables."""
        return {key: value for entry in self.entries if not entry.where for key, value in entry.given.items()}

    def _problem(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)

    def _read_dataset(self, dataset: str | None) -> None:
        path = self.folder / f"{dataset}.yaml"
        if dataset is None or dataset in self.read or not path.is_file():
            return
        self.read.add(dataset)
        try:
            self._read(path, {"dataset": (dataset,)})
        except ConfigError as error:
            self._problem(str(error))

    def _read(self, path: Path, where: dict[str, tuple[str, ...]], shared: bool = False) -> None:
        loader, root = read_mapping(path)
        leaves = Leaves(loader, shown_path(path), SECTIONS, self.problems, NAMED, tuple(TABLES))
        self.entries += _Reader(self.known, leaves, shared).entries(root, where)


@dataclass
class _Reader:
    """Reader of one file of a book."""

    known: Known
    leaves: Leaves
    shared: bool

    def entries(self, node: yaml.MappingNode, where: dict[str, tuple[str, ...]]) -> Iterator[Entry]:
        """Yield the entry of ``node`` and the entries of its tables."""
        self.leaves.given = {}
        tables = self.leaves.collect(node)
        given = {key: value for key, value in self.leaves.given.items() if self._may_set(key, value, where)}
        yield Entry(where, given, self.shared)
        for table, content, source in tables:
            if TABLES[table] in where:
                self._problem(source, f"{table} is inside an entry that is already one of {table}")
            elif not isinstance(content, yaml.MappingNode):
                self._problem(source, f"{table} is a table; its keys are names, each with the values that differ")
            else:
                yield from self._table(table, content, where)

    def _table(self, table: str, content: yaml.MappingNode, where: dict[str, tuple[str, ...]]) -> Iterator[Entry]:
        seen: set[str] = set()
        for key, value in content.value:
            source = f"{self.leaves.name}, line {key.start_mark.line + 1}"
            text = str(key.value) if isinstance(key, yaml.ScalarNode) else ""
            if text in seen:
                self._problem(source, f"{table}: {shown(text)} is given twice")
            seen.add(text)
            names = tuple(name.strip() for name in text.split(","))
            problems = [problem for name in names if (problem := self._name_problem(table, name))]
            for problem in problems:
                self._problem(source, f"{table}: {problem}")
            if not isinstance(value, yaml.MappingNode):
                self._problem(source, f"{table}: {shown(text)} holds no sections; write {text}: {{recipe: {{...}}}}")
            elif not problems:
                yield from self.entries(value, {**where, TABLES[table]: names})

    def _name_problem(self, table: str, name: str) -> str:
        """Return the problem with a name in a table, or an empty text."""
        if table == "shots":
            fine = name == ANY or _SHOTS.fullmatch(name)
            accepted = "1 or more images per class, -1 for all of them, or any"
            return "" if fine else f"{shown(name)} is no number of shots; accepted: {accepted}"
        if table == "backbones":
            return "" if name else "a name is empty"
        known, word = {
            "datasets": (self.known.datasets, "data set"),
            "protocols": (self.known.protocols, "protocol"),
        }[table]
        if name in known or (set(name) & set("*?[") and fnmatch.filter(known, name)):
            return ""
        return f"there is no {word} {shown(name)}.{did_you_mean(name, known)}"

    def _may_set(self, key: str, value: Given, where: Mapping[str, object]) -> bool:
        inside = [table for table, name in TABLES.items() if name in where and name in _FIXED.get(key, ())]
        if inside:
            self._problem(value.source, f"{key} chooses entries of the book and cannot be set inside {inside[0]}")
        return not inside

    def _problem(self, source: str, text: str) -> None:
        self.leaves.problems.append(f"{source}: {text}")


# -- finding books ----------------------------------------------------------------------------------------------------
def find_book(name: str, canonical: Callable[[str], str | None]) -> tuple[Path, str | None] | None:
    """Return the book's folder and the data set that ``--config NAME`` refers to, or None if it is not a book.

    ``coop``, ``coop/dtd``, ``configs/coop/dtd.yaml`` and ``configs/coop/base.yaml`` all refer to the book ``coop``,
    whether or not the data set has a separate file. Any other folder with a ``base.yaml`` is also a book.
    """
    root = config_root()
    plain = name.removeprefix("./").rstrip("/")
    paths = [Path(plain)]
    if root is not None and not Path(plain).is_absolute() and ".." not in Path(plain).parts:
        paths.append(root / plain.removeprefix("configs/"))
    for path in paths:
        if _is_book(path):
            return path, None
        stem = path.name.removesuffix(".yaml").removesuffix(".yml")
        if _is_book(path.parent):
            if stem == "base":
                return path.parent, None
            if dataset := canonical(stem):
                return path.parent, dataset
        if os.path.isfile(path) or os.path.isfile(f"{path}.yaml"):
            return None
    return None


def _is_book(folder: Path) -> bool:
    """Return whether ``folder`` is a book; the parent folder of vlprompt's books is not."""
    root = config_root()
    return os.path.isfile(folder / BASE) and (root is None or folder.resolve() != root.resolve())


def list_books() -> list[str]:
    """Return the sorted names of the books in vlprompt."""
    root = config_root()
    return sorted(path.parent.name for path in root.glob(f"*/{BASE}")) if root is not None else []
