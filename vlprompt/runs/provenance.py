"""What a saved head records about its training, compared with the images that it is evaluated on."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vlprompt._dist import is_main_process
from vlprompt._files import sha256_text
from vlprompt.backbone import Backbone, load_backbone
from vlprompt.backbone.demo import DEMOS
from vlprompt.config.run import DataConfig
from vlprompt.datasets import FewShotTask, find_card, load_dataset
from vlprompt.datasets.kept_images import (
    KEPT_IMAGES,
    Contents,
    KeptImages,
    contents_by_id,
    read_kept_images,
    write_kept_images,
)
from vlprompt.datasets.kept_split import KEPT_SPLIT
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
    run, facts = run_of(folder), _data_facts(head.training_facts)
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

    Args:
        folder: The run folder or head folder.
        head: The head.
        task: The task that it is evaluated on.
        trains: Whether the head's method takes gradient steps over images.

    Raises:
        ConfigError: Test images are training images of the head.
    """
    facts, now = _data_facts(head.training_facts), task.describe()
    if facts.get("name") == task.name:
        if unknown := [name for name in task.class_names if name not in set(head.class_names)]:
            warnings.warn(
                f"{len(unknown)} of the {len(task.class_names)} classes of {task.name} are not those of the head, "
                f"first {unknown[0]!r}: their scores are those of new classes",
                stacklevel=2,
            )
        elif facts.get("classes") == task.classes and list(task.class_names) != list(head.class_names):
            warnings.warn(
                f"the classes of {task.name} are in another order than the head's, or fewer; they are matched by name",
                stacklevel=2,
            )
        pixels = facts.get("pixels")
        if isinstance(pixels, Mapping) and pixels != now["pixels"]:
            warnings.warn(
                f"the images are read with {_in_words(now['pixels'])}, those of the head's training were read with "
                f"{_in_words(pixels)} (data.orientation, data.background)",
                stacklevel=2,
            )
    kept = _kept_images(folder)
    if kept is not None and task.card.own:
        contents = contents_by_id(task.test)
        if changed := [name for name, text in contents.items() if text and (kept.tested.get(name) or text) != text]:
            warnings.warn(
                f"{len(changed)} of the {len(task.test)} test images have other contents than in the run of the head, "
                f"first {changed[0]!r}",
                stacklevel=2,
            )
    if trains or isinstance(head.method, FittedMethod):
        check_unseen(folder, head.training_facts, task, _OMIT)


def check_bank(head: Head, recipe_id: str | None) -> None:
    """Warn if the generated images are those of another recipe than in the head's own run."""
    known = _data_facts(head.training_facts).get("bank")
    if known is not None and recipe_id is not None and known != recipe_id:
        warnings.warn(
            f"data.bank has generated images of the recipe {recipe_id[:16]}, those of the head's run were of "
            f"{str(known)[:16]}: the scores are not those of one method",
            stacklevel=2,
        )


def check_starts(folders: Sequence[tuple[str, str]], task: FewShotTask) -> list[dict[str, Any]]:
    """Check that the heads that a run starts from, or learns from, were not trained on the run's test images.

    Args:
        folders: The setting that names a head, and its folder.
        task: The task of the run.

    Returns:
        The data records of the heads and of their own starts, for the record of the run.

    Raises:
        ConfigError: Test images of ``task`` are training images of a head.
        HeadError: There is no head.
    """
    records = []
    for key, folder in folders:
        training = read_config(find_head(folder)).training
        check_unseen(folder, training, task.whole or task, f"Omit {key}, or name a run that was not trained on them.")
        starts = training.get("starts")
        records += [_data_facts(training), *(starts if isinstance(starts, list) else [])]
    return [dict(record) for record in records if record]


def check_unseen(folder: str | Path, training: Mapping[str, Any], task: FewShotTask, advice: str) -> None:
    """Raise ConfigError if test images of ``task`` are training images of a head; warn of what cannot be compared.

    The split of the head's own data set may have changed, because files came, went or moved, or another split was
    named. Images of the user are compared by their content, wherever they are now, up to
    :data:`vlprompt.datasets.images.HASHED_BYTES`; larger sets, and published ones, by their ids.

    Args:
        folder: The run folder or head folder.
        training: What the head records about its training.
        task: The task.
        advice: What to do about it.
    """
    kept = _kept_images(folder)
    if kept is not None and not kept.trained and not kept.starts:
        return
    contents = contents_by_id(task.test) if kept is not None and task.card.own else {}
    if kept is not None and contents and kept.trained_contents():
        if shared := kept.shared(task.test, contents):
            _refuse(folder, task, shared, advice)
        return
    starts = training.get("starts")
    for facts in [_data_facts(training), *(starts if isinstance(starts, list) else [])]:
        if facts.get("name") == task.name:
            _compare(folder, facts, task, kept, advice)


def _compare(
    folder: str | Path, facts: Mapping[str, Any], task: FewShotTask, kept: KeptImages | None, advice: str
) -> None:
    """Compare the images of ``task`` by their ids with those of a training on the same data set."""
    now = task.describe()
    if facts.get("split_sha256") == now["split_sha256"] and not task.card.same_images:
        return
    if facts.get("place_sha256") != now.get("place_sha256"):
        warnings.warn(
            f"the head in {folder} was trained on another folder of images than {task.card.base(task.root)}, or on "
            "this one in another place: whether its training images are among the test images is not known",
            stacklevel=4,
        )
        return
    seen = set(kept.trained) if kept is not None else _training_ids(facts, task)
    if seen is None:
        warnings.warn(
            f"{task.name} has another split here than the one that the head in {folder} was trained on (content "
            f"{str(facts.get('split_sha256'))[:12]} there, {now['split_sha256'][:12]} here), and its training images "
            "cannot be found: they may be among the test images",
            stacklevel=4,
        )
    elif shared := [(sample.id, sample.id) for sample in task.test if sample.id in seen]:
        _refuse(folder, task, shared, advice)


def _refuse(folder: str | Path, task: FewShotTask, shared: Sequence[tuple[str, str]], advice: str) -> NoReturn:
    name, before = shared[0]
    moved = f" ({before!r} at the training)" if before != name else ""
    if advice == _OMIT and moved:
        advice = "Move them back, or train on the folder as it is now, with another --output."
    elif advice == _OMIT and task.card.same_images:
        advice = "Name data.target domains that it was not trained on."
    raise ConfigError(
        f"{len(shared)} of the {len(task.test)} test images of {task.name} are images that the head in {folder} was "
        f"trained on, first {name!r}{moved}: scores on them would be too high. {advice}"
    )


_OMIT = "Evaluate it on the split of its training: omit data.split."


def _in_words(pixels: Mapping[str, Any]) -> str:
    return f"orientation {pixels.get('orientation')} and background {pixels.get('background') or 'none'}"


def _data_facts(training: Mapping[str, Any]) -> Mapping[str, Any]:
    facts = training.get("data")
    return facts if isinstance(facts, Mapping) else {}


# -- the images of a run ----------------------------------------------------------------------------------------------
def keep_images(folder: Path, task: FewShotTask, starts: Sequence[str], contents: Contents, *, learns: bool) -> None:
    """Write the contents of the images of the user in ``task`` into the run folder, if they are not there yet.

    A warning counts test images that are the same files as training or validation images.

    Args:
        folder: The run folder.
        task: The task of the run, with its training images.
        starts: Folders of the heads that the run starts from, or learns from.
        contents: SHA-256 of all images of the data set by id; empty if there are too many.
        learns: Whether the method learns from training images.
    """
    path, lists = folder / KEPT_IMAGES, task.lists
    if lists is None or not task.card.own or os.path.lexists(path) or not is_main_process():
        return
    before: dict[str, str] = {}
    for start in starts:
        if (known := _kept_images(start)) is not None:
            before |= known.trained_contents()
    trained = [*task.train, *task.val] if learns else []
    kept = KeptImages(
        {sample.id: contents.get(sample.id) for sample in trained},
        {sample.id: contents.get(sample.id) for sample in lists.test},
        before,
    )
    known_contents = kept.trained_contents()
    twice = [(name, known_contents[text]) for name, text in kept.tested.items() if text in known_contents]
    if twice:
        warnings.warn(
            f"{len(twice)} of the {len(lists.test)} test images are the same files as training or validation images, "
            f"first {twice[0][0]!r} and {twice[0][1]!r}: scores on them are too high",
            stacklevel=2,
        )
    write_kept_images(path, kept)


def _kept_images(folder: str | Path) -> KeptImages | None:
    path = run_of(folder) / KEPT_IMAGES
    return read_kept_images(path) if os.path.lexists(path) else None


def _training_ids(facts: Mapping[str, Any], task: FewShotTask) -> set[str] | None:
    """Return the ids of the images that a head was trained and selected on; None if they cannot be found."""
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
