"""What all caches share: a zero-shot classifier on frozen features, and a key-value memory that adds to its logits.

Caches work on features alone and have scikit-learn's manners: ``fit(features, labels)``, ``predict(features)``,
``score(features, labels)``; ``search(features, labels, ...)`` chooses hyperparameters on validation images. They take
raw (not normalised) features and normalise them themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.caches.search import SearchResult, search_grid
from vlprompt.caches.training import CacheRecipe, TrainingStep
from vlprompt.errors import ConfigError, DataError


class FeatureClassifier(nn.Module):
    """Zero-shot classification of features; a subclass adds what it was fitted on. Before that it is zero-shot.

    Args:
        text_features: Text classifier ``[C, D]``, one row per class; rows are brought to length 1 for scoring.
        logit_scale: What cosines are multiplied by. The published codes have 100, that of OpenAI's CLIP.

    Raises:
        ConfigError: ``text_features`` is no matrix, or has no rows.
    """

    fitted: ClassVar[tuple[str, ...]] = ()
    """Buffers that :meth:`fit` sets; with them and ``text_features`` the classifier can be made anew."""

    def __init__(self, text_features: Tensor, logit_scale: float | Tensor = 100.0) -> None:
        super().__init__()
        if text_features.ndim != 2 or not text_features.numel():
            raise ConfigError(f"text_features has shape {list(text_features.shape)}; accepted: [C, D], 1 or more each")
        self._keep("unit_text", F.normalize(text_features, dim=-1))
        self._keep("logit_scale", torch.as_tensor(logit_scale).to(text_features).reshape(()))

    def _keep(self, name: str, value: Tensor) -> None:
        with torch.inference_mode(False):
            self.register_buffer(name, value.detach().clone(), persistent=False)

    def _set(self, **values: Tensor | float) -> None:
        """Replace fitted buffers; in inference mode, too, they stay ordinary tensors."""
        with torch.inference_mode(False), torch.no_grad():
            for name, value in values.items():
                setattr(self, name, torch.as_tensor(value).detach().to(self.text).clone())

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
        """Whether there is anything beside the zero-shot classifier."""
        return any(self.get_buffer(name).ndim and self.get_buffer(name).numel() for name in self.fitted)

    def unit(self, features: Tensor) -> Tensor:
        """Return raw ``features`` ``[B, D]`` at length 1 and in the classifier's number type."""
        return F.normalize(features.to(self.text), dim=-1)

    def zeroshot(self, unit: Tensor) -> Tensor:
        """Return the zero-shot logits ``[B, C]`` of unit features ``[B, D]``."""
        return self.get_buffer("logit_scale") * unit @ self.text.t()

    def logits(self, features: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of raw ``features`` ``[B, D]``."""
        raise NotImplementedError

    def predict(self, features: Tensor) -> Tensor:
        """Return the class ``[B]`` of raw ``features`` ``[B, D]``."""
        return self.logits(features).argmax(dim=-1)

    def score(self, features: Tensor, labels: Tensor) -> float:
        """Return the accuracy, 0 to 1, on raw ``features`` ``[B, D]`` of ``labels`` ``[B]``.

        Raises:
            DataError: There are no images to score.
        """
        if not len(labels):
            raise DataError("there are no images to score on; the accuracy of none is not defined")
        return float((self.predict(features) == labels.to(features.device)).double().mean())

    def for_classes(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return the fitted buffers of the classifier that has class ``rows[i]`` of this one as its class i."""
        raise NotImplementedError

    def misfits(self, state: Mapping[str, Tensor]) -> list[str]:
        """Return what in a ``state`` of fitted buffers contradicts itself or the classes, in words."""
        return []

    def _checked(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return views ``[V, N, D]`` and labels ``[N]``.

        Raises:
            DataError: Shapes that do not go together, or labels that are none of the classes.
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
        return views.to(self.text), labels

    def _train(
        self,
        name: str,
        recipe: CacheRecipe,
        views: Tensor,
        labels: Tensor,
        order: Sequence[Tensor],
        scored: Callable[[Tensor, Tensor], Tensor],
    ) -> Iterator[TrainingStep]:
        """Train the fitted buffer ``name`` in place by cross-entropy; yield each step after it was taken.

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
    """A classifier that was fitted to one row for each class, so that other classes are a choice of rows."""

    per_class: ClassVar[tuple[str, ...]] = ()
    """The fitted buffers that have one entry or row for each class, and none before :meth:`fit`."""

    def for_classes(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return the buffers of the classifier that has class ``rows[i]`` of this one as its class i."""
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


class KeyValueCache(FeatureClassifier):
    """Unit keys ``[N, D]`` with one class each: ``logits = zero-shot + alpha sum_class exp(-beta (1 - affinity))``.

    The values of the published codes are one-hot rows, so that a product with them is a sum over the keys of each
    class. Keys are kept in the order of their classes, and that sum is formed directly (grouped sums): N numbers per
    image are added up instead of N times C multiplied.

    Args:
        text_features: As in :class:`FeatureClassifier`.
        logit_scale: As there.
        alpha: Weight of what the cache says; 0 is zero-shot.
        beta: Sharpness of the affinities; 0 lets all keys speak alike.
    """

    fitted: ClassVar[tuple[str, ...]] = ("keys", "labels", "alpha", "beta")

    def __init__(
        self, text_features: Tensor, logit_scale: float | Tensor = 100.0, *, alpha: float = 1.0, beta: float = 1.0
    ) -> None:
        super().__init__(text_features, logit_scale)
        self._keep("keys", text_features.new_zeros(0, text_features.shape[1]))
        self._keep("labels", text_features.new_zeros(0))
        self._keep("alpha", text_features.new_tensor(alpha))
        self._keep("beta", text_features.new_tensor(beta))

    @property
    def key_labels(self) -> Tensor:
        """The class ``[N]`` of each key, int64 (heads hold it as floats)."""
        return self.get_buffer("labels").long()

    def affinity(self, unit: Tensor) -> Tensor:
        """Return how near each key is to each image ``[N, B]``, given unit features ``[B, D]``: their cosine."""
        return self.get_buffer("keys") @ unit.t()

    def evidence(self, affinity: Tensor, beta: float | Tensor) -> Tensor:
        """Return ``sum exp(-beta (1 - affinity))`` over the keys of each class ``[C, B]``; ``affinity`` ``[N, B]``."""
        return class_sums((affinity - 1).mul_(beta).exp_(), self.key_labels, self.classes)

    def combine(self, zeroshot: Tensor, affinity: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` of zero-shot ``[B, C]`` and of ``affinity`` ``[N, B]``."""
        return zeroshot + self.get_buffer("alpha") * self.evidence(affinity, self.get_buffer("beta")).t()

    def logits(self, features: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of raw ``features`` ``[B, D]``; zero-shot while the cache is empty."""
        return self._scored(features)

    def _scored(self, features: Tensor) -> Tensor:
        unit = self.unit(features)
        zeroshot = self.zeroshot(unit)
        return self.combine(zeroshot, self.affinity(unit)) if len(self.get_buffer("keys")) else zeroshot

    def search(self, features: Tensor, labels: Tensor, betas: Sequence[float], alphas: Sequence[float]) -> SearchResult:
        """Set ``beta`` and ``alpha`` to the best of a grid on labelled images, and say what was found.

        Of equally good points the first counts, beta in the outer loop. The affinities are computed once; each beta
        costs one exponential of them, each alpha one addition and one comparison.

        Args:
            features: Raw features ``[M, D]`` of images that the cache was not fitted on.
            labels: ``[M]``.
            betas: Values of beta.
            alphas: Values of alpha.

        Raises:
            DataError: No images, or labels that are none of the classes.
            ConfigError: An empty grid.
        """
        views, labels = self._checked(features, labels)

        def prepare(start: int, stop: int) -> tuple[Tensor, Any]:
            unit = self.unit(views[0, start:stop])
            return self.zeroshot(unit), self.affinity(unit)

        def evidences(affinity: Tensor, beta: float) -> list[Tensor]:
            return [self.evidence(affinity, beta)]

        found = search_grid(labels, prepare, evidences, {"beta": betas, "alpha": alphas})
        self._set(beta=found.values["beta"], alpha=found.values["alpha"])
        return found

    def for_classes(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return the buffers of the cache that has class ``rows[i]`` of this one as its class i."""
        own = self.key_labels
        places = [(own == row).nonzero().squeeze(1) for row in rows]
        order = torch.cat(places) if places else own[:0]
        labels = torch.cat([torch.full_like(place, new) for new, place in enumerate(places)]) if places else own[:0]
        state = {name: self.get_buffer(name) for name in self.fitted}
        return state | {"labels": labels.to(self.text)} | {name: state[name][order] for name in self._per_key()}

    def _per_key(self) -> tuple[str, ...]:
        """Return the buffers that have one entry for each key, beside the labels."""
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
        labels: ``[N]``, int64; quickest in order and with equally many of each class.
        classes: C.
    """
    shots, rest = divmod(len(labels), classes)
    if shots and not rest and torch.equal(labels, torch.arange(classes, device=labels.device).repeat_interleave(shots)):
        return values.reshape(classes, shots, -1).sum(dim=1)
    return values.new_zeros(classes, values.shape[1]).index_add(0, labels, values)
