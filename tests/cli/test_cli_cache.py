"""``vlprompt cache``: what is listed, what is pruned, what is refused."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from vlprompt.cli.cache import CACHE_HELP, cache
from vlprompt.data import FeatureStore
from vlprompt.errors import ConfigError


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureStore:
    monkeypatch.setenv("VLPROMPT_CACHE", str(tmp_path))
    store = FeatureStore(tmp_path / "features")
    for days, name, more in ((40, "dtd", {}), (1, "[demo]", {"view": "random crop", "seed": 1, "epoch": 7})):
        key = {"dataset": name, "split": "test", "backbone": "f" * 64, "view": "center crop", **more}
        store.get(key, lambda: torch.ones(250, 64))
        used = time.time() - days * 86_400
        os.utime(store.path(key), (used, used))
    return store


def test_list(store: FeatureStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:5] for line in lines[1:3]] == [
        ["[demo]", "test", "f" * 12, "random,"],
        ["dtd", "test", "f" * 12, "center"],
    ]
    assert "random, seed 1, epoch 7" in lines[1] and "250x64" in lines[1] and "64.4 kB" in lines[1]
    newest = max(path.stat().st_mtime for path in store.folder.rglob("*.safetensors"))
    assert time.strftime("%Y-%m-%d", time.localtime(newest)) in lines[1]
    assert lines[3] == f"2 files, 128.9 kB, in {store.folder}"


def test_list_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("VLPROMPT_CACHE", str(tmp_path / "nowhere"))
    assert cache(["list"]) == cache(["prune"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "0 files, 0 B, removed; 0 files, 0 B, left"


def test_prune(store: FeatureStore, capsys: pytest.CaptureFixture[str]) -> None:
    def left() -> int:
        return len(list(store.folder.glob("*.safetensors")))

    assert cache(["prune", "--older-than", "30", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "dtd (64.4 kB): not used for long\n1 file, 64.4 kB, would be removed; 1 file, 64.4 kB, left\n" in out
    assert left() == 2
    assert cache(["prune", "--older-than", "0.5", "--max-size", "1GB", "--dry-run"]) == 0
    assert "2 files, 128.9 kB, would be removed" in capsys.readouterr().out
    assert cache(["prune", "--max-size", "70 kB"]) == 0
    assert "dtd (64.4 kB): over the size\n1 file, 64.4 kB, removed" in capsys.readouterr().out and left() == 1
    assert cache(["prune"]) == 0 and left() == 1
    assert cache(["prune", "--all"]) == 0 and left() == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "cache what\\? Accepted: list, prune"),
        (["lst"], "no `vlprompt cache lst`. Did you mean 'list'"),
        (["prune", "now"], "'now' is one word too many"),
        (["list", "--all"], "--all has no meaning for `vlprompt cache list`"),
        (["prune", "--older-than", "soon"], "--older-than is 'soon'; accepted: a number of days"),
        (["prune", "--max-size", "2 cows"], "--max-size is '2 cows'; accepted: a size such as 500MB"),
        (["prune", "--max-siez", "2GB"], "Did you mean '--max-size'"),
        (["prune", "--config", "x"], "'--config' is not an option of `vlprompt cache`"),
    ],
)
def test_refused(words: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        cache(words)


def test_the_help_names_every_option() -> None:
    assert all(name in CACHE_HELP for name in ("list", "prune", "--all", "--older-than", "--max-size", "--dry-run"))
