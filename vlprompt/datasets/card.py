"""Data set cards as dataclasses: facts of a data set that are known without its files."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from vlprompt._files import home_path
from vlprompt.config.ensembles import ENSEMBLES
from vlprompt.config.hints import REFERENCES
from vlprompt.config.texts import ENSEMBLE, DataTexts
from vlprompt.config.types import Count, Holds, Lines, MinLen, Name, Positive, validated
from vlprompt.datasets.kept_split import KEPT_SPLIT
from vlprompt.datasets.options import FolderOptions, Inside, Named, OneOrMore, ReaderOptions, SplitJsonOptions
from vlprompt.datasets.paths import is_file_name, path_problem, resolve
from vlprompt.datasets.records import class_name_problem
from vlprompt.errors import ConfigError, did_you_mean

_PACKAGE = Path(__file__).resolve().parent.parent
#: Folder of the packaged data: the demo benchmark and other files of the wheel.
ASSETS = _PACKAGE / "assets"
Metric = Literal["accuracy", "mean_per_class", "map", "map_11point"]
NamesFrom = Literal["split", "folders", "file", "list", "wnids"]


def is_word(word: str) -> bool:
    """Return whether a name can be part of lists separated by commas and of file names."""
    return is_file_name(word) and word.isprintable() and "," not in word and word == word.strip()


def _has_one_slot(template: str) -> bool:
    slots = template.count("{}"), template.count("{"), template.count("}")
    return slots == (1, 1, 1) and not template.startswith(REFERENCES)


def _is_entry(template: str) -> bool:
    return _has_one_slot(template) or template.startswith(ENSEMBLE)


def _is_split(name: str) -> bool:
    return is_word(name) and not name.endswith(".json")


def _with_text(licence: Any) -> Any:
    return {"text": licence} if isinstance(licence, str) else licence


Word = Annotated[str, Holds(is_word, "a name of letters, digits, - and _")]
Words = Annotated[tuple[Word, ...], OneOrMore]
CardTemplate = Annotated[str, Holds(_has_one_slot, "a text with {} exactly once and no other braces")]
CardEntry = Annotated[str, Holds(_is_entry, "a text with {} exactly once and no other braces, or ensemble:NAME")]
CardTemplates = Annotated[tuple[CardEntry, ...], OneOrMore, MinLen(1)]
SplitName = Annotated[
    str, Holds(_is_split, "a name of letters, digits, - and _, without .json, which means a split file of the user")
]


@validated("classes")
class Classes:
    """Facts of the classes.

    Attributes:
        count: Number of classes; ``None`` if the user decides.
        names_from: Source of the names: ``split`` (the split file), ``folders`` (the class folders), ``file`` (a list
            next to the images), ``list`` (``names`` below), or ``wnids`` (WordNet folders with OpenAI's CLIP names).
        names: The names by label, for ``list``.
        keys: Names of the classes in the files, by label, where they differ: folders or words of a list.
        names_sha256: SHA-256 of the names by label, joined by LF.
        order: Description of the class order.
    """

    count: Positive | None = None
    names_from: NamesFrom = "split"
    names: Annotated[tuple[str, ...], OneOrMore] = ()
    keys: Annotated[tuple[str, ...], OneOrMore] = ()
    names_sha256: str | None = None
    order: Lines = ""

    def __post_init__(self) -> None:
        problems = []
        if self.names_from == "list" and not self.names:
            problems.append("classes.names_from is list but classes.names is missing")
        for name, listed in (("names", self.names), ("keys", self.keys)):
            if listed and len(listed) != self.count:
                problems.append(f"classes.{name} has {len(listed)} entries but classes.count is {self.count}")
        problems += [
            f"classes.names[{index}]: {text}"
            for index, name in enumerate(self.names)
            if (text := class_name_problem(name))
        ]
        if len(set(self.keys)) != len(self.keys):
            problems.append("classes.keys names something twice")
        if problems:
            raise ConfigError("\n".join(problems))


@validated("splits")
class Split:
    """A split of a data set into train, val and test.

    Attributes:
        train: Number of training images; ``None`` if unknown or decided by the user.
        val: Number of validation images.
        test: Number of test images.
        content_sha256: Hash of the content (:meth:`vlprompt.datasets.records.SplitLists.content_sha256`).
        file_sha256: Hash of the published split file.
        reader: Reader of this split, if it differs from the card's.
        reader_options: Options of that reader.
    """

    train: Count | None = None
    val: Count | None = None
    test: Count | None = None
    content_sha256: str | None = None
    file_sha256: str | None = None
    reader: str | None = None
    reader_options: ReaderOptions | None = None


@validated("templates")
class Templates:
    """Prompts with ``{}`` for the class name: the published ``single`` prompt, and ``ensembles`` by name.

    An ensemble may contain others: ``ensemble:single``, or one that all data sets share, but none of the card.
    """

    single: CardTemplate
    ensembles: Mapping[str, CardTemplates] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shared = [f"{ENSEMBLE}{name}" for name in (*ENSEMBLES, "single")]
        problems = [
            f"templates.ensembles.{name} names {entry!r}.{did_you_mean(entry, shared)}"
            for name, entries in self.ensembles.items()
            for entry in entries
            if entry.startswith(ENSEMBLE) and (entry not in shared or entry == f"{ENSEMBLE}{name}")
        ]
        if problems:
            raise ConfigError("\n".join(problems))


@validated("sources")
class Source:
    """Source of a file of the data set.

    Attributes:
        what: Name of the file or description of the files.
        page: Home page.
        url: Address that ``vlprompt data get`` may fetch; ``None`` if it must not or cannot.
        md5: Published MD5 of the file.
        sha256: SHA-256 of the file.
        unpack: Folder under the data set's folder to unpack an archive into; ``None`` does not unpack.
        strip: Leading folders to drop from the paths of the archive's members.
        inner: Archive inside the archive that is unpacked into the same folder, by its path after ``strip``.
        to: Path of the file under the data set's folder, if it is not an archive; a ``.gz`` file is decompressed
            unless this path also ends in ``.gz``.
    """

    what: str
    page: str = ""
    url: str | None = None
    md5: str | None = None
    sha256: str | None = None
    unpack: Inside | None = None
    strip: Inside = ""
    inner: Inside | None = None
    to: Inside | None = None


@validated("licence")
class Licence:
    """Licence of the images: its ``text``, its ``page``, and whether they may be redistributed."""

    text: str
    page: str = ""
    redistribute: bool = False


@validated("")
class Card:
    """Facts of a data set that are known without its files. A YAML card has the same fields (``datasets/dtd.yaml``).

    Attributes:
        name: Name of the data set.
        reader: ``split_json``, ``folder``, ``list_file``, ``torchvision`` or ``shards``; ``pairs`` for images with
            captions and no classes (:func:`vlprompt.load_pairs`).
        options: The reader's options (:mod:`vlprompt.datasets.options`); ``reader_options`` in the file.
        classes: Count, names and order of the classes.
        templates: Prompts.
        metric: ``accuracy``, ``mean_per_class``, or, for multi-label data, ``map`` or ``map_11point``.
        licence: Licence of the images.
        task: ``multiclass`` or ``multilabel``.
        aliases: Other accepted names.
        group: Groups that contain the data set, such as ``fewshot11``.
        folders: Names of its folder under the data root, tried in order; ``.`` for the data root.
        root: Absolute data root, in a card of the user; ``None`` for the common data root.
        splits: Splits by name; the first is the default.
        split: Name of the split in use.
        domains: Domains, for domain generalisation: each name with the folder or word used in files.
        excluded: Ids of excluded images.
        sources: Sources of the files.
        notes: How to get the data and where to put the files.
        packaged: Whether the data are part of the package, so that no data root is needed.
        same_images: Whether train and test share images by design; the protocol then separates them by domain.
        file: Path of the card.
        kept: Path of the kept split that the images follow, set by :meth:`with_split`.
    """

    name: Word
    reader: Name
    options: ReaderOptions
    classes: Classes
    templates: Templates
    metric: Metric = "accuracy"
    licence: Annotated[Licence, BeforeValidator(_with_text)] = Licence("not stated")
    task: Literal["multiclass", "multilabel"] = "multiclass"
    aliases: Words = ()
    group: Words = ()
    folders: Annotated[tuple[Inside, ...], OneOrMore, MinLen(1)] = (".",)
    root: str | None = None
    splits: Mapping[SplitName, Split] = field(default_factory=dict)
    split: str = ""
    domains: Annotated[Mapping[Word, Inside], Named] = field(default_factory=dict)
    excluded: Annotated[tuple[Inside, ...], OneOrMore] = ()
    sources: tuple[Source, ...] = ()
    notes: Lines = ""
    packaged: bool = False
    same_images: bool = False
    file: str = ""
    kept: str = ""

    def __post_init__(self) -> None:
        if self.multilabel != self.metric.startswith("map"):
            raise ConfigError(
                f"task is {self.task} but metric is {self.metric}; map and map_11point go with multilabel"
            )

    @property
    def template(self) -> str:
        """The published prompt, with ``{}`` for the class name."""
        return self.templates.single

    def texts(self, template: str | None = None) -> DataTexts:
        """Return the templates and names of the data set; ``template`` replaces the published prompt."""
        single = self.template if template is None else template
        return DataTexts(single, self.templates.ensembles, (self.name, *self.aliases))

    @property
    def facts(self) -> Split:
        """Sizes and hashes of the split in use; empty if unknown."""
        return self.splits.get(self.split, Split())

    @property
    def sizes(self) -> dict[str, int] | None:
        """Known numbers of images in train, val and test of the split in use; ``None`` if all are unknown."""
        sizes = {name: getattr(self.facts, name) for name in ("train", "val", "test")}
        return {name: size for name, size in sizes.items() if size is not None} or None

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several labels."""
        return self.task == "multilabel"

    @property
    def own(self) -> bool:
        """Whether these are images of the user: a folder, or a data set made from one (``vlprompt data new``)."""
        return "own" in self.group or (isinstance(self.options, FolderOptions) and not self.options.splits)

    @property
    def tests_only(self) -> bool:
        """Whether the data set has no training images."""
        splits = getattr(self.options, "splits", {})
        return bool(splits) and "train" not in splits

    def base(self, root: str | Path | None = None) -> Path:
        """Return the folder of this data set under ``root`` (see :func:`data_root`): the first that exists."""
        places = self.places(root)
        return next((place for place in places if place.is_dir()), places[0])

    def places(self, root: str | Path | None = None) -> list[Path]:
        """Return the absolute folders to search, in order."""
        if self.packaged:
            return [resolve(ASSETS, folder, folder=True) for folder in self.folders]
        roots = [data_root(self.root)] if self.root is not None and root is None else data_roots(root)
        return [resolve(place, folder, folder=True) for place in roots for folder in self.folders]

    def own_place(self, root: str | Path | None = None) -> str | None:
        """Return the resolved folder of images of the user if the data root itself is the data set, else ``None``.

        Such a card (``folder``) names no data set, so the folder identifies it.
        """
        if self.packaged or self.root is not None or self.folders != (".",):
            return None
        return os.path.realpath(self.base(root))

    @property
    def keeps_split(self) -> bool:
        """Whether the images are a folder of the user without a split of its card, so that runs keep theirs."""
        return self.own_place() is not None and isinstance(self.options, FolderOptions) and not self.options.splits

    def with_split(self, name: str | None) -> Card:
        """Return this card with another split, or with a split file of the user in the data set's folder.

        Args:
            name: Name of a split, or of a file that ends in ``.json``; ``None`` for the split in use. For a folder of
                images (:attr:`keeps_split`) also the folder of a run on it, whose split is kept and later images join.

        Raises:
            ConfigError: If the card has no such split, or the path is not valid.
        """
        if name is None or name == self.split:
            return self
        if name.endswith(".json"):
            if problem := path_problem(name):
                raise ConfigError(f"data.split: {problem}")
            if not isinstance(self.options, SplitJsonOptions):
                options = SplitJsonOptions(split_file=name, image_dir=getattr(self.options, "image_dir", "."))
            else:
                options = replace(self.options, split_file=name)
            return replace(self, reader="split_json", options=options, split=name, classes=Classes())
        if name not in self.splits and self.keeps_split:
            if os.path.lexists(kept := os.path.join(home_path(name), KEPT_SPLIT)):
                return replace(self, kept=kept)
            raise ConfigError(
                f"data.split is {name!r}; {self.name} has no splits. Accepted: the folder of a run on it, which holds "
                f"{KEPT_SPLIT}, or a split file of your own that ends in .json."
            )
        if name not in self.splits:
            known = ", ".join(self.splits) or "none"
            raise ConfigError(
                f"data.split is {name!r}; {self.name} has: {known}, or a split file of your own that ends in .json."
            )
        chosen = self.splits[name]
        if chosen.reader is None or chosen.reader_options is None:
            return replace(self, split=name)
        return replace(self, split=name, reader=chosen.reader, options=chosen.reader_options)


def data_root(root: str | Path | None = None) -> Path:
    """Return the absolute data root: ``root``, else the first of ``VLPROMPT_DATA``, else ``data``."""
    return data_roots(root)[0]


def data_roots(root: str | Path | None = None) -> list[Path]:
    """Return all absolute data roots: ``root``, else the folders in ``VLPROMPT_DATA``, else ``data``."""
    listed = os.environ.get("VLPROMPT_DATA", "").split(os.pathsep)
    folders = [root] if root is not None else [folder for folder in listed if folder]
    return [Path(os.path.abspath(home_path(folder))) for folder in folders or ["data"]]


@functools.lru_cache(maxsize=1)
def imagenet_names() -> dict[str, str]:
    """Return OpenAI's CLIP names of ImageNet's 1,000 classes by WordNet id, in the order of the ids."""
    text = (ASSETS / "imagenet" / "classnames.txt").read_text(encoding="utf-8")
    return dict(line.split(" ", 1) for line in text.splitlines())


def describe(card: Card) -> dict[str, Any]:
    """Return the card's facts as plain JSON values, without empty values."""
    own = ("file", "kept")  # places on this machine
    facts: dict[str, Any] = _without_empty({key: value for key, value in asdict(card).items() if key not in own})
    return facts


def _without_empty(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {key: inner for key, inner in value.items() if inner not in (None, (), {}, "", [], False)}
        return {key: _without_empty(inner) for key, inner in kept.items()}
    return [_without_empty(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def stated_class_names(card: Card) -> list[str] | None:
    """Return the class names by label that the card states, else ``None``.

    ImageNet's names are those of OpenAI's CLIP, as in CoOp's ``classnames.txt`` (``missile`` and ``sunglasses`` occur
    twice).
    """
    if card.classes.names:
        return list(card.classes.names)
    if card.classes.names_from == "wnids":
        names = imagenet_names()
        keys = card.classes.keys or tuple(names)
        return [names[key] for key in keys]
    return None
