"""What methods share that learn a frozen teacher's predictions on unlabelled images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from vlprompt._random import restored_random
from vlprompt.errors import ClassNameError, ConfigError, VlpromptError
from vlprompt.methods.base import PromptMethod
from vlprompt.methods.cached import own_rows
from vlprompt.methods.teacher import Teacher, load_teacher, teacher_dim


class TaughtMethod(PromptMethod):
    """A method that learns a teacher's predictions; the teacher's text features are its classifier.

    Its settings have ``teacher`` and ``template`` as :func:`~vlprompt.methods.teacher.load_teacher` takes them, and
    ``teacher_dim``: 0, or, in saved heads, E. A head keeps the text features of all classes and can do without the
    teacher.
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
        self.teacher_text = teacher.text_features(self.all_class_names).to(self.backbone.device)

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

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Set the learnables, the running statistics and the teacher's text features; the teacher is not needed then.

        Raises:
            HeadError: As for any method; nothing has been changed then.
        """
        super().load_trained_state(state)
        self._taught = True

    def _takes(self, name: str, own: Tensor, given: Tensor) -> bool:
        return given.shape == own.shape

    def with_classes(self, class_names: Sequence[str]) -> PromptMethod:
        """Return the student for other classes; the teacher is asked only about names that it was not asked before.

        Raises:
            ClassNameError: New names, and the teacher cannot be asked any more.
        """
        with restored_random():
            other = type(self)(self.backbone, class_names, self.settings)
        other._teacher = self._teacher
        other.load_trained_state({**self.trained_state(), "teacher_text": self._text_of(class_names)})
        return other.to(self.backbone.device).train(self.training)

    def _text_of(self, class_names: Sequence[str]) -> Tensor:
        new = [name for name in class_names if name not in set(self.all_class_names)]
        text = self.taught_text()
        if new:
            try:
                text = torch.cat([text, self.teacher.text_features(new).to(text)])
            except VlpromptError as error:
                raise ClassNameError(
                    f"{new[0]!r} is none of the {len(text)} classes that were learned with, and the teacher, which "
                    f"would have to be asked, cannot be loaded: {error}"
                ) from error
        return text[own_rows([*self.all_class_names, *new], class_names)]
