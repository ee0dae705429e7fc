"""Features of image-caption pairs, computed once and kept in the feature store.

Long lists are encoded and stored in blocks, so that a killed run resumes at its block. An image with several captions,
or a caption of several images, is encoded once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from vlprompt._files import sha256_lines
from vlprompt.data.batches import ImageBatches, automatic_workers
from vlprompt.data.features import FeatureStore, Rows, default_folder, encode_all
from vlprompt.data.pixel_cache import PixelCache
from vlprompt.data.tally import count_skipped
from vlprompt.data.transforms import PreprocessLike, Transform, describe_transform
from vlprompt.data.view_features import rows_or_error
from vlprompt.datasets.images import ImageSource, stamps_of, stamps_record
from vlprompt.datasets.records import Sample
from vlprompt.errors import ConfigError, DataError
from vlprompt.pairs.load import Pair

#: Images or captions per entry of the store: a killed run repeats at most this many.
BLOCK_ITEMS = 10_000
_Item = TypeVar("_Item", bound=Hashable)


def image_features(
    pairs: Sequence[Pair],
    preprocess: PreprocessLike,
    encode: Callable[[Tensor], Tensor],
    *,
    fingerprint: str,
    store: FeatureStore | str | Path | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 100,
    workers: int | None = None,
    skip: bool = False,
) -> Rows:
    """Return the raw features of the pairs' images under the backbone's test transform.

    Args:
        pairs: The N pairs.
        preprocess: The backbone's preprocessing.
        encode: Images ``[B, 3, H, W]`` on ``device`` to raw features ``[B, D]``.
        fingerprint: The backbone's fingerprint, part of the store's key.
        store: The feature store or its folder; ``None`` for :func:`~vlprompt.data.features.default_folder`.
        device: Device of the images passed to ``encode``.
        batch_size: Images per call of ``encode``.
        workers: Processes that decode images; ``None`` chooses like :class:`~vlprompt.data.FewShotData`.
        skip: Whether to skip images that cannot be read instead of raising. They are counted as skipped training images
            (:mod:`vlprompt.data.tally`).

    Returns:
        Features ``[N, D]``, float32, on the CPU, and the positions of the pairs whose image was skipped; their rows are
        zeros.

    Raises:
        ConfigError: If the fingerprint is missing, or a number is out of range.
        DataError: If an image cannot be read, unless ``skip``, or no image can be read.
    """
    _check(fingerprint, batch_size)
    feature_store, transform = _opened(store), Transform(preprocess, "center")
    facts = {
        "backbone": fingerprint,
        "view": describe_transform(preprocess, "center"),
        "dataset": "pairs",
        "split": "images",
    }

    def rows(images: Sequence[tuple[str, ImageSource]]) -> Rows:
        samples = [Sample(name, 0, source) for name, source in images]

        def compute() -> Rows:
            batches = ImageBatches(PixelCache(samples, transform), torch.zeros(len(samples)), skip=skip)
            processes = automatic_workers(len(samples)) if workers is None else workers
            try:
                return encode_all(encode, batches, batch_size, device, processes)
            except DataError:
                if not skip:
                    raise
                return Rows(torch.zeros(len(samples), 0), tuple(range(len(samples))))  # other blocks may be readable

        stamps, followed = stamps_of([sample.source for sample in samples], skip=skip)
        lines = (f"{sample.id}\t{stamp}" for sample, stamp in zip(samples, stamps, strict=True))
        key = {**facts, "samples_sha256": sha256_lines(lines), **stamps_record(followed)}
        block = rows_or_error(feature_store, key, compute, samples, skip)
        count_skipped("train", (samples[position].id for position in block.missing))
        return block

    return _in_blocks([(pair.id, pair.source) for pair in pairs], rows, "image")


def caption_features(
    captions: Sequence[str],
    encode_text: Callable[[list[str]], Tensor],
    *,
    fingerprint: str,
    store: FeatureStore | str | Path | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Return the raw features ``[N, D]`` of captions, float32, on the CPU.

    The store counts encoded captions like encoded images.

    Args:
        captions: The N captions.
        encode_text: n captions to raw features ``[n, D]``.
        fingerprint: Everything that features depend on besides the captions, part of the store's key: the backbone's
            fingerprint, and any change that ``encode_text`` makes to captions.
        store: As for :func:`image_features`.
        batch_size: Captions per call of ``encode_text``.

    Raises:
        ConfigError: If the fingerprint is missing, a number is out of range, or ``encode_text`` returns another number
            of rows.
        DataError: If there are no captions.
    """
    _check(fingerprint, batch_size)
    feature_store = _opened(store)
    facts = {"backbone": fingerprint, "dataset": "pairs", "split": "captions"}

    def rows(texts: Sequence[str]) -> Rows:
        def compute() -> Rows:
            blocks = []
            with torch.no_grad():
                for start in range(0, len(texts), batch_size):
                    batch = list(texts[start : start + batch_size])
                    features = encode_text(batch).float().cpu()
                    if features.ndim != 2 or len(features) != len(batch):
                        shape = tuple(features.shape)
                        raise ConfigError(f"encode_text returned {shape} for {len(batch)} captions; accepted: [n, D].")
                    blocks.append(features)
            return Rows(torch.cat(blocks))

        # As JSON, because a caption may contain line ends, which separate the lines of the hash.
        key = {**facts, "texts_sha256": sha256_lines(map(json.dumps, texts))}
        return feature_store.rows(key, compute, number=len(texts))

    return _in_blocks(captions, rows, "caption").features


def _in_blocks(items: Sequence[_Item], rows_of: Callable[[Sequence[_Item]], Rows], noun: str) -> Rows:
    """Return the rows of ``items``: ``rows_of`` is called with blocks of the distinct items."""
    place = {item: position for position, item in enumerate(dict.fromkeys(items))}
    distinct = list(place)
    if not distinct:
        raise DataError(f"There are no {noun}s to compute features of.")
    blocks: list[Tensor] = []
    missing: set[int] = set()
    for start in range(0, len(distinct), BLOCK_ITEMS):
        rows = rows_of(distinct[start : start + BLOCK_ITEMS])
        blocks.append(rows.features)
        missing.update(start + position for position in rows.missing)
    if len(missing) == len(distinct):
        raise DataError(f"None of the {len(distinct)} {noun}s can be read.")
    # For a block without readable images, the number of features is unknown.
    width = max(block.shape[1] for block in blocks)
    features = torch.cat([block if block.shape[1] else block.new_zeros(len(block), width) for block in blocks])
    if len(distinct) == len(items):
        return Rows(features, tuple(sorted(missing)))
    index = [place[item] for item in items]
    return Rows(features[index], tuple(position for position, row in enumerate(index) if row in missing))


def _opened(store: FeatureStore | str | Path | None) -> FeatureStore:
    return store if isinstance(store, FeatureStore) else FeatureStore(store or default_folder())


def _check(fingerprint: str, batch_size: int) -> None:
    if not fingerprint:
        raise ConfigError("Cached features need the backbone's fingerprint: pass fingerprint=backbone.fingerprint")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size!r}; accepted: whole numbers from 1.")
