"""Folders that others can write to: planted lock files, modes of files, two users."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlprompt._files import locked, open_lock, read_bytes, replacing, write_json
from vlprompt.data import FeatureStore
from vlprompt.data.features import lock_of
from vlprompt.datasets.acquire.download import get
from vlprompt.datasets.card import Card, Classes, Templates
from vlprompt.datasets.options import FolderOptions
from vlprompt.errors import DataError, VlpromptError
from vlprompt.generation.bank import DiffusionBank, create_bank
from vlprompt.generation.recipe import Recipe
from vlprompt.runs.folder import opened

KEY = {"n": 1}
RECIPE = Recipe({"format": "png", "seed": 1})


def ones() -> torch.Tensor:
    return torch.ones(2, 3)


# -- locks ------------------------------------------------------------------------------------------------------------
def _store(folder: Path) -> None:
    FeatureStore(folder).get(KEY, ones)


def _fetch(folder: Path) -> None:
    (folder / "a.zip").write_bytes(b"")
    card = Card("toy", "folder", FolderOptions(), Classes(), Templates("{}"), folders=("toy",))
    get(card, folder, source_file=folder / "a.zip", report=lambda _: None)


def _run(folder: Path) -> None:
    with opened(folder / "run", {"seed": 1}, {}, force=False):
        pass


def _fill(folder: Path) -> None:
    DiffusionBank(folder, RECIPE).store("00" * 32, "a.png", {})


#: What takes a lock in a folder, and the lock's place there.
LOCKS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Path]]] = {
    "feature store": (_store, lambda folder: lock_of(FeatureStore(folder).path(KEY))),
    "new bank": (lambda folder: create_bank(folder, RECIPE) and None, lambda folder: folder / RECIPE.id[:16] / ".lock"),
    "bank": (_fill, lambda folder: folder / ".lock"),
    "download": (_fetch, lambda folder: folder / "toy" / ".vlprompt-get.lock"),
    "run": (_run, lambda folder: folder / ".run.lock"),
}


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "link to nothing"])
@pytest.mark.parametrize("place", LOCKS)
def test_a_planted_lock_is_refused_and_its_target_unchanged(place: str, kind: str, tmp_path: Path) -> None:
    act, lock_place = LOCKS[place]
    victim, lock = tmp_path / "victim.txt", lock_place(tmp_path / "shared")
    victim.write_text("mine")
    lock.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    else:
        lock.symlink_to(victim if kind == "link" else tmp_path / "new.txt")
    with pytest.raises(VlpromptError, match="link, a folder, a pipe|Is a directory"):
        act(tmp_path / "shared")
    assert victim.read_text() == "mine" and not (tmp_path / "new.txt").exists()


@pytest.mark.parametrize("place", LOCKS)
def test_the_lock_is_where_the_test_above_plants_it(place: str, tmp_path: Path) -> None:
    act, lock_place = LOCKS[place]
    lock = lock_place(tmp_path)
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text("not changed")
    try:
        act(tmp_path)
    except DataError as error:
        assert place == "download" and "is not a file of toy" in str(error)
    assert lock.read_text() == "not changed"


def test_a_lock_excludes_others_of_the_same_process(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"), pytest.raises(TimeoutError), locked(tmp_path / "lock", timeout=0):
        pass
    with locked(tmp_path / "lock", timeout=0):
        pass


# -- reading ----------------------------------------------------------------------------------------------------------
def test_pipes_devices_folders_and_large_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(11))
    os.truncate(tmp_path / "large", 2**40)
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "large", "/dev/zero"):
        with pytest.raises(OSError, match="pipe, a device or a folder|at most 10 are read|Is a directory"):
            read_bytes(path, 10)
    (tmp_path / "small").write_bytes(bytes(10))
    assert read_bytes(tmp_path / "small", 10) == bytes(10)


def test_a_stored_entry_that_is_a_pipe_or_of_other_images_is_not_used(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    store.get(KEY, ones)
    with pytest.warns(UserWarning, match="are damaged"):
        assert len(store.rows(KEY, lambda: store.rows({}, lambda: _rows(4)), number=4).features) == 4
    store.path(KEY).unlink()
    os.mkfifo(store.path(KEY))
    with pytest.raises(DataError, match="cannot be read"):
        store.get(KEY, ones)


def _rows(count: int) -> object:
    from vlprompt.data.features import Rows

    return Rows(torch.ones(count, 3))


# -- modes ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_modes_follow_the_umask_whatever_writes_the_file(tmp_path: Path) -> None:
    with replacing(tmp_path / "tensors") as temporary:
        save_file({"a": torch.ones(1)}, temporary)  # safetensors makes files of mode 0600
    write_json(tmp_path / "new" / "a.json", {})
    FeatureStore(tmp_path / "store").get(KEY, ones)
    os.close(open_lock(tmp_path / "lock"))
    create_bank(tmp_path / "bank", RECIPE)
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert len(found) >= 10
    assert {path: mode for path, mode in found.items() if mode != (0o750 if path.is_dir() else 0o640)} == {}


# -- two users --------------------------------------------------------------------------------------------------------
NOBODY = 65534


@pytest.fixture
def common() -> Iterator[Path]:
    """A folder that every user can write to."""
    if not hasattr(os, "fork") or os.geteuid() != 0:
        pytest.skip("only root can act as two users")
    folder = Path(tempfile.mkdtemp())
    before = os.umask(0)
    folder.chmod(0o777)
    yield folder
    os.umask(before)
    shutil.rmtree(folder)


def as_nobody(act: Callable[[], object]) -> str:
    """Return the text of what ``act`` returns or raises in a process of another user."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            try:
                text = str(act())
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
            os.write(writing, text[:2000].encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as stream:
        text = stream.read().decode()
    assert os.waitpid(child, 0)[1] == 0
    return text


def test_two_users_share_a_feature_store(common: Path) -> None:
    store = FeatureStore(common / "store")
    store.get(KEY, ones)
    assert as_nobody(lambda: store.get(KEY, lambda: torch.zeros(2, 3)).sum().item()) == "6.0"
    lock_of(store.path({"n": 2})).touch(0o644)  # of root: another user may take it, not write it
    assert as_nobody(lambda: store.get({"n": 2}, ones).sum().item()) == "6.0"
    assert store.path({"n": 2}).stat().st_uid == NOBODY and store.get({"n": 2}, lambda: pytest.fail("again")).sum() == 6


def test_an_entry_that_another_user_may_not_read_is_not_called_damaged(common: Path) -> None:
    store = FeatureStore(common / "store")
    store.get(KEY, ones)
    store.path(KEY).chmod(0o600)
    before = store.path(KEY).stat()
    text = as_nobody(lambda: store.get(KEY, ones))
    assert text.startswith("DataError") and "Permission denied" in text and "damaged" not in text
    assert store.path(KEY).stat().st_mtime_ns == before.st_mtime_ns


def test_a_bank_and_a_run_of_another_user_are_refused_by_name(common: Path) -> None:
    os.umask(0o022)
    create_bank(common, RECIPE)
    (common / "runs").mkdir()
    text = as_nobody(lambda: DiffusionBank(common / RECIPE.id[:16], RECIPE).store("00" * 32, "a.png", {}))
    assert text.startswith("DataError") and "Permission denied" in text
    text = as_nobody(lambda: opened(common / "runs" / "run", {"seed": 1}, {}, force=False).__enter__())
    assert text.startswith("ConfigError") and "Permission denied" in text and "--output" in text
