"""Image-caption pairs of data sets and of files of the user."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from vlprompt._files import home_path
from vlprompt.datasets.card import Card, Classes, Templates
from vlprompt.datasets.catalogue import find_card, list_datasets
from vlprompt.datasets.images import AS_SEEN, ImageSource, read_as
from vlprompt.datasets.options import PairsOptions
from vlprompt.datasets.paths import resolve
from vlprompt.datasets.readers.images import find_images
from vlprompt.datasets.readers.missing import missing_text
from vlprompt.datasets.report import Report
from vlprompt.errors import ConfigError, DataError, did_you_mean
from vlprompt.pairs.files import read_list, read_sidecars
from vlprompt.pairs.shards import find_shards, read_shards

_LISTS = (".jsonl", ".csv", ".tsv")
_PATHS = (
    "a .jsonl, .csv or .tsv list with image and caption; a folder of images, each with a .txt of the same name; or "
    "uncompressed webdataset shards: a .tar file, a folder of them, or a pattern such as shards-{0000..0009}.tar"
)


@dataclass(frozen=True)
class Pair:
    """An image and a caption of it.

    Attributes:
        id: POSIX path of the image; in shards ``<shard>/<member>``.
        caption: The caption.
        source: Source of the pixels; ``source.open()`` returns a PIL RGB image.
        domain: First folder of the image's path if the card names domains, else empty.
    """

    id: str
    caption: str
    source: ImageSource
    domain: str = ""


def load_pairs(source: str | Path = "demo-pairs", *, root: str | Path | None = None) -> list[Pair]:
    """Return the image-caption pairs of a data set or of files, in order; at least one.

    An image with several captions is in several pairs. Images of the user's files are read as viewers show them: turned
    as their orientation tags say, on white. ``source`` may be the path of:

    - a list: a ``.jsonl`` file with an object on every line, or a ``.csv`` or ``.tsv`` table with a header. The image
      is under ``image``, ``filepath`` (open_clip) or ``file_name`` (Hugging Face), the caption under ``caption``,
      ``title`` or ``text``, in any case; other columns are ignored. Image paths are relative to the list's folder, or
      to ``root``, and must not leave it;
    - a folder with images at any depth: every non-empty line of ``a.txt`` is a caption of ``a.jpg`` in the same folder.
      If the folder contains ``.tar`` files, only these are read;
    - webdataset shards: a ``.tar`` file, a folder of them, or a pattern such as ``shards-{0000..0009}.tar``. The
      captions of ``KEY.jpg`` are the lines of ``KEY.txt``, or the ``caption`` in ``KEY.json``.

    Args:
        source: Name or alias of a data set (names take precedence; a folder of that name is ``./NAME``), or a path.
        root: For a data set, the folder of the data sets; packaged data sets need none. For a list, the folder of the
            images.

    Raises:
        ConfigError: If there is no such data set or path, the data set has classes instead of captions, or ``root`` is
            given for a folder or shards.
        DataError: If files or images are missing or cannot be used; all problems are listed.
    """
    card = _card(source)
    if card is not None:
        assert isinstance(card.options, PairsOptions)
        base = card.base(root)
        path = resolve(base, card.options.split_file)
        if not path.is_file():
            raise DataError(missing_text(card, base, f"{path} (does not exist)"))
        return _listed(card, path, base)
    path = Path(os.path.abspath(home_path(source)))
    if path.suffix.lower() in _LISTS and os.path.isfile(path):
        base = path.parent if root is None else Path(os.path.abspath(home_path(root)))
        if not base.is_dir():
            raise ConfigError(
                f"root is {str(root)!r}, which is not a folder; accepted: the folder of the list's images."
            )
        own = Card(path.name, "pairs", PairsOptions("pairs"), Classes(), Templates("{}"))
        return [replace(pair, source=read_as(pair.source, AS_SEEN)) for pair in _listed(own, path, base)]
    shards = find_shards(path)
    if not os.path.isdir(path) and not shards:
        near = did_you_mean(str(source), _known())
        raise ConfigError(
            f"{str(source)!r} is neither a data set nor a path of image-caption pairs.{near} Accepted paths: {_PATHS}."
        )
    if root is not None:
        raise ConfigError(f"root is {str(root)!r}, but root is only accepted for a list; {path} is not a list.")
    if shards:
        how = "Correct the shards, or fetch them again: plain tar files of KEY.jpg, .png or .webp and KEY.txt or .json."
        report = Report(f"Shards {path}", how)
        for name in sorted(os.listdir(path), key=os.fsencode) if os.path.isdir(path) else ():
            if path / name not in shards:
                report.passed.add(name, "" if os.path.isfile(path / name) else "folders next to the shards")
        images = read_shards(shards, report)
    else:
        how = "Correct the files, or remove them. Every image needs a .txt of the same name in its folder, in UTF-8."
        report = Report(f"Folder of pairs {path}", how)
        images = read_sidecars(path, report)
    report.finish()
    return [Pair(image.id, image.caption, read_as(image.source, AS_SEEN)) for image in images]


def _card(source: str | Path) -> Card | None:
    """Return the card that ``source`` names, or ``None`` if it is a path."""
    if isinstance(source, Path):
        return None
    try:
        card = find_card(source)
    except ConfigError:
        if isinstance(source, str) and source:
            return None
        raise
    if card.reader != "pairs":
        known = _known()
        path = f"; for your own files ./{source}" if os.path.exists(source) else ""
        raise ConfigError(
            f"{card.name!r} has classes, not captions.{did_you_mean(source, known)} Data sets with captions: "
            f"{', '.join(known)}. For classes use vlprompt.load_dataset({card.name!r}){path}"
        )
    return card


def _known() -> list[str]:
    return [name for name in list_datasets() if find_card(name).reader == "pairs"]


def _listed(card: Card, path: Path, base: Path) -> list[Pair]:
    report = Report(f"List of pairs {path}", "Correct the lines, or remove them.")
    rows = read_list(path, report)
    sources = find_images(card, base, [image for image, _ in rows], report)
    report.finish()
    return [
        Pair(image, caption, sources[image], image.partition("/")[0] if card.domains else "") for image, caption in rows
    ]
