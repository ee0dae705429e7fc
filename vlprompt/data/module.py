"""The LightningDataModule of a few-shot task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vlprompt._dist import gathered, rank_and_size
from vlprompt._files import sha256_lines
from vlprompt.config.run import TestOrder
from vlprompt.data.batches import Batch, FeatureBatches, ImageBatches, Loader, automatic_workers, labels_of, make_loader
from vlprompt.data.features import FeatureStore, Rows, default_folder, encode_all
from vlprompt.data.multi_view import GeneratedViews, ImageBank, MultiViewImages, RandomViews, additional_views
from vlprompt.data.pixel_cache import KEEP_BYTES, PixelCache
from vlprompt.data.samplers import EvalSampler, TrainSampler
from vlprompt.data.tally import count_skipped
from vlprompt.data.transforms import (
    FIXED_KINDS,
    PreprocessLike,
    Transform,
    check_kind,
    describe_transform,
    of_test_images,
)
from vlprompt.data.view_features import MultiViewFeatures, ViewEncoder, ViewRows, rows_or_error
from vlprompt.datasets.images import stamps_of, stamps_record
from vlprompt.datasets.records import SPLITS, Sample
from vlprompt.datasets.task import FewShotTask
from vlprompt.errors import ConfigError, DataError, did_you_mean
from vlprompt.needs import TestViews

ON_BAD_IMAGE = ("error", "skip")
TEST_ORDERS: tuple[TestOrder, ...] = get_args(TestOrder)


class FewShotData(pl.LightningDataModule):
    """Batches of a :class:`~vlprompt.datasets.FewShotTask`, independent of the number of processes and workers.

    A batch is a dict:

    - ``images`` ``[b, 3, H, W]`` normalised float32, or ``features`` ``[b, D]`` raw image features; for test images
      with ``test_views``, ``[b, V, 3, H, W]`` or ``[b, V, D]``;
    - ``labels`` ``[b]`` int64, or for a multi-label task ``[b, C]`` float32 of ones and zeros;
    - ``index`` ``[b]`` int64, the position in the task's list;
    - ``scale``, a float32 scalar: ``local_count * world_size / global_count``, so that the mean over ranks of
      ``scale * mean loss`` is the mean over the global batch (1 except for a short batch shared unevenly).

    The random draws of a training image depend on ``(seed, epoch, index)`` only, so resumed runs and other numbers of
    workers and ranks give bit-identical images. Evaluation counts every image exactly once.

    Training and validation images are decoded once and kept (:class:`~vlprompt.data.pixel_cache.PixelCache`). Test
    images are read once and not kept. Under a Trainer, images are moved to the device as uint8 and normalised there.

    Args:
        task: The task.
        preprocess: The backbone's preprocessing: ``size``, ``mean``, ``std``, ``interpolation``.
        batch_size: Global training batch, over all processes.
        drop_last: Whether the last training batch is dropped if it is not full; the only batch is always kept.
        test_batch_size: Evaluation batch per process.
        transform: Kind of the training transform (:class:`~vlprompt.data.transforms.Transform`): ``random`` (CoOp's),
            ``random-tensor``, ``random-half``, or ``center`` (the test transform, without random draws). ``pad`` and
            ``squash`` are the transform of the test images as well.
        seed: Seed of order and augmentation.
        workers: Processes per DataLoader that decode images; 0 decodes in this process. ``None`` uses 0 for fewer than
            256 images, else up to 8, with the cores shared evenly among processes.
        features: Feature store, or its folder, for cached features; ``None`` uses
            :func:`~vlprompt.data.features.default_folder`. Used only with ``encode``.
        encode: Images ``[B, 3, H, W]`` to raw features ``[B, D]``. If given, images under a deterministic transform are
            encoded once and batches have ``features``. With a random transform, training batches still have ``images``
            unless ``cached_views`` is set.
        fingerprint: The backbone's fingerprint, part of the store's key; required with ``encode``.
        device: Device of the images passed to ``encode``.
        cached_views: 0, or the number K of random views per training image whose features are stored: epoch ``e``
            trains on the features of view ``e % K``, which are computed on first use.
        on_bad_image: ``error`` raises for an unreadable image and names it; ``skip`` omits it in every process and
            counts it (:mod:`vlprompt.data.tally`).
        keep_bytes: Limit, in bytes, of decoded images kept per split; images that do not fit are decoded again.
        test_views: Views of every test image: the test view, then crops, then generated images under the test
            transform. ``None`` for the test view without a view dimension. Crop ``v`` depends on
            ``(seed, image id, v)`` only. Features of views are stored (:mod:`vlprompt.data.view_features`).
        views_as_images: Whether test batches have the views as images instead of features; a batch then has
            ``max(1, test_batch_size // V)`` test images.
        generated: The bank of generated images, required if ``test_views`` has any.
        test_order: Order of the test images: that of the list (``file``), or a random order of ``seed``
            (``shuffled``), which is the same for any number of processes.

    Raises:
        ConfigError: If a value is out of range, or ``test_views`` lacks an encoder or a bank.
    """

    def __init__(
        self,
        task: FewShotTask,
        preprocess: PreprocessLike,
        *,
        batch_size: int = 32,
        drop_last: bool = True,
        test_batch_size: int = 100,
        transform: str = "random",
        seed: int = 1,
        workers: int | None = None,
        features: FeatureStore | str | Path | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,
        fingerprint: str = "",
        device: str | torch.device = "cpu",
        cached_views: int = 0,
        on_bad_image: str = "error",
        keep_bytes: int = KEEP_BYTES,
        test_views: TestViews | None = None,
        views_as_images: bool = False,
        generated: ImageBank | None = None,
        test_order: TestOrder = "file",
    ) -> None:
        super().__init__()
        for name, value, minimum in (
            ("batch_size", batch_size, 1),
            ("test_batch_size", test_batch_size, 1),
            ("workers", 0 if workers is None else workers, 0),
            ("seed", seed, 0),
            ("cached_views", cached_views, 0),
            ("keep_bytes", keep_bytes, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ConfigError(f"{name} is {value!r}; accepted: whole numbers from {minimum}.")
        if test_order not in TEST_ORDERS:
            raise ConfigError(f"test_order is {test_order!r}.{did_you_mean(str(test_order), TEST_ORDERS)}")
        if on_bad_image not in ON_BAD_IMAGE:
            raise ConfigError(f"on_bad_image is {on_bad_image!r}.{did_you_mean(str(on_bad_image), ON_BAD_IMAGE)}")
        if encode is not None and not fingerprint:
            raise ConfigError("Cached features need the backbone's fingerprint: pass fingerprint=backbone.fingerprint")
        if cached_views and encode is None:
            raise ConfigError("cached_views stores features, which need an encoder: pass encode= or cached_views=0.")
        if test_views is not None and encode is None and not views_as_images:
            raise ConfigError("Features of test_views need an encoder: pass encode= or views_as_images=True.")
        preprocess, transform = of_test_images(preprocess, check_kind(transform))
        self.task, self.preprocess, self.transform = task, preprocess, transform
        self.batch_size, self.test_batch_size, self.seed, self.workers = batch_size, test_batch_size, seed, workers
        self.drop_last = drop_last
        self.encode, self.fingerprint, self.device = encode, fingerprint, device
        self.cached_views = cached_views if transform != "center" else 0
        self.skip, self.keep_bytes = on_bad_image == "skip", keep_bytes
        self.test_views, self.views_as_images, self.test_order = test_views, views_as_images, test_order
        self._test_view = RandomViews(preprocess, "center", 1, seed)
        self._additional = [] if test_views is None else additional_views(preprocess, test_views, generated, seed)
        self.store = features if isinstance(features, FeatureStore) else FeatureStore(features or default_folder())
        # With more ranks than test images, some ranks have an empty loader, which Lightning must accept.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._transforms: dict[str, Transform] = {
            kind: Transform(preprocess, kind) for kind in ("center", self.transform)
        }
        self._rows: dict[tuple[str, int | None], Rows] = {}
        self._views: dict[tuple[str, str, int], ViewRows] = {}
        self._caches: dict[str, PixelCache] = {}
        self._stamps: dict[str, list[str]] = {}
        self._followed: dict[str, str] = {}  # what the stamps of a split follow

    def prepare_data(self) -> None:
        """Compute the required features that are not stored (Lightning calls this in one process per machine)."""
        self._load(self._wanted(None))

    def setup(self, stage: str | None = None) -> None:
        """Load the features of ``stage``: ``fit``, ``validate``, ``test``, or all with ``None``."""
        self._load(self._wanted(stage))

    def teardown(self, stage: str) -> None:
        """Release data used only for training: decoded images, and features of random views."""
        if stage == "fit":
            self._caches.pop("train", None)
            self._rows = {key: value for key, value in self._rows.items() if key[1] is None}

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return this process's training batches; raises ConfigError if processes cannot share the batch size."""
        rank, world_size = self._world()
        labels = self._labels("train")
        dataset: FeatureBatches | ImageBatches
        if self.encode is not None and (self.cached_views or self.transform == "center"):
            positions = self._readable(self._rows_of("train", self._view_number(0)).missing)
            dataset = FeatureBatches(self._train_features, labels, positions)
        else:
            dataset = self._images("train", self.transform)
            if self.skip:
                # Determined before the first step, so that all processes skip the same images.
                dataset = self._images("train", self.transform, self._readable(self._unreadable(dataset)))
        sampler = TrainSampler(
            len(dataset), self.batch_size, seed=self.seed, rank=rank, world_size=world_size, drop_last=self.drop_last
        )
        loader = self._loader("train", dataset, sampler, sampler.local_batch_size, sampler.scale())
        loader.scales = sampler.scales()
        return loader

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return this process's share of the validation images; an empty list if the task has none."""
        return self._evaluation("val") if self.task.val else []

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return this process's share of the test images."""
        return self._evaluation("test")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalise a batch's images on the device."""
        return self._finished(batch)

    def feature_key(self, split: str, view: int | None = None) -> dict[str, Any]:
        """Return the key of the features of ``split`` in the feature store: everything they depend on.

        Args:
            split: ``train``, ``val`` or ``test``.
            view: Number of the random view; ``None`` for the test view.
        """
        lines = self._lines(split)
        return {
            "backbone": self.fingerprint,
            "view": describe_transform(self.preprocess, "center" if view is None else self.transform),
            "dataset": self.task.name,
            "split": split,
            "split_sha256": self.task.split_sha256,
            "samples_sha256": sha256_lines(lines),
            **stamps_record(self._followed[split]),
            **({} if view is None else {"seed": self.seed, "epoch": view}),
        }

    def features(self, split: str) -> Tensor:
        """Return the raw features ``[N, D]`` of ``train``, ``val`` or ``test`` under the test transform.

        Rows of skipped images are zeros.
        """
        return self._rows_of(split, None).features

    def view_features(self, split: str, count: int, kind: str) -> Tensor:
        """Return the raw features ``[count, N, D]`` of random views, or of the test view ``[1, N, D]``.

        View ``v`` of an image depends on ``(seed, image id, v)`` only: a larger count adds views. Rows of skipped
        images are zeros.

        Args:
            split: ``train``, ``val`` or ``test``.
            count: Number of random views; 0 for the test view.
            kind: Random kind of :class:`~vlprompt.data.transforms.Transform`; ignored for the test view.

        Raises:
            ConfigError: If there is no encoder, the split or kind is unknown, or the count is negative.
            DataError: If an image cannot be read, unless images are skipped.
        """
        if count < 0 or (count and kind in FIXED_KINDS):
            raise ConfigError(
                f"{count} views of kind {kind!r}; accepted: 0 for the test view, or a random kind with 1 or more views."
            )
        if count == 0:
            return self.features(split)[None]
        return self._view_rows(split, RandomViews(self.preprocess, kind, count, self.seed)).by_view()

    def images(self, split: str) -> Iterator[Tensor]:
        """Yield all images of a split in the order of the list, in normalised batches ``[b, 3, S, S]``.

        The transform is that of the test images. Every process gets all images. Skipped images are omitted.

        Raises:
            DataError: If an image cannot be read, unless images are skipped.
        """
        images = self._images(split, "center", keep=False)
        keys = [(0, index) for index in range(len(images))]
        for batch in make_loader(images, keys, self.test_batch_size, self._workers(len(images))):
            if skipped := batch.get("skipped", torch.empty(0)).tolist():
                count_skipped(split, (self._samples(split)[int(position)].id for position in skipped))
            if len(batch["index"]):
                yield self._transforms["center"].finish(batch["images"])

    def unreadable(self, split: str) -> tuple[int, ...]:
        """Return the positions of skipped images, whose features are zeros."""
        return self._rows_of(split, None).missing

    # -- features -----------------------------------------------------------------------------------------------------
    def _rows_of(self, split: str, view: int | None) -> Rows:
        samples = self._samples(split)
        if (split, view) in self._rows:
            return self._rows[split, view]
        self._encoder()
        key = self.feature_key(split, view)
        rows = rows_or_error(self.store, key, partial(self._compute, split, view), samples, self.skip)
        count_skipped(split, (samples[position].id for position in rows.missing))
        if view is not None:  # one random view at a time: the next epoch uses the next view
            self._rows = {key: value for key, value in self._rows.items() if key[1] is None}
        self._rows[split, view] = rows
        return rows

    def _compute(self, split: str, view: int | None) -> Rows:
        images = self._images(split, "center" if view is None else self.transform, keep=view is not None)
        workers = self._workers(len(images))
        return encode_all(self._encoder(), images, self.test_batch_size, self.device, workers, view or 0)

    def _view_rows(self, split: str, views: RandomViews | GeneratedViews) -> ViewRows:
        samples, name = self._samples(split), (split, views.transform.kind, views.count)
        if name not in self._views:
            lines = self._lines(split)
            facts = {"backbone": self.fingerprint, "dataset": self.task.name, "split": split}
            facts |= stamps_record(self._followed[split])
            size = self.test_batch_size
            encoder = ViewEncoder(self.store, self._encoder(), facts, size, self.device, self._workers, self.skip)
            rows = self._views[name] = encoder.rows(samples, lines, views)
            count_skipped(split, (samples[position].id for position in rows.missing))
        return self._views[name]

    def _encoder(self) -> Callable[[Tensor], Tensor]:
        if self.encode is None:
            raise ConfigError("Features cannot be computed without encode=: pass the backbone's encode_image.")
        return self.encode

    def _train_features(self, epoch: int) -> Tensor:
        return self._rows_of("train", self._view_number(epoch)).features

    def _view_number(self, epoch: int) -> int | None:
        return epoch % self.cached_views if self.cached_views else None

    def _load(self, splits: Sequence[str]) -> None:
        for split in splits:
            if self.encode is not None and self._samples(split) and (split != "train" or self.transform == "center"):
                self.features(split)
                for views in self._additional if split == "test" and not self.views_as_images else ():
                    self._view_rows(split, views)

    def _wanted(self, stage: str | None) -> Sequence[str]:
        if stage is None and self.trainer is not None and self.trainer.state.fn is not None:
            stage = self.trainer.state.fn.value
        return {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage or "", SPLITS)

    # -- samples ------------------------------------------------------------------------------------------------------
    def _samples(self, split: str) -> list[Sample]:
        if split not in SPLITS:
            raise ConfigError(f"Unknown split {split!r}; accepted: {', '.join(SPLITS)}.")
        samples: list[Sample] = getattr(self.task, split)
        return samples

    def _lines(self, split: str) -> list[str]:
        """Return a line for every sample that changes with its id and its bytes."""
        if split not in self._stamps:
            samples = self._samples(split)
            stamps, self._followed[split] = stamps_of([sample.source for sample in samples], skip=self.skip)
            self._stamps[split] = [f"{sample.id}\t{stamp}" for sample, stamp in zip(samples, stamps, strict=True)]
        return self._stamps[split]

    def _labels(self, split: str) -> Tensor:
        return labels_of(self._samples(split), len(self.task.class_names), self.task.multilabel)

    def _unreadable(self, images: ImageBatches) -> list[int]:
        """Return the positions of unreadable training images; readable images are cached on the way."""
        unreadable: list[int] = []
        keys = [(0, index) for index in range(len(images))]
        for batch in make_loader(images, keys, self.test_batch_size, self._workers(len(images))):
            unreadable += batch["skipped"].tolist()
        count_skipped("train", (self.task.train[position].id for position in unreadable))
        return unreadable

    def _readable(self, unreadable: Sequence[int]) -> list[int] | None:
        """Return the positions of training images that every process can read; ``None`` for all."""
        missing = {position for other in (gathered(unreadable) if self.skip else ()) for position in other}
        if missing and len(missing) == len(self.task.train):
            raise DataError(f"None of the {len(missing)} training images can be read.")
        return [position for position in range(len(self.task.train)) if position not in missing] if missing else None

    # -- loaders ------------------------------------------------------------------------------------------------------
    def _world(self) -> tuple[int, int]:
        """Return this process's rank and the number of processes."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        return rank_and_size()

    def _workers(self, images: int) -> int:
        if self.workers is not None:
            return self.workers
        return automatic_workers(images, self._world()[1] if self.trainer is None else self.trainer.num_devices)

    def _images(
        self, split: str, kind: str, positions: Sequence[int] | None = None, *, keep: bool = True
    ) -> ImageBatches:
        samples = self._samples(split)
        if not keep:
            cache = PixelCache(samples, self._transforms[kind])
        else:
            room = self.keep_bytes // self._world()[1]
            if split not in self._caches:
                self._caches[split] = PixelCache(samples, self._transforms[kind], room, self._workers(len(samples)))
            cache = self._caches[split]
        seed = self.seed if kind != "center" else None
        return ImageBatches(cache, self._labels(split), positions, seed=seed, skip=self.skip)

    def _evaluation(self, split: str) -> DataLoader[Batch]:
        rank, world_size = self._world()
        dataset: FeatureBatches | ImageBatches
        labels, size = self._labels(split), self.test_batch_size
        multi_view = split == "test" and self.test_views is not None
        if multi_view and self.views_as_images:
            dataset = MultiViewImages(
                self._samples(split), [self._test_view, *self._additional], labels, skip=self.skip
            )
            size = max(1, size // dataset.views)
        elif self.encode is not None:
            others = [self._view_rows(split, views) for views in self._additional] if multi_view else []
            missing = set(self._rows_of(split, None).missing).union(*(rows.missing for rows in others))
            positions = [position for position in range(len(self._samples(split))) if position not in missing]
            dataset = FeatureBatches(lambda _: self.features(split), labels, positions)
            if multi_view:
                dataset = MultiViewFeatures(self.features(split), others, labels, positions)
        else:
            once = self.trainer is not None and self.trainer.state.fn != "fit"
            dataset = self._images(split, "center", keep=split == "val" and not once)
        order_seed = self.seed if split == "test" and self.test_order == "shuffled" else None
        sampler = EvalSampler(len(dataset), order_seed=order_seed, rank=rank, world_size=world_size)
        return self._loader(split, dataset, sampler, size, 1.0)

    def _loader(
        self,
        split: str,
        dataset: FeatureBatches | ImageBatches,
        sampler: TrainSampler | EvalSampler,
        batch_size: int,
        scale: float,
    ) -> Loader:
        workers = 0 if isinstance(dataset, FeatureBatches) else self._workers(len(dataset))
        loader = make_loader(dataset, sampler, batch_size, workers, scale=scale, persistent=True)
        loader.on_batch = partial(self._on_batch, split)
        return loader

    def _on_batch(self, split: str, batch: Batch) -> Batch | None:
        """Count skipped images; normalise unless a Trainer does it after the transfer; ``None`` for an empty batch."""
        if (skipped := batch.pop("skipped", None)) is not None and len(skipped):
            count_skipped(split, (self._samples(split)[position].id for position in skipped.tolist()))
        if not len(batch["index"]):
            return None
        running = self.trainer is not None and self.trainer.state.stage is not None
        return batch if running else self._finished(batch)

    def _finished(self, batch: Any) -> Any:
        if isinstance(batch, dict) and "images" in batch and batch["images"].dtype == torch.uint8:
            return {**batch, "images": self._transforms[self.transform].finish(batch["images"])}
        return batch
