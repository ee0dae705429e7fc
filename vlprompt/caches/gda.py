"""GDA: Gaussian discriminant analysis added to zero-shot CLIP (Wang et al., ICLR 2024; arXiv 2402.04087).

Classes are Gaussians with one mean each and a common covariance. The classifier has a closed form (equations 4 to 6)
and is added to the zero-shot one. Official code: mrflogs/ICLR24.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlprompt.caches.base import RowClassifier
from vlprompt.caches.search import SearchResult, decades, search_scalar
from vlprompt.config.types import NonNegative, validated
from vlprompt.errors import DataError


@validated("settings")
class GDACacheSettings:
    """Settings of GDA; the default is the official one.

    Attributes:
        alpha: Weight of the Gaussian classifier; 0 is zero-shot.
    """

    alpha: NonNegative = 1.0


class GDA(RowClassifier):
    """``logits = scale f W^T + alpha (f W_g^T + b)`` with ``W_g = mu P`` and ``b_c = -ln C - mu_c P mu_c^T / 2``.

    Arguments are those of :class:`~vlprompt.caches.base.FeatureClassifier`.
    """

    Settings = GDACacheSettings
    fitted = ("weight", "bias", "alpha")
    per_class = ("weight", "bias")

    def build(self, text_features: Tensor) -> None:
        """Create the fitted buffers."""
        self._keep("weight", text_features.new_zeros(0, text_features.shape[1]))
        self._keep("bias", text_features.new_zeros(0))
        self._keep("alpha", text_features.new_tensor(self.settings.alpha))

    def fit(self, features: Tensor, labels: Tensor) -> GDA:
        """Estimate means and the shrunk precision ``P = D pinv((n - 1) S + tr(S) I)``, in double precision.

        Args:
            features: Raw features ``[N, D]``, or ``[V, N, D]``: each view counts as an image, n = V N (officially
                V = 10).
            labels: ``[N]``.

        Raises:
            DataError: Shapes that do not match, or a class without images, which has no mean.
        """
        views, labels = self._checked(features, labels)
        counts = torch.bincount(labels, minlength=self.classes)
        if missing := (counts == 0).nonzero().squeeze(1).tolist():
            raise DataError(
                f"{len(missing)} of {self.classes} classes have no images (the first is class {missing[0]}); "
                "their means cannot be estimated"
            )
        with torch.no_grad():
            unit = self.unit(views).double().flatten(0, 1)
            every = labels.repeat(len(views))
            means = unit.new_zeros(self.classes, unit.shape[1]).index_add_(0, every, unit)
            means /= counts[:, None] * len(views)
            centred = unit - means[every]
            scatter = centred.t() @ centred  # (n - 1) S: centred rows have mean zero
            shrink = scatter.diagonal().sum() / max(len(unit) - 1, 1)
            shrunk = scatter + shrink * torch.eye(len(scatter), dtype=scatter.dtype, device=scatter.device)
            weight = means @ (unit.shape[1] * torch.linalg.pinv(shrunk, hermitian=True))
            bias = -torch.log(torch.tensor(float(self.classes))) - (weight * means).sum(dim=-1) / 2
        self._set(weight=weight, bias=bias)
        return self

    def gaussian(self, unit: Tensor) -> Tensor:
        """Return the Gaussian classifier's scores ``[B, C]`` of unit features ``[B, D]``."""
        return unit @ self.get_buffer("weight").t() + self.get_buffer("bias")

    def _scored(self, features: Tensor) -> Tensor:
        unit = self.unit(features)
        zeroshot = self.zeroshot(unit)
        return zeroshot + self.get_buffer("alpha") * self.gaussian(unit) if self.is_fitted else zeroshot

    def search(self, features: Tensor, labels: Tensor, alphas: Sequence[float] | None = None) -> SearchResult:
        """Set ``alpha`` to the best value on raw ``features`` ``[M, D]`` with ``labels`` ``[M]``; ties go to the first.

        ``alphas`` are the seven powers of ten from 0.0001 to 100 by default.

        Raises:
            DataError: No images, or labels out of range.
        """
        views, labels = self._checked(features, labels)
        if not len(labels):
            raise DataError("there are no images to choose hyperparameters on")
        unit = self.unit(views[0])
        zeroshot, gaussian = self.zeroshot(unit), self.gaussian(unit)

        def score(alpha: float) -> float:
            return float((torch.add(zeroshot, gaussian, alpha=alpha).argmax(dim=-1) == labels).double().mean())

        search = search_scalar("alpha", decades(-4, 2) if alphas is None else alphas, score)
        self._set(alpha=search.values["alpha"])
        return search
