"""What a method that is fitted on frozen features gets to see: shots, validation images, and unlabelled images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FewShotFeatures:
    """Raw (not normalised) frozen image features, float32, on the method's device.

    Attributes:
        train: ``[V, N, D]``: V random views of each training image, or the test view alone (V = 1).
        labels: ``[N]``, int64.
        val: ``[M, D]``, the test view of the images that hyperparameters are chosen on; M may be 0.
        val_labels: ``[M]``.
        unlabelled: ``[U, D]``, the test view of images whose labels are not looked at; U may be 0.
        unlabelled_views: ``[W, U, D]``, random views of them; W may be 0.
        seed: Seed of whatever the method draws.
    """

    train: Tensor
    labels: Tensor
    val: Tensor
    val_labels: Tensor
    unlabelled: Tensor
    unlabelled_views: Tensor
    seed: int = 1
