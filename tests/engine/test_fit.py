"""The Trainer of a run: devices, loggers and silenced messages of Lightning."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from vlprompt.config.run import BackboneConfig, TrainerConfig
from vlprompt.engine.fit import check_devices, check_precision, make_trainer, quiet
from vlprompt.errors import ConfigError


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
