"""Registries of classes by the names used in YAML and on the command line."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from vlprompt.errors import ConfigError, did_you_mean


class Configurable(Protocol):
    """What has settings: a dataclass that checks its values when it is made."""

    Settings: ClassVar[type]


T = TypeVar("T", bound=Configurable)
K = TypeVar("K", bound=type)


class Registry(Generic[T]):
    """Classes of one kind by name.

    Args:
        what: Kind of class, for messages: "method", "objective" or "decomposition".
        renamed: Former names with their present ones, for messages.
    """

    def __init__(self, what: str, renamed: Mapping[str, str] | None = None) -> None:
        self._what, self._renamed = what, dict(renamed or {})
        self._known: dict[str, type[T]] = {}

    def enrol(self, name: str) -> Callable[[K], K]:
        """Return a decorator that registers a class under ``name`` and sets its attribute ``name``.

        Raises:
            ValueError: The name is taken by another class.
        """

        def decorate(kind: K) -> K:
            if name in self._known and self._known[name] is not kind:
                raise ValueError(f"{self._what} name {name!r} is taken by {self._known[name].__qualname__}")
            setattr(kind, "name", name)  # noqa: B010  # the attribute is not part of the static type
            self._known[name] = kind
            return kind

        return decorate

    def names(self, pattern: str = "*") -> list[str]:
        """Return the sorted names that match a wildcard ``pattern``."""
        return sorted(fnmatch.filter(self._known, pattern))

    def get(self, name: str) -> type[T]:
        """Return the class registered as ``name``.

        Raises:
            ConfigError: The name is unknown; the text lists the nearest ones.
        """
        if name not in self._known:
            near = did_you_mean(str(name), self.names())
            if name in self._renamed:
                near = f" It is called {self._renamed[name]!r} now."
            raise ConfigError(f"there is no {self._what} {name!r}.{near} See `vlprompt list {self._what}s`.")
        return self._known[name]

    def settings(self, name: str, values: Mapping[str, Any]) -> Any:
        """Return the ``Settings`` of the class enrolled as ``name``, made of ``values``.

        Raises:
            ConfigError: There is no such class or setting, or values are not accepted; all of them are listed.
        """
        try:
            return self.get(name).Settings(**{str(key): value for key, value in values.items()})
        except ConfigError as error:
            raise ConfigError(f"{self._what} {name!r}: {error}") from error
