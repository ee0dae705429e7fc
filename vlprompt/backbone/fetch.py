"""Published weights: finding them on this machine or downloading them from the Hugging Face hub.

Search order: ``$VLPROMPT_CACHE/weights/NAME/TAG/`` (by default ``~/.cache/vlprompt``), the Hugging Face
cache, the cache of OpenAI's package (``~/.cache/clip``), the hub.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlprompt._files import home_path
from vlprompt.errors import BackboneError

WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
CONFIG_FILE = "open_clip_config.json"

_PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class Published:
    """Location of the weights ``tag`` of ``name``: a hub repository and file names, best first, or a URL."""

    name: str
    tag: str
    repo: str
    files: tuple[str, ...]
    url: str = ""

    @property
    def folder(self) -> Path:
        """Folder that is searched for a file fetched by hand."""
        return cache_folder() / "weights" / self.name / self.tag


def cache_folder() -> Path:
    """Return vlprompt's cache folder: ``$VLPROMPT_CACHE``, else ``vlprompt`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    folder = os.environ.get("VLPROMPT_CACHE")
    if folder:
        return home_path(folder)
    return home_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vlprompt"


def published(name: str, tag: str, config: dict[str, Any]) -> Published:
    """Return the location of the weights in open_clip's entry ``config`` of a pretrained tag."""
    repo, _, file = str(config.get("hf_hub", "")).rpartition("/")
    url = str(config.get("url", ""))
    if not repo:
        return Published(name, tag, "", (url.rpartition("/")[2],), url)
    files = WEIGHT_FILES
    if file:
        stem, dot, ending = file.rpartition(".")
        safe = (f"{stem}.safetensors",) if dot and ending in ("bin", "pth", "pt") else ()
        files = (*safe, file)
    return Published(name, tag, repo, files, url)


def find_or_fetch(source: Published) -> Path:
    """Return a local path of the weights; download them if they are not on this machine.

    Raises:
        BackboneError: They are not on this machine and cannot be downloaded; the text names the file, its address and
            its target. One short probe of the hub replaces its client's retry loops, so this takes only seconds.
    """
    for file in source.files:
        if (source.folder / file).is_file():
            return source.folder / file
    for file in source.files:
        if source.repo and (path := _in_hub_cache(source.repo, file)):
            return path
    old = home_path("~/.cache/clip") / source.url.rpartition("/")[2]
    if "openaipublic" in source.url and old.is_file():
        return old
    if not source.repo:
        raise BackboneError(_by_hand(source, "open_clip lists no hub repository for them"))
    try:
        return _download(source.repo, source.files)
    except _NotFetched as reason:
        raise BackboneError(_by_hand(source, str(reason))) from None


def find_or_fetch_repo(repo: str) -> tuple[Path, Path]:
    """Return local paths of ``open_clip_config.json`` and of the weights of a hub repository.

    Raises:
        BackboneError: They are not on this machine and cannot be downloaded.
    """
    try:
        return (
            _in_hub_cache(repo, CONFIG_FILE) or _download(repo, (CONFIG_FILE,)),
            next((path for file in WEIGHT_FILES if (path := _in_hub_cache(repo, file))), None)
            or _download(repo, WEIGHT_FILES),
        )
    except _NotFetched as reason:
        raise BackboneError(
            f"hf-hub:{repo} is not on this machine and cannot be downloaded ({reason}).\n"
            f"On a machine with a network fetch {CONFIG_FILE} and {WEIGHT_FILES[0]} from\n"
            f"  {_address(repo, '')}\ninto one folder, and use --backbone.name local-dir:FOLDER"
        ) from None


class _NotFetched(Exception):
    """Short reason why a download failed."""


def _in_hub_cache(repo: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        path = try_to_load_from_cache(repo, file)
    except ValueError:  # not a valid repository name
        return None
    return Path(path) if isinstance(path, str) else None


def _download(repo: str, files: Sequence[str]) -> Path:
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise _NotFetched("HF_HUB_OFFLINE is set")
    session: Any = huggingface_hub.get_session()
    status = 0
    for file in files:
        try:
            status = session.head(_address(repo, file), timeout=_PROBE_SECONDS).status_code
        except Exception as error:  # the HTTP client depends on the version of the hub package
            raise _NotFetched(f"no connection to {huggingface_hub.constants.ENDPOINT}: {_first_line(error)}") from None
        if status >= 400:
            continue
        try:
            return Path(huggingface_hub.hf_hub_download(repo, file))
        except Exception as error:
            raise _NotFetched(_first_line(error)) from None
    raise _NotFetched(f"the hub answered {status} for {repo}/{files[-1]}")


def _address(repo: str, file: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}/resolve/main/{file}" if file else f"{constants.ENDPOINT}/{repo}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _by_hand(source: Published, reason: str) -> str:
    file = source.files[0]
    address = _address(source.repo, file) if source.repo else source.url
    return (
        f"The weights {source.tag!r} of {source.name} are not on this machine and cannot be downloaded ({reason}).\n"
        f"Fetch this file on a machine with a network:\n  {address}\n"
        f"and save it as:\n  {source.folder / file}\n"
        f"or save it anywhere and use --backbone.pretrained {source.tag}=/path/to/{file}\n"
        "--backbone.name demo needs no download: it is the small CLIP included in vlprompt."
    )
