"""The two files of a saved head: finding, reading and checking them."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from vlprompt._files import file_checksum
from vlprompt.errors import HeadError

SCHEMA = 1
CONFIG_FILE, TENSOR_FILE = "config.json", "head.safetensors"
_KEYS = {
    "schema": int,
    "method": str,
    "settings": dict,
    "objectives": dict,
    "decomposition": dict,
    "class_names": list,
    "all_class_names": list,
    "backbone": dict,
    "preprocess": dict,
    "training": dict,
    "versions": dict,
    "tensors_sha256": str,
}
_MAX_CONFIG_BYTES = 16 << 20


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


def read_config(folder: Path) -> dict[str, Any]:
    """Return the checked ``config.json`` of a head.

    Raises:
        HeadError: Not JSON, missing or unknown keys, values of a wrong type, or another schema.
    """
    path = folder / CONFIG_FILE
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise HeadError(f"{path} is larger than {_MAX_CONFIG_BYTES >> 20} MB, so it is not a head's configuration")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HeadError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise HeadError(f"{path} holds a {type(config).__name__}; expected an object")
    schema = config.get("schema")
    if isinstance(schema, int) and not isinstance(schema, bool) and schema != SCHEMA:
        fix = "Run: pip install -U vlprompt" if schema > SCHEMA else "Save the head again."
        raise HeadError(f"{path} has schema {str(schema)[:20]}; this vlprompt reads schema {SCHEMA}. {fix}")
    optional = ("objectives", "decomposition")  # missing in older heads
    wrong = [f"{key} is missing" for key in _KEYS if key not in config and key not in optional]
    wrong += [f"{key[:60]!r} is unknown" for key in config if key not in _KEYS]
    for key, kind in _KEYS.items():
        if key in config and (not isinstance(config[key], kind) or isinstance(config[key], bool)):
            wrong.append(f"{key} is {str(config[key])[:40]!r}; expected {kind.__name__}")
    facts = config.get("backbone")
    expected = {"name": str, "pretrained": str, "precision": str, "embed_dim": int, "fingerprint": str}
    if isinstance(facts, dict):
        missing = [(key, kind) for key, kind in expected.items() if not isinstance(facts.get(key), kind)]
        wrong += [f"backbone.{key} is missing or not {kind.__name__}" for key, kind in missing]
        long = [key for key, value in facts.items() if len(str(value)) > 1024]
        wrong += [f"backbone.{key[:60]} has more than 1,024 characters" for key in long]
    if wrong:
        raise HeadError(f"{path} is not a head's configuration:\n  " + "\n  ".join(wrong[:20]))
    return config


def read_tensors(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a head whose :func:`read_config` is ``config``.

    Raises:
        HeadError: The file is damaged or belongs to another head.
    """
    path = folder / TENSOR_FILE
    try:
        checksum = file_checksum(path)
    except OSError as error:
        raise HeadError(f"{path} cannot be read: {error.strerror or error}") from error
    if checksum != config["tensors_sha256"]:
        raise HeadError(
            f"{path} is damaged or belongs to another head: its SHA-256 is {checksum[:12]}..., {CONFIG_FILE} records "
            f"{config['tensors_sha256'][:12]}... Save or copy the whole folder again."
        )
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except Exception as error:  # the checksum is right, so this is another kind of file
        raise HeadError(f"{path} is not a safetensors file: {str(error)[:200]}") from error
    return tensors
