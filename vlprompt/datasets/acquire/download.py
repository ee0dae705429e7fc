"""``vlprompt data get``: downloads the files that a card allows, and lists those to fetch by hand.

Downloads use https with resume, compare checksums, and never replace files of the user.
"""

from __future__ import annotations

import os
import shutil
import urllib.parse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlprompt._files import file_checksum, home_path, locked, parse_json, read_bytes, replacing, write_json
from vlprompt._terminal import show
from vlprompt.datasets.acquire.transfer import Log, Network, Unreachable, download
from vlprompt.datasets.acquire.unpack import gunzip, unpack
from vlprompt.datasets.card import Card, Source
from vlprompt.datasets.paths import path_problem, resolve
from vlprompt.datasets.readers import new_report, read_into
from vlprompt.errors import DataError, VlpromptError

_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".rar", ".7z")
_RECORD = ".vlprompt-get.json"
_LARGEST_RECORD = 2**28


def get(
    card: Card,
    root: str | Path | None = None,
    *,
    source_file: str | Path | None = None,
    report: Log = show,
    network: Network = Network(),  # noqa: B008  (frozen)
) -> list[str]:
    """Fetch the files of a data set that may be fetched, after reporting page and licence.

    Args:
        card: The data set's card.
        root: The data root (:func:`vlprompt.datasets.card.data_root`).
        source_file: A file that the user fetched by hand, used instead of a download.
        report: Called with every line of the report.
        network: Settings of transfers.

    Returns:
        Lines that describe the steps to do by hand (:func:`steps`); empty if there are none.

    Raises:
        DataError: If a file cannot be reached, differs from its checksum, cannot be unpacked or would replace a file.
    """
    if card.packaged:
        report(f"{card.name} is part of vlprompt; there is nothing to fetch.")
        return []
    base = card.base(root)
    for page in dict.fromkeys(source.page for source in card.sources if source.page):
        report(f"page:     {page}")
    report(f"licence:  {card.licence.text}" + (f" ({card.licence.page})" if card.licence.page else ""))
    report(f"folder:   {base}")
    job = _Job(card, base, "" if root is None else f" --root {root}", report, network)
    if source_file is not None:
        with _locked(base, card.name):
            job.take(home_path(source_file))
    elif _is_complete(card, root):
        report(f"{card.name} is complete and can be read.")
    elif fetchable := [source for source in card.sources if job.fetchable(source)]:
        with _locked(base, card.name):
            for source in fetchable:
                job.fetch(source)
    return steps(card, root, network=network)


def steps(card: Card, root: str | Path | None = None, *, network: Network = Network()) -> list[str]:  # noqa: B008
    """Return lines that name the files to fetch by hand and their places; empty if there are none."""
    job = _Job(card, card.base(root), "" if root is None else f" --root {root}", show, network)
    remaining = [
        source for source in card.sources if not (card.packaged or job.fetchable(source) or job.is_present(source))
    ]
    if not remaining or _is_complete(card, root):
        return []
    lines = [line for source in remaining for line in job.by_hand(source)]
    return [*lines, f"how:      {card.notes.strip()}", f"check it: vlprompt data check {card.name}{job.where}"]


def _is_complete(card: Card, root: str | Path | None) -> bool:
    """Return whether the data set can be read and has the card's sizes."""
    report = new_report(card, card.base(root))
    try:
        read_into(card, root, report)
    except VlpromptError:
        return False
    return not report.failed and all(problem.code != "S13" for problem in report.problems)


@contextmanager
def _locked(base: Path, name: str) -> Iterator[None]:
    lock = ExitStack()
    try:
        base.mkdir(parents=True, exist_ok=True)
        lock.enter_context(locked(base / ".vlprompt-get.lock", timeout=0))
    except TimeoutError as error:
        raise DataError(f"Another `vlprompt data get {name}` is running in {base}. Wait for it to finish.") from error
    except OSError as error:
        raise DataError(f"Folder {base} cannot be written to: {error}. Give another data root: --root DIR") from error
    with lock:
        yield


@dataclass(frozen=True)
class _Job:
    card: Card
    base: Path
    where: str
    log: Log
    network: Network

    # -- sources ------------------------------------------------------------------------------------------------------
    def fetchable(self, source: Source) -> bool:
        return source.url is not None and urllib.parse.urlsplit(source.url).scheme in self.network.schemes

    def name(self, source: Source) -> str:
        """Return the published file name; empty if the card does not state it."""
        if source.url is not None:
            return urllib.parse.unquote(urllib.parse.urlsplit(source.url).path).rpartition("/")[2]
        name = source.what if "." in source.what.strip(".") and not set(" /\\") & set(source.what) else ""
        return name or (source.to or "").rpartition("/")[2]

    def target(self, source: Source) -> Path | None:
        """Return the folder to unpack an archive into, or the path of a file; None if the card states neither."""
        if source.unpack is not None:
            return resolve(self.base, source.unpack, folder=True)
        if source.to is not None:
            return resolve(self.base, source.to)
        name = self.name(source)
        return None if not name or path_problem(name) or name.lower().endswith(_ARCHIVES) else resolve(self.base, name)

    def is_present(self, source: Source) -> bool:
        target = self.target(source)
        if target is None:
            return False
        if source.unpack is None:
            return target.is_file()
        made = self.record().get(self.key(source))
        return isinstance(made, list) and bool(made) and all((target / str(name)).exists() for name in made)

    def by_hand(self, source: Source) -> list[str]:
        target, sums = self.target(source), _sums(source)
        lines = [f"by hand:  {source.what}, from {source.url or source.page or 'the page of the data set'}"]
        lines += [f"          expected {', '.join(sums)}"] if sums else []
        if target is not None:
            lines += [f"          goes to {target}", f"          or: {self.command}"]
        return lines

    @property
    def command(self) -> str:
        return f"vlprompt data get {self.card.name}{self.where} --from FILE"

    # -- record of unpacked archives ----------------------------------------------------------------------------------
    def key(self, source: Source) -> str:
        return source.sha256 or source.md5 or source.url or source.what

    def record(self) -> dict[str, Any]:
        try:
            content = parse_json(read_bytes(self.base / _RECORD, _LARGEST_RECORD))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def remember(self, source: Source, made: list[str]) -> None:
        write_json(self.base / _RECORD, {**self.record(), self.key(source): made})

    # -- fetching -----------------------------------------------------------------------------------------------------
    def fetch(self, source: Source) -> None:
        assert source.url is not None
        name, target = self.name(source), self.target(source)
        if target is None or path_problem(name):
            raise DataError(
                f"Card {self.card.name}: {source.url} has no file name, or the card no folder to unpack it into."
            )
        if self.is_present(source):
            self.log(f"{source.what}: already present in {target}")
            return
        if source.unpack is None:
            _refuse_existing(target)
        file = self.base / name
        downloaded = not file.exists()
        if downloaded:
            partial = self.base / f"{name}.part"
            try:
                download(source.url, partial, bool(_sums(source)), self.network, self.log)
            except Unreachable as error:
                raise DataError(
                    f"{source.url} cannot be fetched: {error}.\nFetch it by hand, possibly on another machine, then "
                    f"run: {self.command}\n(it goes to {target})"
                ) from error
            _check_sums(partial, source, f"{source.url} is not the published file", remove=True)
            os.replace(partial, file)
        else:
            self.log(f"{source.what}: {file} exists")
            _check_sums(file, source, f"{file} is not the published file; move it away")
        self.put(source, file, target)
        # A downloaded archive is removed after unpacking; a file that existed before belongs to the user.
        if downloaded and file != target:
            file.unlink()

    def take(self, file: Path) -> None:
        """Put a file that the user fetched into its place."""
        if not file.is_file():
            raise DataError(f"--from is {file}, which is not a file.")
        source = self._source_of(file)
        target = self.target(source)
        if target is None:
            raise DataError(
                f"The card of {self.card.name} does not state where {source.what} goes. {self.card.notes.strip()}"
            )
        if source.unpack is None and target.is_file() and file_checksum(target) == file_checksum(file):
            self.log(f"{source.what}: already present, {target}")
            return
        if source.unpack is None:
            _refuse_existing(target)
        if not _sums(source):
            self.log(f"{file} is identified as {source.what} by its name; its checksum is not known")
        self.put(source, file, target)

    def _source_of(self, file: Path) -> Source:
        sums = {kind: file_checksum(file, kind) for kind in ("md5", "sha256")}
        sources = [*self.card.sources, *self._split_file()]
        for source in sources:
            if any(getattr(source, kind) == value for kind, value in sums.items()):
                return source
        for source in sources:
            if file.name in (self.name(source), source.what, (source.to or "").rpartition("/")[2]):
                _check_sums(file, source, f"{file} is not the published {source.what}")
                return source
        known = [f"  {self.name(source) or source.what}  {', '.join(_sums(source))}".rstrip() for source in sources]
        raise DataError(
            f"{file} is not a file of {self.card.name}: neither its name nor its checksum (md5 {sums['md5']}, sha256 "
            f"{sums['sha256']}) is known. The files:\n" + "\n".join(known)
        )

    def _split_file(self) -> list[Source]:
        """Return the split file if the card's sources lack it; its content is compared when it is read."""
        name = getattr(self.card.options, "split_file", None)
        listed = any(name in (source.what, source.to) for source in self.card.sources)
        return [Source(name, to=name)] if name and not listed else []

    def put(self, source: Source, file: Path, target: Path) -> None:
        """Unpack, decompress or copy ``file`` to ``target``."""
        if source.unpack is not None:
            done = unpack(file, target, strip=source.strip, inner=source.inner)
            self.remember(source, done.made)
            self.log(f"{source.what}: {done.files:,} files unpacked into {target}")
            if done.kept:
                shown = f"{len(done.kept):,}, the first {target / done.kept[0]}"
                self.log(f"{source.what}: existing files that are not replaced: {shown}; move them to replace them")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.name.endswith(".gz") and not target.name.endswith(".gz"):
            gunzip(file, target)
        elif file != target:
            with replacing(target) as temporary:
                shutil.copyfile(file, temporary)
        self.log(f"{source.what}: {target}")


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise DataError(f"{target} exists and is never replaced. Move it away to get the published file.")


# -- checksums --------------------------------------------------------------------------------------------------------
def _sums(source: Source) -> list[str]:
    return [f"{kind} {value}" for kind in ("md5", "sha256") if (value := getattr(source, kind))]


def _check_sums(path: Path, source: Source, text: str, *, remove: bool = False) -> None:
    for kind in ("md5", "sha256"):
        expected = getattr(source, kind)
        if expected and (actual := file_checksum(path, kind)) != expected.lower():
            if remove:
                path.unlink()
            raise DataError(
                f"{text}: its {kind} is {actual}, expected {expected}." + (" It was removed." if remove else "")
            )
