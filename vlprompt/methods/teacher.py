"""A frozen teacher for methods that learn from another model's predictions: a saved head, or a zero-shot CLIP."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vlprompt.backbone import Backbone, load_backbone, shapes_only
from vlprompt.errors import BackboneError, ClassNameError, ConfigError, VlpromptError
from vlprompt.methods.base import PromptMethod
from vlprompt.methods.cached import own_rows
from vlprompt.methods.registry import create_method


class Teacher:
    """A trained method that says what it sees in images; no module, so that nothing of it is trained or saved.

    Args:
        method: What scores images by one text feature per class.
        student: The backbone of the method that learns, whose images it will get.

    Raises:
        ConfigError: A method that scores otherwise, or one that takes other images than the student.
    """

    def __init__(self, method: PromptMethod, student: Backbone) -> None:
        plain = method.weights_per == "class" and not (method.fits or method.online or method.test_views)
        if not plain:
            raise ConfigError(
                f"a head of {method.name} cannot teach: it does not score by one text feature per class; accepted: "
                "heads of promptsrc, ivlp, maple, coop and the like, or the zero-shot model of a backbone"
            )
        own, other = method.backbone.preprocess, student.preprocess
        constants = zip((*own.mean, *own.std), (*other.mean, *other.std), strict=True)
        if own.size != other.size or any(abs(a - b) > 1e-4 for a, b in constants):
            raise ConfigError(
                f"the teacher {method.backbone.name} takes images of {own.size} pixels with mean {own.mean} and std "
                f"{own.std}, the student {student.name} of {other.size} with {other.mean} and {other.std}; both look "
                "at the same images, so choose a teacher with the same preprocessing"
            )
        self.method = method.eval()

    @property
    def dim(self) -> int:
        """E, the width of its features."""
        return self.method.class_dim

    def class_weights(self, class_names: Sequence[str]) -> Tensor:
        """Return its unit text features ``[C, E]`` for ``class_names``."""
        with torch.inference_mode(False), torch.no_grad():
            method = self.method
            if list(class_names) != method.class_names:
                method = method.with_classes(class_names)
            return method.class_weights().clone()

    def image_features(self, images: Tensor) -> Tensor:
        """Return its raw image features, without gradient."""
        with torch.no_grad():
            return self.method.image_features(images)

    def logits(self, features: Tensor, class_weights: Tensor) -> Tensor:
        """Return its logits ``[B, C]`` of its raw image ``features`` and its text features ``[C, E]``."""
        with torch.no_grad():
            return self.method.score(self.method.unit_image(features), class_weights)


def load_teacher(where: str, student: Backbone, class_names: Sequence[str], template: str) -> Teacher:
    """Return the teacher that ``where`` names.

    Args:
        where: The folder of a saved head or of a run; a backbone, ``NAME`` or ``NAME:PRETRAINED``, for its zero-shot
            model; empty for that of the student's own backbone.
        student: The student's backbone; the teacher stands on the same device, and on the same weights where they are
            the teacher's too.
        class_names: The classes.
        template: The prompt of zero-shot models.

    Raises:
        VlpromptError: There is no such teacher, or it cannot teach the student.
    """
    device = str(student.device)
    if where and Path(where).expanduser().is_dir():
        from vlprompt.io.head import find_head, load_head, read_config  # a teacher is a trained head: the one way up

        folder = find_head(Path(where).expanduser())
        same = read_config(folder)["backbone"]["fingerprint"] == student.fingerprint
        return Teacher(load_head(folder, student if same else None, device=device).method, student)
    backbone = student
    if where:
        name, _, pretrained = where.partition(":")
        try:
            backbone = load_backbone(name, pretrained or None, precision=student.precision, device=device)
        except BackboneError as error:
            raise ConfigError(
                f"settings.teacher is {where!r}, which is no folder of a head or run, nor a backbone that can be "
                f"loaded: {error}"
            ) from error
    return Teacher(create_method("zeroshot", backbone, class_names, templates=[template]), student)


def teacher_dim(where: str) -> int:
    """Return the width of a teacher's features, read off its description, without its weights."""
    if Path(where).expanduser().is_dir():
        from vlprompt.io.head import find_head, read_config

        return int(read_config(find_head(Path(where).expanduser()))["backbone"]["embed_dim"])
    return shapes_only(where.partition(":")[0]).embed_dim


class TaughtMethod(PromptMethod):
    """A method that learns a teacher's predictions; the teacher's text features are its classifier.

    Its settings have ``teacher`` and ``template`` as :func:`load_teacher` takes them, and ``teacher_dim``: 0, or, in
    saved heads, E. A head keeps the text features of all classes and can do without the teacher.
    """

    transductive = True
    no_objectives = "it is taught by another model's predictions"
    fitted: tuple[str, ...] = ("teacher_text",)
    teacher_text: Tensor

    def ask_teacher(self) -> int:
        """Return E, and make the buffer ``teacher_text`` ``[A, E]`` of all A classes; a part of :meth:`build`."""
        own, backbone = self.settings, self.backbone
        self._teacher: list[Teacher] = []  # in a list and no module: nothing of it is trained or saved
        self._taught = False
        dim = own.teacher_dim
        if not dim:
            without_weights = own.teacher and backbone.device.type == "meta"
            dim = teacher_dim(own.teacher) if without_weights else self.teacher.dim
            self.settings = dataclasses.replace(own, teacher_dim=dim)
        self.register_buffer("teacher_text", torch.zeros(len(self.all_class_names), dim))
        if self._teacher:
            self.teach(self.teacher)
        return int(dim)

    @property
    def teacher(self) -> Teacher:
        """The teacher, loaded when it is first asked for."""
        if not self._teacher:
            own = self.settings
            self._teacher.append(load_teacher(own.teacher, self.backbone, self.all_class_names, own.template))
        method = self._teacher[0].method
        if method.backbone.device != self.backbone.device:
            method.to(self.backbone.device)
        return self._teacher[0]

    def teach(self, teacher: Teacher) -> None:
        """Take ``teacher`` and its text features of all classes.

        Raises:
            ConfigError: Its features are of another width than the projector's.
        """
        if teacher.dim != self.settings.teacher_dim:
            raise ConfigError(f"the teacher's features have {teacher.dim} numbers, not {self.settings.teacher_dim}")
        self._teacher, self._taught = [teacher], True
        self.teacher_text = teacher.class_weights(self.all_class_names).to(self.backbone.device)

    def taught_text(self) -> Tensor:
        """Return the teacher's unit text features ``[A, E]`` of all classes."""
        if not self._taught:
            self.teach(self.teacher)
        return self.teacher_text

    @property
    def class_dim(self) -> int:
        """E: images and classes meet in the teacher's space."""
        return int(self.settings.teacher_dim)

    def unlabelled(self) -> Literal["none", "train", "test"]:
        """Return that training images are learned from without labels."""
        return "train"

    def load_learnable_state(self, state: Mapping[str, Tensor]) -> None:
        """Set the learnables, the running statistics and the teacher's text features; the teacher is not needed then.

        Raises:
            HeadError: As for any method; nothing has been changed then.
        """
        super().load_learnable_state(state)
        self._taught = True

    def _takes(self, name: str, own: Tensor, given: Tensor) -> bool:
        return given.shape == own.shape

    def with_classes(self, class_names: Sequence[str]) -> PromptMethod:
        """Return the student for other classes; the teacher is asked only about names that it was not asked before.

        Raises:
            ClassNameError: New names, and the teacher cannot be asked any more.
        """
        with torch.random.fork_rng(devices=[]):
            other = type(self)(self.backbone, class_names, self.settings)
        other._teacher = self._teacher
        other.load_learnable_state({**self.learnable_state(), "teacher_text": self._text_of(class_names)})
        return other.to(self.backbone.device).train(self.training)

    def _text_of(self, class_names: Sequence[str]) -> Tensor:
        new = [name for name in class_names if name not in set(self.all_class_names)]
        text = self.taught_text()
        if new:
            try:
                text = torch.cat([text, self.teacher.class_weights(new).to(text)])
            except VlpromptError as error:
                raise ClassNameError(
                    f"{new[0]!r} is none of the {len(text)} classes that were learned with, and the teacher, which "
                    f"would have to be asked, cannot be loaded: {error}"
                ) from error
        return text[own_rows([*self.all_class_names, *new], class_names)]
