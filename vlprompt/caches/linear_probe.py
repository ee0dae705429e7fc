"""Linear probe: multinomial logistic regression on frozen image features (Radford et al., ICML 2021; CoOp's lpclip)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.caches.base import RowClassifier
from vlprompt.caches.search import search_exponent
from vlprompt.config.types import Ge, Positive, validated
from vlprompt.errors import ConfigError, DataError

#: Exponents of the coarse grid of C, in the order of lpclip: ties go to the largest C.
C_EXPONENTS = (6, 4, 2, 0, -2, -4, -6)
HALVINGS = 8


#: L-BFGS stops where no entry of the gradient is larger; the default of scikit-learn.
TOLERANCE = 1e-4


@validated("settings")
class LinearProbeCacheSettings:
    """Settings of the linear probe.

    Attributes:
        c: Inverse strength of the penalty, used where it is not searched; the default is that of CLIP's README.
        normalised: Normalise features first. CLIP's README and CoOp's few-shot protocol take raw ones
            (lpclip/feat_extractor.py).
        start: Initial W: ``zero``, or ``zeroshot`` for the text classifier times the logit scale. The loss is convex,
            so the start matters only where the iterations stop short of the minimum: with a large c and separable
            classes.
        iterations: Maximal number of L-BFGS steps.
    """

    c: Annotated[float, Ge(1e-12)] = 0.316
    normalised: bool = False
    start: Literal["zero", "zeroshot"] = "zero"
    iterations: Positive = 1000

    def __post_init__(self) -> None:
        if self.start == "zeroshot" and not self.normalised:
            raise ConfigError(
                "settings.start is 'zeroshot' and settings.normalised false; accepted then: zero, because the text "
                "classifier is scaled for unit features"
            )


class LinearProbe(RowClassifier):
    """``logits = f W^T + b``; ``W`` ``[C, D]`` and ``b`` ``[C]`` minimise the penalised cross-entropy of the images.

    ``mean CE + |W|^2 / (2 c N)``: scikit-learn's LogisticRegression of three or more classes, biases not penalised.
    (For two classes scikit-learn learns one row, not two, and penalises differently.) Arguments are those of
    :class:`~vlprompt.caches.base.FeatureClassifier`.
    """

    Settings = LinearProbeCacheSettings
    fitted = ("weight", "bias", "c")
    per_class = ("weight", "bias")

    def build(self, text_features: Tensor) -> None:
        """Create the fitted buffers."""
        self._keep("weight", text_features.new_zeros(0, text_features.shape[1]))
        self._keep("bias", text_features.new_zeros(0))
        self._keep("c", text_features.new_tensor(self.settings.c))
        self.tolerance = TOLERANCE

    def rows(self, features: Tensor) -> Tensor:
        """Return the regressors ``[..., D]`` of raw ``features`` ``[..., D]``."""
        return self.unit(features) if self.settings.normalised else features.to(self.text)

    def _scored(self, features: Tensor) -> Tensor:
        if not self.is_fitted:
            return self.zeroshot(self.unit(features))
        return F.linear(self.rows(features), self.get_buffer("weight"), self.get_buffer("bias"))

    def fit(self, features: Tensor, labels: Tensor, *, val: tuple[Tensor, Tensor] | None = None) -> LinearProbe:
        """Find W and b, in double precision.

        Args:
            features: Raw features ``[N, D]``, or ``[V, N, D]``: each view counts as an image.
            labels: ``[N]``.
            val: Raw features ``[M, D]`` and labels ``[M]`` that ``c`` is chosen on: the best of seven powers of ten,
                1e6 to 1e-6, then eight halvings around it (:func:`vlprompt.caches.search.search_exponent`).

        Raises:
            DataError: Shapes that do not match, labels out of range, or no images.
        """
        views, labels = self._checked(features, labels)
        if not len(labels):
            raise DataError("a linear probe cannot be fitted on no images")
        every = self.rows(views).flatten(0, 1), labels.repeat(len(views))
        if val is None or not len(val[1]):
            weight, bias = self._minimum(*every, float(self.get_buffer("c")))
            self._set(weight=weight, bias=bias)
            return self
        known: dict[float, tuple[Tensor, Tensor]] = {}

        def score(exponent: float) -> float:
            known[exponent] = self._minimum(*every, 10.0**exponent)
            self._set(weight=known[exponent][0], bias=known[exponent][1])
            return self.score(*val)

        best = search_exponent(C_EXPONENTS, HALVINGS, score)
        self._set(weight=known[best][0], bias=known[best][1], c=10.0**best)
        return self

    def _minimum(self, rows: Tensor, labels: Tensor, c: float) -> tuple[Tensor, Tensor]:
        """Return W ``[C, D]`` and b ``[C]`` for rows ``[N, D]``, by L-BFGS with the options of scikit-learn."""
        with torch.inference_mode(False), torch.enable_grad():
            rows, labels = rows.double().clone(), labels.clone()
            start = self.text.double() * self.get_buffer("logit_scale").double()
            weight = nn.Parameter(start if self.settings.start == "zeroshot" else torch.zeros_like(start))
            bias = nn.Parameter(rows.new_zeros(self.classes))
            optimizer = torch.optim.LBFGS(
                [weight, bias],
                max_iter=self.settings.iterations,
                max_eval=2 * self.settings.iterations,
                tolerance_grad=self.tolerance,
                tolerance_change=1e-12,
                history_size=10,
                line_search_fn="strong_wolfe",
            )

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = penalised_loss(weight, bias, rows, labels, c)
                loss.backward()
                return loss

            optimizer.step(closure)
        return weight.detach(), bias.detach()


def penalised_loss(weight: Tensor, bias: Tensor, rows: Tensor, labels: Tensor, c: float) -> Tensor:
    """Return the loss of a linear probe: the mean cross-entropy and ``|W|^2 / (2 c N)``.

    Args:
        weight: W ``[C, D]``.
        bias: b ``[C]``.
        rows: ``[N, D]``.
        labels: ``[N]``.
        c: Inverse strength of the penalty.
    """
    return F.cross_entropy(F.linear(rows, weight, bias), labels) + weight.square().sum() / (2 * c * len(labels))
