"""A frozen teacher for methods that learn from another model's predictions: a saved head, or a zero-shot CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from vlprompt._files import home_path
from vlprompt._lazy import provider
from vlprompt.backbone import Backbone, load_backbone, shapes_only
from vlprompt.errors import BackboneError, ConfigError
from vlprompt.methods.base import PromptMethod
from vlprompt.methods.episodic import ViewsMethod
from vlprompt.methods.fitted import FittedMethod
from vlprompt.methods.registry import create_method


class SavedHeads(Protocol):
    """Interface for reading saved heads as teachers, implemented by :mod:`vlprompt.io.teachers`."""

    def method_of(self, folder: Path, student: Backbone) -> PromptMethod:
        """Return the trained method saved in ``folder``, on the device of ``student``."""

    def dim_of(self, folder: Path) -> int:
        """Return the width of its features without loading weights."""


class Teacher:
    """A frozen, trained method as a teacher; it is not a module, so it is neither trained nor saved.

    Args:
        method: A method that scores images with one text feature per class.
        student: The backbone of the student; the teacher gets the same images.

    Raises:
        ConfigError: The method scores in another way, or its image size or normalisation differs from the student's.
    """

    def __init__(self, method: PromptMethod, student: Backbone) -> None:
        plain = method.text_features_per == "class" and not isinstance(method, FittedMethod | ViewsMethod)
        if not plain:
            raise ConfigError(
                f"a head of {method.name} cannot teach: it does not score by one text feature per class; accepted: "
                "heads of promptsrc, ivlp, maple, coop and the like, or the zero-shot model of a backbone"
            )
        preprocess, expected = method.backbone.preprocess, student.preprocess
        constants = zip((*preprocess.mean, *preprocess.std), (*expected.mean, *expected.std), strict=True)
        if preprocess.size != expected.size or any(abs(a - b) > 1e-4 for a, b in constants):
            raise ConfigError(
                f"the teacher {method.backbone.name} takes images of {preprocess.size} pixels with mean "
                f"{preprocess.mean} and std {preprocess.std}, the student {student.name} of {expected.size} with "
                f"{expected.mean} and {expected.std}; both look at the same images, so "
                "choose a teacher with the same preprocessing"
            )
        self.method = method.eval()

    @property
    def dim(self) -> int:
        """E, the width of the teacher's features."""
        return self.method.class_dim

    def text_features(self, class_names: Sequence[str]) -> Tensor:
        """Return the unit text features ``[C, E]`` of ``class_names``."""
        with torch.inference_mode(False), torch.no_grad():
            method = self.method
            if list(class_names) != method.class_names:
                method = method.with_classes(class_names)
            return method.text_features().clone()

    def image_features(self, images: Tensor) -> Tensor:
        """Return raw image features, without gradient."""
        with torch.no_grad():
            return self.method.image_features(images)

    def logits(self, features: Tensor, text_features: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of raw image ``features`` and ``text_features`` ``[C, E]``, without gradient."""
        with torch.no_grad():
            return self.method.score(self.method.unit_image(features), text_features)


def load_teacher(where: str, student: Backbone, class_names: Sequence[str], template: str) -> Teacher:
    """Return the teacher at ``where``.

    Args:
        where: The folder of a saved head or of a run; a backbone, ``NAME`` or ``NAME:PRETRAINED``, for its zero-shot
            model; empty for the zero-shot model of the student's backbone.
        student: The student's backbone. The teacher is on the same device, and shares its weights if they are equal.
        class_names: The classes.
        template: The prompt of zero-shot models.

    Raises:
        VlpromptError: The teacher does not exist, or does not fit the student.
    """
    if folder := _folder(where):
        return Teacher(_heads().method_of(folder, student), student)
    backbone = student
    if where:
        name, _, pretrained = where.partition(":")
        try:
            backbone = load_backbone(
                name,
                pretrained or None,
                precision=student.precision,
                device=str(student.device),
                image_size=student.image_size,
            )
        except BackboneError as error:
            raise ConfigError(
                f"settings.teacher is {where!r}, which is no folder of a head or run, nor a backbone that can be "
                f"loaded: {error}"
            ) from error
    return Teacher(create_method("zeroshot", backbone, class_names, templates=[template]), student)


def teacher_dim(where: str) -> int:
    """Return the width of a teacher's features from its description, without loading weights."""
    if folder := _folder(where):
        return _heads().dim_of(folder)
    return shapes_only(where.partition(":")[0]).embed_dim


def is_head(where: str) -> bool:
    """Return whether ``where`` is a folder, of a saved head or a run, and not a backbone."""
    return _folder(where) is not None


def _folder(where: str) -> Path | None:
    folder = home_path(where)
    return folder if where and folder.is_dir() else None


def _heads() -> SavedHeads:
    heads: SavedHeads = provider("heads")
    return heads
