"""Batches of meta-training tasks, independent of the number of processes and workers and of interruptions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlprompt.config.meta import MetaConfig
from vlprompt.data.batches import automatic_workers, make_loader
from vlprompt.data.pixel_cache import KEEP_BYTES, PixelCache
from vlprompt.data.samplers import Key, KeySampler
from vlprompt.data.transforms import PreprocessLike, Transform
from vlprompt.datasets.records import Sample
from vlprompt.meta.tasks import Task

Batch = dict[str, Any]


class StepSampler(KeySampler):
    """Samples ``(outer step, slot)``: rank ``r`` of ``W`` gets the slots ``r``, ``r + W``, ... of every outer step."""

    def __init__(self, config: MetaConfig, *, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(config.save_every * config.tasks_per_step, rank=rank, world_size=world_size)
        self.config = config

    def __iter__(self) -> Iterator[Key]:
        """Yield this rank's keys of the current epoch of ``save_every`` outer steps."""
        every = self.config.save_every
        for step in range(self.epoch * every, (self.epoch + 1) * every):
            for slot in range(self.rank, self.config.tasks_per_step, self.num_replicas):
                yield step, slot

    def __len__(self) -> int:
        """Return the number of keys per epoch of this rank."""
        return self.length // self.num_replicas


class TaskBatches(Dataset[Batch]):
    """Data set with one batch per task; see :class:`vlprompt.engine.meta_module.MetaModule`.

    Args:
        task: Maps an outer step and a slot to a task.
        features: Raw frozen image features ``[N, D]`` of the pairs.
        pictures: Pixels of the pairs' images, for a method that learns on the image side; None: batches hold features.
    """

    def __init__(self, task: Callable[[int, int], Task], features: Tensor, pictures: PixelCache | None = None) -> None:
        self.task, self.features, self.pictures = task, features, pictures

    def __getitem__(self, key: Key) -> Batch:
        """Return the batch of ``(outer step, slot)``; images are uint8, before normalisation."""
        task = self.task(*key)
        rows = list(task.support)
        return {
            "support": self._inputs(rows),
            "support_labels": torch.tensor(task.support_labels),
            "support_classes": list(task.support_classes),
            "query": self._inputs(list(task.query)),
            "query_labels": torch.tensor(task.query_labels),
            "query_classes": list(task.query_classes),
            "feature": F.normalize(self.features[rows].float(), dim=-1).mean(dim=0),
        }

    def _inputs(self, rows: list[int]) -> Tensor:
        if self.pictures is None:
            return self.features[rows]
        return torch.stack([torch.from_numpy(self.pictures.pixels(row).copy()) for row in rows])


class MetaData(pl.LightningDataModule):
    """Batches of tasks for :class:`~vlprompt.engine.meta_module.MetaModule`.

    Args:
        task: Maps an outer step and a slot to a task (:class:`vlprompt.meta.tasks.TaskSampler`).
        features: Raw frozen image features ``[N, D]`` of the pairs.
        config: Configuration with the numbers of steps and tasks.
        images: The pairs' images, for a method that learns on the image side; None: batches hold features.
        preprocess: The backbone's preprocessing.
        workers: Number of loader processes; None: automatic.
    """

    def __init__(
        self,
        task: Callable[[int, int], Task],
        features: Tensor,
        config: MetaConfig,
        *,
        images: Sequence[Sample] | None,
        preprocess: PreprocessLike,
        workers: int | None = None,
    ) -> None:
        super().__init__()
        self.task, self.features, self.config = task, features, config
        self.images, self.view, self.workers = images, Transform(preprocess, "center"), workers

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of this process's tasks."""
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        workers = 0
        pictures = None
        if self.images is not None:
            chosen = self.workers
            workers = automatic_workers(len(self.images), world_size) if chosen is None else chosen
            pictures = PixelCache(self.images, self.view, KEEP_BYTES, workers)
        sampler = StepSampler(self.config, rank=rank, world_size=world_size)
        tasks: Any = TaskBatches(self.task, self.features, pictures)
        return make_loader(tasks, sampler, None, workers, persistent=True)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Normalise the images of a batch on the device."""
        if self.images is None:
            return batch
        return {**batch, "support": self.view.finish(batch["support"]), "query": self.view.finish(batch["query"])}
