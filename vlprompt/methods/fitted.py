"""Base of methods that are fitted on frozen features: caches and linear classifiers of :mod:`vlprompt.caches`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vlprompt.caches.base import FeatureClassifier
from vlprompt.errors import ClassNameError, ConfigError, HeadError
from vlprompt.methods.base import PromptMethod
from vlprompt.needs import Needs
from vlprompt.prompts.words import rows_of
from vlprompt.prompts.zero_shot import template_features


@dataclass(frozen=True)
class FewShotFeatures:
    """Raw frozen image features, float32, on the method's device.

    Attributes:
        train: ``[V, N, D]``: V random views of each training image, or only the test view (V = 1); N may be 0.
        labels: ``[N]``, int64.
        val: ``[M, D]``, the test view of the images for the hyperparameter search; M may be 0.
        val_labels: ``[M]``.
        unlabelled: ``[U, D]``, the test view of unlabelled images; U may be 0.
        unlabelled_views: ``[W, U, D]``, random views of them; W may be 0.
        seed: Seed of all draws.
    """

    train: Tensor
    labels: Tensor
    val: Tensor
    val_labels: Tensor
    unlabelled: Tensor
    unlabelled_views: Tensor
    seed: int = 1


def check_known(method: str, source: tuple[str, Iterable[str]], target: tuple[str, Iterable[str]]) -> None:
    """Raise ConfigError if a method fitted on the classes of one data set cannot classify those of another.

    Args:
        method: The name of the method.
        source: The data set that it is fitted on, and the names of its classes.
        target: The other data set, and the names of its classes.
    """
    known = set(source[1])
    if new := [name for name in target[1] if name not in known]:
        raise ConfigError(
            f"{method} cannot be moved to other data sets: it is fitted on images of the classes of {source[0]} and "
            f"cannot classify those of {target[0]} ({new[0]!r}, ...)"
        )


class FittedMethod(PromptMethod):
    """A classifier of :mod:`vlprompt.caches` on frozen features; unfitted, it is zero-shot.

    A subclass sets :attr:`Cache`, whose settings are included in its settings, and fits it (:meth:`fit`). Cosines are
    multiplied by the backbone's logit scale, which is 100, as in the published code, for OpenAI's weights.
    """

    Cache: ClassVar[type[FeatureClassifier]]
    no_objectives = "it is fitted on frozen features"
    by_recipe = False
    cache: Any

    @property
    def needs(self) -> Needs:
        """Features of ``views`` random views, and the split for the hyperparameter search."""
        settings = self.settings
        select_on = getattr(settings, "select_on", None) if getattr(settings, "search", True) else None
        return Needs(fit_views=settings.views, fit_view="random-half", select_on=select_on)

    def build(self) -> None:
        """Encode the templates and create the empty cache; fitting fills buffers, there are no parameters."""
        scale = self.backbone.logit_scale.detach().float()
        self.cache = self.Cache(self.text_weights(), scale, self.settings)
        self.fitted = tuple(f"cache.{name}" for name in self.cache.fitted)

    def text_weights(self) -> Tensor:
        """Return the text classifier ``[C, D]``: the normalised mean of the templates' unit features."""
        return template_features(self.backbone, self.class_names, self.settings.templates)

    def zero_shot_settings(self) -> dict[str, Any]:
        """Return the method's own texts."""
        return {"templates": self.settings.templates}

    def fit(self, shots: FewShotFeatures) -> None:
        """Fit the classifier on frozen features."""
        raise NotImplementedError

    # -- scoring ------------------------------------------------------------------------------------------------
    def logits(self, features: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of raw image ``features`` ``[B, D]``."""
        logits: Tensor = self.cache.logits(features.float())
        return logits

    @property
    def cosine_scale(self) -> float | None:
        """None: the logits are sums with a cache or another classifier."""
        return None

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the zero-shot classifier ``[C, D]``; a fitted method warns that its scores use more."""
        if self.cache.is_fitted:
            warnings.warn(
                f"{self.name} is fitted and scores by more than text features; text_features() returns the zero-shot "
                "classifier alone",
                stacklevel=2,
            )
        text: Tensor = self.cache.text
        return text

    def training_text_features(self, unit_image: Tensor, features: Tensor) -> Tensor:
        """Return the zero-shot classifier ``[C, D]``."""
        text: Tensor = self.cache.text
        return text

    def training_logits(self, unit_image: Tensor, weights: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` of unit features; TFUP-T's adapter lacks their raw length here."""
        logits: Tensor = self.cache.logits(unit_image)
        return logits

    # -- keeping ------------------------------------------------------------------------------------------------
    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Set the fitted buffers from ``state``.

        Raises:
            HeadError: A tensor is missing, unknown or of a different shape, or tensors contradict each other or the
                classes. No tensor is changed.
        """
        kept = self._kept()
        if kept.keys() == state.keys() and all(kept[name].ndim == state[name].ndim for name in kept):
            wrong = self.cache.misfits({name.removeprefix("cache."): value for name, value in state.items()})
            if wrong:
                raise HeadError(f"these tensors do not fit the method {self.name!r}:\n  " + "\n  ".join(wrong))
        super().load_trained_state(state)

    def with_classes(self, class_names: Sequence[str]) -> PromptMethod:
        """Return the method for some or all of its classes, in any order; for any classes if it is not fitted.

        Raises:
            ClassNameError: Classes without training images.
        """
        if not self.cache.is_fitted or list(class_names) == self.class_names:
            return super().with_classes(class_names)
        if unknown := [name for name in class_names if name not in set(self.class_names)]:
            raise ClassNameError(
                f"{self.name} was fitted on images of its {len(self.class_names)} classes and cannot classify others "
                f"({unknown[0]!r}); accepted: some of its classes"
            )
        other = type(self)(self.backbone, class_names, self.settings).to(self.backbone.device)
        state = self.cache.for_classes(rows_of(self.class_names, class_names))
        other.load_trained_state({f"cache.{name}": value for name, value in state.items()})
        return other.train(self.training)


def keys_of(shots: FewShotFeatures, views: int) -> tuple[Tensor, Tensor]:
    """Return the views ``[V, N, D]`` for the keys, and the remaining views for training."""
    count = views or 1
    rest = shots.train[count:]
    return shots.train[:count], rest if len(rest) else shots.train[:count]
