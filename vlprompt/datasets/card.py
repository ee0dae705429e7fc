"""Data-set cards as dataclasses: the facts that are known of a data set without having it."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from vlprompt.config.types import Count, Holds, Lines, MinLen, Name, Positive, validated
from vlprompt.datasets.options import Inside, Named, OneOrMore, ReaderOptions, SplitJsonOptions
from vlprompt.datasets.paths import path_problem
from vlprompt.datasets.records import class_name_problem
from vlprompt.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent.parent
#: Folder of the demo benchmark and of what else the wheel carries.
ASSETS = _PACKAGE / "assets"
Metric = Literal["accuracy", "mean_per_class", "map", "map_11point"]
NamesFrom = Literal["split", "folders", "file", "list", "wnids"]


def _is_word(word: str) -> bool:
    return bool(word) and word.isprintable() and "," not in word and word == word.strip()


def _has_one_slot(template: str) -> bool:
    return template.count("{}") == template.count("{") == template.count("}") == 1


def _is_no_file(name: str) -> bool:
    return not name.endswith(".json")


def _with_text(licence: Any) -> Any:
    return {"text": licence} if isinstance(licence, str) else licence


Word = Annotated[str, Holds(_is_word, "a name of letters, digits, - and _")]
Words = Annotated[tuple[Word, ...], OneOrMore]
CardTemplate = Annotated[str, Holds(_has_one_slot, "a text with {} exactly once and no other braces")]
CardTemplates = Annotated[tuple[CardTemplate, ...], OneOrMore, MinLen(1)]
SplitName = Annotated[
    str, Holds(_is_no_file, "a name that does not end in .json, which means a split file of the user's")
]


@validated("classes")
class Classes:
    """What is known of the classes.

    Attributes:
        count: How many there are; ``None`` where the user decides.
        names_from: ``split`` (the split file says), ``folders`` (the class folders' names), ``file`` (a list beside
            the images), ``list`` (``names`` below), or ``wnids`` (WordNet folders named as OpenAI's CLIP names them).
        names: The names by label, for ``list``.
        keys: What the files call the classes, by label, where that is not the name: folders or words of a list.
        names_sha256: SHA-256 of the names by label, joined by LF.
        order: The rule of the order, in words.
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
    """One way to cut a data set into train, val and test.

    Attributes:
        train: Images to train on; ``None`` where it is not known or the user decides.
        val: Validation images.
        test: Test images.
        content_sha256: Hash of the content (:meth:`vlprompt.datasets.records.SplitLists.content_sha256`).
        file_sha256: Hash of the published split file.
        reader: Another reader than the card's, for this split.
        reader_options: Its options.
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
    """Prompts with ``{}`` for the class name: the ``single`` published one, and ``ensembles`` by name."""

    single: CardTemplate
    ensembles: Mapping[str, CardTemplates] = field(default_factory=dict)


@validated("sources")
class Source:
    """Where one part of the data comes from.

    Attributes:
        what: The file or the part.
        page: Home page.
        url: Address that ``vlprompt data get`` may fetch; ``None`` where it may not or cannot.
        md5: MD5 of the file, as its publisher gives it.
        sha256: SHA-256 of the file.
        unpack: Folder under the data set's folder to unpack an archive into; ``None`` keeps the file as it is.
        strip: Leading folders of the archive's members that are dropped.
        inner: Archive inside the archive that is unpacked into the same folder, by its path after ``strip``.
        to: Where the file goes, under the data set's folder, if it is not an archive; a file that ends in ``.gz`` is
            decompressed unless this name ends so, too.
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
    """The licence of the images: its ``text``, the ``page`` that has it, and whether they may be passed on."""

    text: str
    page: str = ""
    redistribute: bool = False


@validated("")
class Card:
    """What is known of a data set without having it. The YAML file has the same fields, as in ``datasets/dtd.yaml``.

    Attributes:
        name: The name it is asked for by.
        reader: ``split_json``, ``folder``, ``list_file``, ``torchvision`` or ``shards``; ``pairs`` for images with
            captions and no classes (:func:`vlprompt.load_pairs`).
        options: The reader's options (:mod:`vlprompt.datasets.options`); ``reader_options`` in the file.
        classes: Count, names and order of the classes.
        templates: Prompts.
        metric: ``accuracy``, ``mean_per_class``, or, with several labels an image, ``map`` or ``map_11point``.
        licence: Licence of the images.
        task: ``multiclass`` or ``multilabel``.
        aliases: Other accepted spellings of the name.
        group: Groups it belongs to, such as ``fewshot11``.
        folders: Names of its folder under the data root, tried in order; ``.`` for the data root itself.
        root: Absolute folder to look in, in a user's own card; the data root otherwise.
        splits: Ways to cut it, by name; the first is the one that is used if none is asked for.
        split: The name of the split in use.
        domains: Its domains, for domain generalisation: each name with the folder or word that stands for it in files.
        excluded: Images left out on purpose, by their id.
        sources: Where the parts come from.
        notes: How to get it and where to put what.
        packaged: Whether the data lie inside the package, so that no data root is needed.
        same_images: Whether train and test hold the same images on purpose: the protocol then parts them by domain.
        file: The card's own file.
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

    def __post_init__(self) -> None:
        if self.multilabel != self.metric.startswith("map"):
            raise ConfigError(
                f"task is {self.task} but metric is {self.metric}; map and map_11point go with multilabel"
            )

    @property
    def template(self) -> str:
        """The published prompt, with ``{}`` for the class name."""
        return self.templates.single

    @property
    def facts(self) -> Split:
        """Sizes and hashes of the split in use; empty where nothing is known of it."""
        return self.splits.get(self.split, Split())

    @property
    def sizes(self) -> dict[str, int] | None:
        """Images in train, val and test of the split in use, as far as they are known; ``None`` if none is."""
        facts = self.facts
        known = {part: getattr(facts, part) for part in ("train", "val", "test")}
        return {part: size for part, size in known.items() if size is not None} or None

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several labels."""
        return self.task == "multilabel"

    @property
    def tests_only(self) -> bool:
        """Whether there is nothing to train on: the reader is told of no training images."""
        splits = getattr(self.options, "splits", {})
        return bool(splits) and "train" not in splits

    def base(self, root: str | Path | None = None) -> Path:
        """Return the folder of this data set under ``root`` (see :func:`data_root`): the first that exists."""
        places = self.places(root)
        return next((place for place in places if place.is_dir()), places[0])

    def places(self, root: str | Path | None = None) -> list[Path]:
        """Return the absolute folders that are looked in, in order."""
        if self.packaged:
            return [ASSETS / folder for folder in self.folders]
        roots = [data_root(self.root)] if self.root is not None and root is None else data_roots(root)
        return [place / folder for place in roots for folder in self.folders]

    def with_split(self, name: str | None) -> Card:
        """Return this card with another of its splits, or with a split file of the user's in the data set's folder.

        Args:
            name: A split's name, or the name of a file that ends in ``.json``; ``None`` for the default.

        Raises:
            ConfigError: The card has no such split, or takes no split file.
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
    """Return the absolute data root: ``root``, else the first of ``VLPROMPT_DATA``, else ``data`` here."""
    return data_roots(root)[0]


def data_roots(root: str | Path | None = None) -> list[Path]:
    """Return all absolute data roots: ``root``, else the folders in ``VLPROMPT_DATA``, else ``data`` here."""
    named = (
        [root] if root is not None else [part for part in os.environ.get("VLPROMPT_DATA", "").split(os.pathsep) if part]
    )
    return [Path(os.path.abspath(Path(one).expanduser())) for one in named or ["data"]]


@functools.lru_cache(maxsize=1)
def imagenet_names() -> dict[str, str]:
    """Return OpenAI's CLIP names of ImageNet's 1,000 classes by WordNet id, in the order of the ids."""
    text = (ASSETS / "imagenet" / "classnames.txt").read_text(encoding="utf-8")
    return dict(line.split(" ", 1) for line in text.splitlines())


def describe(card: Card) -> dict[str, Any]:
    """Return the card's facts as plain JSON values, what is empty left out."""
    found: dict[str, Any] = _bare({key: value for key, value in asdict(card).items() if key != "file"})
    return found


def _bare(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _bare(inner) for key, inner in value.items() if inner not in (None, (), {}, "", [], False)}
    return [_bare(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def stated_class_names(card: Card) -> list[str] | None:
    """Return the class names by label that the card itself states, else ``None``.

    ImageNet's are those of OpenAI's CLIP, as in CoOp's ``classnames.txt`` (two occur twice: ``missile`` and
    ``sunglasses``).
    """
    if card.classes.names:
        return list(card.classes.names)
    if card.classes.names_from == "wnids":
        names = imagenet_names()
        keys = card.classes.keys or tuple(names)
        return [names[key] for key in keys]
    return None
