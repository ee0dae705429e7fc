"""Files and command line into a configuration: order-free, typed, every problem reported at once.

Two kinds have one: training runs (:class:`RunConfig`, meant where nothing is said) and meta-training.

Values come from ``--config`` files (later files win over earlier ones) and from ``--a.b value`` overrides, which win
over files wherever they stand. Types are the hints of the dataclasses (jsonargparse checks them); a value is never
guessed, cut or replaced: whatever is not accepted is listed with the place it came from.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, NoReturn, TypeVar, get_origin, get_type_hints

from vlprompt.cli.parse_parts import judge_decomposition, judge_objectives
from vlprompt.config.keys import keys_of, sections_of, settings_keys
from vlprompt.config.run import RunConfig
from vlprompt.config.values import accepted_values, convert, from_text, literals
from vlprompt.config.yaml import Given, find_config, read_config, shown, yaml_text
from vlprompt.errors import ConfigError, bulleted, did_you_mean, nearest

COMMAND_LINE = "command line"
C = TypeVar("C")












def key_table(settings: type | None = None, root: type = RunConfig) -> str:
    """Return the accepted keys with defaults and types, one per line: those of ``root``, or of a ``Settings``."""
    default: Any = root()
    rows = []
    for key, hint in (keys_of(root) if settings is None else settings_keys(settings)).items():
        if settings is None:
            value: Any = functools.reduce(getattr, key.split("."), default)
        else:
            value = _default(next(entry for entry in dataclasses.fields(settings) if f"settings.{entry.name}" == key))
        text = "required" if value is MISSING else yaml_text(value, flow=True)
        text = text if len(text) <= 24 else text[:21] + "..."
        rows.append(f"  --{key:<30} {text:<24} {accepted_values(hint)}")
    return "\n".join(rows)


def _default(entry: dataclasses.Field[Any]) -> Any:
    return entry.default_factory() if entry.default_factory is not MISSING else entry.default


def _near(key: str, accepted: Iterable[str], dashes: str = "") -> str:
    """Return `` Did you mean ...?`` for ``key``, also where only its section is missing or wrong, or nothing."""
    tails: dict[str, list[str]] = {}
    for name in accepted:
        tails.setdefault(name.rpartition(".")[2], []).append(name)
    last = key.rpartition(".")[2].replace("-", "_")
    found = tails.get(last) or nearest(key, [name for names in tails.values() for name in names])
    found = found or [name for tail in nearest(last, tails) for name in tails[tail]]
    return " Did you mean " + " or ".join(repr(dashes + name) for name in found[:3]) + "?" if found else ""


# -- the command line -------------------------------------------------------------------------------------------------
@dataclass
class CommandLine:
    """What stands on a command line, not yet judged against the keys; ``problems`` are those of its form.

    Attributes:
        command: The command, for the texts of errors.
        configs: The ``--config`` files, in order.
        overrides: ``--a.b`` keys with their text; None where the value is missing.
        flags: The options without a value that are set.
        options: The command's own options with their text.
        operands: What stands free, where the command takes such.
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
        """Note that ``--key`` is not one of the command's ``accepted`` keys or own options."""
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
    """Sort ``argv`` into configuration files, overrides, the command's own ``flags`` and ``options``, and operands.

    A value is the next word unless that begins with ``--`` (``--key=--value`` gives such a value). Nothing is raised:
    what is malformed stands in ``problems``.
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
        line.problems.append(f"{COMMAND_LINE}: {shown(word)} stands alone; a value follows its key: --a.b VALUE")


def _take_value(line: CommandLine, key: str, value: str | None, into: dict[str, Any]) -> None:
    if key in into and into[key] != value:
        line.problems.append(f"{COMMAND_LINE}: --{key} is given twice, {shown(into[key])} and {shown(value)}")
    into[key] = value


# -- judging ----------------------------------------------------------------------------------------------------------
def parse_run(argv: Sequence[str]) -> RunConfig:
    """Return the configuration that ``argv`` (``--config FILE`` and ``--a.b value``, in any order) describes.

    ``settings`` of the result holds every setting of the method, defaults included; only the one that a data set's own
    template fills (``PromptMethod.template_setting``) is there only if it was given.

    Raises:
        ConfigError: One text with every problem: its place, key, value, what is accepted, and the nearest spelling.
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
    """Return the configuration of ``line`` (None if it cannot be made) and everything that is wrong with it.

    Args:
        line: The command line.
        root: Its dataclass, with ``method``, :data:`NAMED` and ``problems()`` as :class:`RunConfig` has.
        configs: Files to use instead of ``line.configs``.
        within: Beginnings of the keys that the command lets one override; the files may hold any key.
    """
    problems: list[str] = []
    given: dict[str, Given] = {}
    for name in line.configs if configs is None else configs:
        try:
            given.update(read_config(find_config(name), sections_of(root), problems))
        except ConfigError as error:
            problems.append(str(error))
    for key, text in line.overrides.items():
        if key.startswith(tuple(within)):
            given[key] = Given(text, COMMAND_LINE, False)
        else:
            line.refuse(key, [name for name in keys_of(root) if name.startswith(tuple(within))])
    config: C | None = _Judge(given, problems, line.names, root).run()
    return config, [*line.problems, *problems]


class _Judge:
    """Types the given values and asks every part what it does not accept."""

    def __init__(self, given: Mapping[str, Given], problems: list[str], names: Iterable[str], root: type[Any]) -> None:
        self.given, self.problems, self.names = dict(given), problems, tuple(names)
        self.root, self.keys = root, keys_of(root)
        self.values: dict[str, Any] = {}
        self.failed: set[str] = set()
        self.left_open: str | None = None

    def run(self) -> Any:
        """Return the configuration, or None; ``problems`` grows by what is wrong."""
        before = len(self.problems)
        self.type_value("method", self.keys["method"])
        settings = self._settings_class()
        objectives, decomposition = judge_objectives(self), judge_decomposition(self)
        known = {**self.keys, **(settings_keys(settings) if settings else {})}
        for key in self.given:
            if key in known:
                self.type_value(key, known[key])
            elif (key.startswith("settings.") and settings is None) or key.startswith(
                ("objectives.", "decomposition.")
            ):
                continue  # the method is what is wrong; the others are judged by themselves
            else:
                self._unknown(key, known)
        if "data.name" in self.keys:
            self._data_name()
        config = self._build(self.root, "")
        for text in config.problems():
            keys = self._keys_in(text)
            if not self.failed & set(keys):
                self.problems.append(f"{self.sources(keys)}: {text}")
        if settings is not None:
            config.settings = self._settings(settings)
        config.objectives, config.decomposition = objectives, decomposition
        return config if len(self.problems) == before else None

    def type_value(self, key: str, hint: Any) -> None:
        given = self.given.get(key)
        if given is None or key in self.values or key in self.failed:
            return
        accepted = accepted_values(hint)
        dashes = "" if given.typed else "--"
        if not given.typed and given.value is None:
            self.fail(key, f"{given.source}: --{key} has no value; accepted: {accepted}")
            return
        try:
            value = convert(hint, given.value) if given.typed else from_text(hint, given.value)
        except ValueError as error:
            why = f" ({error})" if str(error) else ""
            near = nearest(str(given.value)[:100], [str(name) for name in literals(hint)], 1)
            meant = f". Did you mean {near[0]!r}?" if near else ""
            self.fail(key, f"{given.source}: {dashes}{key} is {shown(given.value)}{why}; accepted: {accepted}{meant}")
            return
        if value == "" and key in self.keys:
            self.fail(key, f"{given.source}: {dashes}{key} is an empty text; accepted: {accepted}")
            return
        self.values[key] = value

    def fail(self, key: str, text: str) -> None:
        self.failed.add(key)
        self.problems.append(text)

    def _unknown(self, key: str, known: Iterable[str]) -> None:
        given = self.given[key]
        dashes = "" if given.typed else "--"
        inner = [name for name in known if name.startswith(key + ".")]
        if key in sections_of(self.root):
            text = f"{dashes}{key} is a section; its keys are " + ", ".join(dashes + name for name in inner)
        else:
            own = () if given.typed else (*self.names, "config")
            text = f"there is no key {shown(dashes + key)}.{_near(key, [*own, *known], dashes)}"
        self.problems.append(f"{given.source}: {text}")

    def _settings_class(self) -> type | None:
        """Return the method's ``Settings``, or None when the method is unknown (which is a problem already noted)."""
        if "method" in self.failed:
            return None
        from vlprompt.methods.registry import get_method_class  # torch: imported when a configuration is judged

        try:
            method = get_method_class(self.values.get("method", self.root.method))
        except ConfigError as error:
            self.fail("method", f"{self.sources(['method'])}: method: {error}")
            return None
        self.left_open = method.template_setting
        return method.Settings

    def _data_name(self) -> None:
        if "data.name" in self.failed:
            return
        from vlprompt.datasets import find_card, list_datasets

        name = self.values.get("data.name", RunConfig().data.name)
        try:
            self.values["data.name"] = find_card(name).name  # an alias becomes the data set's own name
        except ConfigError:
            near = did_you_mean(name, list_datasets())
            text = f"data.name is {shown(name)}, which is no data set.{near} See `vlprompt list datasets`."
            self.fail("data.name", f"{self.sources(['data.name'])}: {text}")

    def _build(self, part: type, prefix: str) -> Any:
        """Return ``part`` with the typed values; what failed keeps its default, only so that the rest can be judged."""
        filled: dict[str, Any] = {}
        for name, hint in get_type_hints(part).items():
            if dataclasses.is_dataclass(hint) and isinstance(hint, type):
                filled[name] = self._build(hint, f"{prefix}{name}.")
            elif prefix + name in self.values:
                filled[name] = self.values[prefix + name]
        return part(**filled)

    def _settings(self, settings: type) -> dict[str, Any]:
        """Return the settings, defaults filled in, after the dataclass has checked what contradicts."""
        complete: dict[str, Any] = {}
        hints = settings_keys(settings)
        for entry in (entry for entry in dataclasses.fields(settings) if entry.init):
            key = f"settings.{entry.name}"
            value = self.values.get(key, _default(entry))
            if entry.name == self.left_open and key not in self.values:
                continue  # the data set's own template fills it
            if value is MISSING:
                if key not in self.failed:
                    accepted = accepted_values(hints[key])
                    self.fail(key, f"defaults: {key} has no default; give it: --{key} VALUE; accepted: {accepted}")
                continue
            as_list = isinstance(value, tuple) and get_origin(hints[key]) is not tuple
            complete[entry.name] = list(value) if as_list else value
        if any(key.startswith("settings.") for key in self.failed):
            return complete
        try:
            settings(**complete)
        except ConfigError as error:
            self.problems.append(f"{self.sources(self._keys_in(str(error), hints))}: {error}")
        return complete

    def _keys_in(self, text: str, known: Iterable[str] | None = None) -> list[str]:
        """Return the keys that ``text`` speaks of, in its order."""
        known = set(self.keys if known is None else known)
        return [word for word in dict.fromkeys(re.findall(r"[a-z_]+(?:\.[a-z_]+)?", text)) if word in known]

    def sources(self, keys: Iterable[str]) -> str:
        places = dict.fromkeys(self.given[key].source for key in keys if key in self.given)
        return " and ".join(places) or "defaults"


