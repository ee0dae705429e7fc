"""Callbacks of training: the metrics file and atomically written checkpoints."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from vlprompt._files import parse_json, read_bytes, replacing, write_text
from vlprompt.errors import ConfigError, HeadError

LAST_CHECKPOINT = "last.ckpt"
_PARTS: dict[str, type] = {
    **{"state_dict": dict, "loops": dict, "epoch": int, "global_step": int},
    **{"optimizer_states": list, "lr_schedulers": list, "callbacks": dict, "pytorch-lightning_version": str},
}
"""What a checkpoint of a training holds, as written by Lightning."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints written to a temporary name and renamed, and read as tensors only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` atomically: if the process is killed, the previous file remains."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = io.BytesIO()  # torch reports a full disk as a RuntimeError
        torch.save(checkpoint, data)
        with replacing(path) as temporary:
            temporary.write_bytes(data.getbuffer())

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint; only tensors and plain values are unpickled.

        Raises:
            HeadError: The file is damaged or not a checkpoint of vlprompt.
        """
        try:
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise HeadError(
                f"the checkpoint {path} cannot be read ({type(error).__name__}); it is damaged or not vlprompt's"
            ) from error
        if not isinstance(checkpoint, dict):
            raise HeadError(f"the checkpoint {path} is not one of a training: it is a {type(checkpoint).__name__}")
        wrong = [name for name, kind in _PARTS.items() if not isinstance(checkpoint.get(name), kind)]
        if wrong:
            raise HeadError(f"the checkpoint {path} is not one of a training: {', '.join(wrong)} missing or damaged")
        if not all(isinstance(value, torch.Tensor) for value in checkpoint["state_dict"].values()):
            raise HeadError(f"the checkpoint {path} is not one of a training: state_dict holds more than tensors")
        return checkpoint


def last_checkpoint_callback(folder: Path) -> ModelCheckpoint:
    """Return the callback that writes ``folder/last.ckpt`` at the end of every epoch."""
    return ModelCheckpoint(
        dirpath=folder,
        filename=Path(LAST_CHECKPOINT).stem,
        save_top_k=1,
        every_n_epochs=1,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


class KeptSigterm(pl.Callback):
    """Puts back the handler of SIGTERM that was set when the callback was made, if there was one.

    The Trainer adds one of its own, which broadcasts to the other processes inside the handler. They may be in another
    collective operation, or have ended, and the broadcast would not return.
    """

    def __init__(self) -> None:
        self.handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put it back; the Trainer has set its own."""
        if callable(self.handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.handler)

    on_test_start = on_train_start


class MetricsFile(Checkpoint):
    """One JSON line per epoch in ``metrics.jsonl``: epoch, learning rate, every ``train/`` term and ``val/`` score.

    A resumed run drops the lines of epochs that it trains again. The base class makes Lightning call it after the
    module, which scores the validation images at the end of an epoch.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the lines of finished epochs."""
        known = read_metrics(self.path)
        self.lines = [line for line in known if line["epoch"] < trainer.current_epoch]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the learning rate of this epoch, because the scheduler steps before the end of the epoch."""
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add this epoch's line."""
        # The Trainer keeps the scores of earlier epochs until there are others.
        scored = getattr(pl_module, "scored_epoch", trainer.current_epoch) == trainer.current_epoch
        kinds = ("train/", "val/") if scored else ("train/",)
        logged = trainer.callback_metrics.items()
        metrics = {name: float(value) for name, value in logged if name.startswith(kinds)}
        self.lines.append({"epoch": trainer.current_epoch, "lr": self.lr, **metrics})
        if trainer.is_global_zero:
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))


_LARGEST_METRICS = 2**28


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ``metrics.jsonl``; an empty list if there is no file.

    Raises:
        ConfigError: A line is not a JSON object with an epoch.
    """
    if not os.path.lexists(path):
        return []
    lines = []
    try:
        content = read_bytes(path, _LARGEST_METRICS).decode(errors="replace")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}. Restart with --force.") from error
    for number, text in enumerate(content.splitlines(), 1):
        try:
            line = parse_json(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not isinstance(line.get("epoch"), int):
            raise ConfigError(
                f"{path}, line {number}, is not the metrics of an epoch: {text[:60]!r}. Restart with --force."
            )
        lines.append(line)
    return lines
