"""Bases of caches: a zero-shot classifier on frozen features, and a key-value memory that adds to its logits.

Caches have the interface of scikit-learn: ``fit(features, labels)``, ``predict(features)``,
``score(features, labels)``; ``search(features, labels, ...)`` chooses hyperparameters on validation images. Features
are raw; caches normalise them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt._finite import check_finite
from vlprompt._shapes import check_shape
from vlprompt.caches.search import SearchResult, search_grid
from vlprompt.caches.training import CacheRecipe, TrainingStep
from vlprompt.config.types import NonNegative, validated
from vlprompt.errors import ConfigError, DataError


@validated("settings")
class NoSettings:
    """Settings of a classifier that has none."""


class FeatureClassifier(nn.Module):
    """Zero-shot classification of features; a subclass adds what it was fitted on. Unfitted, it is zero-shot.

    Args:
        text_features: Text classifier ``[C, D]``, one row per class; rows are normalised for scoring.
        logit_scale: Factor of the cosines. The published codes have 100, the factor of OpenAI's CLIP.
        settings: An instance of :attr:`Settings`. Default: the values, or the defaults of :attr:`Settings`.
        **values: Fields of :attr:`Settings`, in place of an instance.

    Raises:
        ConfigError: ``text_features`` is not a matrix or has no rows, or a value is not accepted.
    """

    Settings: ClassVar[type] = NoSettings
    fitted: ClassVar[tuple[str, ...]] = ()
    """Buffers that :meth:`fit` sets; they and ``text_features`` restore the classifier."""

    def __init__(
        self, text_features: Tensor, logit_scale: float | Tensor = 100.0, settings: Any = None, **values: Any
    ) -> None:
        super().__init__()
        self.settings: Any = self.Settings(**values) if settings is None else settings
        if text_features.ndim != 2 or not text_features.numel():
            raise ConfigError(f"text_features has shape {list(text_features.shape)}; accepted: [C, D], 1 or more each")
        self._keep("unit_text", F.normalize(text_features, dim=-1))
        self._keep("logit_scale", torch.as_tensor(logit_scale).to(text_features).reshape(()))
        self.build(text_features)

    def build(self, text_features: Tensor) -> None:
        """Create the buffers that :meth:`fit` sets, empty; ``text_features`` ``[C, D]`` are raw."""

    def _keep(self, name: str, value: Tensor) -> None:
        with torch.inference_mode(False):
            self.register_buffer(name, value.detach().clone(), persistent=False)

    def _set(self, **values: Tensor | float) -> None:
        """Replace fitted buffers; they stay ordinary tensors in inference mode, too.

        Raises:
            NotFiniteError: A value is not finite. No buffer is changed.
        """
        with torch.inference_mode(False), torch.no_grad():
            buffers = {name: torch.as_tensor(value).detach().to(self.text).clone() for name, value in values.items()}
            check_finite(buffers, f"fitting {type(self).__name__}", "Lower its learning rate or its other settings.")
            for name, value in buffers.items():
                setattr(self, name, value)

    @property
    def text(self) -> Tensor:
        """The unit text classifier ``[C, D]``."""
        return self.get_buffer("unit_text")

    @property
    def classes(self) -> int:
        """C, the number of classes."""
        return len(self.text)

    @property
    def is_fitted(self) -> bool:
        """Whether there is more than the zero-shot classifier."""
        return any(self.get_buffer(name).ndim and self.get_buffer(name).numel() for name in self.fitted)

    def unit(self, features: Tensor) -> Tensor:
        """Return raw ``features`` ``[B, D]`` normalised, in the classifier's dtype."""
        return F.normalize(features.to(self.text), dim=-1)

    def zeroshot(self, unit: Tensor) -> Tensor:
        """Return the zero-shot logits ``[B, C]`` of unit features ``[B, D]``."""
        return self.get_buffer("logit_scale") * unit @ self.text.t()

    def logits(self, features: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of raw ``features`` ``[B, D]``; those of zero-shot before it is fitted.

        Raises:
            DataError: Features of another shape, or that are no floats.
        """
        check_shape(features, "features", ("B", self.text.shape[1]))
        return self._scored(features)

    def _scored(self, features: Tensor) -> Tensor:
        raise NotImplementedError

    def predict(self, features: Tensor) -> Tensor:
        """Return the class ``[B]`` of raw ``features`` ``[B, D]``."""
        return self.logits(features).argmax(dim=-1)

    def score(self, features: Tensor, labels: Tensor) -> float:
        """Return the accuracy, 0 to 1, on raw ``features`` ``[B, D]`` of ``labels`` ``[B]``.

        Raises:
            DataError: No images, or shapes that do not match.
        """
        if not len(labels):
            raise DataError("there are no images to score on; the accuracy of none is not defined")
        if labels.shape != features.shape[:1]:
            raise DataError(
                f"labels have shape {list(labels.shape)} for features {list(features.shape)}; accepted: [B]"
            )
        return float((self.predict(features) == labels.to(features.device)).double().mean())

    def for_classes(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return the fitted buffers for other classes: class i of them is class ``rows[i]`` of this classifier."""
        raise NotImplementedError

    def misfits(self, state: Mapping[str, Tensor]) -> list[str]:
        """Return what in a ``state`` of fitted buffers contradicts itself or the classes, in words."""
        return []

    def _checked(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return views ``[V, N, D]`` and labels ``[N]``.

        Raises:
            DataError: Shapes that do not match, labels out of range, or features that are not finite.
        """
        views = features[None] if features.ndim == 2 else features
        if views.ndim != 3 or views.shape[1:] != (len(labels), self.text.shape[1]) or not len(views):
            raise DataError(
                f"features have shape {list(features.shape)} for {len(labels)} labels; accepted: [N, D] or views of "
                f"them [V, N, D], with D = {self.text.shape[1]}"
            )
        labels = labels.to(self.text.device, torch.int64)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise DataError(
                f"labels run from {int(labels.min())} to {int(labels.max())}; accepted: 0 to {self.classes - 1}"
            )
        views = views.to(self.text)
        if not bool((finite := views.isfinite().all(dim=-1).all(dim=0)).all()):
            rows = (~finite).nonzero().flatten().tolist()
            raise DataError(
                f"features of {len(rows)} of {len(labels)} images are not finite, the first in row {rows[0]}; leave "
                "these images out, or compute features in full precision (--backbone.precision fp32)"
            )
        return views, labels

    def _train(
        self,
        name: str,
        recipe: CacheRecipe,
        views: Tensor,
        labels: Tensor,
        order: Sequence[Tensor],
        scored: Callable[[Tensor, Tensor], Tensor],
    ) -> Iterator[TrainingStep]:
        """Train the fitted buffer ``name`` in place by cross-entropy; yield each step once it is done.

        Args:
            name: The buffer.
            recipe: Batches, optimiser and schedule.
            views: Raw features ``[E, N, D]``; epoch e uses view e mod E.
            labels: ``[N]``.
            order: The order ``[N]`` of the images in each epoch.
            scored: ``scored(unit, value)``: logits ``[B, C]`` of unit features ``[B, D]`` by a value of the buffer.
        """
        batches = recipe.batches(len(labels))
        with torch.inference_mode(False), torch.enable_grad():
            parameter = nn.Parameter(self.get_buffer(name).clone())
            optimizer, schedule = recipe.optimizer([parameter], len(order) * batches)
        for epoch, rows in enumerate(order):
            for number, batch in enumerate(rows.to(labels.device).split(recipe.batch_size)[:batches], 1):
                with torch.inference_mode(False), torch.enable_grad():
                    logits = scored(self.unit(views[epoch % len(views), batch].clone()), parameter)
                    loss = F.cross_entropy(logits, labels[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    lr = float(optimizer.param_groups[0]["lr"])
                    optimizer.step()
                    schedule.step()
                self._set(**{name: parameter.data})
                gradients = {} if parameter.grad is None else {name: parameter.grad}
                ends, value = number == batches, float(loss.detach())
                yield TrainingStep(epoch, ends, lr, batch, labels[batch], logits.detach(), value, gradients)


class RowClassifier(FeatureClassifier):
    """A classifier with one fitted row per class, so that other classes are a choice of rows."""

    per_class: ClassVar[tuple[str, ...]] = ()
    """Fitted buffers with one entry or row per class, and none before :meth:`fit`."""

    def for_classes(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return the fitted buffers for other classes: class i of them is class ``rows[i]`` of this classifier."""
        state = {name: self.get_buffer(name) for name in self.fitted}
        return state | {name: state[name][list(rows)] for name in self.per_class}

    def misfits(self, state: Mapping[str, Tensor]) -> list[str]:
        """Return what in a ``state`` of fitted buffers contradicts itself or the classes, in words."""
        count, width = len(state[self.per_class[0]]), self.text.shape[1]
        wrong = [
            f"{name}: {len(state[name])} rows for {self.classes} classes"
            for name in self.per_class
            if len(state[name]) != count or count not in (0, self.classes)
        ]
        matrices = [name for name in self.per_class if state[name].ndim == 2 and state[name].shape[1] != width]
        return wrong + [f"{name}: width {state[name].shape[1]}, expected {width}" for name in matrices]


@validated("settings")
class KeyValueSettings:
    """Settings of a key-value cache.

    Attributes:
        alpha: Weight of the cache; 0 is zero-shot.
        beta: Sharpness of the affinities; at 0 all keys count alike.
    """

    alpha: NonNegative = 1.0
    beta: NonNegative = 1.0


class KeyValueCache(FeatureClassifier):
    """Unit keys ``[N, D]`` with one class each: ``logits = zero-shot + alpha sum_class exp(-beta (1 - affinity))``.

    The values of the published codes are one-hot rows, and a product with them is a sum over the keys of each class.
    Keys are sorted by class here, and that sum is formed directly: N additions per image instead of N x C products.
    Arguments are those of :class:`FeatureClassifier`.
    """

    Settings = KeyValueSettings
    fitted: ClassVar[tuple[str, ...]] = ("keys", "labels", "alpha", "beta")

    def build(self, text_features: Tensor) -> None:
        """Create the fitted buffers."""
        self._keep("keys", text_features.new_zeros(0, text_features.shape[1]))
        self._keep("labels", text_features.new_zeros(0))
        self._keep("alpha", text_features.new_tensor(self.settings.alpha))
        self._keep("beta", text_features.new_tensor(self.settings.beta))

    @property
    def key_labels(self) -> Tensor:
        """The class ``[N]`` of each key, int64 (heads hold it as floats)."""
        return self.get_buffer("labels").long()

    def affinity(self, unit: Tensor) -> Tensor:
        """Return the affinity ``[N, B]`` of each key and unit features ``[B, D]``: their cosine."""
        return self.get_buffer("keys") @ unit.t()

    def evidence(self, affinity: Tensor, beta: float | Tensor) -> Tensor:
        """Return ``sum exp(-beta (1 - affinity))`` over the keys of each class ``[C, B]``; ``affinity`` ``[N, B]``."""
        return class_sums((affinity - 1).mul_(beta).exp_(), self.key_labels, self.classes)

    def combine(self, zeroshot: Tensor, affinity: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` of zero-shot ``[B, C]`` and of ``affinity`` ``[N, B]``."""
        return zeroshot + self.get_buffer("alpha") * self.evidence(affinity, self.get_buffer("beta")).t()

    def _scored(self, features: Tensor) -> Tensor:
        unit = self.unit(features)
        zeroshot = self.zeroshot(unit)
        return self.combine(zeroshot, self.affinity(unit)) if len(self.get_buffer("keys")) else zeroshot

    def search(self, features: Tensor, labels: Tensor, betas: Sequence[float], alphas: Sequence[float]) -> SearchResult:
        """Set ``beta`` and ``alpha`` to the best point of a grid on labelled images, and return the search.

        Ties go to the first point, beta in the outer loop. The affinities are computed once; each beta costs one
        exponential of them, each alpha one addition and one comparison.

        Args:
            features: Raw features ``[M, D]`` of other images than the cache was fitted on.
            labels: ``[M]``.
            betas: Values of beta.
            alphas: Values of alpha.

        Raises:
            DataError: No images, or labels out of range.
            ConfigError: An empty grid.
        """
        views, labels = self._checked(features, labels)

        def prepare(start: int, stop: int) -> tuple[Tensor, Any]:
            unit = self.unit(views[0, start:stop])
            return self.zeroshot(unit), self.affinity(unit)

        def evidences(affinity: Tensor, beta: float) -> list[Tensor]:
            return [self.evidence(affinity, beta)]

        search = search_grid(labels, prepare, evidences, {"beta": betas, "alpha": alphas})
        self._set(beta=search.values["beta"], alpha=search.values["alpha"])
        return search

    def for_classes(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return the fitted buffers for other classes: class i of them is class ``rows[i]`` of this cache."""
        classes = self.key_labels
        places = [(classes == row).nonzero().squeeze(1) for row in rows]
        order = torch.cat(places) if places else classes[:0]
        labels = torch.cat([torch.full_like(place, new) for new, place in enumerate(places)]) if places else classes[:0]
        state = {name: self.get_buffer(name) for name in self.fitted}
        return state | {"labels": labels.to(self.text)} | {name: state[name][order] for name in self._per_key()}

    def _per_key(self) -> tuple[str, ...]:
        """Return the buffers with one entry per key, apart from the labels."""
        return ("keys",)

    def _key_width(self, state: Mapping[str, Tensor]) -> int:
        return self.text.shape[1]

    def misfits(self, state: Mapping[str, Tensor]) -> list[str]:
        """Return what in a ``state`` of fitted buffers contradicts itself or the classes, in words."""
        count = len(state["labels"])
        wrong = [
            f"{name}: {len(state[name])} entries for {count} labels"
            for name in self._per_key()
            if len(state[name]) != count
        ]
        if (width := self._key_width(state)) != state["keys"].shape[1]:
            wrong.append(f"keys: width {state['keys'].shape[1]}, expected {width}")
        labels = state["labels"]
        if count and not bool(((labels >= 0) & (labels < self.classes) & (labels == labels.round())).all()):
            wrong.append(f"labels: not all of them are classes, 0 to {self.classes - 1}")
        return wrong


def class_sums(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the sums ``[C, B]`` of the rows of ``values`` ``[N, B]`` that have the same label.

    Equal to ``one_hot(labels).T @ values``.

    Args:
        values: ``[N, B]``.
        labels: ``[N]``, int64; fastest if sorted with equal counts.
        classes: C.
    """
    shots, rest = divmod(len(labels), classes)
    if shots and not rest and torch.equal(labels, torch.arange(classes, device=labels.device).repeat_interleave(shots)):
        return values.reshape(classes, shots, -1).sum(dim=1)
    return values.new_zeros(classes, values.shape[1]).index_add(0, labels, values)
