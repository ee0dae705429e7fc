"""Data set cards: one YAML file of facts per data set, found in the wheel, in a clone and in the user's own folder."""

from __future__ import annotations

import fnmatch
import functools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from vlprompt.datasets.card import _PACKAGE, ASSETS, Card, stated_class_names
from vlprompt.datasets.card_files import read_card
from vlprompt.datasets.readers import read_dataset
from vlprompt.errors import ConfigError, DataError, did_you_mean


def card_folder() -> Path:
    """Return the folder of the cards: the installed package's, or the clone's ``datasets/``."""
    for folder in (ASSETS / "datasets", _PACKAGE.parent / "datasets"):
        if any(folder.glob("*.yaml")):
            return folder
    raise DataError(
        f"The data set cards are missing: looked in {ASSETS / 'datasets'} and {_PACKAGE.parent / 'datasets'}. "
        "Install vlprompt again: pip install --force-reinstall vlprompt"
    )


def own_card_folder() -> Path:
    """Return the folder of the user's own cards: ``$VLPROMPT_CARDS``, else ``~/.config/vlprompt/datasets``."""
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    named = os.environ.get("VLPROMPT_CARDS")
    return Path(os.path.abspath(Path(named or f"{home}/vlprompt/datasets").expanduser()))


def list_datasets(pattern: str = "*") -> list[str]:
    """Return the names of the known data sets that match ``pattern`` (``*`` and ``?`` are wildcards), sorted."""
    return [name for name in sorted(all_cards()) if fnmatch.fnmatch(name, pattern.lower())]


def list_groups() -> dict[str, list[str]]:
    """Return the groups of data sets that the cards name, each with its members in order."""
    groups: dict[str, list[str]] = {}
    for name, card in sorted(all_cards().items()):
        for group in card.group:
            groups.setdefault(group, []).append(name)
    return groups


def find_card(name: str) -> Card:
    """Return the card of data set ``name``; its aliases, letter case and ``-``/``_`` make no difference.

    Raises:
        ConfigError: If no card has that name; the text gives the nearest ones.
    """
    if not isinstance(name, str):
        raise ConfigError(f"A data set is asked for by its name, not by {name!r}.")
    cards = all_cards()
    spellings = {_plain(spelling): card for card in cards.values() for spelling in (card.name, *card.aliases)}
    if _plain(name) not in spellings:
        known = [*cards, *(alias for card in cards.values() for alias in card.aliases)]
        raise ConfigError(
            f"Unknown data set {name!r}.{did_you_mean(name, known)} All of them: {', '.join(sorted(cards))}. Your own "
            f"folder of images: --data.name folder --data.root FOLDER. Your own cards go to {own_card_folder()}"
        )
    return spellings[_plain(name)]


def card_class_names(card: Card) -> list[str] | None:
    """Return class names by label where they are known without the images, else ``None``.

    A card may state them (:func:`vlprompt.datasets.card.stated_class_names`). A packaged data set brings its own.
    """
    names = stated_class_names(card)
    if names is None and card.packaged and card.reader != "pairs":
        names = list(read_dataset(card).class_names)
    return names


def all_cards() -> dict[str, Card]:
    """Return every card by name: vlprompt's own and the user's (:func:`own_card_folder`).

    A card of the user's that cannot be read, or that takes a name that is taken, is left out with a warning.
    """
    own = own_card_folder()
    stamp = tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(own.glob("*.yaml")))
    cards, problems = _cards(stamp)
    for problem in problems:
        warnings.warn(problem, stacklevel=2)
    return cards


@functools.lru_cache(maxsize=4)
def _cards(own: tuple[tuple[str, int, int], ...]) -> tuple[dict[str, Card], list[str]]:
    cards: dict[str, Card] = {}
    owners: dict[str, str] = {}
    problems: list[str] = []
    shipped = [(path, False) for path in sorted(card_folder().glob("*.yaml"))]
    for path, users in [*shipped, *((Path(one[0]), True) for one in own)]:
        try:
            card = read_card(path, own=users)
            taken = {_plain(word): owners[_plain(word)] for word in _spellings(card) if _plain(word) in owners}
            if taken:
                owner = next(iter(taken.values()))
                raise DataError(f"Data set cards {owner} and {path} both answer to {next(iter(taken))!r}.")
        except DataError as error:
            if not users:
                raise
            problems.append(f"your card is left out. {error}")
            continue
        owners |= {_plain(word): card.name for word in _spellings(card)}
        cards[card.name] = card
    return cards, problems


def _spellings(card: Card) -> Sequence[str]:
    return (card.name, *card.aliases)


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
