"""The feature store with several processes: computed once; killed writers; pruning."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from vlprompt.data import FeatureStore
from vlprompt.data.eviction import DAY, entries, prune, remove
from vlprompt.data.features import lock_of, read_entry

KEY = {"dataset": "toy", "n": 3}


def _read(folder: str, log: str, start: Any, asked: Any, results: Any) -> None:
    def compute() -> torch.Tensor:
        with open(log, "a") as file:
            file.write("computed\n")
        for _ in range(3):  # until all three readers ask for the entry; a second computation waits in vain
            asked.acquire(timeout=5)
        return torch.ones(4, 3)

    start.wait()
    asked.release()
    results.put(torch.equal(FeatureStore(folder).get(KEY, compute), torch.ones(4, 3)))


@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_concurrent_readers_compute_once(kind: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    context: Any = multiprocessing.get_context("fork")
    start, asked, results = context.Barrier(3), context.Semaphore(0), context.Queue()
    make: Any = context.Process if kind == "processes" else threading.Thread
    if kind == "threads":
        start, asked = threading.Barrier(3), threading.Semaphore(0)  # type: ignore[assignment]
    readers = [make(target=_read, args=(str(tmp_path / "store"), str(log), start, asked, results)) for _ in range(3)]
    for reader in readers:
        reader.start()
    assert [results.get(timeout=60) for _ in readers] == [True] * 3
    for reader in readers:
        reader.join(30)
    assert log.read_text() == "computed\n"


def test_every_flipped_byte_is_detected(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    store.get(KEY, lambda: torch.arange(6.0).view(2, 3))
    path, data = store.path(KEY), store.path(KEY).read_bytes()
    key = '{"dataset":"toy","n":3}'
    for place in range(len(data)):
        path.unlink()
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        assert read_entry(path, key) is None, place
    for length in range(len(data)):
        path.unlink()
        path.write_bytes(data[:length])
        assert read_entry(path, key) is None, length
    path.unlink()
    path.write_bytes(data)
    assert read_entry(path, key) is not None


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from vlprompt.data import FeatureStore, features

def half(tensors, path, metadata):
    whole(tensors, path, metadata=metadata)
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)

whole, features.save_file = features.save_file, half
FeatureStore(sys.argv[1]).get({"dataset": "toy", "n": 3}, lambda: torch.ones(4, 3))
"""


@pytest.fixture
def killed(tmp_path: Path) -> FeatureStore:
    """A store whose writer was killed while writing."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.suffix for path in tmp_path.glob(".writing-*")] == [".tmp"]
    return FeatureStore(tmp_path)


def test_killed_while_writing(killed: FeatureStore) -> None:
    assert not killed.path(KEY).exists() and entries(killed.folder) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is damaged: there is no entry
        assert torch.equal(killed.get(KEY, lambda: torch.ones(4, 3)), torch.ones(4, 3))
    assert list(killed.folder.glob(".writing-*")) == [] and killed.encoded == 4


def test_prune_removes_leftovers_except_those_of_a_running_writer(killed: FeatureStore) -> None:
    with FileLock(lock_of(killed.path(KEY))):
        assert prune(killed.folder) == ([], [])
    removed, kept = prune(killed.folder)
    assert [entry.why for entry in removed] == ["left by a writer that was killed"] and kept == []
    remove(killed.folder, removed)
    assert [path.name for path in killed.folder.iterdir()] == [".locks"]
    assert list((killed.folder / ".locks").iterdir()) == []


@pytest.fixture
def filled(tmp_path: Path) -> FeatureStore:
    """A store with entries 0, 1, 2, last used 30, 20 and 10 days ago."""
    store = FeatureStore(tmp_path)
    for number in range(3):
        store.get({"n": number}, lambda: torch.ones(10, 8))
        used = time.time() - (30 - 10 * number) * DAY
        os.utime(store.path({"n": number}), (used, used))
    return store


def numbers(listed: list[Any]) -> list[int]:
    return [entry.key["n"] for entry in listed]


def test_entries(filled: FeatureStore) -> None:
    listed = entries(filled.folder)
    assert numbers(listed) == [2, 1, 0]
    assert {entry.shape for entry in listed} == {(10, 8)} and not any(entry.why for entry in listed)
    assert entries(filled.folder / "nowhere") == []


def test_prune_by_age(filled: FeatureStore) -> None:
    removed, kept = prune(filled.folder, older_than=15)
    assert (numbers(removed), numbers(kept)) == ([1, 0], [2])
    assert len(entries(filled.folder)) == 3, "prune only chooses"
    remove(filled.folder, removed)
    assert numbers(entries(filled.folder)) == [2]


def test_reading_counts_as_use_and_listing_does_not(filled: FeatureStore) -> None:
    filled.get({"n": 0}, lambda: pytest.fail("computed again"))
    prune(filled.folder)
    assert numbers(entries(filled.folder)) == [0, 2, 1]
    assert numbers(prune(filled.folder, older_than=15)[0]) == [1]


def test_prune_by_size_keeps_the_last_used(filled: FeatureStore) -> None:
    size = filled.path({"n": 0}).stat().st_size
    assert numbers(prune(filled.folder, max_size=2 * size + 1)[0]) == [0]
    assert numbers(prune(filled.folder, max_size=2 * size - 1)[0]) == [1, 0]
    assert numbers(prune(filled.folder, max_size=3 * size)[0]) == []
    assert numbers(prune(filled.folder, everything=True)[0]) == [2, 1, 0]


def test_prune_ignores_other_files(filled: FeatureStore) -> None:
    folder = filled.folder
    others = [folder / "notes.txt", folder / "model.safetensors", folder / f"{'g' * 64}.safetensors", folder / "x.tmp"]
    for other in others:
        other.write_text("mine")
    (folder / f"{'a' * 64}.safetensors").mkdir()
    (folder / f"{'b' * 64}.safetensors").symlink_to(others[0])
    remove(folder, prune(folder, everything=True)[0])
    assert entries(folder) == []
    assert {path.name for path in folder.iterdir()} == {
        *(other.name for other in others),
        f"{'a' * 64}.safetensors",
        f"{'b' * 64}.safetensors",
        ".locks",
    }


def test_prune_removes_damaged_entries(filled: FeatureStore) -> None:
    path = filled.path({"n": 1})
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-1] + b"!")
    removed, kept = prune(filled.folder)
    assert [(entry.key["n"], entry.why) for entry in removed] == [(1, "damaged")] and numbers(kept) == [2, 0]
    path.unlink()
    path.write_bytes(b"not safetensors")
    assert [entry.why for entry in prune(filled.folder)[0]] == ["damaged"]
