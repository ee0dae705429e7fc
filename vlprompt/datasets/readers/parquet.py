"""Reading of Hugging Face image data sets in parquet files, for :mod:`vlprompt.datasets.readers.shards`."""

from __future__ import annotations

import functools
import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlprompt._files import open_regular, parse_json, sha256_bytes
from vlprompt.datasets.card import Card
from vlprompt.datasets.images import PLAIN, Reading, decode_rgb
from vlprompt.datasets.options import ShardOptions
from vlprompt.datasets.paths import resolve
from vlprompt.datasets.readers.missing import missing_text
from vlprompt.datasets.readers.rows import Row, Rows
from vlprompt.datasets.report import Report
from vlprompt.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


#: Largest row group of images, in bytes, which is in memory at once, and most rows of all files of a split. A file of a
#: few bytes can declare any number of equal rows. (datasets writes groups of 100 MB to 1 GB.)
_LARGEST_GROUP, _MOST_ROWS = 4 * 2**30, 20_000_000
#: Rows that are decoded at once.
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class ParquetSource:
    """An image in a parquet file.

    Attributes:
        path: The file.
        column: Name of the image column.
        group: Number of the row group.
        row: Number of the row in the group.
    """

    path: str
    column: str
    group: int
    row: int
    reading: Reading = PLAIN

    def open(self) -> Image:
        """Decode the image. Raises :class:`~vlprompt.errors.DataError` that names it."""
        return decode_rgb(*self.encoded(), self.reading)

    def encoded(self) -> tuple[bytes, str]:
        """Return the bytes of the image and its name."""
        name = f"{self.path}, row {self.row} of group {self.group}"
        try:
            data = _group(self.path, self.column, self.group, self._state())[self.row].as_py()
        except (DataError, MemoryError):
            raise
        except Exception as error:  # Arrow's errors have no common type
            raise DataError(f"Image {name} cannot be read: {str(error)[:200]}.") from error
        data = data.get("bytes") if isinstance(data, dict) else data
        if not isinstance(data, bytes):
            raise DataError(f"Image {name} is not in the file, only its name. Fetch a copy that includes the images.")
        return data, name

    def stamp(self) -> str:
        """Return size and modification time of the file, and the image's position in it."""
        return self.reading.stamped(f"{self._state()}-{self.group}-{self.row}")

    def stored_bytes(self) -> int:
        """Return the mean number of bytes of the images in the row group."""
        return _bytes_per_row(self.path, self.column, self.group, self._state())

    def content(self) -> str:
        """Return the SHA-256 of the image's bytes."""
        return self.reading.stamped(sha256_bytes(self.encoded()[0]))

    def _state(self) -> str:
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise DataError(f"File {self.path} cannot be read: {error.strerror or error}.") from error
        return f"{status.st_size}-{status.st_mtime_ns}"


@functools.lru_cache(maxsize=4)
def _group(path: str, column: str, group: int, state: str) -> Any:
    """Return the encoded images of a row group. They are in memory, so forked processes share them."""
    del state
    chunks: list[Any] = []
    size = 0
    with _parquet_file(path) as file:
        # In parts: the stated sizes may be wrong, and a value of a dictionary may be repeated in every row.
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[column]):
            chunks.append(batch.column(0))
            size += chunks[-1].nbytes
            if size > _LARGEST_GROUP:
                raise DataError(f"{path}: group {group} has more than {_LARGEST_GROUP:,} bytes of images")
    return import_module("pyarrow").chunked_array(chunks)


@contextmanager
def _parquet_file(path: str | Path) -> Iterator[Any]:
    """Open a parquet file. Raises OSError for what is not a regular file, and Arrow's errors."""
    with open_regular(path) as stream, import_module("pyarrow.parquet").ParquetFile(stream) as file:
        yield file


@functools.lru_cache(maxsize=256)
def _bytes_per_row(path: str, column: str, group: int, state: str) -> int:
    del state
    try:
        with _parquet_file(path) as file:
            facts = file.metadata.row_group(group)
    except MemoryError:
        raise
    except Exception as error:  # Arrow's errors have no common type
        raise DataError(f"File {path} cannot be read: {str(error)[:200]}.") from error
    chunks = [facts.column(number) for number in range(facts.num_columns)]
    of_images = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column]
    total = sum(int(chunk.total_uncompressed_size) for chunk in of_images)
    return total // max(1, int(facts.num_rows))


def read_parquet(card: Card, options: ShardOptions, split: str, base: Path, report: Report) -> Rows:
    """Return the rows of a split; keys are row numbers over all files of the split, sorted by name."""
    try:
        import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(f"Reading {card.name} needs pyarrow, which is not installed: pip install pyarrow") from error
    files: list[Path] = []
    for pattern in options.splits[split]:
        found = sorted(glob.glob(pattern, root_dir=base), key=os.fsencode)
        matches = [path for match in found if (path := resolve(base, match)).is_file()]
        if not matches:
            raise DataError(missing_text(card, base, f"{base / pattern} (does not exist)"))
        files += matches
    rows: list[Row] = []
    names: list[str] = []
    left = _MOST_ROWS
    for path in files:
        name = path.relative_to(base).as_posix()
        try:
            with _parquet_file(path) as file:
                left -= file.metadata.num_rows
                if left < 0:
                    raise ValueError(f"more than {_MOST_ROWS:,} rows in all")
                schema = file.schema_arrow
                problem = _column_problem(schema, options)
                counts = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
                labels = [] if problem else file.read(columns=[options.label_key]).column(options.label_key).to_pylist()
        except MemoryError:
            raise
        except Exception as error:  # Arrow's errors have no common type
            report.error("S01", f"{name} cannot be read as a parquet file: {str(error)[:200]}")
            continue
        if problem:
            report.error("S03", f"{name}: {problem}")
            continue
        file_names = _names(schema.metadata or {}, options.label_key)
        if names and file_names and file_names != names:
            report.error("S20", f"{name} has other class names than the files before it")
        names = names or file_names
        places = ((group, row) for group, count in enumerate(counts) for row in range(count))
        for (group, row), label in zip(places, labels, strict=True):
            key = str(len(rows))
            source = ParquetSource(str(path), options.image_key, group, row)
            listed = label if isinstance(label, list) else [label]
            if any(isinstance(value, bool) or not isinstance(value, int) or value < 0 for value in listed):
                report.error("S06", f"{name}: row {key} has label {str(label)[:40]}; whole numbers from 0 are expected")
                label = []
            rows.append(Row(key, tuple(sorted(set(label))) if isinstance(label, list) else label, source))
    return Rows(rows, [], names)


def _column_problem(schema: Any, options: ShardOptions) -> str:
    """Return the problem of the columns, or an empty text."""
    absent = [name for name in (options.image_key, options.label_key) if name not in schema.names]
    if absent:
        return f"there is no column {absent[0]!r}; there are: {', '.join(schema.names)[:200]}"
    kind = str(schema.field(options.image_key).type)
    if not (kind in ("binary", "large_binary") or (kind.startswith("struct<") and "bytes: " in kind)):
        return f"column {options.image_key!r} holds {kind[:80]}; images are expected (struct of bytes and path)"
    return ""


def _names(metadata: dict[bytes, bytes], column: str) -> list[str]:
    """Return the class names of the ClassLabel feature, or list of it, that Hugging Face's ``datasets`` writes."""
    try:
        feature = parse_json(metadata[b"huggingface"])["info"]["features"][column]
        if isinstance(feature, list):
            feature = feature[0]
        names = feature["names"] if "names" in feature else feature["feature"]["names"]
    except (KeyError, ValueError, TypeError, IndexError, RecursionError):
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []
