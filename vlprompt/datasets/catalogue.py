"""Catalogue of data set cards: YAML files in the wheel, in a clone and in the user's card folder."""

from __future__ import annotations

import fnmatch
import functools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from vlprompt._files import home_path
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


def user_card_folder() -> Path:
    """Return the folder of the user's cards: ``$VLPROMPT_CARDS``, else ``~/.config/vlprompt/datasets``."""
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    named = os.environ.get("VLPROMPT_CARDS")
    return Path(os.path.abspath(home_path(named or f"{home}/vlprompt/datasets")))


def list_datasets(pattern: str = "*") -> list[str]:
    """Return the names of the known data sets that match ``pattern`` (``*`` and ``?`` are wildcards), sorted."""
    return [name for name in sorted(all_cards()) if fnmatch.fnmatch(name, pattern.lower())]


def list_groups() -> dict[str, list[str]]:
    """Return the groups of data sets that cards name, each with its sorted members."""
    groups: dict[str, list[str]] = {}
    for name, card in sorted(all_cards().items()):
        for group in card.group:
            groups.setdefault(group, []).append(name)
    return groups


def find_card(name: str) -> Card:
    """Return the card of data set ``name`` or alias; ignores letter case and ``-``/``_``.

    Raises:
        ConfigError: If no card has that name; the text gives the nearest names.
    """
    if not isinstance(name, str):
        raise ConfigError(f"The name of a data set is text, not {name!r}.")
    cards = all_cards()
    spellings = {_plain(spelling): card for card in cards.values() for spelling in (card.name, *card.aliases)}
    if _plain(name) not in spellings:
        known = [*cards, *(alias for card in cards.values() for alias in card.aliases)]
        raise ConfigError(
            f"Unknown data set {name!r}.{did_you_mean(name, known)} All data sets: {', '.join(sorted(cards))}. A "
            f"folder of images: --data.name folder --data.root FOLDER. Your own cards go to {user_card_folder()}"
        )
    return spellings[_plain(name)]


def card_class_names(card: Card) -> list[str] | None:
    """Return the class names by label if they are known without the images, else ``None``.

    They are on the card (:func:`vlprompt.datasets.card.stated_class_names`) or, for a packaged data set, in its files.
    """
    names = stated_class_names(card)
    if names is None and card.packaged and card.reader != "pairs":
        names = list(read_dataset(card).class_names)
    return names


def all_cards() -> dict[str, Card]:
    """Return every card by name: vlprompt's and the user's (:func:`user_card_folder`).

    A card of the user that cannot be read, or whose name is already used, is omitted with a warning.
    """
    paths = sorted(user_card_folder().glob("*.yaml"))
    stamp = tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths)
    cards, problems = _cards(stamp)
    for problem in problems:
        warnings.warn(problem, stacklevel=2)
    return cards


@functools.lru_cache(maxsize=4)
def _cards(user_files: tuple[tuple[str, int, int], ...]) -> tuple[dict[str, Card], list[str]]:
    cards: dict[str, Card] = {}
    owners: dict[str, str] = {}
    problems: list[str] = []
    shipped = [(path, False) for path in sorted(card_folder().glob("*.yaml"))]
    for path, of_user in [*shipped, *((Path(file), True) for file, *_ in user_files)]:
        try:
            card = read_card(path, of_user=of_user)
            taken = {_plain(name): owners[_plain(name)] for name in _spellings(card) if _plain(name) in owners}
            if taken:
                owner = next(iter(taken.values()))
                raise DataError(f"Data set cards {owner} and {path} both have the name {next(iter(taken))!r}.")
        except DataError as error:
            if not of_user:
                raise
            problems.append(f"your card is ignored. {error}")
            continue
        owners |= {_plain(name): card.name for name in _spellings(card)}
        cards[card.name] = card
    return cards, problems


def _spellings(card: Card) -> Sequence[str]:
    return (card.name, *card.aliases)


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
