"""The Trainer of a run: devices, loggers and silenced messages of Lightning."""

import importlib.util
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import TensorDataset

from vlprompt.config.run import BackboneConfig, TrainerConfig
from vlprompt.engine.fit import check_devices, check_precision, fit, make_trainer, quiet
from vlprompt.engine.module import PromptModule
from vlprompt.errors import ConfigError, Terminated
from vlprompt.methods import create_method


def test_trainer_follows_the_configuration(tmp_path: Path) -> None:
    config = TrainerConfig(accelerator="cpu", accumulate=3, progress=False)
    trainer = make_trainer(config, tmp_path, 7)
    assert (trainer.max_epochs, trainer.accumulate_grad_batches, trainer.num_devices) == (7, 3, 1)
    assert trainer.precision == "32-true"
    assert not trainer.loggers and trainer.progress_bar_callback is None
    assert list(tmp_path.iterdir()) == []  # nothing is written yet
    assert make_trainer(TrainerConfig(accelerator="cpu"), tmp_path, 1).progress_bar_callback is not None


def test_missing_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="no GPU here; use --trainer.accelerator cpu"):
        check_devices(TrainerConfig(accelerator="gpu"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"trainer.devices is 3 but torch sees 2 GPU\(s\); accepted: 1 to 2"):
        check_devices(TrainerConfig(devices=3))
    check_devices(TrainerConfig(devices=3, accelerator="cpu"))


@pytest.mark.parametrize("gpu", [False, True])
def test_towers_and_autocast_have_one_narrow_type(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them ended in a RuntimeError of torch (index_copy under autocast)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    refused = set()
    for towers in ("fp32", "fp16", "bf16"):
        for precision in ("32-true", "16-mixed", "bf16-mixed"):
            try:
                check_precision(BackboneConfig(precision=towers), TrainerConfig(precision=precision))
            except ConfigError as error:
                assert "accepted: backbone.precision fp32 or" in str(error)
                refused.add((towers, precision))
    assert refused == {("fp16", "bf16-mixed"), ("bf16", "16-mixed") if gpu else ("fp16", "16-mixed")}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_missing_loggers_are_refused(name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=f"requests '{name}', which is not installed; run: pip install {name}"):
        make_trainer(TrainerConfig(accelerator="cpu", loggers=[name]), tmp_path, 1)


def test_quiet_restores_the_levels() -> None:
    logger = logging.getLogger("pytorch_lightning")
    before = logger.level
    with pytest.raises(ValueError, match="inside"), quiet():
        assert logger.level == logging.ERROR
        raise ValueError("inside")
    assert logger.level == before


def test_a_handler_of_sigterm_is_kept_and_ends_the_training(tiny_backbone: Any, tmp_path: Path) -> None:
    """Lightning's own handler broadcasts to processes that may have ended."""

    def terminate(number: int, frame: Any) -> None:
        raise Terminated

    class Sent(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            assert signal.getsignal(signal.SIGTERM) is terminate
            os.kill(os.getpid(), signal.SIGTERM)

    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, terminate)
    try:
        trainer = make_trainer(TrainerConfig(accelerator="cpu", progress=False), tmp_path, 1, callbacks=[Sent()])
        module = PromptModule(create_method("coop", tiny_backbone, ["cat", "dog"], context_length=2))
        images = TensorDataset(torch.zeros(2, 3, 64, 64), torch.tensor([0, 1]))
        with pytest.raises(Terminated):
            fit(trainer, module, pl.LightningDataModule.from_datasets(images), tmp_path)
        assert signal.getsignal(signal.SIGTERM) is terminate and not list(tmp_path.iterdir())
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
