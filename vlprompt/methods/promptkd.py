"""PromptKD: image prompts that learn a teacher's predictions on unlabelled images (Li et al., CVPR 2024; 2403.02781).

``L = w T^2 / (B C) sum KL(softmax(z_t / T) || softmax(z_s / T))``: z_t are the teacher's logits of a view, z_s those of
the student. The student's image features (with deep image tokens) are projected into the teacher's space and compared
with the *same* text features, which are computed once. Labels are not used. C counts all classes including new ones,
whose images are also used for training: results are transductive and marked as such.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt._random import restored_random
from vlprompt.config.effect import switched_off
from vlprompt.config.run import RecipeConfig
from vlprompt.config.types import Above0, Count, NonNegative, Positive, Template, validated
from vlprompt.errors import ClassNameError, ConfigError, VlpromptError
from vlprompt.methods.base import PromptMethod
from vlprompt.methods.registry import register
from vlprompt.methods.teacher import Teacher, is_head, load_teacher, teacher_dim
from vlprompt.needs import Needs
from vlprompt.objectives.base import Step
from vlprompt.prompts import Projector, VisualPrompts
from vlprompt.prompts.words import rows_of


@validated("settings")
class PromptKDSettings:
    """Settings of PromptKD; a ViT-B/16 with a ViT-L/14 as teacher has 1,013,760 trainable numbers.

    Attributes:
        teacher: The folder of a trained head or run, usually PromptSRC's on a larger backbone; or a backbone,
            ``NAME`` or ``NAME:PRETRAINED``, for its zero-shot model; empty for that of the student's backbone.
        image_tokens: V image tokens.
        image_depth: Layers that have image tokens; 3 in cross-data-set runs.
        weight: w; 1000 in the official scripts, 200 on Aircraft, Flowers102 and DTD.
        temperature: T.
        template: The prompt of a zero-shot teacher.
        teacher_dim: E, the width of the teacher's features; 0 reads it from the teacher. Heads save it, so they can be
            loaded without the teacher.
    """

    teacher: str = ""
    image_tokens: Positive = 4
    image_depth: Positive = 9
    weight: NonNegative = 1000.0
    temperature: Above0 = 1.0
    template: Template = "a photo of a {}."
    teacher_dim: Count = 0

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        reason = "settings.teacher is a trained head, which has texts of its own"
        return switched_off(reason, "template") if is_head(self.teacher) else {}


@register("promptkd")
class PromptKD(PromptMethod):
    """Deep image tokens and a projector into the teacher's space; the teacher's text features are the classifier."""

    Settings = PromptKDSettings
    recipe = RecipeConfig(epochs=20, batch_size=8, lr=0.005)
    needs = Needs(inputs="images", towers="transformers", unlabelled="all-classes")
    no_objectives = "it is taught by another model's predictions"
    fitted = ("teacher_text", "projector.running_mean", "projector.running_var")
    settings: PromptKDSettings
    teacher_text: Tensor

    def build(self) -> None:
        """Create ``visual`` (``input`` and ``deep``, ``[V, W]`` each) and ``projector`` (D to E)."""
        settings, backbone = self.settings, self.backbone
        self.visual = VisualPrompts(backbone.image, settings.image_tokens, settings.image_depth)
        self.projector = Projector(backbone.embed_dim, self.ask_teacher())

    @classmethod
    def texts_setting(cls, settings: Any) -> str | None:
        """Return the prompt of a zero-shot teacher; a trained head has texts of its own."""
        return None if is_head(settings.teacher) else "template"

    def zero_shot_settings(self) -> dict[str, Any]:
        """Return the prompt of a zero-shot teacher, which the student learns; else the template of the data set."""
        return {} if is_head(self.settings.teacher) else {"templates": [self.settings.template]}

    # -- the teacher ----------------------------------------------------------------------------------------------
    def ask_teacher(self) -> int:
        """Return E, and create the buffer ``teacher_text`` ``[A, E]`` of all A classes; used by :meth:`build`."""
        settings, backbone = self.settings, self.backbone
        self._teacher: list[Teacher] = []  # in a list: the teacher is neither trained nor saved
        self._taught = False
        dim = settings.teacher_dim
        if not dim:
            without_weights = settings.teacher and backbone.device.type == "meta"
            dim = teacher_dim(settings.teacher) if without_weights else self.teacher.dim
            self.settings = dataclasses.replace(settings, teacher_dim=dim)
        self.register_buffer("teacher_text", torch.zeros(len(self.all_class_names), dim))
        if self._teacher:
            self.teach(self.teacher)
        return int(dim)

    @property
    def teacher(self) -> Teacher:
        """The teacher, loaded at the first access."""
        if not self._teacher:
            settings = self.settings
            self._teacher.append(load_teacher(settings.teacher, self.backbone, self.all_class_names, settings.template))
        method = self._teacher[0].method
        if method.backbone.device != self.backbone.device:
            method.to(self.backbone.device)
        return self._teacher[0]

    def teach(self, teacher: Teacher) -> None:
        """Set ``teacher`` and compute its text features of all classes.

        Raises:
            ConfigError: The width of its features differs from the projector's.
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
        """E: images and classes are compared in the teacher's space."""
        return int(self.settings.teacher_dim)

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Set the trained tensors, running statistics and teacher text features; the teacher is then not needed.

        Raises:
            HeadError: As for any method. No tensor is changed.
        """
        super().load_trained_state(state)
        self._taught = True

    def _takes(self, name: str, own: Tensor, given: Tensor) -> bool:
        return given.shape == own.shape

    def with_classes(self, class_names: Sequence[str]) -> PromptMethod:
        """Return the student for other classes; the teacher encodes only new names.

        Raises:
            ClassNameError: There are new names, and the teacher is not available.
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
        return text[rows_of([*self.all_class_names, *new], class_names)]

    # -- scoring --------------------------------------------------------------------------------------------------
    def image_features(self, images: Tensor) -> Tensor:
        """Return the student's raw image features ``[B, D]`` with the tokens."""
        return self.backbone.encode_image(images, self.visual.tokens())

    def unit_image(self, features: Tensor) -> Tensor:
        """Return unit projections ``[B, E]`` of raw ``features`` ``[B, D]``, with the running statistics."""
        return F.normalize(self.projector(features), dim=-1)

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the teacher's unit text features ``[C, E]``."""
        return self.taught_text()[: len(self.class_names)]

    # -- training -------------------------------------------------------------------------------------------------
    def step(self, inputs: Tensor, labels: Tensor) -> Step:
        """Return the results of a step: logits are ``[B, A]``, frozen features are the teacher's ``[B, E]``."""
        self.check_inputs(inputs)
        features, text = self.image_features(inputs), self.taught_text()
        unit = F.normalize(self.projector(features, learn=self.training), dim=-1)
        return Step(labels, features, unit, text, self.score(unit, text), lambda: self.teacher.image_features(inputs))

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the distillation term ``kd``."""
        settings = self.settings
        target = self.teacher.logits(step.frozen_features(), step.text_features) / settings.temperature
        divergence = F.kl_div(
            (step.logits / settings.temperature).log_softmax(-1),
            target.log_softmax(-1),
            reduction="sum",
            log_target=True,
        )
        return {"kd": settings.weight * settings.temperature**2 * divergence / step.logits.numel()}

    def epoch_end(self, epoch: int, epochs: int) -> None:
        """Average the running statistics over processes."""
        self.projector.average()
