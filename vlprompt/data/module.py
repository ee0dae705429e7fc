"""The LightningDataModule of a few-shot task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlprompt.data.features import FeatureStore, default_folder, extract, named_errors
from vlprompt.data.records import SPLITS, Sample, lines_sha256
from vlprompt.data.samplers import EvalSampler, Key, TrainSampler, derived_seed
from vlprompt.data.task import FewShotTask
from vlprompt.data.views import PreprocessLike, View, check_kind, describe_view, test_view, train_view
from vlprompt.errors import ConfigError

Batch = dict[str, Tensor]


class FewShotData(pl.LightningDataModule):
    """Batches of a :class:`~vlprompt.data.FewShotTask`, the same ones whatever the number of processes or workers.

    A batch is a dict:

    - ``images`` ``[b, 3, H, W]`` normalised float32, or ``features`` ``[b, D]`` raw image features;
    - ``labels`` ``[b]`` int64 and ``index`` ``[b]`` int64, the position in the task's list;
    - ``scale``, a float32 scalar: ``local_count * world_size / global_count``, so that the mean over ranks of
      ``scale * mean loss`` is the mean over the global batch (1 but for a short batch shared unevenly).

    The randomness of a training image depends on ``(seed, epoch, index)`` alone, so resumed runs, other numbers of
    workers and other numbers of ranks give bit-identical images. Evaluation counts every image exactly once.

    Args:
        task: The task.
        preprocess: The backbone's preprocessing: ``size``, ``mean``, ``std``, ``interpolation``.
        batch_size: Global training batch, over all processes.
        test_batch_size: Evaluation batch per process.
        view: ``random`` (CoOp's training view) or ``center`` (the deterministic test view).
        seed: Seed of order and augmentation.
        workers: Processes per DataLoader that decode images; 0 decodes in this one.
        features: Feature store, or its folder, for cached features; ``None`` takes
            :func:`~vlprompt.data.features.default_folder`. Used only with ``encode``.
        encode: Images ``[B, 3, H, W]`` to raw features ``[B, D]``. If given, every deterministic view is encoded once
            and batches carry ``features``; under ``view="random"`` training batches still carry ``images``.
        fingerprint: The backbone's fingerprint, part of the store's key; needed with ``encode``.
        device: Where ``encode`` wants its images.

    Raises:
        ConfigError: If a value is out of range.
    """

    def __init__(
        self,
        task: FewShotTask,
        preprocess: PreprocessLike,
        *,
        batch_size: int = 32,
        test_batch_size: int = 100,
        view: str = "random",
        seed: int = 1,
        workers: int = 0,
        features: FeatureStore | str | Path | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,
        fingerprint: str = "",
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("test_batch_size", test_batch_size, 1),
            ("workers", workers, 0),
            ("seed", seed, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} is {value!r}; accepted: whole numbers from {least}.")
        if encode is not None and not fingerprint:
            raise ConfigError("Cached features need the backbone's fingerprint: pass fingerprint=backbone.fingerprint")
        self.task, self.preprocess, self.view = task, preprocess, check_kind(view)
        self.batch_size, self.test_batch_size, self.seed, self.workers = batch_size, test_batch_size, seed, workers
        self.encode, self.fingerprint, self.device = encode, fingerprint, device
        self.store = features if isinstance(features, FeatureStore) else FeatureStore(features or default_folder())
        # With more ranks than test images some ranks have nothing to do; that is right and no reason to stop.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._loaded: dict[str, Tensor] = {}

    def prepare_data(self) -> None:
        """Compute the features that are needed and not stored yet (Lightning calls this in one process a machine)."""
        self._load(self._wanted(None))

    def setup(self, stage: str | None = None) -> None:
        """Load the features of ``stage``: ``fit``, ``validate``, ``test``, or all with ``None``."""
        self._load(self._wanted(stage))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return this process's training batches; raises ConfigError if processes cannot share the batch size."""
        rank, world_size = self._world()
        sampler = TrainSampler(len(self.task.train), self.batch_size, seed=self.seed, rank=rank, world_size=world_size)
        dataset = self._dataset("train", train_view(self.preprocess, self.view), random=self.view == "random")
        return self._loader(dataset, sampler, sampler.local_batch_size, sampler.scale())

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return this process's share of the validation images; an empty list if the task has none."""
        return self._evaluation("val") if self.task.val else []

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return this process's share of the test images."""
        return self._evaluation("test")

    def feature_key(self, split: str) -> dict[str, Any]:
        """Return what the features of ``split`` depend on: the key in the feature store."""
        samples = self._samples(split)
        return {
            "backbone": self.fingerprint,
            "view": describe_view(self.preprocess, "center"),
            "dataset": self.task.name,
            "split_sha256": self.task.split_sha256,
            "samples_sha256": lines_sha256(f"{sample.id}\t{sample.source.stamp()}" for sample in samples),
        }

    def features(self, split: str) -> Tensor:
        """Return the raw features ``[N, D]`` of ``train``, ``val`` or ``test`` under the deterministic view."""
        if split not in self._loaded:
            encode = self.encode
            if encode is None:
                raise ConfigError("There are no features without encode=: pass the backbone's encode_image.")
            view = test_view(self.preprocess)
            self._loaded[split] = self.store.get(
                self.feature_key(split),
                lambda: extract(encode, self._samples(split), view, self.test_batch_size, self.device, self.workers),
            )
        return self._loaded[split]

    def _load(self, splits: Sequence[str]) -> None:
        for split in splits:
            if self.encode is not None and self._samples(split) and (split != "train" or self.view == "center"):
                self.features(split)

    def _wanted(self, stage: str | None) -> Sequence[str]:
        if stage is None and self.trainer is not None and self.trainer.state.fn is not None:
            stage = self.trainer.state.fn.value
        return {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage or "", SPLITS)

    def _samples(self, split: str) -> list[Sample]:
        if split not in SPLITS:
            raise ConfigError(f"Unknown split {split!r}; accepted: {', '.join(SPLITS)}.")
        samples: list[Sample] = getattr(self.task, split)
        return samples

    def _world(self) -> tuple[int, int]:
        """Return this process's rank and the number of processes."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def _dataset(self, split: str, view: View, random: bool) -> _Batches:
        cached = self.features(split) if self.encode is not None and not random else None
        return _Batches(self._samples(split), view, self.seed if random else None, cached)

    def _evaluation(self, split: str) -> DataLoader[Batch]:
        rank, world_size = self._world()
        sampler = EvalSampler(len(self._samples(split)), rank=rank, world_size=world_size)
        return self._loader(self._dataset(split, test_view(self.preprocess), False), sampler, self.test_batch_size, 1.0)

    def _loader(
        self, dataset: _Batches, sampler: TrainSampler | EvalSampler, batch_size: int, scale: float
    ) -> DataLoader[Batch]:
        workers = 0 if dataset.features is not None else self.workers
        return _Loader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=partial(_with_scale, scale=scale),
            pin_memory=workers > 0 and torch.cuda.is_available(),
        )


class _Loader(DataLoader[Batch]):
    """A DataLoader whose errors read the same whether they were raised here or in a worker process."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        with named_errors():
            yield from super().__iter__()


class _Batches(Dataset[Batch]):
    """Whole batches by their keys: images seeded one by one, or rows of cached features."""

    def __init__(self, samples: list[Sample], view: View, seed: int | None, features: Tensor | None) -> None:
        self.samples, self.view, self.seed, self.features = samples, view, seed, features
        self.labels = torch.tensor([sample.label for sample in samples], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> Batch:
        return {name: value[0] for name, value in self.__getitems__([key]).items()}

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        index = torch.tensor([position for _, position in keys], dtype=torch.int64)
        batch = {"labels": self.labels[index], "index": index}
        if self.features is not None:
            return {"features": self.features[index], **batch}
        return {"images": torch.stack([self._image(*key) for key in keys]), **batch}

    def _image(self, epoch: int, position: int) -> Tensor:
        picture = self.samples[position].source.open()
        if self.seed is None:
            image: Tensor = self.view(picture)
            return image
        # Only the CPU generator is seeded and restored: torch.manual_seed would also disturb those of other devices.
        generator = torch.default_generator
        state = generator.get_state()
        generator.manual_seed(derived_seed(self.seed, epoch, position))
        try:
            image = self.view(picture)
        finally:
            generator.set_state(state)
        return image


def _with_scale(batch: Batch, scale: float) -> Batch:
    return {**batch, "scale": torch.tensor(scale)}
