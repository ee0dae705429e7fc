"""The Trainer of a run, fitting and testing. Loops, processes, precision and loggers are those of Lightning."""

from __future__ import annotations

import importlib.util
import logging
import os
import shlex
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import DDPStrategy

from vlprompt._dist import check_launcher
from vlprompt.config.run import BackboneConfig, RecipeConfig, TrainerConfig
from vlprompt.engine.callbacks import (
    LAST_CHECKPOINT,
    AtomicCheckpointIO,
    KeptSigterm,
    MetricsFile,
    last_checkpoint_callback,
)
from vlprompt.engine.metrics import plain_score, score
from vlprompt.engine.module import FrozenInside, PromptModule
from vlprompt.errors import ConfigError, HeadError

METRICS = "metrics.jsonl"
_LOGGERS = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""The package of every logger."""


def make_trainer(
    config: TrainerConfig,
    folder: Path,
    epochs: int,
    *,
    gradient: bool = False,
    callbacks: Sequence[pl.Callback] = (),
) -> pl.Trainer:
    """Return a Trainer that writes into ``folder``; ``gradient`` allows gradients in evaluation.

    ``epochs`` may be -1 for a training that the module ends.
    ``callbacks`` are added to those that write the checkpoint and the metrics.

    Raises:
        ConfigError: A logger is not installed, or there are fewer devices than requested.
    """
    check_devices(config)
    # Chosen here: Lightning would take Slurm's variables, which every job has, for those of processes that it started.
    environment = TorchElasticEnvironment() if TorchElasticEnvironment.detect() else LightningEnvironment()
    strategy: Any = "auto"
    if config.devices > 1:
        # Every step uses all trainable parameters, and the frozen backbone has no buffers to broadcast.
        strategy = DDPStrategy(find_unused_parameters=False, broadcast_buffers=False)
    standard: list[pl.Callback] = [KeptSigterm(), MetricsFile(folder / METRICS), last_checkpoint_callback(folder)]
    if config.progress:
        standard.append(RichProgressBar(leave=False))
    with quiet():
        return pl.Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            strategy=strategy,
            precision=config.precision,
            accumulate_grad_batches=config.accumulate,
            max_epochs=epochs,
            logger=_loggers(config, folder) or False,
            callbacks=[*standard, *callbacks],
            plugins=[AtomicCheckpointIO(), environment],
            enable_progress_bar=config.progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            inference_mode=not gradient,
            use_distributed_sampler=False,
            log_every_n_steps=1,
            default_root_dir=folder,
        )


def check_devices(config: TrainerConfig) -> None:
    """Raise ConfigError if this machine lacks the accelerator, the number of GPUs or a logger that ``config`` requests.

    Variables that a launcher left in the environment are refused, too (:func:`vlprompt._dist.check_launcher`).
    """
    check_launcher(config.devices)
    if (tasks := os.environ.get("SLURM_NTASKS", "1")) != "1":
        warnings.warn(
            f"SLURM_NTASKS is {tasks}, and this command is one task with {config.devices} process(es); the number of "
            "processes is --trainer.devices",
            stacklevel=2,
        )
    gpus = torch.cuda.device_count()
    if config.accelerator == "gpu" and not gpus:
        raise ConfigError("trainer.accelerator is 'gpu' but torch sees no GPU here; use --trainer.accelerator cpu")
    if config.accelerator != "cpu" and 0 < gpus < config.devices:
        raise ConfigError(f"trainer.devices is {config.devices} but torch sees {gpus} GPU(s); accepted: 1 to {gpus}")
    for name in config.loggers:
        if importlib.util.find_spec(_LOGGERS[name]) is None:
            raise ConfigError(
                f"trainer.loggers requests {name!r}, which is not installed; run: pip install {_LOGGERS[name]}"
            )


def check_precision(backbone: BackboneConfig, trainer: TrainerConfig) -> None:
    """Raise ConfigError if the towers have another narrow type than autocast, which cannot compute with it.

    Lightning's ``16-mixed`` is float16 on a GPU and bfloat16 on a CPU.
    """
    on_cpu = trainer.accelerator == "cpu" or not torch.cuda.is_available()
    types = {"32-true": None, "16-mixed": "bf16" if on_cpu else "fp16", "bf16-mixed": "bf16"}
    used = types[trainer.precision]
    if used and backbone.precision not in ("fp32", used):
        raise ConfigError(
            f"backbone.precision is {backbone.precision!r} and trainer.precision {trainer.precision!r}, which computes "
            f"in {used} on this machine; accepted: backbone.precision fp32 or {used}, or trainer.precision 32-true"
        )


def _loggers(config: TrainerConfig, folder: Path) -> list[Logger]:
    loggers: list[Logger] = []
    for name in config.loggers:
        if name == "tensorboard":
            from pytorch_lightning.loggers import TensorBoardLogger

            loggers.append(TensorBoardLogger(folder, name="tensorboard", version=""))
        else:
            from pytorch_lightning.loggers import WandbLogger

            loggers.append(WandbLogger(project="vlprompt", save_dir=folder))
    return loggers


def fit(
    trainer: pl.Trainer,
    module: FrozenInside,
    data: pl.LightningDataModule,
    folder: Path,
    inputs_sha256: str | None = None,
) -> None:
    """Fit ``module``, resuming from the last checkpoint in ``folder`` if there is one.

    Args:
        trainer: The Trainer.
        module: The module.
        data: Its data.
        folder: The run folder.
        inputs_sha256: SHA-256 of the inputs of the training; a checkpoint of other inputs is refused.

    Raises:
        HeadError: The checkpoint is damaged, not finite, or that of another training.
    """
    last = folder / LAST_CHECKPOINT
    if os.path.lexists(last) and not last.is_file():
        raise HeadError(f"{last} is no file; move it aside: mv {shlex.quote(str(last))} {shlex.quote(f'{last}.old')}")
    module.inputs_sha256 = inputs_sha256
    with quiet(), _interruptible(trainer), _restoring(last):
        trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.is_file() else None, weights_only=True)


@contextmanager
def _restoring(checkpoint: Path) -> Iterator[None]:
    """Raise HeadError, with the command that moves ``checkpoint`` aside, if the Trainer cannot continue from it."""
    try:
        yield
    except Exception as error:
        if not _while_restoring(error):
            raise
        reason = str(error) if isinstance(error, HeadError) else f"{type(error).__name__}: {str(error)[:200]}"
        raise HeadError(
            f"the training cannot continue from {checkpoint}: {reason}\n"
            f"To train from the beginning, move it aside: mv {shlex.quote(str(checkpoint))} "
            f"{shlex.quote(f'{checkpoint}.old')}"
        ) from error


def _while_restoring(error: BaseException) -> bool:
    """Return whether ``error`` was raised while the Trainer restored a checkpoint: a frame of its restoring code."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(Path(frame.f_code.co_filename).stem == "checkpoint_connector" for frame in frames)


def test(trainer: pl.Trainer, module: PromptModule, data: pl.LightningDataModule) -> dict[str, Any]:
    """Return the scores of the test images, each counted once.

    The result holds all measured values, and the name of the headline metric of ``module`` as ``"metric"`` if that is
    not accuracy (:func:`vlprompt.engine.metrics.plain_score`). ``module.per_class`` holds the counts per class.
    """
    with quiet(), _interruptible(trainer):
        (scores,) = trainer.test(module, datamodule=data, verbose=False)
    return plain_score(module.metric, {name.removeprefix("test/"): value for name, value in scores.items()})


@contextmanager
def _interruptible(trainer: pl.Trainer) -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C, or the subclass that was raised: the Trainer exits with status 1 instead."""
    try:
        yield
    except SystemExit as error:
        if trainer.interrupted:
            cause = error.__context__
            raise (cause if isinstance(cause, KeyboardInterrupt) else KeyboardInterrupt()) from None
        raise


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's messages about hardware, worker counts and existing checkpoint folders."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|lightning_utilities)\b.*")
            warnings.filterwarnings("ignore", message=r".*(num_workers|pin_memory|LeafSpec|isinstance\(treespec).*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


__all__ = [
    "METRICS",
    "RecipeConfig",
    "check_devices",
    "check_precision",
    "fit",
    "make_trainer",
    "quiet",
    "score",
    "test",
]
