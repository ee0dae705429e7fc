"""Parsing of files and command line into a configuration: order-free, typed, all problems reported at once.

Training runs (:class:`RunConfig`, the default) and meta-training have configurations.

:func:`given_values` collects values and their sources: ``--config`` files (later files override earlier ones) and
``--a.b value`` overrides, which override files in any position. :class:`_ConfigBuilder` builds a configuration from
them. Nothing is guessed, truncated or replaced: every value that is not accepted is listed with its source.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, NoReturn, TypeVar

from vlprompt.config.book import Book, Known, find_book, list_books
from vlprompt.config.hints import field_hints, options
from vlprompt.config.keys import NAMED, as_plain, keys_in, keys_of, merged, nest, sections_of, settings_keys, sources
from vlprompt.config.run import RecipeConfig, RunConfig
from vlprompt.config.source import ConfigSource, NamedBook
from vlprompt.config.types import (
    Problem,
    accepted_values,
    convert,
    field_default,
    from_text,
    over_defaults,
    refusal,
    validate,
)
from vlprompt.config.yaml import Given, find_config, read_config, shown, shown_path, yaml_text
from vlprompt.errors import ConfigError, bulleted, did_you_mean, nearest

COMMAND_LINE = "command line"
C = TypeVar("C")


def key_table(settings: type | None = None, root: type = RunConfig) -> str:
    """Return the accepted keys of ``root`` or of a ``Settings`` with defaults and types, one per line."""
    rows = []
    for key, hint in (keys_of(root) if settings is None else settings_keys(settings)).items():
        first, *rest = key.split(".") if settings is None else key.split(".")[1:]
        value = functools.reduce(getattr, rest, field_default(root if settings is None else settings, first))
        text = "required" if value is MISSING else yaml_text(value, flow=True)
        text = text if len(text) <= 24 else text[:21] + "..."
        rows.append(f"  --{key:<30} {text:<24} {accepted_values(hint)}")
    return "\n".join(rows)


def _near(key: str, accepted: Iterable[str], dashes: str = "") -> str:
    """Return `` Did you mean ...?`` for ``key``, also if only its section is missing or wrong, else an empty text."""
    tails: dict[str, list[str]] = {}
    for name in accepted:
        tails.setdefault(name.rpartition(".")[2], []).append(name)
    last = key.rpartition(".")[2].replace("-", "_")
    near = tails.get(last) or nearest(key, [name for names in tails.values() for name in names])
    near = near or [name for tail in nearest(last, tails) for name in tails[tail]]
    return " Did you mean " + " or ".join(repr(dashes + name) for name in near[:3]) + "?" if near else ""


# -- the command line -------------------------------------------------------------------------------------------------
@dataclass
class CommandLine:
    """A parsed command line, not yet checked against the keys; ``problems`` concern only its form.

    Attributes:
        command: The command, for error messages.
        configs: The ``--config`` files, in order.
        overrides: ``--a.b`` keys with their text; None for a missing value.
        flags: Options without a value that are set.
        options: Options of the command with their text.
        operands: Positional arguments, if the command accepts them.
    """

    command: str
    names: tuple[str, ...]
    configs: list[str] = field(default_factory=list)
    overrides: dict[str, str | None] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)
    options: dict[str, str] = field(default_factory=dict)
    operands: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def refuse(self, key: str, accepted: Iterable[str]) -> None:
        """Add the problem that ``--key`` is neither an ``accepted`` key nor an option of the command."""
        names = [*self.names, *accepted]
        near = _near(key, names, "--") or " Accepted: " + (", ".join("--" + name for name in names) or "none") + "."
        self.problems.append(f"{COMMAND_LINE}: '--{key}' is not an option of `vlprompt {self.command}`.{near}")


def read_command_line(
    argv: Sequence[str],
    command: str = "train",
    *,
    flags: Sequence[str] = (),
    options: Sequence[str] = (),
    operands: bool = False,
) -> CommandLine:
    """Split ``argv`` into configuration files, overrides, the command's ``flags`` and ``options``, and operands.

    A value is the next word unless it starts with ``--`` (``--key=--value`` gives such a value). Nothing is raised:
    malformed arguments are listed in ``problems``.
    """
    line = CommandLine(command, (*flags, *options))
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            _take_operand(line, word, operands)
            continue
        key, equals, text = word[2:].partition("=")
        value: str | None = text if equals else None
        if key in flags:
            if equals:
                line.problems.append(f"{COMMAND_LINE}: --{key} takes no value, but has {shown(text)}")
            line.flags.add(key)
            continue
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        if not key:
            line.problems.append(f"{COMMAND_LINE}: {shown(word)} is not an option; options are written --name value")
        elif key in ("config", *options) and not value:
            line.problems.append(f"{COMMAND_LINE}: --{key} has no value; write --{key} VALUE")
        elif key == "config":
            line.configs.append(str(value))
        else:
            _take_value(line, key, value, line.options if key in options else line.overrides)
    return line


def _take_operand(line: CommandLine, word: str, accepted: bool) -> None:
    if word.startswith("-") and len(word) > 1:
        line.problems.append(f"{COMMAND_LINE}: {shown(word)} is not an option; options are written --name value")
    elif accepted:
        line.operands.append(word)
    else:
        line.problems.append(f"{COMMAND_LINE}: {shown(word)} has no key; a value follows its key: --a.b VALUE")


def _take_value(line: CommandLine, key: str, value: str | None, into: dict[str, Any]) -> None:
    if key in into and into[key] != value:
        line.problems.append(f"{COMMAND_LINE}: --{key} is given twice, {shown(into[key])} and {shown(value)}")
    into[key] = value


# -- checking ---------------------------------------------------------------------------------------------------------
def parse_run(argv: Sequence[str]) -> RunConfig:
    """Return the configuration that ``argv`` (``--config FILE`` and ``--a.b value``, in any order) describes.

    ``settings`` of the result has all settings of the method, with defaults. Templates that the data set fills are
    empty unless they are given. ``recipe`` is that of the method, overridden by the given values.

    Raises:
        ConfigError: The text lists every problem: source, key, value, accepted values and the nearest spelling.
    """
    line = read_command_line(argv)
    config, problems = check_run(line)
    return config if config is not None and not problems else refuse(problems, line.command)


def refuse(problems: Sequence[str], command: str) -> NoReturn:
    """Raise ConfigError with all ``problems``."""
    lines = [text if len(text) <= 600 else f"{text[:400]} ... {text[-150:]}" for text in dict.fromkeys(problems)]
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    raise ConfigError(f"{count}:\n{bulleted(lines)}\nSee `vlprompt {command} --help`.")


def check_run(
    line: CommandLine, configs: Sequence[str] | None = None, within: Sequence[str] = ("",)
) -> tuple[RunConfig | None, list[str]]:
    """Return the run's configuration that ``line`` describes, and its problems; see :func:`check_config`."""
    return check_config(line, RunConfig, configs, within)


def check_config(
    line: CommandLine, root: type[C], configs: Sequence[str] | None = None, within: Sequence[str] = ("",)
) -> tuple[C | None, list[str]]:
    """Return the configuration of ``line`` (None if it cannot be built) and all its problems.

    Args:
        line: The command line.
        root: Dataclass of the configuration, with ``method`` and the sections :data:`NAMED` as in :class:`RunConfig`.
        configs: Files to use instead of ``line.configs``.
        within: Prefixes of the keys that the command line may override; files may contain any key.
    """
    given, problems = given_values(line, root, configs, within)
    config: C | None = _ConfigBuilder(given, problems, line.names, root).run()
    return config, [*line.problems, *problems]


def given_values(
    line: CommandLine, root: type[Any], configs: Sequence[str] | None = None, within: Sequence[str] = ("",)
) -> tuple[dict[str, Given], list[str]]:
    """Return the values of books, files and overrides by dotted key, in the order in which they apply, and problems.

    The arguments are those of :func:`check_config`.
    """
    source = _source(line, root, configs, within)
    return source.given(), source.problems()


def source_of(line: CommandLine, configs: Sequence[str] | None = None, within: Sequence[str] = ("",)) -> ConfigSource:
    """Return ``line`` as a source of runs, resolved per protocol, data set and shots; see :func:`check_config`."""
    return _source(line, RunConfig, configs, within)


def _source(line: CommandLine, root: type[Any], configs: Sequence[str] | None, within: Sequence[str]) -> ConfigSource:
    problems: list[str] = []
    layers: list[NamedBook | dict[str, Given]] = []
    for name in _parts(line.configs if configs is None else configs):
        try:
            layers.append(_layer(name, root, line, problems))
        except ConfigError as error:
            problems.append(str(error))
    books = [layer for layer in layers if isinstance(layer, NamedBook)]
    if len({layer.book.folder.resolve() for layer in books}) > 1:
        names = " and ".join(shown_path(layer.book.folder) for layer in books)
        problems.append(f"{COMMAND_LINE}: --config names the books {names}; accepted: one, and files of yours")
    overrides: dict[str, Given] = {}
    for key, text in line.overrides.items():
        if key.startswith(tuple(within)):
            overrides[key] = Given(text, COMMAND_LINE, False)
        else:
            line.refuse(key, [name for name in keys_of(root) if name.startswith(tuple(within))])

    def build(given: Mapping[str, Given], wrong: list[str]) -> RunConfig:
        config: RunConfig | None = _ConfigBuilder(given, wrong, line.names, root).run()
        wrong = [*line.problems, *wrong]
        return config if config is not None and not wrong else refuse(wrong, line.command)

    return ConfigSource([*layers, overrides], build, _dataset_name, problems)


def _parts(names: Sequence[str]) -> list[str]:
    """Return the names of all layers: ``A+B`` has two, unless a file has this name."""
    files = [name for name in names if os.path.isfile(name) or os.path.isfile(f"{name}.yaml")]
    return [part for name in names for part in ([name] if name in files else name.split("+"))]


def _layer(name: str, root: type[Any], line: CommandLine, problems: list[str]) -> NamedBook | dict[str, Given]:
    """Return the layer of ``--config NAME``: a book (training runs only), or the values of a file."""
    books: list[str] = []
    if root is RunConfig:
        from vlprompt.datasets import list_datasets

        datasets = list_datasets()
        if named := find_book(name, _dataset_name):
            folder, dataset = named
            book = Book(folder, Known(datasets, _protocols(line)))
            return NamedBook(book, None if dataset is None else Given(dataset, f"--config {name}", True))
        books = [text for method in list_books() for text in (method, *(f"{method}/{data}" for data in datasets))]
    return read_config(find_config(name, books), sections_of(root), problems, NAMED)


def _protocols(line: CommandLine) -> list[str]:
    """Return the names of the protocols in vlprompt and of a protocol file on ``line``."""
    from vlprompt.protocols.protocol_files import find_protocol, list_protocols

    try:
        return [*list_protocols(), find_protocol(line.options["protocol"]).name]
    except (KeyError, ConfigError):
        return list_protocols()


def _dataset_name(name: str) -> str | None:
    """Return the name of a data set for a spelling of it, or None."""
    from vlprompt.datasets import find_card

    try:
        return find_card(name).name
    except ConfigError:
        return None


class _ConfigBuilder:
    """Builder of a configuration from given values.

    Attributes:
        given: The values; values in braces are stored under their full keys.
        problems: Problems with their sources are added to this list.
        names: Options of the command, for near spellings.
        root: The configuration's dataclass.
        hints: Every known key with its type.
        tables: Keys of settings in braces: ``objectives.NAME``, and settings that are dataclasses.
        optional: Members of ``tables`` that may be null.
        renamed: Former keys with their current names.
        values: Values converted to the type of their key.
        failed: Keys with a reported problem.
    """

    def __init__(self, given: Mapping[str, Given], problems: list[str], names: Iterable[str], root: type[Any]) -> None:
        self.given, self.problems, self.names, self.root = dict(given), problems, tuple(names), root
        self.hints: dict[str, Any] = dict(keys_of(root))
        self.tables: set[str] = set()
        self.optional: set[str] = set()
        self.renamed: dict[str, str] = {}
        self.values: dict[str, Any] = {}
        self.failed: set[str] = set()

    def run(self) -> Any:
        """Return the configuration, or None; problems are added to ``problems``."""
        before = len(self.problems)
        method = self._method()
        if method is not None:
            self._move_parts(method.Settings)
        kinds: dict[str, type] = {} if method is None else {"settings": method.Settings}
        for section in ("objectives", "decomposition"):
            kinds |= self._named_kinds(section)
        for where, kind in kinds.items():
            self.hints |= keys_of(kind, f"{where}.")
        self.tables = {outer for key in [*self.hints, *(f"{where}." for where in kinds)] for outer in _outer(key)}
        self.tables -= set(sections_of(self.root))
        for key, given in list(self.given.items()):
            if method is not None or not key.startswith("settings."):  # otherwise only the method is reported
                self._take(key, given)
        if "data.name" in self.hints:
            self._data_name()
        tree = nest(self.values)
        if self.root is RunConfig and method is not None:
            tree["recipe"] = over_defaults(RecipeConfig, tree.get("recipe", {}), method.recipe)
        config: Any = self._validated(self.root, {name: tree[name] for name in tree if name not in NAMED}, "")
        named: dict[str, Any] = {section: {} for section in NAMED}
        if method is not None:
            settings = self._validated(method.Settings, tree.get("settings", {}), "settings")
            named["settings"] = {} if settings is None else as_plain(settings)
            self._searched(settings)
        for section in ("objectives", "decomposition"):
            for name, values in tree.get(section, {}).items():
                made = self._validated(kinds[f"{section}.{name}"], values, f"{section}.{name}")
                named[section][name] = {} if made is None else as_plain(made)
        if len(named["decomposition"]) > 1:
            where = sources([key for key in self.given if key.startswith("decomposition.")], self.given)
            names = " and ".join(named["decomposition"])
            self.problems.append(f"{where}: decomposition names {names}; accepted: one of them, or none")
        return dataclasses.replace(config, **named) if len(self.problems) == before else None

    def _method(self) -> Any:
        """Return the method's class, or None and a new problem if the method is unknown."""
        given = self.given.get("method")
        try:
            name = convert(self.hints["method"], given.value if given else field_default(self.root, "method"))
        except ValueError:
            return None  # reported together with all other values
        from vlprompt.methods.registry import get_method_class  # imports torch, so only when a configuration is checked

        try:
            return get_method_class(name)
        except ConfigError as error:
            self._fail("method", f"{sources(['method'], self.given)}: method: {error}")
            return None

    def _named_kinds(self, section: str) -> dict[str, type]:
        """Return the ``Settings`` of all objectives or decompositions by key, if the section is used."""
        if not any(key.startswith(f"{section}.") for key in self.given):
            return {}
        if section == "objectives":
            from vlprompt.objectives import get_objective_class, list_objectives

            return {f"{section}.{name}": get_objective_class(name).Settings for name in list_objectives()}
        from vlprompt.prompts.decomposed import get_decomposition_class, list_decompositions

        return {f"{section}.{name}": get_decomposition_class(name).Settings for name in list_decompositions()}

    def _move_parts(self, settings: type) -> None:
        """Rename ``objectives.NAME`` and ``decomposition.NAME`` to ``settings.NAME`` if the method declares them."""
        from vlprompt.objectives.base import objectives_in
        from vlprompt.prompts.decomposed import decompositions_in

        hints = field_hints(settings)
        self.optional = {f"settings.{name}" for name, hint in hints.items() if type(None) in options(hint)}
        self.renamed = {f"settings.{old}": f"settings.{new}" for old, new in getattr(settings, "renamed", {}).items()}
        declared = {"objectives": objectives_in(settings), "decomposition": decompositions_in(settings)}
        moved: dict[str, Given] = {}
        for key, given in self.given.items():
            section, name, *_ = [*key.split("."), ""]
            place = f"settings.{key.partition('.')[2]}" if name in declared.get(section, ()) else key
            other = moved.pop(place, None)
            if other is not None and other.source.partition(", line")[0] == given.source.partition(", line")[0]:
                text = f"{key} and {place} are both given, {shown(given.value)} and {shown(other.value)}"
                self._fail(place, f"{given.source}: {text}; accepted: one of them")
            moved[place] = given
        self.given = moved

    # -- one value ----------------------------------------------------------------------------------------------------
    def _take(self, key: str, given: Given) -> None:
        """Convert the value of ``key`` to its type and add it to ``values``."""
        leaf = next((outer for outer in _outer(key) if outer in self.hints), None)
        section, name = [*key.split("."), ""][:2]
        if key in self.failed:
            return
        if key in self.hints:
            self._read(key, given)
        elif key in self.tables:
            self._take_table(key, given)
        elif leaf is not None and given.typed:  # a mapping in a file where a value is expected
            self.given[leaf] = given
            self.values[leaf] = merged(self.values.get(leaf), nest({key.removeprefix(f"{leaf}."): given.value}))
        elif section in ("objectives", "decomposition") and name and f"{section}.{name}" not in self.tables:
            known = [table.partition(".")[2] for table in self.tables if table.startswith(f"{section}.")]
            near = did_you_mean(name, sorted(known))
            self._fail(key, f"{given.source}: there is no {section.removesuffix('s')} {shown(name)}.{near}")
        else:
            self._unknown(key, given)

    def _read(self, key: str, given: Given) -> None:
        hint = self.hints[key]
        if given.typed:
            self.values[key] = given.value
        elif given.value is None:
            self._fail(key, f"{given.source}: --{key} has no value; accepted: {accepted_values(hint)}")
        else:
            try:
                self.values[key] = from_text(hint, given.value)
            except ValueError as error:
                self._fail(key, f"{given.source}: {refusal(f'--{key}', given.value, hint, str(error))}")

    def _take_table(self, key: str, given: Given) -> None:
        """Add the settings in braces: ``--objectives.knowledge {weight: 4}``."""
        value = given.value
        if not given.typed and value is not None:
            try:
                value = from_text(dict[str, Any], value)
            except ValueError:
                value = given.value
        if key in self.optional and value in (None, "null", "~"):
            self.values[key] = None
            return
        if not isinstance(value, Mapping):
            accepted = "its settings in braces, {} for the defaults"
            accepted += ", null for none" if key in self.optional else ""
            dashes = "" if given.typed else "--"
            self._fail(key, f"{given.source}: {dashes}{key} is {shown(value)}; accepted: {accepted}")
            return
        if self.values.get(key) is None:
            self.values[key] = {}
        for name, inner in value.items():
            self.given[f"{key}.{name}"] = Given(inner, given.source, True)
            self._take(f"{key}.{name}", self.given[f"{key}.{name}"])

    def _data_name(self) -> None:
        name = self.values.get("data.name", field_default(self.root, "data").name)
        if "data.name" in self.failed or not isinstance(name, str):
            return
        from vlprompt.datasets import find_card, list_datasets

        try:
            self.values["data.name"] = find_card(name).name  # an alias becomes the name of the data set
        except ConfigError:
            text = f"data.name is {shown(name)}, which is no data set.{did_you_mean(name, list_datasets())}"
            self._fail("data.name", f"{sources(['data.name'], self.given)}: {text} See `vlprompt list datasets`.")

    # -- problems -----------------------------------------------------------------------------------------------------
    def _validated(self, kind: type[C], values: Mapping[str, Any], where: str) -> C | None:
        """Return an instance of ``kind`` built from ``values``; problems are added with their sources."""
        instance, problems = validate(kind, values, where)
        for problem in problems:
            keys = list(dict.fromkeys([problem.key, *keys_in(problem.text, self.hints)]))
            if not self.failed.intersection(keys):
                self.problems.append(f"{sources(keys, self.given)}: {_with_advice(problem)}")
        return instance

    def _searched(self, settings: Any) -> None:
        """Refuse settings of the command line that the method's own search replaces."""
        for name, reason in getattr(settings, "searched", dict)().items():
            key = f"settings.{name}"
            if key in self.given and self.given[key].source == COMMAND_LINE:
                what = f"{key} is {shown(getattr(settings, name))}, and {reason}"
                self._fail(key, f"{COMMAND_LINE}: {what}; accepted: one of the two (--settings.search false)")

    def _fail(self, key: str, text: str) -> None:
        self.failed.add(key)
        self.values.pop(key, None)
        self.problems.append(text)

    def _unknown(self, key: str, given: Given) -> None:
        dashes = "" if given.typed else "--"
        if key in sections_of(self.root):
            inner = ", ".join(dashes + name for name in self.hints if name.startswith(f"{key}."))
            text = f"{dashes}{key} is a section; its keys are {inner}"
        else:
            section = key.rpartition(".")[0] + "."
            known = [name for name in self.hints if name.startswith(section) and section.startswith(("obj", "dec"))]
            names = () if given.typed or known else (*self.names, "config")
            near = _near(key, [*names, *(known or self.hints)], dashes)
            if key in self.renamed:
                near = f" It is called {dashes + self.renamed[key]} now."
            text = f"there is no key {shown(dashes + key)}.{near or (known and did_you_mean(key, known))}"
        self._fail(key, f"{given.source}: {text}")


def _outer(key: str) -> Iterable[str]:
    """Yield the keys of the sections around ``key``, innermost first."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def _with_advice(problem: Problem) -> str:
    return f"{problem.text}; give it: --{problem.key} VALUE" if problem.missing else problem.text
