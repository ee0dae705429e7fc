"""What a method is fed: the data module of a run, the features that caches are fitted on, views of test images."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt._files import sha256_lines
from vlprompt.config.run import RunConfig
from vlprompt.data import FewShotData
from vlprompt.datasets import FewShotTask
from vlprompt.errors import ConfigError
from vlprompt.generation import open_bank
from vlprompt.methods import PromptMethod
from vlprompt.methods.fitting import FewShotFeatures
from vlprompt.runs.selection import judge


def data_of(config: RunConfig, method: PromptMethod, task: FewShotTask) -> FewShotData:
    """Return the data module that serves ``method``: features where its image side is frozen, else images.

    Raises:
        ConfigError: Values that the method cannot have.
    """
    backbone, views = method.backbone, method.test_views
    more: dict[str, Any] = {}
    if views is not None:
        more = {"test_views": views, "views_as_images": method.learns_image_side}
        if views.generated:
            more["generated"] = _bank(config, method)
    return FewShotData(
        task,
        backbone.preprocess,
        batch_size=config.recipe.batch_size,
        test_batch_size=config.recipe.test_batch_size,
        transform=config.data.view,
        seed=config.seed,
        workers=config.data.workers,
        on_bad_image=config.data.on_bad_image,
        cached_views=_cached_views(config, method, task),
        encode=None if method.learns_image_side else backbone.encode_image,
        fingerprint=backbone.fingerprint,
        device=backbone.device,
        **more,
    )


def shots_of(config: RunConfig, method: PromptMethod, task: FewShotTask) -> FewShotFeatures:
    """Return the frozen features that ``method.fit`` learns from, out of the feature store.

    Validation images that are test images too are left out: nothing is chosen on test images unless the method's
    settings say so.
    """
    data, device = data_of(config, method, task), method.backbone.device

    def features(split: str, count: int, kind: str) -> Tensor:
        return data.view_features(split, count, kind)[:, readable(split)].to(device)

    def labels(split: str) -> Tensor:
        found = torch.tensor([sample.label for sample in getattr(task, split)], dtype=torch.int64)
        return found[readable(split)].to(device)

    def readable(split: str) -> list[int]:
        skipped = set(data.unreadable(split))
        return [row for row in range(len(getattr(task, split))) if row not in skipped]

    where = method.unlabelled()
    nothing = torch.empty(0, method.backbone.embed_dim, device=device)
    split = _chosen_on(method, task)
    views = method.unlabelled_view_count() if where != "none" else 0
    return FewShotFeatures(
        train=features("train", method.fit_views(), method.fit_view),
        labels=labels("train"),
        val=nothing if split is None else features(split, 0, "center")[0],
        val_labels=torch.empty(0, dtype=torch.int64, device=device) if split is None else labels(split),
        unlabelled=nothing if where == "none" else features(where, 0, "center")[0],
        unlabelled_views=features(where, views, "random") if views else nothing[None][:0],
        seed=config.seed,
    )


def training_images(config: RunConfig, method: PromptMethod, task: FewShotTask) -> Iterator[Tensor]:
    """Yield the training images once, in batches ``[B, 3, H, W]``, as the configuration looks at them."""
    data = data_of(config, method, task)
    data.setup("fit")
    for batch in data.train_dataloader():
        yield batch["images"]


def _chosen_on(method: PromptMethod, task: FewShotTask) -> str | None:
    """Return the split that hyperparameters are chosen on; None where there are no images for it."""
    ids = [{sample.id for sample in part} for part in (task.val, task.test)]
    if method.selects_on() == "test":
        judge(task.name, "test", *ids, oracle=True)
        return "test"
    if not ids[0] or ids[0] & ids[1]:
        why = "no validation images" if not ids[0] else "no validation images apart from its test images"
        warnings.warn(f"{task.name} has {why}: {method.name} keeps the values of its settings", stacklevel=2)
        return None
    return "val"


def use_of_test_images(method: PromptMethod) -> str | None:
    """Return how a method uses test images beyond scoring each one: for results and tables; None for not at all."""
    if method.transductive or method.unlabelled() == "test":
        return "transductive"
    if method.online:
        return "online"
    return "test-tuned" if method.test_views is not None and method.needs_gradient else None


def training_task(method: PromptMethod, task: FewShotTask) -> FewShotTask:
    """Return ``task`` with the training images that ``method`` takes gradient steps on.

    Without labels, images of the other half of the classes can be learned from as well.
    """
    if method.fits or method.unlabelled() != "train" or task.classes == "all":
        return task
    train = [*task.train, *task.counterpart().train]
    return replace(task, train=train, shots_sha256=sha256_lines(sample.id for sample in train))


def task_feature(config: RunConfig, method: PromptMethod, task: FewShotTask) -> Tensor:
    """Return the mean unit image feature ``[D]`` of the training images in the test view, out of the feature store."""
    backbone = method.backbone
    data = FewShotData(
        task,
        backbone.preprocess,
        transform="center",
        workers=config.data.workers,
        on_bad_image=config.data.on_bad_image,
        encode=backbone.encode_image,
        fingerprint=backbone.fingerprint,
        device=backbone.device,
    )
    unit = F.normalize(data.features("train").float(), dim=-1)  # skipped images are zeros and stay so
    return unit.sum(dim=0) / (len(unit) - len(data.unreadable("train")))


def check_processes(config: RunConfig, method: PromptMethod) -> None:
    """Raise ConfigError when several processes would share a stream whose order counts."""
    if method.online and config.trainer.devices > 1:
        raise ConfigError(
            f"trainer.devices is {config.trainer.devices}, but {method.name} sees its test images one after the other; "
            "accepted: 1"
        )


def _bank(config: RunConfig, method: PromptMethod) -> Any:
    if config.data.bank is None:
        raise ConfigError(
            f"{method.name} looks at {method.test_views.generated if method.test_views else 0} generated pictures of "
            "each test image, and data.bank does not say where they are. Make them with `vlprompt bank` "
            "and give --data.bank FOLDER, or do without: --settings.generated 0"
        )
    return open_bank(Path(config.data.bank).expanduser())


def _cached_views(config: RunConfig, method: PromptMethod, task: FewShotTask) -> int:
    """Return the random views per training image whose features are kept: what was asked for, or one per epoch.

    One per epoch where that changes nothing but rounding (one process, full precision) and takes at most 1 GiB.
    """
    asked = config.data.cached_views
    if asked and method.learns_image_side:
        raise ConfigError(
            f"data.cached_views is {asked}, but {method.name} with these settings learns on the image side, so that "
            "features cannot be kept; accepted: 0 or null"
        )
    if asked is not None or method.learns_image_side or config.data.view == "center":
        return asked or 0
    size = len(task.train) * config.recipe.epochs * method.backbone.embed_dim * 4
    exact = config.trainer.devices == 1 and config.trainer.precision == "32-true"
    return config.recipe.epochs if exact and size <= 2**30 else 0
