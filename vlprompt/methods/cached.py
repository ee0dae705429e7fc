"""What methods share that are a cache on frozen features: text classifiers, fitting, other classes, saved state."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from torch import Tensor

from vlprompt.caches import FeatureClassifier
from vlprompt.errors import ClassNameError, HeadError
from vlprompt.methods.base import PromptMethod
from vlprompt.methods.fitting import FewShotFeatures
from vlprompt.prompts.zero_shot import template_features


class CachedMethod(PromptMethod):
    """A cache of :mod:`vlprompt.caches` beside the frozen text classifier; unfitted it is zero-shot.

    A subclass makes its cache (:meth:`make_cache`) and fits it (:meth:`fit`). Cosines are multiplied by the backbone's
    own factor, which is the published codes' 100 for OpenAI's weights.
    """

    fits = True
    fit_view: ClassVar[Literal["random", "random-half"]] = "random-half"
    template_setting = "templates"
    no_objectives = "it is fitted on frozen features"
    cache: FeatureClassifier

    def build(self) -> None:
        """Encode the templates and make an empty cache; there are no learnables, fitting fills buffers."""
        scale = self.backbone.logit_scale.detach().float()
        self.cache = self.make_cache(self.text_weights(), scale)
        self.fitted = tuple(f"cache.{name}" for name in self.cache.fitted)

    def text_weights(self) -> Tensor:
        """Return the text classifier ``[C, D]``: the normalised mean of the templates' unit features."""
        return template_features(self.backbone, self.class_names, self.settings.templates)

    def make_cache(self, text: Tensor, scale: Tensor) -> FeatureClassifier:
        """Return the empty cache for the text classifier ``[C, D]`` and the factor of cosines."""
        raise NotImplementedError

    def fit_views(self) -> int:
        """Return how many random views of each training image are averaged into its key."""
        return int(self.settings.views)

    def selects_on(self) -> Literal["val", "test"]:
        """Return where hyperparameters are chosen: on validation images, or, as published, on the test images."""
        return "test" if getattr(self.settings, "select_on", "val") == "test" else "val"

    # -- scoring ------------------------------------------------------------------------------------------------
    def logits(self, features: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of raw image ``features`` ``[B, D]``."""
        return self.cache.logits(features.float())

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the zero-shot classifier ``[C, D]``, and warn where that is not all: the rest is no unit rows."""
        if self.cache.is_fitted:
            warnings.warn(
                f"{self.name} scores by more than class weights: by what it was fitted on; text_features() are the "
                "zero-shot classifier alone",
                stacklevel=2,
            )
        return self.cache.text

    def training_text_features(self, unit_image: Tensor, features: Tensor) -> Tensor:
        """Return the zero-shot classifier ``[C, D]``."""
        return self.cache.text

    def training_logits(self, unit_image: Tensor, weights: Tensor) -> Tensor:
        """Return the logits ``[B, C]``; the length of features is lost here, which TFUP-T's adapter would look at."""
        return self.cache.logits(unit_image)

    # -- keeping ------------------------------------------------------------------------------------------------
    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Set what was fitted from ``state``.

        Raises:
            HeadError: A tensor is missing, unknown or of another form, or they contradict each other or the classes;
                nothing has been changed then.
        """
        own = self._kept()
        if own.keys() == state.keys() and all(own[name].ndim == state[name].ndim for name in own):
            wrong = self.cache.misfits({name.removeprefix("cache."): value for name, value in state.items()})
            if wrong:
                raise HeadError(f"these tensors do not fit the method {self.name!r}:\n  " + "\n  ".join(wrong))
        super().load_trained_state(state)

    def with_classes(self, class_names: Sequence[str]) -> PromptMethod:
        """Return the method for some or all of its classes, in any order, or, while nothing is fitted, for any.

        Raises:
            ClassNameError: Classes that it was fitted on no images of.
        """
        if not self.cache.is_fitted or list(class_names) == self.class_names:
            return super().with_classes(class_names)
        if strange := [name for name in class_names if name not in set(self.class_names)]:
            raise ClassNameError(
                f"{self.name} was fitted on images of its own {len(self.class_names)} classes and says nothing "
                f"about others ({strange[0]!r}); accepted: some of its own classes"
            )
        other = type(self)(self.backbone, class_names, self.settings).to(self.backbone.device)
        state = self.cache.for_classes(own_rows(self.class_names, class_names))
        other.load_trained_state({f"cache.{name}": value for name, value in state.items()})
        return other.train(self.training)


def own_rows(class_names: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Return where each of the ``wanted`` names stands in ``class_names``; repeated names are taken in turn."""
    seen: Counter[str] = Counter()
    rows = []
    for name in wanted:
        places = [row for row, own in enumerate(class_names) if own == name]
        rows.append(places[min(seen[name], len(places) - 1)])
        seen[name] += 1
    return rows


def keys_of(shots: FewShotFeatures, views: int) -> tuple[Tensor, Tensor]:
    """Return the views ``[V, N, D]`` that keys are made of, and those that follow them, for training."""
    count = views or 1
    rest = shots.train[count:]
    return shots.train[:count], rest if len(rest) else shots.train[:count]
