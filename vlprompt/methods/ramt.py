"""R-AMT: learned binary masks over CLIP's own weights (Zheng et al., Regularized Mask Tuning, ICCV 2023; 2307.15049).

No parameters are added to the model: each candidate weight has a score R and is used if R > 0.005, ``W' = 1[R > 0.005]
W``, with the straight-through gradient dL/dR = dL/dW' W. All scores start at 0.01: zero-shot CLIP. The loss is
cross-entropy plus 1e-4 times the (not squared) norms of the score tensors; ``gradient_dropout`` drops entries of its
gradient that disagree with the frozen model's. The official code (wuw2019/R-AMT) masks the image tower's patch kernel
and attention projections ("A"); the paper also has MLP weights ("M") and all of them ("P"). A score must change by
0.005: a run with fewer steps than 0.005 / rate (63 at the published 8e-5) ends as zero-shot CLIP.

A head saves the masks as bits, one per weight, without the scores. Training resumes from a checkpoint, or starts from a
head with scores of 0.01 and 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vlprompt.backbone import Added, TokenLayout
from vlprompt.config.run import RecipeConfig
from vlprompt.config.types import NonNegative, OpenTemplates, validated
from vlprompt.errors import ConfigError
from vlprompt.methods.base import PromptMethod
from vlprompt.methods.registry import register
from vlprompt.needs import Needs
from vlprompt.objectives.base import Step
from vlprompt.objectives.gradient_dropout import GradientDropoutSettings
from vlprompt.prompts import Masks
from vlprompt.prompts.zero_shot import first_layout, first_texts, template_features

_MLP = (".mlp.c_fc.weight", ".mlp.c_proj.weight")
_ATTENTION = ("in_proj_weight", "out_proj.weight", *(f"attnpool.{part}_proj.weight" for part in "qkvc"))


@validated("settings")
class RAMTSettings:
    """Settings of R-AMT; the defaults are those of the official code (28,901,376 masks on ViT-B/16).

    Attributes:
        side: Towers with masked weights: image, as published, text or both.
        candidates: attention: attention projections and convolution kernels (AMT); mlp: the two MLP matrices (MMT);
            all: both (PMT).
        gradient_dropout: The dropout of gradients (the "R-"), None to disable; the official code requires it.
            Its strength (the paper's lambda) is 1, or 0.3 with 16 shots of ImageNet, SUN397 and Food-101.
        initial: Initial value of all scores.
        threshold: A weight is used if its score is above this value.
        penalty: Weight of the score tensors' norms, which are not in the paper; 0 for none.
        templates: Prompts with {} for the class name; their raw features are averaged and then normalised. A masked
            text tower uses the first.
    """

    side: Literal["image", "text", "both"] = "image"
    candidates: Literal["attention", "mlp", "all"] = "attention"
    gradient_dropout: GradientDropoutSettings | None = GradientDropoutSettings(strength=1.0, temperature=1.0)
    initial: float = 0.01
    threshold: NonNegative = 0.005
    penalty: NonNegative = 1e-4
    templates: OpenTemplates = ()
    renamed: ClassVar[Mapping[str, str]] = {
        "strength": "gradient_dropout.strength",
        "temperature": "gradient_dropout.temperature",
    }

    def __post_init__(self) -> None:
        if self.threshold >= self.initial:
            raise ConfigError(
                f"settings.threshold is {self.threshold} and settings.initial {self.initial}; accepted: a start above "
                "the threshold"
            )


@register("ramt")
class RAMT(PromptMethod):
    """Binary masks over frozen weights, trained by cross-entropy with gradient dropout."""

    Settings = RAMTSettings
    recipe = RecipeConfig(epochs=30, lr=8e-5, optimizer="adam", weight_decay=0.0, warmup_epochs=0)
    settings: RAMTSettings

    @property
    def needs(self) -> Needs:
        """Images, unless only the text tower is masked."""
        return Needs(inputs="features" if self.settings.side == "text" else "images")

    def build(self) -> None:
        """Create ``masks``: a tensor of scores for every candidate weight, with its shape and name."""
        settings, text = self.settings, self.backbone.text
        self.masks = Masks(settings.initial, settings.threshold)
        if settings.side != "text":
            self.masks.add("visual.", self._candidates(self.backbone.image.parameters()))
        if settings.side != "image":
            self.masks.add("", self._candidates(text.parameters()))
            self.layout = first_layout(text, self.class_names, settings.templates)
        else:
            features = template_features(self.backbone, self.class_names, settings.templates, average="raw")
            self.register_buffer("frozen_text", features, persistent=False)

    def _candidates(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kind = self.settings.candidates
        mlp = {name: w for name, w in weights.items() if name.endswith(_MLP) and kind != "attention"}
        rest = {n: w for n, w in weights.items() if (w.ndim == 4 or n.endswith(_ATTENTION)) and kind != "mlp"}
        if not mlp and not rest:
            raise ConfigError(f"settings.candidates is {kind!r}, and {self.backbone.name} has no such weights; use all")
        return {**rest, **mlp}

    def zero_shot_settings(self) -> dict[str, Any]:
        """Return the texts of the classifier: all, or the first if the text tower is changed."""
        templates = self.settings.templates
        frozen = self.settings.side == "image"
        return {"templates": templates if frozen else first_texts(templates), "average": "raw"}

    def image_features(self, images: Tensor) -> Tensor:
        """Return raw image features ``[B, D]`` of the masked tower."""
        added = Added() if self.needs.images and self.backbone.image.takes_tokens else None
        return self.backbone.encode_image(images, overrides=self.image_overrides(), added=added)

    @property
    def in_towers(self) -> bool:
        """Return True: masks are multiplied with weights."""
        return True

    def image_overrides(self) -> dict[str, Tensor]:
        """Return the masked weights of the image tower."""
        return self.masks.overrides("visual.", self.backbone.image.parameters())

    def text_overrides(self) -> dict[str, Tensor]:
        """Return the masked weights of the text tower."""
        return self.masks.overrides("", self.backbone.text.parameters())

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the unit text features ``[C, D]``."""
        if self.settings.side == "image":
            return self.unit_text(self.get_buffer("frozen_text"))
        text = self.backbone.text
        return self.once(
            "classes", lambda: self.unit_text(text.encode(self.layout, overrides=self.text_overrides())[0])
        )

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return cross-entropy and the penalty of the scores' norms."""
        if not self.settings.penalty:
            return super().terms(step)
        norms = torch.stack([scores.norm() for scores in self.masks.parameters()])
        return {**super().terms(step), "penalty": self.settings.penalty * norms.sum()}

    def training_layouts(self) -> list[TokenLayout]:
        """Return the layout of the class prompts, if the text tower is masked."""
        return [] if self.settings.side == "image" else [self.layout]

    def prompt_tensors(self) -> list[tuple[str, nn.Parameter]]:
        """Return an empty list: scores are not prompts."""
        return []

    def head_state(self) -> dict[str, Tensor]:
        """Return the masks as bits, without the scores; the logits are the same."""
        return self.masks.packed_state("masks.", super().head_state())

    def load_head_state(self, state: Mapping[str, Tensor]) -> None:
        """Set scores to the initial value where a bit is set, to 0 elsewhere."""
        super().load_head_state(self.masks.unpacked_state("masks.", state))
