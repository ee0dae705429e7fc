"""Atomic file writes, file locks and SHA-256 checksums.

Nothing here imports torch before it is called with tensors: the modules of ``vlprompt.datasets`` use it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = ".writing-"
#: The name of a temporary file; the group is what it was to become, without its suffix.
LEFTOVER = re.compile(rf"{re.escape(_PREFIX)}(.+)-[^-]+-[^-]+\.tmp")


# -- writing ----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a temporary file in the folder of ``path``; afterwards the file is synced and renamed to it.

    A reader never sees half a file. If the body raises, or the process is killed, an older ``path`` is unchanged. The
    body creates the file, so its permissions follow the umask, unlike those of :mod:`tempfile`.

    Raises:
        OSError: The file cannot be written.
    """
    temporary = path.with_name(f"{_PREFIX}{path.stem}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary), temporary):
            error.filename, error.filename2 = str(path), None  # the name that the reader of the message knows
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` as :func:`replacing` does; missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8 to ``path`` as :func:`write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a plain value as indented JSON to ``path`` as :func:`write_bytes` does."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def leftovers(folder: Path, stem: str = "*") -> Iterator[Path]:
    """Return the temporary files in ``folder`` of files called ``stem``, which a killed process may have left."""
    return folder.glob(f"{_PREFIX}{stem}-*.tmp")


def lock(file: IO[str]) -> None:
    """Lock an open file for this process until it is closed or the process ends.

    Raises:
        OSError: Another process holds the lock.
    """
    if sys.platform == "win32":
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        # A record lock belongs to one process. A lock of flock would pass to forked data loader processes, which live
        # some seconds longer than a killed run and would prevent its resumption.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# -- checksums --------------------------------------------------------------------------------------------------------
def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_text(text: str) -> str:
    """Return the SHA-256 of ``text`` in UTF-8."""
    return sha256_bytes(text.encode())


def sha256_lines(lines: Iterable[str]) -> str:
    """Return the SHA-256 of ``lines`` joined by LF, without a final LF."""
    digest, separator = hashlib.sha256(), ""
    for line in lines:
        digest.update((separator + line).encode())
        separator = "\n"
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of a plain value, as JSON with sorted keys; what JSON does not know is taken as a list."""
    return sha256_text(json.dumps(value, sort_keys=True, default=list))


def canonical_json(value: Any) -> str:
    """Return a plain value as JSON without spaces, with sorted keys.

    Raises:
        TypeError, ValueError: The value is not JSON.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def file_checksum(path: str | Path, kind: str = "sha256") -> str:
    """Return the checksum of a file, ``sha256`` or ``md5``."""
    digest = hashlib.new(kind, usedforsecurity=kind != "md5")
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_tensors(tensors: Mapping[str, Tensor], header: Callable[[str, Tensor], str], start: str = "") -> str:
    """Return the SHA-256 over tensors in the order of their names.

    Args:
        tensors: By name, on any device.
        header: Text that precedes the bytes of a tensor. File formats differ in it.
        start: Text that precedes everything.
    """
    import torch

    digest = hashlib.sha256(start.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(header(name, tensor).encode())
        if tensor.numel():
            flat: Any = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()
