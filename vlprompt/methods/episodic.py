"""Base classes of test-time methods that use several views of every test image."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlprompt._shapes import Shape
from vlprompt.methods.base import PromptMethod
from vlprompt.prompts.zero_shot import template_features

_IMAGES = 256  # views encoded at once


class ViewsMethod(PromptMethod):
    """A method that scores an image from several views of it."""

    no_objectives = "it learns nothing before it sees a test image"
    per_target = True
    by_recipe = False

    def reset(self) -> None:
        """Clear the state of earlier test images, if scores depend on them."""

    @property
    def aligns(self) -> bool:
        """Whether test images are aligned with statistics of source images."""
        return False

    @property
    def wants_source(self) -> bool:
        """Whether statistics of source images are needed and missing."""
        return False

    def source_shape(self) -> tuple[int, int, int]:
        """Return L, T and W of the source statistics."""
        raise NotImplementedError

    def set_source(self, mean: Tensor, variance: Tensor) -> None:
        """Set the source statistics ``[L, T, W]``."""
        raise NotImplementedError

    def measure_source(self, batches: Iterable[Tensor]) -> None:
        """Compute statistics of the source images, in batches ``[B, 3, H, W]``, if they are needed and missing."""

    def input_shapes(self) -> list[Shape]:
        """Return the shapes of accepted inputs: images, features, and several views of each."""
        plain = super().input_shapes()
        return [*plain, *(("B", "V", *shape[1:]) for shape in plain)]

    def view_features(self, views: Tensor) -> Tensor:
        """Return raw features ``[B, V, D]`` of ``views``: features ``[B, V, D]`` or images ``[B, V, 3, H, W]``."""
        if views.ndim == 3:
            return views
        if not views.numel():
            return views.new_zeros(*views.shape[:2], self.backbone.embed_dim)
        chunks = views.flatten(0, 1).split(_IMAGES)
        features = torch.cat([self.image_features(chunk) for chunk in chunks])
        return features.reshape(*views.shape[:2], -1)

    def unit_views(self, views: Tensor) -> Tensor:
        """Return unit features ``[B, V, D]`` of views."""
        raw = self.view_features(views)
        units: Tensor = self.unit_image(raw.flatten(0, 1)).reshape(raw.shape)
        return units

    def initial_text_features(self) -> Tensor:
        """Return the initial unit text features ``[C, D]``, before adaptation to any test image."""
        raise NotImplementedError

    def logits(self, features: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of raw image ``features`` ``[B, D]`` without adaptation."""
        return self.score(self.unit_image(features), self.initial_text_features())

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the initial unit text features ``[C, D]``, with a warning: the method is not a linear classifier."""
        warnings.warn(
            f"{self.name} adapts to every test image; text_features() are those it starts from, without adaptation",
            stacklevel=2,
        )
        return self.initial_text_features()


class EpisodicMethod(ViewsMethod):
    """A method that adapts to every test image separately (:meth:`adapt`) and keeps no state."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits ``[B, C]``.

        Args:
            inputs: Views to adapt to, as features ``[B, V, D]`` or images ``[B, V, 3, H, W]``. A single image
                ``[B, 3, H, W]`` or its feature ``[B, D]`` is scored without adaptation, with a warning.
        """
        self.check_inputs(inputs)
        if inputs.ndim in (3, 5):
            return self.adapt(inputs)
        views = self.needs.test_views
        count = 0 if views is None else views.count
        warnings.warn(
            f"{self.name} got one view of each image and adapts to nothing; give it {count} views of each, "
            "[B, V, 3, H, W] or features [B, V, D], the test view first",
            stacklevel=2,
        )
        return super().forward(inputs)

    def adapt(self, views: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` of B images from their views, ``[B, V, D]`` or ``[B, V, 3, H, W]``."""
        raise NotImplementedError


class TunedMethod(EpisodicMethod):
    """A method that tunes prompts by gradient steps on the views, from the same initial prompts for every image."""

    def has_text_prompts(self) -> bool:
        """Return True: the context is tuned at test time."""
        return True

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Set the initial prompts, which are buffers, and clear cached results."""
        super().load_trained_state(state)
        self._remembered.clear()


class TemplateViewsMethod(ViewsMethod):
    """A method that scores views with hand-written prompts; settings have ``templates``, ``crops`` and ``augmix``."""

    def build(self) -> None:
        """Encode the templates once; there are no trainable parameters."""
        weights = template_features(self.backbone, self.class_names, self.settings.templates)
        self.register_buffer("weights", weights, persistent=False)

    def zero_shot_settings(self) -> dict[str, Any]:
        """Return the method's own texts."""
        return {"templates": self.settings.templates}

    def initial_text_features(self) -> Tensor:
        """Return the unit text features ``[C, D]``."""
        return self.unit_text(self.get_buffer("weights"))
