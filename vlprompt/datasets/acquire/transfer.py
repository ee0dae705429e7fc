"""Fetches one file over https, going on where an earlier transfer broke off."""

from __future__ import annotations

import http.client
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

Tell = Callable[[str], None]
_CHUNK = 2**18


@dataclass(frozen=True)
class Network:
    """How files are fetched.

    Attributes:
        schemes: Accepted schemes of addresses, also after redirection.
        timeout: Seconds to wait for a connection and for every piece of an answer.
        tries: How often a transfer that broke off is taken up again without any progress.
        pause: Seconds before the first such try; each further one waits twice as long.
    """

    schemes: tuple[str, ...] = ("https",)
    timeout: float = 10.0
    tries: int = 3
    pause: float = 1.0


class Unreachable(Exception):
    """A file cannot be fetched; the text says why."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, schemes: tuple[str, ...]) -> None:
        self.schemes = schemes

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urllib.parse.urlsplit(newurl).scheme not in self.schemes:
            raise Unreachable(f"it leads to {newurl}, which is not {' or '.join(self.schemes)}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str, part: Path, has_sum: bool, network: Network, tell: Tell) -> None:
    """Fetch ``url`` to ``part``, going on where an earlier transfer broke off.

    Without a checksum nothing would show that the file changed between two runs, so there a new run begins anew.
    """
    if not has_sum:
        part.unlink(missing_ok=True)
    opener = urllib.request.build_opener(_Redirects(network.schemes))
    version, waited = "", 0
    with _bar(part.name.removesuffix(".part"), tell) as show:
        while True:
            have = part.stat().st_size if part.exists() else 0
            headers = {"User-Agent": "vlprompt", **({"Range": f"bytes={have}-"} if have else {})}
            headers |= {"If-Range": version} if have and version else {}
            try:
                with opener.open(urllib.request.Request(url, headers=headers), timeout=network.timeout) as response:
                    version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
                    if version.startswith("W/"):  # a weak tag may not be used with a range
                        version = ""
                    _receive(response, part, have, show)
                return
            except urllib.error.HTTPError as error:
                if error.code == 416 and have:  # there is nothing behind what we have: too much, or all of it
                    if has_sum and error.headers.get("Content-Range", "").endswith(f"/{have}"):
                        return
                    part.unlink()
                    continue
                if error.code < 500 and error.code != 429:
                    raise Unreachable(f"the server answers {error.code} {error.reason}") from error
                reason = f"the server answers {error.code} {error.reason}"
            except (OSError, http.client.HTTPException) as error:
                reason = f"{getattr(error, 'reason', None) or error or type(error).__name__}"
            got = part.stat().st_size if part.exists() else 0
            if got == 0 and not have:
                raise Unreachable(reason)  # never got anything: waiting would not help
            waited = 0 if got > have else waited + 1
            if waited > network.tries:
                raise Unreachable(
                    f"{reason}, {waited} times; {got:,} bytes are kept and the next run goes on from there"
                )
            time.sleep(network.pause * 2 ** max(0, waited - 1))


def _receive(response: Any, part: Path, have: int, show: Callable[[int, int | None], None]) -> None:
    resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    start = have if resumed else 0
    length = response.headers.get("Content-Length")
    total = start + int(length) if length and length.isdigit() else None
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - start > free:
        raise Unreachable(f"it has {total:,} bytes, and {free:,} are free on the disk of {part.parent}")
    with open(part, "ab" if resumed else "wb") as stream:
        while chunk := response.read(_CHUNK):
            stream.write(chunk)
            show(stream.tell(), total)
        size = stream.tell()
    if total is not None and size < total:
        raise http.client.IncompleteRead(b"", total - size)


@contextmanager
def _bar(name: str, tell: Tell) -> Iterator[Callable[[int, int | None], None]]:
    """Give a function that takes bytes so far and in all: a bar on a terminal, nothing but two lines elsewhere."""
    if not sys.stderr.isatty():
        tell(f"{name}: fetching")
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
