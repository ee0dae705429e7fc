"""LP++: a linear probe blended with the text classifier, step sizes from the data (Huang et al., CVPR 2024).

arXiv 2404.02285; official code FereshteShakeri/FewShot-CLIP-Strong-Baseline. Step sizes are Lipschitz bounds of the
loss on the few-shot images; no learning rate is searched.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.caches.base import RowClassifier, class_sums
from vlprompt.config.types import Below1, Count, NonNegative, Positive, validated
from vlprompt.errors import DataError


@validated("settings")
class LPPlusPlusCacheSettings:
    """Settings of LP++; the defaults are the official ones.

    Attributes:
        iterations: Number of steps, each over all images.
        momentum: Momentum of w and b.
        alpha_every: Iterations between two steps of alpha.
        alpha_start: Initial alpha, in units of the mean cosine of images and the text features of their classes.
        accumulate: Sum the gradient of alpha over all iterations so far, as the official code does, which never sets it
            to zero; otherwise take that of the last iteration.
    """

    iterations: Count = 300
    momentum: Below1 = 0.9
    alpha_every: Positive = 10
    alpha_start: NonNegative = 250.0
    accumulate: bool = True


class LPPlusPlus(RowClassifier):
    """``logits_k = f w_k + b_k + alpha_k (f t_k)``, without temperature; w, b and alpha are learned.

    Arguments are those of :class:`~vlprompt.caches.base.FeatureClassifier`; ``text_features`` are the rows t, and
    ``logit_scale`` is used before :meth:`fit` only.
    """

    Settings = LPPlusPlusCacheSettings
    fitted = ("weight", "bias", "alpha")
    per_class = ("weight", "bias", "alpha")

    def build(self, text_features: Tensor) -> None:
        """Create the fitted buffers."""
        self._keep("weight", text_features.new_zeros(0, text_features.shape[1]))
        self._keep("bias", text_features.new_zeros(0))
        self._keep("alpha", text_features.new_zeros(0))

    def _scored(self, features: Tensor) -> Tensor:
        unit = self.unit(features)
        return self._blended(unit, unit @ self.text.t()) if self.is_fitted else self.zeroshot(unit)

    def _blended(self, unit: Tensor, cosines: Tensor) -> Tensor:
        visual = F.linear(unit, self.get_buffer("weight"), self.get_buffer("bias"))
        return visual + self.get_buffer("alpha") * cosines

    def fit(
        self, features: Tensor, labels: Tensor, *, val: tuple[Tensor, Tensor] | None = None, seed: int = 1
    ) -> LPPlusPlus:
        """Start from the classes' sums of features and take the steps.

        Args:
            features: Raw features ``[N, D]``, or ``[V, N, D]``: each view counts as an image. (The official code has
                one random view.)
            labels: ``[N]``.
            val: Raw features ``[M, D]`` and labels ``[M]``. The iteration that is best on them is kept, the last of
                equally good ones. Default: the last iteration.
            seed: Seed of the initial biases.

        Raises:
            DataError: Shapes that do not match, labels out of range, or no images.
        """
        views, labels = self._checked(features, labels)
        if not len(labels):
            raise DataError("LP++ cannot be fitted on no images")
        unit, labels = self.unit(views).flatten(0, 1), labels.repeat(len(views))
        self.begin(unit, labels, seed)
        chosen = val if val is not None and len(val[1]) else None
        best, kept = -1.0, {}
        for _ in self.iterate(unit, labels, *step_sizes(unit, self.text)):
            accuracy = self.score(*chosen) if chosen else 0.0
            if accuracy >= best:
                best, kept = accuracy, {name: self.get_buffer(name) for name in self.fitted}
        self._set(**kept)
        return self

    @torch.no_grad()
    def begin(self, unit: Tensor, labels: Tensor, seed: int) -> None:
        """Set w to the sum of each class's ``unit`` features ``[N, D]``, b as linear layers have it, and alpha."""
        cosines = (unit * self.text[labels]).sum(dim=-1, keepdim=True)
        counts = torch.bincount(labels, minlength=self.classes)
        means = class_sums(cosines, labels, self.classes).squeeze(1) / counts.clamp(min=1)
        bound = unit.shape[1] ** -0.5
        noise = torch.rand(self.classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self._set(
            weight=class_sums(unit, labels, self.classes),
            bias=(2 * noise - 1) * bound,
            alpha=self.text.new_ones(self.classes) * self.settings.alpha_start * means[counts > 0].mean(),
        )

    @torch.no_grad()
    def iterate(self, unit: Tensor, labels: Tensor, rate: float, alpha_rate: float) -> Iterator[float]:
        """Take the steps in place; yield the loss before each, once it is done.

        The gradients of cross-entropy are written out: ``p - y`` is that of the logits.

        Args:
            unit: Unit features ``[N, D]``.
            labels: ``[N]``.
            rate: Step size of w and b.
            alpha_rate: Step size of alpha.
        """
        cosines = unit @ self.text.t()
        rows = torch.arange(len(labels), device=labels.device)
        speed_weight, speed_bias = torch.zeros_like(self.text), self.text.new_zeros(self.classes)
        pull = self.text.new_zeros(self.classes)
        for number in range(1, self.settings.iterations + 1):
            log_p = self._blended(unit, cosines).log_softmax(dim=-1)
            loss = float(-log_p[rows, labels].mean())
            error = log_p.exp_()
            error[rows, labels] -= 1
            error /= len(labels)
            speed_weight.mul_(self.settings.momentum).add_(error.t() @ unit)
            speed_bias.mul_(self.settings.momentum).add_(error.sum(dim=0))
            pull.mul_(float(self.settings.accumulate)).add_((error * cosines).sum(dim=0))
            self._set(
                weight=self.get_buffer("weight") - rate * speed_weight,
                bias=self.get_buffer("bias") - rate * speed_bias,
            )
            if number % self.settings.alpha_every == 0:
                self._set(alpha=self.get_buffer("alpha") - alpha_rate * pull)
            yield loss


@torch.no_grad()
def step_sizes(unit: Tensor, text: Tensor) -> tuple[float, float]:
    """Return the step sizes of w and of alpha: ``4 N / lambda_max(F^T F)`` and ``N / (4 max_k sum_i (f_i t_k)^2)``.

    Args:
        unit: Unit features F ``[N, D]``.
        text: Unit text classifier ``[C, D]``.
    """
    wide = unit.double()
    gram = wide.t() @ wide if len(wide) >= wide.shape[1] else wide @ wide.t()  # both have the same largest eigenvalue
    largest = (wide @ text.double().t()).square().sum(dim=0).max()
    return float(4 * len(unit) / torch.linalg.eigvalsh(gram)[-1]), float(len(unit) / (4 * largest))
