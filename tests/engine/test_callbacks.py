"""Atomic checkpoints and the metrics file."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from vlprompt.engine.callbacks import AtomicCheckpointIO, read_metrics
from vlprompt.errors import ConfigError, HeadError

CHECKPOINT = {
    **{"state_dict": {"a": torch.arange(3.0)}, "epoch": 1, "global_step": 1, "loops": {}, "callbacks": {}},
    **{"optimizer_states": [], "lr_schedulers": [], "pytorch-lightning_version": "2.0"},
}


def fail(*_: Any) -> None:
    raise OSError("disk full")


def test_checkpoint_is_replaced_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint(CHECKPOINT, path)
    monkeypatch.setattr(torch, "save", lambda _, file: (file.write(b"half"), fail()))
    with pytest.raises(OSError, match="disk full"):
        io.save_checkpoint({}, path)
    assert torch.equal(io.load_checkpoint(path)["state_dict"]["a"], torch.arange(3.0))


class Evil:
    """Creates a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("missing", [*CHECKPOINT])
def test_a_checkpoint_without_a_part_is_refused(missing: str, tmp_path: Path) -> None:
    torch.save({**CHECKPOINT, missing: None}, tmp_path / "last.ckpt")
    with pytest.raises(HeadError, match=f"{missing} missing or damaged"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize("content", [b"", b"junk" * 100, "cut", "foreign", "list", "evil"])
def test_unusable_checkpoints_are_refused(content: bytes | str, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "cut":
        torch.save(CHECKPOINT, path)
        path.write_bytes(path.read_bytes()[:-200])
    else:
        evil = {**CHECKPOINT, "x": Evil(tmp_path / "trace")}
        torch.save({"foreign": {"weights": torch.ones(2)}, "list": [1], "evil": evil}[content], path)
    with pytest.raises(HeadError, match=r"the checkpoint .*last\.ckpt ") as caught:
        AtomicCheckpointIO().load_checkpoint(path)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "trace").exists()


def test_metrics_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    lines = [{"epoch": 0, "lr": 1e-5}, {"epoch": 1, "lr": 2e-3}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_metrics(path) == lines


@pytest.mark.parametrize("second", ['{"epoch": 1, "lr"', "[]", '{"lr": 1}', "\x00\x00", '{"epoch": "1"}'])
def test_damaged_metrics_are_refused(second: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 0}\n' + second + "\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2, is not the metrics of an epoch.*--force"):
        read_metrics(path)
