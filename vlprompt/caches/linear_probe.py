"""Linear probe: multinomial logistic regression on frozen image features (Radford et al., ICML 2021; CoOp's lpclip)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.caches.base import RowClassifier
from vlprompt.caches.search import search_exponent
from vlprompt.errors import DataError

#: Exponents of the coarse grid of C, in the order of lpclip: of equally good ones the largest C counts.
C_EXPONENTS = (6, 4, 2, 0, -2, -4, -6)
HALVINGS = 8


class LinearProbe(RowClassifier):
    """``logits = f W^T + b``; ``W`` ``[C, D]`` and ``b`` ``[C]`` minimise the penalised cross-entropy of the images.

    ``mean CE + |W|^2 / (2 c N)``: scikit-learn's LogisticRegression of three or more classes, the biases without
    penalty. (Of two classes scikit-learn learns one row, not two, and so penalises differently.)

    Args:
        text_features: Text classifier ``[C, D]``: what is zero-shot before :meth:`fit`, and a possible start.
        logit_scale: What cosines are multiplied by.
        c: Inverse strength of the penalty; 0.316 is that of CLIP's README.
        normalised: Bring features to length 1 first, as few-shot protocols do; CLIP's README takes them raw.
        start: Where W starts: at zero, or as the zero-shot classifier of unit features, times ``logit_scale``. What is
            minimised is convex: the start counts only as far as ``iterations`` and tolerance stop short of the minimum,
            which they do where ``c`` is large and the classes can be told apart.
        iterations: The most steps of L-BFGS.
        tolerance: It stops where no entry of the gradient is larger; scikit-learn's default.
    """

    fitted = ("weight", "bias", "c")
    per_class = ("weight", "bias")

    def __init__(
        self,
        text_features: Tensor,
        logit_scale: float | Tensor = 100.0,
        *,
        c: float = 0.316,
        normalised: bool = True,
        start: Literal["zero", "zeroshot"] = "zero",
        iterations: int = 1000,
        tolerance: float = 1e-4,
    ) -> None:
        super().__init__(text_features, logit_scale)
        self._keep("weight", text_features.new_zeros(0, text_features.shape[1]))
        self._keep("bias", text_features.new_zeros(0))
        self._keep("c", text_features.new_tensor(c))
        self.normalised, self.start = normalised, start
        self.iterations, self.tolerance = iterations, tolerance

    def rows(self, features: Tensor) -> Tensor:
        """Return raw ``features`` ``[..., D]`` as they are regressed on."""
        return self.unit(features) if self.normalised else features.to(self.text)

    def logits(self, features: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of raw ``features`` ``[B, D]``; zero-shot before :meth:`fit`."""
        if not self.is_fitted:
            return self.zeroshot(self.unit(features))
        return F.linear(self.rows(features), self.get_buffer("weight"), self.get_buffer("bias"))

    def fit(self, features: Tensor, labels: Tensor, *, val: tuple[Tensor, Tensor] | None = None) -> LinearProbe:
        """Find W and b, in double precision.

        Args:
            features: Raw features ``[N, D]``, or ``[V, N, D]``: each view counts as an image of its own.
            labels: ``[N]``.
            val: Raw features ``[M, D]`` and labels ``[M]`` that ``c`` is chosen on: the best of seven powers of ten,
                1e6 to 1e-6, then eight halvings about it (:func:`vlprompt.caches.search.search_exponent`).

        Raises:
            DataError: Shapes that do not go together, labels that are none of the classes, or no images.
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
        """Return W ``[C, D]`` and b ``[C]`` for rows ``[N, D]``, by L-BFGS as scikit-learn sets it up."""
        with torch.inference_mode(False), torch.enable_grad():
            rows, labels = rows.double().clone(), labels.clone()
            start = self.text.double() * self.get_buffer("logit_scale").double()
            weight = nn.Parameter(start if self.start == "zeroshot" else torch.zeros_like(start))
            bias = nn.Parameter(rows.new_zeros(self.classes))
            optimizer = torch.optim.LBFGS(
                [weight, bias],
                max_iter=self.iterations,
                max_eval=2 * self.iterations,
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
    """Return what a linear probe minimises: the mean cross-entropy and ``|W|^2 / (2 c N)``.

    Args:
        weight: W ``[C, D]``.
        bias: b ``[C]``.
        rows: ``[N, D]``.
        labels: ``[N]``.
        c: Inverse strength of the penalty.
    """
    return F.cross_entropy(F.linear(rows, weight, bias), labels) + weight.square().sum() / (2 * c * len(labels))


__all__ = ["C_EXPONENTS", "HALVINGS", "LinearProbe", "penalised_loss"]
