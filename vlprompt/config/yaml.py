"""Configuration files: lookup by path or name, strict YAML reading, and the source line of every value.

YAML is read by PyYAML's safe loader with the plain scalars of YAML 1.2. Repeated keys, aliases and tags are refused,
and nothing is executed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vlprompt._files import read_bytes
from vlprompt.config.texts import located
from vlprompt.errors import ConfigError, nearest

BASE = "base.yaml"
"""The file that makes a folder a recipe book (:mod:`vlprompt.config.book`)."""
MAX_CONFIG_BYTES = 1_000_000
_EXPECTED = "a configuration is a mapping such as 'method: mocoop'"


# -- reading YAML -------------------------------------------------------------------------------------------------
class _Loader(yaml.SafeLoader):
    """Safe loader for plain scalars of YAML 1.2: ``1e-3`` is a number; ``010``, ``1:30``, ``no``, dates are texts."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse aliases (nested aliases grow without bound) and explicit tags."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark, tag = event.start_mark, getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not accepted", problem_mark=mark)
        if tag is not None:
            raise yaml.MarkedYAMLError(problem=f"tags ({tag}) are not accepted", problem_mark=mark)
        return super().compose_node(parent, index)


_FLOAT = re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$")
for _tag, _pattern, _first in (
    ("float", _FLOAT, list("-+.0123456789")),
    ("int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")),
    ("bool", re.compile(r"^(?:true|false|True|False|TRUE|FALSE)$"), list("tTfF")),
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)


class _Dumper(yaml.SafeDumper):
    """Dumper with short lists on one line; texts that YAML 1.1 or this loader would not read as texts are quoted."""


def _represent_list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=len(str(value)) <= 100)


_Dumper.add_representer(list, _represent_list)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


@dataclass(frozen=True)
class Given:
    """A value and its source; ``typed`` is False for command-line text (None: the value is missing)."""

    value: Any
    source: str
    typed: bool


def yaml_node(text: str) -> tuple[_Loader, yaml.Node | None]:
    """Return the loader and the single document of ``text``; raises ConfigError with the line number."""
    try:
        loader = _Loader(text)
        return loader, loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{where}not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError("not usable YAML: nested too deeply") from None


def yaml_value(loader: _Loader, node: yaml.Node) -> Any:
    """Return the value of ``node``; raises ConfigError for repeated keys, list keys, and numbers that are too long."""
    try:
        _refuse_repeats(node)
        return loader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"line {node.start_mark.line + 1}: not usable: {problem}") from None
    except RecursionError:
        raise ConfigError(f"line {node.start_mark.line + 1}: nested too deeply") from None


def _refuse_repeats(node: yaml.Node) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
            _refuse_repeats(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeats(item)


def read_config(
    path: Path, sections: Collection[str], problems: list[str], open_sections: Collection[str] = ()
) -> dict[str, Given]:
    """Return the dotted keys of a configuration file with their values.

    Args:
        path: The file.
        sections: Keys that are sections.
        problems: Problems inside the file are added to this list.
        open_sections: Members of ``sections`` in which every non-empty mapping is a section.

    Raises:
        ConfigError: The file as a whole cannot be used: unreadable, too large, not UTF-8, not YAML, not a mapping.
    """
    loader, root = read_mapping(path)
    leaves = Leaves(loader, shown_path(path), sections, problems, open_sections)
    leaves.collect(root)
    return leaves.given


def read_mapping(path: Path) -> tuple[_Loader, yaml.MappingNode]:
    """Return the loader and the mapping that the file at ``path`` holds.

    Raises:
        ConfigError: The file as a whole cannot be used: unreadable, too large, not UTF-8, not YAML, not a mapping.
    """
    name = shown_path(path)
    try:
        raw = read_bytes(path, MAX_CONFIG_BYTES)
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(f"{name}, line {line}: not UTF-8 text (byte {raw[error.start]:#04x})") from None
    try:
        loader, root = yaml_node(text)
    except ConfigError as error:
        raise ConfigError(f"{name}, {error}") from None
    if root is None:
        raise ConfigError(f"{name} holds no keys; {_EXPECTED}")
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{name}, line {root.start_mark.line + 1}: found a list or a text; {_EXPECTED}")
    return loader, root


@dataclass
class Leaves:
    """The values of one file by dotted key, each with its line; problems are added to ``problems``.

    Paths of texts (:mod:`vlprompt.config.texts`) that exist relative to the file become relative to the current folder.
    Mappings in ``sections`` and non-empty mappings inside ``open_sections`` are sections; any other mapping is a value.
    Keys in ``tables`` are left to the caller.
    """

    loader: _Loader
    name: str
    sections: Collection[str]
    problems: list[str]
    open_sections: Collection[str] = ()
    tables: Collection[str] = ()
    given: dict[str, Given] = field(default_factory=dict)

    def collect(self, node: yaml.MappingNode, prefix: str = "") -> list[tuple[str, yaml.Node, str]]:
        """Add the keys of ``node`` to ``given``; return the tables: name, content and line."""
        seen: dict[str, int] = {}
        tables = []
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            source = f"{self.name}, line {line}"
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(f"{source}: a key is a list or a mapping; keys are names")
                continue
            key = prefix + key_node.value
            if "." in key_node.value:
                first, _, rest = key.partition(".")
                fix = f"in a file write '{first}: {{{rest}: ...}}'"
                self.problems.append(f"{source}: {shown(key)}: dotted keys are for the command line; {fix}")
            elif key in seen:
                self.problems.append(f"{source}: {shown(key)} is given twice (first in line {seen[key]})")
            elif key in self.tables:
                tables.append((key, value_node, source))
            elif isinstance(value_node, yaml.MappingNode) and self._holds_keys(key, value_node):
                self.collect(value_node, key + ".")
            elif key in self.sections:
                self.problems.append(f"{source}: {key!r} is a section: keys stand indented under it, or it is left out")
            else:
                self._leaf(key, value_node, source)
            seen.setdefault(key, line)
        return tables

    def _holds_keys(self, key: str, node: yaml.MappingNode) -> bool:
        return key in self.sections or (key.partition(".")[0] in self.open_sections and bool(node.value))

    def _leaf(self, key: str, node: yaml.Node, source: str) -> None:
        try:
            value = located(yaml_value(self.loader, node), Path(self.name).parent)
            self.given[key] = Given(value, source, True)
        except ConfigError as error:
            self.problems.append(f"{self.name}, {error} (key {shown(key)})")


def yaml_text(value: Any, *, flow: bool = False) -> str:
    """Return plain values, lists, tuples and mappings as YAML that this module can read; ``flow``: on one line."""
    text: str = yaml.dump(
        plain(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6, default_flow_style=flow
    )
    return text.removesuffix("...\n").rstrip("\n") if flow else text


def plain(value: Any) -> Any:
    """Return a copy of nested mappings and lists with tuples replaced by lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


# -- finding configuration files ------------------------------------------------------------------------------------
def config_root() -> Path | None:
    """Return the folder of the configurations that come with vlprompt, in the wheel or the clone, or None."""
    package = Path(__file__).resolve().parent.parent
    for root in (package / "assets" / "configs", package.parent / "configs"):
        if root.is_dir():
            return root
    return None


def find_config(name: str, books: Collection[str] = ()) -> Path:
    """Return the file that ``--config NAME`` refers to: a path, or a file of vlprompt such as ``gram/coop``.

    Args:
        name: The path or name.
        books: Other accepted names, for the error message.

    Raises:
        ConfigError: There is no such file; the text names the nearest ones.
    """
    root = config_root()
    plain = name.removeprefix("./").removeprefix("configs/")
    candidates = [Path(name), Path(name + ".yaml")]
    if root is not None and ".." not in Path(plain).parts and not Path(plain).is_absolute():
        candidates += [root / plain, root / (plain + ".yaml")]
    for path in candidates:
        if os.path.isfile(path):  # unlike Path.is_file, False for a name that is too long
            return path
    paths = sorted(root.glob("*/*.yaml")) if root is not None else []
    file_names = [f"{path.parent.name}/{path.stem}" for path in paths if not (path.parent / BASE).is_file()]
    if os.path.isdir(name):
        raise ConfigError(f"--config {shown(name)}: this is a folder without {BASE}; name one file in it")
    near = nearest(plain.removesuffix(".yaml").removesuffix(".yml"), [*books, *file_names])
    if not near:  # a path elsewhere: compare its last two parts
        near = nearest("/".join(Path(plain).with_suffix("").parts[-2:]), [*books, *file_names])
    hint = " Did you mean " + " or ".join(near) + "?" if near else ""
    where = f" or in {shown_path(root)}" if root else ""
    raise ConfigError(f"--config {shown(name)}: there is no such file or book here{where}.{hint}")


# -- words ----------------------------------------------------------------------------------------------------------
def shown(value: Any) -> str:
    """Return ``repr(value)``, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:70]}...{text[-20:]}"


def shown_path(path: Path) -> str:
    """Return ``path`` relative to the current folder if it is inside, else unchanged."""
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix()
    except (ValueError, OSError):
        return str(path)
