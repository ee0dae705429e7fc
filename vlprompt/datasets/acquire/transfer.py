"""Download of a file over https, with resume of partial transfers."""

from __future__ import annotations

import http.client
import os
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlprompt.errors import printable

Log = Callable[[str], None]
_CHUNK = 2**18


@dataclass(frozen=True)
class Network:
    """Settings of transfers.

    Attributes:
        schemes: Accepted URL schemes, also after redirection.
        timeout: Seconds to wait for a connection and for every chunk of a response.
        tries: Number of consecutive retries without progress.
        pause: Seconds before the first retry; each further retry waits twice as long.
    """

    schemes: tuple[str, ...] = ("https",)
    timeout: float = 10.0
    tries: int = 3
    pause: float = 1.0


class Unreachable(Exception):
    """A file cannot be fetched; the text gives the reason."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, schemes: tuple[str, ...]) -> None:
        self.schemes = schemes

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urllib.parse.urlsplit(newurl).scheme not in self.schemes:
            raise Unreachable(f"it redirects to {newurl}, which is not {' or '.join(self.schemes)}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str, partial: Path, has_sum: bool, network: Network, log: Log) -> None:
    """Fetch ``url`` to the file ``partial`` and resume a partial transfer.

    Without a checksum (``has_sum``), a change of the file between two runs cannot be detected, so each run starts from
    the beginning.
    """
    if not has_sum:
        partial.unlink(missing_ok=True)
    opener = urllib.request.build_opener(_Redirects(network.schemes))
    version, waited = "", 0
    with _bar(partial.name.removesuffix(".part"), log) as show:
        while True:
            have = partial.stat().st_size if partial.exists() else 0
            headers = {"User-Agent": "vlprompt", **({"Range": f"bytes={have}-"} if have else {})}
            headers |= {"If-Range": version} if have and version else {}
            try:
                with opener.open(urllib.request.Request(url, headers=headers), timeout=network.timeout) as response:
                    version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
                    if version.startswith("W/"):  # a weak tag may not be used with a range
                        version = ""
                    _receive(response, partial, have, show)
                return
            except urllib.error.HTTPError as error:
                if error.code == 416 and have:  # no bytes after the received ones: the file is complete or too long
                    if has_sum and error.headers.get("Content-Range", "").endswith(f"/{have}"):
                        return
                    partial.unlink()
                    continue
                if error.code < 500 and error.code != 429:
                    raise Unreachable(f"the server returns {error.code} {error.reason}") from error
                reason = f"the server returns {error.code} {error.reason}"
            except (OSError, http.client.HTTPException) as error:
                reason = f"{getattr(error, 'reason', None) or error or type(error).__name__}"
            received = partial.stat().st_size if partial.exists() else 0
            if received == 0 and not have:
                raise Unreachable(reason)  # nothing was ever received: no retry
            waited = 0 if received > have else waited + 1
            if waited > network.tries:
                raise Unreachable(
                    f"{reason}, {waited} times; {received:,} bytes are kept and the next run resumes there"
                )
            time.sleep(network.pause * 2 ** max(0, waited - 1))


def _receive(response: Any, partial: Path, have: int, show: Callable[[int, int | None], None]) -> None:
    resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    start = have if resumed else 0
    length = response.headers.get("Content-Length")
    total = start + int(length) if length and length.isdigit() else None
    free = shutil.disk_usage(partial.parent).free
    if total is not None and total - start > free:
        raise Unreachable(f"it has {total:,} bytes, and {free:,} are free on the disk of {partial.parent}")
    with open(partial, "ab" if resumed else "wb", opener=_plain) as stream:
        while chunk := response.read(_CHUNK):
            stream.write(chunk)
            show(stream.tell(), total)
        size = stream.tell()
    if total is not None and size < total:
        raise http.client.IncompleteRead(b"", total - size)


def _plain(path: str, flags: int) -> int:
    """Open a file to write to, not the target of a link that others may have put in its place."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)


@contextmanager
def _bar(name: str, log: Log) -> Iterator[Callable[[int, int | None], None]]:
    """Yield a function of received and total bytes: a progress bar on a terminal, one line of text elsewhere."""
    if not sys.stderr.isatty():
        log(f"{name}: fetching")
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(escape(printable(name)), total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
