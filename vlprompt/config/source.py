"""Sources of run configurations: books, files and command line, resolved per protocol, data set and shots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import TypedDict, Unpack

from vlprompt.config.book import Book, Selectors
from vlprompt.config.keys import rival_of
from vlprompt.config.run import RunConfig
from vlprompt.config.yaml import Given

Build = Callable[[Mapping[str, Given], list[str]], RunConfig]
"""Builds a configuration from values by dotted key; raises ConfigError with the given and all new problems."""


@dataclass(frozen=True)
class NamedBook:
    """A book, and the data set in its name (``coop/dtd``), if any."""

    book: Book
    dataset: Given | None = None

    def resolve(self, selectors: Selectors) -> dict[str, Given]:
        """Return the book's values for ``selectors`` and the data set in its name."""
        given = self.book.resolve(selectors)
        return given if self.dataset is None else {**given, "data.name": self.dataset}


Layer = NamedBook | Mapping[str, Given]


class Selection(TypedDict, total=False):
    """Selection of the values of one run; None is the same as an omitted key.

    Attributes:
        protocol: The protocol of the run.
        dataset: The data set that the protocol names; if omitted, that of the configuration.
        shots: Images per class; overrides the configuration.
        default_shots: Images per class if book, files and command line do not set them.
    """

    protocol: str | None
    dataset: str | None
    shots: int | None
    default_shots: int | None


_CHOSEN = ("data.name", "data.shots")
"""Keys that a selection sets."""
_DECLARED = ("settings", "recipe")
"""Sections with defaults that the method defines."""


class ConfigSource:
    """Source of the configurations that share ``--config`` names and overrides.

    Args:
        layers: Books and plain values by dotted key; later layers override earlier ones.
        build: Builds a configuration from values.
        canonical: Returns the name of a data set for a spelling of it, or None.
        problems: Problems found before the values are checked.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        build: Build,
        canonical: Callable[[str], str | None],
        problems: Sequence[str] = (),
    ) -> None:
        self._layers, self._build, self._canonical = tuple(layers), build, canonical
        self._problems = list(problems)

    def resolve(self, **selection: Unpack[Selection]) -> RunConfig:
        """Return the configuration of one run.

        Raises:
            ConfigError: Values are not accepted; the text lists every problem.
        """
        given = self.given(**selection)
        return self._build(given, self.problems())

    def problems(self) -> list[str]:
        """Return the problems of names, files and the form of overrides, as far as they were read."""
        books = [layer.book for layer in self._layers if isinstance(layer, NamedBook)]
        return [*self._problems, *(text for book in books for text in book.problems)]

    def given(self, **selection: Unpack[Selection]) -> dict[str, Given]:
        """Return the values of one run by dotted key, each with its source."""
        protocol, default_shots = selection.get("protocol"), selection.get("default_shots")
        place = "command line" if protocol is None else f"protocol {protocol}"
        forced = {"data.name": selection.get("dataset"), "data.shots": selection.get("shots")}
        last = {key: Given(value, place, True) for key, value in forced.items() if value is not None}
        # First the data set, then the backbone, then the shots: each may depend on the previous values.
        selectors = Selectors(protocol=protocol)
        name = _text({**self._merged(selectors), **last}, "data.name", RunConfig().data.name)
        selectors = Selectors(protocol=protocol, dataset=self._canonical(name))
        backbone = _text(self._merged(selectors), "backbone.name", RunConfig().backbone.name)
        selectors = Selectors(protocol=protocol, dataset=selectors.dataset, backbone=backbone)
        fallback = {} if default_shots is None else {"data.shots": Given(default_shots, place, True)}
        count = _number({**fallback, **self._merged(selectors), **last}, "data.shots", RunConfig().data.shots)
        selectors = Selectors(count, selectors.dataset, backbone, protocol)
        return {**fallback, **self._merged(selectors), **last}

    def differences(self, **selection: Unpack[Selection]) -> dict[str, Any]:
        """Return the values of one run from outside the top level of its book, by dotted key.

        They come from the book's tables, later files and the command line; without a book, from the command line only.
        ``data.name`` and ``data.shots`` are omitted.
        """
        books = [layer.book.base() for layer in self._layers if isinstance(layer, NamedBook)]
        files = [layer for layer in self._layers if not isinstance(layer, NamedBook)]
        base = {id(value) for values in books or files for value in values.values() if value.typed}
        config, given = self.resolve(**selection), self.given(**selection)
        values = {key: _value_of(config, key, value.value) for key, value in given.items() if id(value) not in base}
        off = tuple(f"{key}." for key, value in values.items() if value is None)
        return {key: value for key, value in values.items() if key not in _CHOSEN and not key.startswith(off)}

    def _merged(self, selectors: Selectors) -> dict[str, Given]:
        merged: dict[str, Given] = {}
        for layer in self._layers:
            given = layer.resolve(selectors) if isinstance(layer, NamedBook) else layer
            for key, value in given.items():
                merged.pop(key, None)  # a dictionary keeps the order of first insertion
                merged[key] = value
                if (rival := rival_of(key, value.value)) is not None and rival not in given:
                    merged.pop(rival, None)
        return merged


class _Fixed(ConfigSource):
    """Source for a configuration made in Python: only data set and shots change."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__((), lambda given, problems: config, lambda name: name)
        self._config = config

    def resolve(self, **selection: Unpack[Selection]) -> RunConfig:
        shots = selection.get("shots")
        chosen = {"name": selection.get("dataset"), "shots": selection.get("default_shots") if shots is None else shots}
        return self._config.with_data(**{key: value for key, value in chosen.items() if value is not None})

    def differences(self, **selection: Unpack[Selection]) -> dict[str, Any]:
        return {}


def as_source(config: RunConfig | ConfigSource) -> ConfigSource:
    """Return ``config`` as a source; a configuration made in Python keeps all values except data set and shots."""
    return config if isinstance(config, ConfigSource) else _Fixed(config)


def origin_of(given: Mapping[str, Given], key: str) -> str:
    """Return the source of the value of ``key`` as text: a file and line, the command line, method or default."""
    parts = key.split(".")
    for count in range(len(parts), 0, -1):  # objectives.knowledge may be given as a whole
        if place := given.get(".".join(parts[:count])):
            return place.source
    return "method" if parts[0] in _DECLARED else "default"


def _text(given: Mapping[str, Given], key: str, default: str) -> str:
    value = given[key].value if key in given else default
    return value if isinstance(value, str) else default


def _number(given: Mapping[str, Given], key: str, default: int) -> int:
    try:
        return int(str(given[key].value)) if key in given else default
    except ValueError:  # reported when the configuration is built
        return default


def _value_of(config: RunConfig, key: str, given: Any) -> Any:
    """Return the value of a dotted ``key``; ``given`` if the configuration stores it under another key."""
    value: Any = config
    for name in key.split("."):
        entries = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
        if name not in entries:
            return given
        value = entries[name]
    return value
