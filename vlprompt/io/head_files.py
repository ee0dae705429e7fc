"""The two files of a saved head: finding, reading and checking them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from safetensors.torch import load_file
from torch import Tensor

from vlprompt._files import file_checksum, parse_json, read_text
from vlprompt._finite import not_finite
from vlprompt.config.texts import DESCRIPTORS, FILE
from vlprompt.config.types import MaxLen, Name, Positive, validate, validated
from vlprompt.errors import HeadError, bulleted

SCHEMA = 1
CONFIG_FILE, TENSOR_FILE = "config.json", "head.safetensors"
_MAX_CONFIG_BYTES = 16 << 20
Short = Annotated[str, MaxLen(1024)]


@validated("backbone")
class BackboneFacts:
    """What identifies a backbone: name, weights, precision, size of its features, checksum of its weights.

    ``image_size`` is the one for which position embeddings were interpolated, if any; older heads have none.
    """

    name: Short
    pretrained: Short
    precision: Short
    embed_dim: Positive
    fingerprint: Short
    image_size: Positive | None = None


@validated("")
class HeadConfig:
    """The content of a head's ``config.json``.

    Attributes:
        schema: Version of the format.
        method: Name of the method.
        settings: Its settings.
        class_names: The C classes, in the order of the logits.
        all_class_names: Every class of the data set, those of ``class_names`` first.
        backbone: The backbone it was trained on.
        preprocess: The constants that the backbone's images need.
        training: How it was trained.
        versions: Versions of packages.
        tensors_sha256: SHA-256 of ``head.safetensors``.
        objectives: Objectives with their settings; older heads have none.
        decomposition: The decomposition with its settings, if any.
    """

    schema: int
    method: Name
    settings: dict[str, Any]
    class_names: tuple[str, ...]
    all_class_names: tuple[str, ...]
    backbone: BackboneFacts
    preprocess: dict[str, Any]
    training: dict[str, Any]
    versions: dict[str, Any]
    tensors_sha256: Short
    objectives: dict[str, dict[str, Any]] = field(default_factory=dict)
    decomposition: dict[str, dict[str, Any]] = field(default_factory=dict)


def find_head(folder: str | Path) -> Path:
    """Return the folder that holds ``config.json`` and ``head.safetensors``: ``folder`` or its ``head/``.

    Raises:
        HeadError: Neither folder holds a head.
    """
    folder = Path(folder)
    for candidate in (folder, folder / "head"):  # os.path returns False for invalid names
        if os.path.isfile(candidate / CONFIG_FILE) and os.path.isfile(candidate / TENSOR_FILE):
            return candidate
    if os.path.isfile(folder):
        raise HeadError(
            f"{folder} is a file; use the folder that holds {CONFIG_FILE} and {TENSOR_FILE}, or the run folder"
        )
    if not os.path.exists(folder):
        if kept := sorted(folder.parent.glob(f".{glob.escape(folder.name[:100])}.older-*/{CONFIG_FILE}")):
            raise HeadError(
                f"saving over {folder} was interrupted; restore the older head: mv {kept[0].parent} {folder}"
            )
        raise HeadError(f"there is no folder {folder}. Train a head first: vlprompt train --config mocoop/demo")
    raise HeadError(
        f"{folder} holds no head: looked for {CONFIG_FILE} and {TENSOR_FILE} in it and in {folder / 'head'}. "
        "An unfinished run has none yet; run its train command again to finish it."
    )


def read_config(folder: Path) -> HeadConfig:
    """Return the checked ``config.json`` of a head.

    Raises:
        HeadError: Not JSON, missing or unknown keys, values of a wrong type, or another schema.
    """
    path = folder / CONFIG_FILE
    try:
        config = parse_json(read_text(path, _MAX_CONFIG_BYTES))
    except (OSError, ValueError) as error:
        raise HeadError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise HeadError(f"{path} holds a {type(config).__name__}; expected an object")
    schema = config.get("schema")
    if isinstance(schema, int) and not isinstance(schema, bool) and schema != SCHEMA:
        fix = "Run: pip install -U vlprompt" if schema > SCHEMA else "Save the head again."
        raise HeadError(f"{path} has schema {str(schema)[:20]}; this vlprompt reads schema {SCHEMA}. {fix}")
    checked, problems = validate(HeadConfig, config)
    if checked is None:
        lines = "\n  ".join(problem.text[:200] for problem in problems[:20])
        raise HeadError(f"{path} is not a head's configuration:\n  {lines}")
    for text in _texts([checked.settings, checked.objectives, checked.decomposition]):
        if text.startswith((FILE, DESCRIPTORS)):
            raise HeadError(f"{path} names a file, {text[:80]!r}; a head holds its texts themselves. Save it again.")
    return checked


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a plain value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def read_tensors(folder: Path, config: HeadConfig) -> dict[str, Tensor]:
    """Return the tensors of a head whose :func:`read_config` is ``config``.

    Raises:
        HeadError: The file is damaged or belongs to another head, or a value is not finite.
    """
    path = folder / TENSOR_FILE
    try:
        checksum = file_checksum(path)
    except OSError as error:
        raise HeadError(f"{path} cannot be read: {error.strerror or error}") from error
    if checksum != config.tensors_sha256:
        raise HeadError(
            f"{path} is damaged or belongs to another head: its SHA-256 is {checksum[:12]}..., {CONFIG_FILE} records "
            f"{config.tensors_sha256[:12]}... Save or copy the whole folder again."
        )
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except Exception as error:  # the checksum is right, so this is another kind of file
        raise HeadError(f"{path} is not a safetensors file: {str(error)[:200]}") from error
    if lines := not_finite(tensors):
        raise HeadError(f"{path} holds values that are not finite; train the head again:\n{bulleted(lines, limit=6)}")
    return tensors
