"""Data set cards: one YAML file of facts per data set, found in the wheel and in a clone alike."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlprompt.errors import ConfigError, DataError, bulleted, did_you_mean

_PACKAGE = Path(__file__).resolve().parent.parent
#: Folder of the demo benchmark and of what else the wheel carries.
ASSETS = _PACKAGE / "assets"
READER_NAMES = ("split_json", "folder", "fgvc", "imagenet", "pairs")
_LARGEST_CARD = 1_000_000


@dataclass(frozen=True)
class Card:
    """What is known of a data set without having it.

    Attributes:
        name: The name it is asked for by.
        aliases: Other accepted spellings.
        folder: Folder under the data root; ``.`` for the data root itself.
        image_dir: Folder of the images under ``folder``; sample ids are relative to it.
        reader: ``split_json``, ``folder``, ``fgvc`` or ``imagenet``; ``pairs`` for images with captions and no classes
            (:func:`vlprompt.load_pairs`).
        template: The published prompt, with ``{}`` for the class name.
        licence: Licence of the images.
        home: Where the images come from.
        notes: How to get them and where to put them.
        split_file: Split file under ``folder``, for the ``split_json`` reader; the list of pairs for ``pairs``.
        split_file_sha256: SHA-256 of the published split file.
        split_content_sha256: SHA-256 of its content (:meth:`vlprompt.data.records.SplitLists.content_sha256`).
        classes: Number of classes; ``None`` where the user decides.
        sizes: Images in train, val and test; ``None`` where the user decides.
        archive: Zip archive under ``folder`` that holds the images. ``{}`` in its name stands for the first folder of
            an image's path: every such folder has an archive of its own.
        packaged: Whether the data lie inside the package, so that no data root is needed.
        variants: Whether an image's path may end in ``#`` and a variant (:mod:`vlprompt.data.variants`).
        domains: Names of its domains, for domain generalisation; a sample's domain is the first folder of its path,
            with ``+noise`` or the like behind it for a corrupted variant.
    """

    name: str
    folder: str
    image_dir: str
    reader: str
    template: str
    licence: str
    home: str
    notes: str
    aliases: tuple[str, ...] = ()
    split_file: str | None = None
    split_file_sha256: str | None = None
    split_content_sha256: str | None = None
    classes: int | None = None
    sizes: Mapping[str, int] | None = None
    archive: str | None = None
    packaged: bool = False
    variants: bool = False
    domains: tuple[str, ...] = ()

    def base(self, root: str | Path | None = None) -> Path:
        """Return the absolute folder of this data set under ``root`` (see :func:`data_root`)."""
        return (ASSETS if self.packaged else data_root(root)) / self.folder


def data_root(root: str | Path | None = None) -> Path:
    """Return the absolute data root: ``root``, else the environment's ``VLPROMPT_DATA``, else ``data`` here."""
    chosen = root if root is not None else os.environ.get("VLPROMPT_DATA") or "data"
    return Path(os.path.abspath(Path(chosen).expanduser()))


def card_folder() -> Path:
    """Return the folder of the cards: the installed package's, or the clone's ``datasets/``."""
    for folder in (ASSETS / "datasets", _PACKAGE.parent / "datasets"):
        if any(folder.glob("*.yaml")):
            return folder
    raise DataError(
        f"The data set cards are missing: looked in {ASSETS / 'datasets'} and {_PACKAGE.parent / 'datasets'}. "
        "Install vlprompt again: pip install --force-reinstall vlprompt"
    )


def list_datasets(pattern: str = "*") -> list[str]:
    """Return the names of the known data sets that match ``pattern`` (``*`` and ``?`` are wildcards), sorted."""
    return [name for name in sorted(_cards()) if fnmatch.fnmatch(name, pattern.lower())]


def find_card(name: str) -> Card:
    """Return the card of data set ``name``; its aliases, letter case and ``-``/``_`` make no difference.

    Raises:
        ConfigError: If no card has that name; the text gives the nearest ones.
    """
    if not isinstance(name, str):
        raise ConfigError(f"A data set is asked for by its name, not by {name!r}.")
    cards = _cards()
    spellings = {_plain(spelling): card for card in cards.values() for spelling in (card.name, *card.aliases)}
    if _plain(name) not in spellings:
        known = [*cards, *(alias for card in cards.values() for alias in card.aliases)]
        raise ConfigError(
            f"Unknown data set {name!r}.{did_you_mean(name, known)} All of them: {', '.join(sorted(cards))}. Your own "
            "folder of images: --data.name folder --data.root FOLDER"
        )
    return spellings[_plain(name)]


def card_class_names(card: Card) -> list[str] | None:
    """Return class names by label where they are known without the images, else ``None``.

    ImageNet's 1,000 names are those of OpenAI's CLIP as open_clip carries them (two occur twice: ``missile`` and
    ``sunglasses``); a packaged data set brings its own.
    """
    if card.reader == "imagenet":
        from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

        return list(IMAGENET_CLASSNAMES)
    if card.packaged and card.reader != "pairs":
        from vlprompt.data.readers import read_dataset

        return list(read_dataset(card).class_names)
    return None


def read_card(path: Path) -> Card:
    """Read and check one card file.

    Raises:
        DataError: If the file is not YAML, or has missing, unknown or ill-typed fields; all are listed.
    """
    try:
        if path.stat().st_size > _LARGEST_CARD:
            raise DataError(f"Data set card {path} is larger than {_LARGEST_CARD:,} bytes.")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"Data set card {path} cannot be read: {first}.") from error
    if not isinstance(content, dict):
        raise DataError(f"Data set card {path} is not a table of fields.")
    problems = _card_problems(content)
    if problems:
        raise DataError(f"Data set card {path} is not valid:\n{bulleted(problems)}")
    fields = {key: value for key, value in content.items() if key != "schema"}
    for name in ("aliases", "domains"):
        fields[name] = tuple(fields.get(name, ()))
    return Card(**fields)


def _card_problems(content: dict[Any, Any]) -> list[str]:
    fields = {field.name: field for field in dataclasses.fields(Card)}
    problems = []
    for key in content:
        if key not in fields and key != "schema":
            problems.append(f"unknown field {key!r}.{did_you_mean(str(key), fields)}")
    if content.get("schema") != 1:
        problems.append(f"schema is {content.get('schema')!r}; this version reads schema 1")
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in content:
            problems.append(f"field {name!r} is missing")
        elif name in content and field.type in ("str", "str | None") and not isinstance(content[name], str):
            problems.append(f"{name} is {content[name]!r}; text is expected")
    if content.get("reader") not in READER_NAMES:
        problems.append(f"reader is {content.get('reader')!r}.{did_you_mean(str(content.get('reader')), READER_NAMES)}")
    if content.get("reader") in ("split_json", "pairs") and not content.get("split_file"):
        problems.append(f"reader {content['reader']} needs the field 'split_file'")
    for name in ("folder", "image_dir", "split_file", "archive"):
        value = content.get(name, "")
        if isinstance(value, str) and (value.startswith(("/", "\\")) or ".." in value.split("/")):
            problems.append(f"{name} is {value!r}; a path inside the data root is expected")
    template = content.get("template")
    if isinstance(template, str) and template.count("{}") != 1:
        problems.append(f"template is {template!r}; it needs {{}} exactly once")
    classes, sizes = content.get("classes"), content.get("sizes")
    if classes is not None and (not isinstance(classes, int) or isinstance(classes, bool) or classes < 1):
        problems.append(f"classes is {classes!r}; a count is expected")
    if sizes is not None and (
        not isinstance(sizes, dict)
        or set(sizes) != {"train", "val", "test"}
        or not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in sizes.values())
    ):
        problems.append(f"sizes is {sizes!r}; {{train: N, val: N, test: N}} is expected")
    for name in ("aliases", "domains"):
        names = content.get(name, [])
        if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
            problems.append(f"{name} is {names!r}; a list of names is expected")
    for name in ("packaged", "variants"):
        if not isinstance(content.get(name, False), bool):
            problems.append(f"{name} is {content[name]!r}; true or false is expected")
    return problems


@functools.lru_cache(maxsize=1)
def _cards() -> dict[str, Card]:
    cards: dict[str, Card] = {}
    owners: dict[str, str] = {}
    for path in sorted(card_folder().glob("*.yaml")):
        card = read_card(path)
        for spelling in {_plain(spelling) for spelling in (card.name, *card.aliases)}:
            if owners.setdefault(spelling, card.name) != card.name:
                raise DataError(f"Data set cards {owners[spelling]} and {card.name} both answer to {spelling!r}.")
        cards[card.name] = card
    return cards


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
