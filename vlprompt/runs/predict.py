"""Predictions of a saved head for image files and folders."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch

from vlprompt.data.transforms import Transform, test_transform
from vlprompt.datasets.images import (
    AS_SEEN,
    IMAGE_SUFFIXES,
    PLAIN,
    FileSource,
    Reading,
    is_image,
    reading_of,
    tag_and_alpha,
)
from vlprompt.datasets.passed import PassedOver
from vlprompt.engine.metrics import MULTILABEL, checked_logits
from vlprompt.errors import ConfigError, DataError, HeadError, bulleted, did_you_mean
from vlprompt.io.head import Head, load_head
from vlprompt.runs.provenance import backbone_of

Score = Literal["probability", "cosine"]
LOWEST: Mapping[str, float] = {"probability": 0.0, "cosine": -1.0}
"""The lowest value of each score; the highest is 1."""


def predict(
    folder: str | Path,
    paths: Sequence[str | Path],
    top: int = 5,
    *,
    batch_size: int = 64,
    device: str = "cpu",
    workers: int = 0,
    backbone: Mapping[str, Any] | None = None,
    orientation: Literal["tag", "ignore"] | None = None,
    background: str | None = None,
    scores: Score = "probability",
    unknown: float | None = None,
) -> list[dict[str, Any]]:
    """Return the ``top`` classes of every image with their scores, best first.

    A probability is a softmax over the classes of the head: it says which of them fits best, and an image of none of
    them may have a high one. A cosine is that of image and class, before the logit scale and the softmax, and depends
    on no other class; with CLIP, those of fitting classes are often between 0.2 and 0.4.

    Args:
        folder: A head folder or a run folder.
        paths: Image files, and folders that are searched recursively.
        top: Classes per image; at most all of them.
        batch_size: Images per forward pass.
        device: Device of the computation.
        workers: Threads that read images; 0 reads them in this one.
        backbone: Fields of the backbone's configuration that differ from those that the head records, such as the
            place of its weights (:func:`vlprompt.runs.provenance.backbone_of`).
        orientation: ``tag`` to turn images as their orientation tags say, ``ignore`` for the stored pixels.
        background: Colour behind transparent pixels, ``white``, ``black`` or ``#rrggbb``; ``none`` for the stored ones.
            Both are by default those of the head's training if it was on images of the user, else ``tag`` and
            ``white``. A warning counts the images that the head's training would have read in another way.
        scores: ``probability`` or ``cosine``.
        unknown: Images with a best score below this threshold are unknown; None: no image is.

    Returns:
        ``[{"path": str, "classes": [{"name": str, "probability": float}, ...]}, ...]`` in the order of the images;
        with cosines, ``"cosine"`` in place of ``"probability"``. With a threshold, every image also has
        ``"unknown": bool``.

    Raises:
        ConfigError: ``top`` is below 1; ``scores`` or ``unknown`` are not accepted, or make no sense with the head:
            scores that are more than cosines (caches), and a threshold on the probability of a single class or of
            classes that occur together.
        DataError: Files are missing or are not images; the text lists them, and nothing is predicted.
        HeadError: The head cannot be loaded.
        NotFiniteError: A score is not finite.
    """
    if top < 1:
        raise ConfigError(f"--top is {top}; accepted: 1 or more")
    check_scores(scores, unknown)
    files = image_files(paths)
    head = load_head(folder, backbone_of(folder, backbone or {}, device), device=device)
    _check_head(head, scores, unknown)
    if head.method.needs.online and len(files) > 1:
        warnings.warn(
            f"{head.method.name} adapts to the images before: these {len(files):,} images are one stream, in the order "
            "of the arguments and of the paths in folders. Another order or choice of images gives other predictions.",
            stacklevel=2,
        )
    trained = trained_reading(head)
    base = trained if trained is not None and (trained != PLAIN or _of_user(head)) else AS_SEEN
    given = reading_of(own=True, orientation=orientation, background=background)
    reading = Reading(
        base.orientation if orientation is None else given.orientation,
        base.background if background is None else given.background,
    )
    transform = test_transform(head.backbone.preprocess)
    predictions: list[dict[str, Any]] = []
    wrong: list[str] = []

    def view(path: Path) -> torch.Tensor | DataError:
        return _view_of(path, transform, reading)

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            loaded = list(pool.map(view, batch) if workers else map(view, batch))
            wrong += [str(error) for error in loaded if isinstance(error, DataError)]
            if wrong:
                continue  # nothing is predicted; only collect further unreadable images
            images = torch.stack([image for image in loaded if isinstance(image, torch.Tensor)])
            logits = checked_logits(head(images.to(head.backbone.device)), head.method.name)
            shown = logits.softmax(dim=-1) if scores == "probability" else _cosines(logits, head)
            best = shown.cpu().topk(min(top, len(head.class_names)), dim=-1)
            for path, values, indices in zip(batch, best.values.tolist(), best.indices.tolist(), strict=True):
                classes = [{"name": head.class_names[i], scores: x} for x, i in zip(values, indices, strict=True)]
                entry: dict[str, Any] = {"path": str(path), "classes": classes}
                predictions.append(entry if unknown is None else entry | {"unknown": values[0] < unknown})
    if wrong:
        raise DataError(wrong[0] if len(wrong) == 1 else "images that cannot be used:\n" + bulleted(wrong, limit=8))
    if trained is not None and trained != reading:
        _report_pixels(files, reading, trained)
    return predictions


def _of_user(head: Head) -> bool:
    """Return whether the head was trained on a folder of images of the user."""
    facts = head.training_facts.get("data")
    return isinstance(facts, Mapping) and not {"place_sha256", "images_sha256"}.isdisjoint(facts)


def trained_reading(head: Head) -> Reading | None:
    """Return how the images of the head's training were read; None if it does not say so."""
    facts = head.training_facts.get("data")
    pixels = facts.get("pixels") if isinstance(facts, Mapping) else None
    if not isinstance(pixels, Mapping):
        return None
    try:
        background = pixels.get("background")
        return reading_of(own=False, orientation=pixels.get("orientation"), background=background or "none")
    except ConfigError as error:
        raise HeadError(f"the head's record of its images is damaged: {error}") from error


def _report_pixels(files: Sequence[Path], reading: Reading, trained: Reading) -> None:
    """Warn of the images that the head's training would have read in another way."""
    found = [tag_and_alpha(FileSource(str(path))) for path in files]
    turned = sum(tag for tag, _ in found) if reading.orientation != trained.orientation else 0
    transparent = sum(alpha for _, alpha in found) if reading.background != trained.background else 0
    parts = [f"{turned:,} with an orientation tag"] if turned else []
    parts += [f"{transparent:,} with transparent pixels"] if transparent else []
    if parts:
        warnings.warn(
            f"{' and '.join(parts)} of {len(files):,} images: they are read with orientation {reading.orientation} and "
            f"background {reading.background or 'none'}, the images of the head's training were read with orientation "
            f"{trained.orientation} and background {trained.background or 'none'} (--data.orientation, "
            "--data.background)",
            stacklevel=3,
        )


def check_scores(scores: str, unknown: float | None) -> None:
    """Raise ConfigError if ``scores`` is no score, or ``unknown`` no value of it."""
    if scores not in LOWEST:
        raise ConfigError(f"--scores is {scores!r}; accepted: probability or cosine.{did_you_mean(scores, LOWEST)}")
    if unknown is not None and not LOWEST[scores] <= unknown <= 1:  # also false for NaN
        raise ConfigError(f"--unknown is {unknown}; accepted: a {scores} from {LOWEST[scores]:g} to 1")


def _check_head(head: Head, scores: str, unknown: float | None) -> None:
    """Raise ConfigError if the head has no such scores, or a threshold on them makes no sense."""
    method, data = head.method, head.training_facts.get("data")
    if scores == "cosine" and method.cosine_scale is None:
        raise ConfigError(
            f"--scores is 'cosine', but the scores of {method.name} are more than cosines of image and class; "
            "accepted: probability"
        )
    if scores == "cosine" or unknown is None:
        return
    why = ""
    if len(head.class_names) == 1:
        why = "the head has a single class, whose probability is always 1"
    elif isinstance(data, Mapping) and data.get("metric") in MULTILABEL:
        why = f"images of {data.get('name')} have several labels, which share the sum of the probabilities"
    if why:
        raise ConfigError(f"--unknown is {unknown}, but {why}; accepted: a cosine, with --scores cosine")


def _cosines(logits: torch.Tensor, head: Head) -> torch.Tensor:
    """Return the cosines ``[B, C]`` of images and classes."""
    assert head.method.cosine_scale is not None  # _check_head
    return logits.float() / head.method.cosine_scale


def _view_of(path: Path, transform: Transform, reading: Reading) -> torch.Tensor | DataError:
    """Return the preprocessed image ``[3, H, W]``, or the error if it cannot be read."""
    try:
        image: torch.Tensor = transform(FileSource(str(path), reading).open())
    except DataError as error:
        return error
    return image


def image_files(paths: Sequence[str | Path]) -> list[Path]:
    """Return the image files in ``paths``; files of folders are in byte order of their paths.

    A warning counts the files of folders that are passed over.

    Raises:
        DataError: A path does not exist, a folder has no images, or there are no paths.
    """
    files: list[Path] = []
    wrong = []
    passed = PassedOver()
    for path in map(Path, paths):
        if os.path.isdir(path):  # os.path gives False for invalid names
            inside = []
            for found in path.rglob("*"):
                if _is_image(found, path):
                    inside.append(found)
                elif not found.is_dir():
                    hidden = any(part.startswith(".") for part in found.relative_to(path).parts)
                    passed.add(".hidden" if hidden else str(found))
            files += sorted(inside, key=lambda p: os.fsencode(p))
            if not inside:
                wrong.append(f"{path}: a folder without images ({', '.join(IMAGE_SUFFIXES)})")
        elif os.path.isfile(path):
            files.append(path)
        else:
            text = str(path)
            wrong.append(f"{text if len(text) <= 150 else text[:120] + '...'}: there is no such file or folder")
    if wrong or not files:
        others = [text] if (text := passed.text()) else []
        raise DataError("nothing to predict:\n" + bulleted([*(wrong or ["no images were given"]), *others]))
    if text := passed.text():
        warnings.warn(f"predict: {text}", stacklevel=3)
    return files


def _is_image(path: Path, folder: Path) -> bool:
    # As in data folders, hidden files (._x.jpg of macOS, .thumbnails/) are skipped.
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and is_image(path.name) and path.is_file()
