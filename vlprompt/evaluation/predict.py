"""Predictions of a saved head for image files and folders of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlprompt.data.images import IMAGE_SUFFIXES, FileSource
from vlprompt.data.views import test_view
from vlprompt.errors import ConfigError, DataError, bulleted
from vlprompt.io.head import load_head


def predict(
    folder: str | Path, paths: Sequence[str | Path], top: int = 5, *, batch_size: int = 64, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Return, for every image, its ``top`` classes with their probabilities, best first.

    Args:
        folder: A head's or a run's folder.
        paths: Image files, and folders that are searched for images at any depth.
        top: Classes per image; more than there are gives all of them.
        batch_size: Images per forward pass.
        device: Where to compute.

    Returns:
        ``[{"path": str, "classes": [{"name": str, "probability": float}, ...]}, ...]`` in the order of the images.

    Raises:
        ConfigError: ``top`` below 1.
        DataError: Files that are missing or no images, all of them listed; nothing is predicted then.
        HeadError: The head cannot be loaded.
    """
    if top < 1:
        raise ConfigError(f"--top is {top}; accepted: 1 or more")
    files = image_files(paths)
    head = load_head(folder, device=device)
    view = test_view(head.backbone.preprocess)
    found: list[dict[str, Any]] = []
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        images = torch.stack([view(FileSource(str(path)).open()) for path in batch])
        probabilities = head(images.to(head.backbone.device)).softmax(dim=-1).cpu()
        best = probabilities.topk(min(top, len(head.class_names)), dim=-1)
        for path, values, indices in zip(batch, best.values.tolist(), best.indices.tolist(), strict=True):
            classes = [{"name": head.class_names[i], "probability": p} for p, i in zip(values, indices, strict=True)]
            found.append({"path": str(path), "classes": classes})
    return found


def image_files(paths: Sequence[str | Path]) -> list[Path]:
    """Return the image files that ``paths`` name, folders searched in byte order of their paths.

    Raises:
        DataError: A path that does not exist, a folder without images, or no paths at all.
    """
    files: list[Path] = []
    wrong = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
            files += sorted(inside, key=lambda p: p.as_posix().encode())
            if not inside:
                wrong.append(f"{path}: a folder without images ({', '.join(IMAGE_SUFFIXES)})")
        elif path.is_file():
            files.append(path)
        else:
            wrong.append(f"{path}: there is no such file or folder")
    if wrong or not files:
        raise DataError("nothing to predict:\n" + bulleted(wrong or ["no images were given"]))
    return files
