"""What a saved head records about its training, compared with the images that it is evaluated on."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlprompt._files import sha256_text
from vlprompt.backbone import Backbone, load_backbone
from vlprompt.backbone.demo import DEMOS
from vlprompt.config.run import DataConfig
from vlprompt.datasets import FewShotTask, find_card, load_dataset
from vlprompt.datasets.kept_split import KEPT_SPLIT, read_kept
from vlprompt.errors import ConfigError, VlpromptError
from vlprompt.io.head import Head
from vlprompt.io.head_files import find_head, read_config
from vlprompt.methods.fitted import FittedMethod


def run_of(folder: str | Path) -> Path:
    """Return the run folder of a head in ``folder``: the parent of ``head/``, else the head's folder."""
    head = find_head(folder)
    return head.resolve().parent if head.resolve().name == "head" else head


def backbone_of(folder: str | Path, given: Mapping[str, Any], device: str) -> Backbone | None:
    """Return the backbone of a head, loaded as ``given`` says; None without ``given``: the head knows its name.

    Weights are often in another place than at training. :func:`vlprompt.load_head` compares their content with what
    the head records.

    Args:
        folder: A run folder or head folder.
        given: Values of ``name``, ``pretrained``, ``precision`` and ``image_size``; the others are those of the head.
        device: Device of the backbone.

    Raises:
        VlpromptError: There is no head, or the backbone cannot be loaded.
    """
    if not given:
        return None
    facts = read_config(find_head(folder)).backbone
    names = ("name", "pretrained", "precision", "image_size")
    values: dict[str, Any] = {name: getattr(facts, name) for name in names}
    if (name := str(given.get("name", ""))) in DEMOS or name.startswith(("local-dir:", "hf-hub:")):
        values["pretrained"] = None  # such a name includes its weights
    values |= given
    return load_backbone(**values, device=device)


def with_kept_split(folder: str | Path, data: DataConfig, head: Head) -> DataConfig:
    """Return ``data`` with the split that the run of a head kept, if ``data`` names the run's own folder of images.

    Args:
        folder: The run folder or head folder.
        data: The images to evaluate on; a split that it names stays.
        head: The head.
    """
    run, facts = run_of(folder), _data_facts(head)
    if data.split is not None or not os.path.lexists(run / KEPT_SPLIT) or facts.get("name") != data.name:
        return data
    if not find_card(data.name).keeps_split:
        return data
    if facts.get("place_sha256") != load_place(data):
        return data
    return dataclasses.replace(data, split=str(run))


def load_place(data: DataConfig) -> str | None:
    """Return the SHA-256 of the place of a folder of images of the user; None for other data sets."""
    place = find_card(data.name).own_place(data.root)
    return None if place is None else sha256_text(place)


def check_images(folder: str | Path, head: Head, task: FewShotTask, *, trains: bool) -> None:
    """Compare the images of ``task`` with those that the head was trained on, and its classes with the head's.

    The split of the head's own data set may have changed, because files came or went or another split was named. Test
    images that the head was trained on are then refused. A warning names what cannot be compared.

    Args:
        folder: The run folder or head folder.
        head: The head.
        task: The task that it is evaluated on.
        trains: Whether the head's method takes gradient steps over images.

    Raises:
        ConfigError: Test images are training images of the head.
    """
    facts, now = _data_facts(head), task.describe()
    if facts.get("name") != task.name:
        return  # another data set
    if unknown := [name for name in task.class_names if name not in set(head.class_names)]:
        warnings.warn(
            f"{len(unknown)} of the {len(task.class_names)} classes of {task.name} are not those of the head, first "
            f"{unknown[0]!r}: their scores are those of new classes",
            stacklevel=2,
        )
    if not trains and not isinstance(head.method, FittedMethod):
        return
    if facts.get("split_sha256") == now["split_sha256"] and not task.card.same_images:
        return
    if facts.get("place_sha256") != now.get("place_sha256"):
        warnings.warn(
            f"the head was trained on another folder of images than {task.card.base(task.root)}, or on this one in "
            "another place: whether its training images are among the test images is not known",
            stacklevel=2,
        )
        return
    seen = _training_ids(folder, facts, task)
    if seen is None:
        warnings.warn(
            f"{task.name} has another split here than the one that the head was trained on (content "
            f"{str(facts.get('split_sha256'))[:12]} there, {now['split_sha256'][:12]} here), and its training images "
            "cannot be found: they may be among the test images",
            stacklevel=2,
        )
    elif shared := sum(sample.id in seen for sample in task.test):
        advice = "name data.target domains that it was not trained on" if task.card.same_images else "omit data.split"
        raise ConfigError(
            f"{shared} of the {len(task.test)} test images of {task.name} are images that the head was trained on, so "
            f"its scores would be too high. Evaluate the run folder on the split of its training: {advice}"
        )


def _data_facts(head: Head) -> Mapping[str, Any]:
    facts = head.training_facts.get("data")
    return facts if isinstance(facts, Mapping) else {}


def _training_ids(folder: str | Path, facts: Mapping[str, Any], task: FewShotTask) -> set[str] | None:
    """Return the ids of the images that a head was trained and selected on; None if they cannot be found."""
    kept = run_of(folder) / KEPT_SPLIT
    if os.path.lexists(kept):
        return {name for name, split in read_kept(kept).items() if split != "test"}
    split = facts.get("split")
    try:
        drawn = load_dataset(
            task.name,
            root=task.root,
            shots=facts["shots"],
            seed=facts["seed"],
            classes=facts.get("classes", "all"),
            source=facts.get("source", ()),
            target=facts.get("target", ()),
            split=None if split == find_card(task.name).split else split,
            sampler=facts.get("sampler"),
        )
    except (VlpromptError, KeyError):
        return None
    if drawn.shots_sha256 != facts.get("shots_sha256"):
        return None
    return {sample.id for sample in (*drawn.train, *drawn.val)}
