"""Options of each reader: ``reader_options`` in the YAML file of a card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator

from vlprompt.config.types import Count, Holds, validated
from vlprompt.datasets.paths import stays_inside


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _named(value: Any) -> Any:
    return (
        {name: name for name in value} if isinstance(value, list) and all(isinstance(n, str) for n in value) else value
    )


def _is_archive(name: str) -> bool:
    return stays_inside(name) and not set("{}") & set(name.replace("{}", ""))


Inside = Annotated[str, Holds(stays_inside, "a path inside the data root")]
"""A path that stays inside the folder that it is relative to."""
Archive = Annotated[str, Holds(_is_archive, "a path inside the data root, with {} or no braces")]
"""An archive's path; ``{}`` is replaced by a folder."""
OneOrMore = BeforeValidator(_listed)
"""Metadata of a list of texts: a single text is accepted."""
Named = BeforeValidator(_named)
"""Metadata of a mapping of texts: a list of keys is accepted, with the keys as values."""
if TYPE_CHECKING:
    Part = str  # keys of a Mapping are invariant, and readers use plain texts
else:
    Part = Literal["train", "val", "test"]
Paths = Mapping[Part, Annotated[tuple[Inside, ...], OneOrMore]]


@validated("reader_options")
class SplitJsonOptions:
    """CoOp's split file.

    Attributes:
        split_file: The file, under the data set's folder.
        image_dir: Folder of the images; sample ids are relative to it.
        index_by: ``relative_path``, or ``basename``: images are found in any sub-folder by their file name, for
            repacked copies of a data set.
        archive: Zip archive of the images. ``{}`` in its name stands for the first folder of an image's path: one
            archive per folder.
        variants: Whether a path may end in ``#`` and a variant (:mod:`vlprompt.datasets.variants`).
    """

    split_file: Inside
    image_dir: Inside = "."
    index_by: Literal["relative_path", "basename"] = "relative_path"
    archive: Archive | None = None
    variants: bool = False


@validated("reader_options")
class FolderOptions:
    """Class folders.

    Attributes:
        image_dir: Folder that ``splits`` are relative to; sample ids are relative to it.
        splits: For train, val and test, the folders that contain class folders; ``{domain}`` stands for the folder of
            each domain. Empty for a folder of the user, in either layout of
            :func:`vlprompt.datasets.readers.folder.read_folder`.
        sort: Order of the class folders: ``bytes`` of their names, or ``int`` for their numeric value.
        ignore: Names of files and folders to skip.
        lower: Whether class names are the folder names in lower case (after sorting).
    """

    image_dir: Inside = "."
    splits: Paths = field(default_factory=dict)
    sort: Literal["bytes", "int"] = "bytes"
    ignore: Annotated[tuple[str, ...], OneOrMore] = ()
    lower: bool = False


@validated("reader_options")
class ListFileOptions:
    """Text lists of images with their labels.

    Attributes:
        splits: For train, val and test, the list files under the data set's folder. ``{domain}`` and ``{class}`` stand
            for the keys of each domain and class.
        image_dir: Folder of the images; sample ids are relative to it.
        format: ``lines`` (an image and its label), ``per_class`` (one file per class with lines of an image and 1, 0 or
            -1; only 1 counts), ``coco`` (instance annotations) or ``jsonl`` (an object on every line).
        label: Label of a line: ``number`` or ``name`` of the class, or ``folder``: no label, the class is the first
            folder of the path.
        first_label: The lowest label number.
        suffix: Suffix to append to image names, such as ``.jpg``.
        names_file: A list of the class names in label order, if the card does not have them.
        folders: Folder of the images of each split, under ``image_dir``.
        image_key: Key of the image's path in a ``jsonl`` object.
        label_key: Key of the label.
    """

    splits: Paths
    image_dir: Inside = "."
    format: Literal["lines", "per_class", "coco", "jsonl"] = "lines"
    label: Literal["number", "name", "folder"] = "number"
    first_label: Count = 0
    suffix: str = ""
    names_file: Inside | None = None
    folders: Annotated[Mapping[str, Inside], Named] = field(default_factory=dict)
    image_key: str = "path"
    label_key: str = "label"


@validated("reader_options")
class TorchvisionOptions:
    """A torchvision data set.

    Attributes:
        dataset: Name of the class in ``torchvision.datasets``.
        splits: For train, val and test, the arguments that select the split.
    """

    dataset: str
    splits: Mapping[Part, Mapping[str, Any]]


@validated("reader_options")
class ShardOptions:
    """Image archives.

    Attributes:
        splits: For train, val and test, the folders of the shards (``webdataset``), or the files (``parquet``; ``*`` is
            a wildcard).
        format: ``webdataset`` tar files in CLIP_benchmark's layout, or Hugging Face's ``parquet`` files.
        image_key: Column of the images in ``parquet`` files.
        label_key: Column of the labels.
    """

    splits: Paths
    format: Literal["webdataset", "parquet"] = "webdataset"
    image_key: str = "image"
    label_key: str = "label"


@validated("reader_options")
class PairsOptions:
    """Image-caption pairs: a JSON object with ``image`` and ``caption`` on every line of ``split_file``.

    Attributes:
        split_file: The file, under the data set's folder.
        image_dir: Folder of the images.
        archive: As in :class:`SplitJsonOptions`.
        variants: As in :class:`SplitJsonOptions`.
    """

    split_file: Inside
    image_dir: Inside = "."
    archive: Archive | None = None
    variants: bool = False


ReaderOptions = SplitJsonOptions | FolderOptions | ListFileOptions | TorchvisionOptions | ShardOptions | PairsOptions
OPTIONS: Mapping[str, type[Any]] = {
    "split_json": SplitJsonOptions,
    "folder": FolderOptions,
    "list_file": ListFileOptions,
    "torchvision": TorchvisionOptions,
    "shards": ShardOptions,
    "pairs": PairsOptions,
}
