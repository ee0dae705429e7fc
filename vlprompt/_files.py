"""Bounded reads, atomic file writes, file locks and SHA-256 checksums.

Nothing here imports torch before it is called with tensors: the modules of ``vlprompt.datasets`` use it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from vlprompt.errors import ConfigError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = ".writing-"
#: The name of a temporary file; the group is what it was to become, without its suffix.
LEFTOVER = re.compile(rf"{re.escape(_PREFIX)}(.+)-[^-]+-[^-]+\.tmp")


def home_path(path: str | Path) -> Path:
    """Return ``path`` with the home folder in place of a leading ``~`` or ``~user``.

    Raises:
        ConfigError: That user or home folder is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"the home folder in {str(path)!r} is not known. Write the whole path, or say where it is: "
            "export HOME=FOLDER"
        ) from None


# -- writing ----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a temporary file in the folder of ``path``; afterwards the file is synced and renamed to it.

    A reader never sees half a file. If the body raises, or the process is killed, an older ``path`` is unchanged. The
    permissions follow the umask, also if the body writes with a library that makes private files (safetensors).

    Raises:
        OSError: The file cannot be written.
    """
    temporary = path.with_name(f"{_PREFIX}{path.stem}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        created = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        mode = stat.S_IMODE(os.fstat(created).st_mode)
        os.close(created)
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary), temporary):
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


def open_lock(path: Path, *, shared: bool = False) -> int:
    """Open a lock file and return its descriptor; the file is created if it is missing and never changed.

    A link, a pipe or a device in its place is refused: in a shared folder, others may have put it there.

    Args:
        path: The lock file.
        shared: Whether a file that this user may read but not write is accepted, as for :func:`locked`.

    Raises:
        OSError: The file cannot be opened or is not a regular file.
    """
    # O_NONBLOCK: opening a pipe would wait for its other end.
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
        except PermissionError:
            if not shared:
                raise
            descriptor = os.open(path, os.O_RDONLY | flags)
    except OSError as error:
        if path.is_symlink():
            raise _not_regular(path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    return descriptor


def _not_regular(path: Path) -> OSError:
    text = "the lock file is a link, a folder, a pipe or a device; a regular file is expected"
    return OSError(errno.EINVAL, text, str(path))


def lock(descriptor: int) -> None:
    """Lock the file of :func:`open_lock` for this process until it is closed or the process ends.

    Raises:
        OSError: Another process holds the lock.
    """
    if sys.platform == "win32":
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        # A record lock belongs to one process. A lock of flock would pass to forked data loader processes, which live
        # some seconds longer than a killed run and would prevent its resumption.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def locked(path: Path, timeout: float | None = None) -> Iterator[None]:
    """Hold the lock file ``path`` against other processes and threads; the folder of ``path`` exists.

    Args:
        path: The lock file; see :func:`open_lock`.
        timeout: Seconds to wait for the lock; ``None`` waits until it is free.

    Raises:
        TimeoutError: The lock is held elsewhere.
        OSError: The file cannot be opened or locked.
    """
    until = None if timeout is None else time.monotonic() + timeout
    descriptor = open_lock(path, shared=True)
    try:
        while not _is_locked(descriptor):
            if until is not None and time.monotonic() >= until:
                raise TimeoutError(errno.ETIMEDOUT, "another process holds the lock", str(path))
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int) -> bool:
    """Lock an open file against all other open files, also those of this process; return whether it was free."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True


# -- reading ----------------------------------------------------------------------------------------------------------
def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file to read its bytes; links are followed.

    Raises:
        OSError: The file cannot be opened, or is a pipe, a device or a folder. Nothing waits for the end of a pipe.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is a pipe, a device or a folder; a regular file is expected", str(path))
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | Path, most: int) -> bytes:
    """Return the content of a regular file of at most ``most`` bytes.

    Pipes and devices are refused before they are read. A file is never read further than ``most``.

    Raises:
        OSError: The file cannot be read, is not a regular file, or is larger (``EFBIG``).
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(most + 1) if size <= most else b""
    if max(size, len(data)) > most:
        raise OSError(errno.EFBIG, f"it has {max(size, len(data)):,} bytes; at most {most:,} are read", str(path))
    return data


def read_text(path: str | Path, most: int, encoding: str = "utf-8") -> str:
    """Return the text of a file; see :func:`read_bytes`.

    Raises:
        OSError: As in :func:`read_bytes`.
        UnicodeDecodeError: The file is not text in this encoding.
    """
    return read_bytes(path, most).decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str | bytes, *, constants: bool = True) -> Any:
    """Return the value of a JSON text without repeated keys.

    Args:
        text: The text.
        constants: Whether ``NaN`` and ``Infinity``, which Python writes and JSON does not have, are accepted.

    Raises:
        ValueError: The text is not JSON, repeats a key of an object, or is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_distinct, parse_constant=None if constants else _no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for at, key in enumerate(names) if key in names[:at])
        raise ValueError(f"the key {twice[:80]!r} is given twice")
    return values


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
    with open_regular(path) as file:
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
