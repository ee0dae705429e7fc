"""Kept images: which images of the user a run was trained and tested on, by their content.

A picture that is moved to another folder or renamed keeps its content. ``images.json`` in a run folder is compared with
the test images of later evaluations (:mod:`vlprompt.runs.provenance`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlprompt._files import parse_json, read_text, write_json
from vlprompt.datasets.images import contents_of
from vlprompt.datasets.records import Sample
from vlprompt.errors import DataError

#: Name of the file in a run folder.
KEPT_IMAGES = "images.json"
_LARGEST_FILE = 256 * 2**20
Contents = Mapping[str, str | None]


@dataclass(frozen=True)
class KeptImages:
    """The images of a run: the SHA-256 of their files by id, None where it is not known.

    Attributes:
        trained: Images that the head was trained or selected on.
        tested: Images of the complete test list.
        starts: Ids by SHA-256 of images that the heads were trained on from which the run started or learned.
    """

    trained: Contents
    tested: Contents
    starts: Mapping[str, str] = field(default_factory=dict)

    def trained_contents(self) -> dict[str, str]:
        """Return the ids of all training images by SHA-256."""
        return {**self.starts, **{digest: name for name, digest in self.trained.items() if digest is not None}}

    def shared(self, samples: Sequence[Sample], contents: Mapping[str, str | None]) -> list[tuple[str, str]]:
        """Return the ids of ``samples`` that are training images, each with the id that it had then.

        Images of unknown content are compared by their ids. A test image of the run itself is not reported again if it
        is unchanged.

        Args:
            samples: Test images.
            contents: Their SHA-256 by id (:func:`contents_by_id`); empty if unknown.
        """
        known, found = self.trained_contents(), []
        for sample in samples:
            digest = contents.get(sample.id)
            if digest is None or not known:
                found += [(sample.id, sample.id)] if sample.id in self.trained else []
            elif digest in known and self.tested.get(sample.id) != digest:
                found.append((sample.id, known[digest]))
        return found


def contents_by_id(samples: Sequence[Sample]) -> dict[str, str | None]:
    """Return the SHA-256 of the images by id; empty for more images than are hashed."""
    contents = contents_of([sample.source for sample in samples])
    return {} if contents is None else dict(zip((sample.id for sample in samples), contents, strict=True))


def write_kept_images(path: Path, kept: KeptImages) -> None:
    """Write ``kept`` as JSON."""
    write_json(path, {"trained": dict(kept.trained), "tested": dict(kept.tested), "starts": dict(kept.starts)})


def read_kept_images(path: Path) -> KeptImages:
    """Return the content of ``path``.

    Raises:
        DataError: It cannot be read, or is no such file.
    """
    try:
        content = parse_json(read_text(path, _LARGEST_FILE))
    except (OSError, ValueError) as error:
        raise DataError(f"The kept images {path} cannot be read: {str(error)[:200]}.") from error
    parts = [content.get(name) if isinstance(content, dict) else None for name in ("trained", "tested", "starts")]
    if not all(
        isinstance(part, dict) and all(isinstance(value, str | None) for value in part.values()) for part in parts
    ):
        raise DataError(f"The kept images {path} are damaged: accepted are trained, tested and starts, texts by id.")
    trained, tested, starts = (dict(part) for part in parts if isinstance(part, dict))
    return KeptImages(trained, tested, {digest: str(name) for digest, name in starts.items()})
