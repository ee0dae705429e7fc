"""Cross-modal hierarchical clustering of image-caption pairs: topics by caption, visual domains by image.

GRAM (Li et al., ICCV 2023; arXiv 2303.06571) names the algorithm but does not publish its details. In this
reconstruction both levels are spherical k-means on the frozen CLIP's features.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlprompt._files import replacing, sha256_tensors
from vlprompt.errors import ConfigError, DataError, bulleted

SCHEMA = "vlprompt clusters 1"
#: More rows than this are clustered in mini-batches, which is much faster and slightly less exact.
EXACT_ROWS = 20_000
_STARTS = 4


@dataclass(frozen=True, eq=False)
class Clusters:
    """The topic of every pair and its domain inside the topic, for K1 topics with K2 domains each.

    Attributes:
        topic: ``[N]`` int64, 0 to K1 - 1.
        domain: ``[N]`` int64, 0 to K2 - 1, counted inside the topic.
        topic_centres: ``[K1, D]`` unit means of captions; zeros for empty topics.
        domain_centres: ``[K1, K2, D]`` unit means of images; zeros for empty domains.
        kept: ``[K1, K2]`` bool: domains that are large enough for tasks. Other domains are not used.

    Raises:
        DataError: Shapes, types or numbers do not match.
    """

    topic: Tensor
    domain: Tensor
    topic_centres: Tensor
    domain_centres: Tensor
    kept: Tensor

    def __post_init__(self) -> None:
        if self.kept.ndim != 2 or self.domain_centres.ndim != 3 or self.topic_centres.ndim != 2 or self.topic.ndim != 1:
            raise DataError("clusters: expected topic [N], topic_centres [K1, D], domain_centres [K1, K2, D]")
        numbers = zip(("topic", "domain"), (self.topic, self.domain), self.kept.shape, strict=True)
        wrong = [
            f"{name} holds numbers outside 0 to {count - 1}"
            for name, x, count in numbers
            if x.dtype != torch.int64 or x.numel() and not (0 <= int(x.min()) and int(x.max()) < count)
        ]
        if self.topic.shape != self.domain.shape:
            wrong.append(f"topic has shape {list(self.topic.shape)}, domain {list(self.domain.shape)}")
        if len(self.topic_centres) != len(self.kept) or self.domain_centres.shape[:2] != self.kept.shape:
            wrong.append(f"kept has shape {list(self.kept.shape)}, but the centres have other numbers of clusters")
        if self.kept.dtype != torch.bool:
            wrong.append(f"kept is {self.kept.dtype}; expected torch.bool")
        if wrong:
            raise DataError("the tensors of the clusters do not match:\n" + bulleted(wrong))

    def members(self) -> dict[tuple[int, int], list[int]]:
        """Return the rows of every non-empty ``(topic, domain)``, including dropped ones, in ascending order."""
        members: dict[tuple[int, int], list[int]] = {}
        for row, key in enumerate(zip(self.topic.tolist(), self.domain.tolist(), strict=True)):
            members.setdefault(key, []).append(row)
        return dict(sorted(members.items()))

    def save(self, path: str | Path) -> None:
        """Write the clusters to a safetensors file, atomically.

        Raises:
            DataError: The file cannot be written.
        """
        path = Path(path)
        tensors = {field.name: getattr(self, field.name).contiguous() for field in fields(self)}
        try:
            with replacing(path) as temporary:
                save_file(tensors, temporary, metadata={"schema": SCHEMA, "sha256": _sha256(tensors)})
        except (OSError, SafetensorError) as error:
            raise DataError(f"Clusters cannot be written to {path}: {error}. Use another folder.") from error

    @classmethod
    def load(cls, path: str | Path) -> Clusters:
        """Read a file written by :meth:`save`.

        Raises:
            DataError: The file is missing, damaged or of another kind.
        """
        if not os.path.isfile(path):
            raise DataError(f"There is no file {path}; clusters are written when tasks are first drawn from pairs.")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} is damaged ({error}); move it away to cluster the pairs again.") from error
        if metadata.get("schema") != SCHEMA or set(tensors) != {field.name for field in fields(cls)}:
            schema = metadata.get("schema", "no schema")
            raise DataError(
                f"{path} holds no clusters: its schema is {schema!r}; expected {SCHEMA!r}. "
                "Move it away to cluster the pairs again."
            )
        if metadata.get("sha256") != _sha256(tensors):
            raise DataError(f"{path} is damaged (its checksum differs); move it away to cluster the pairs again.")
        return cls(**tensors)


def cluster(images: Tensor, captions: Tensor, *, topics: int, domains: int, least: int, seed: int) -> Clusters:
    """Cluster N pairs: captions into topics, then the images of each topic into domains.

    Every pair gets exactly one topic and domain. Domains of fewer than ``least`` pairs are marked as not kept. If there
    are fewer different rows than requested clusters, the remaining clusters are empty.

    Args:
        images: Raw image features ``[N, D]`` of the frozen CLIP.
        captions: Raw caption features ``[N, D]``.
        topics: K1.
        domains: K2 of each topic.
        least: Minimum number of pairs of a domain to be kept.
        seed: Seed of the initialisations of k-means. The result does not depend on the number of threads, because
            k-means uses one. Another processor, BLAS or scikit-learn may round differently and move pairs between
            clusters.

    Returns:
        The clusters, on the CPU.

    Raises:
        ConfigError: A number is too small, or scikit-learn is missing.
        DataError: The features are not two matrices of N rows, or hold numbers that are not finite.
    """
    for name, value, smallest in (("topics", topics, 1), ("domains", domains, 2), ("least", least, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise ConfigError(f"tasks.{name} is {value!r}; accepted: whole numbers from {smallest}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed is {seed!r}; accepted: whole numbers from 0.")
    images, captions = (x.detach().float().cpu() for x in (images, captions))
    if images.ndim != 2 or captions.ndim != 2 or len(images) != len(captions) or not len(images):
        shapes = f"{list(images.shape)} and {list(captions.shape)}"
        raise DataError(f"image and caption features have shapes {shapes}; expected [N, D], one row each for N pairs")
    for name, x in (("image", images), ("caption", captions)):
        bad = (~x.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise DataError(
                f"{name} features are not finite numbers in {len(bad)} of {len(x)} rows, first in row {bad[0]}. Encode "
                "them again (in float32 if they were computed in half precision), or remove those pairs."
            )
    topic, topic_centres = spherical_kmeans(captions, topics, _derived(seed))
    domain = torch.zeros_like(topic)
    domain_centres = torch.zeros(topics, domains, images.shape[1])
    for number in topic.unique().tolist():
        rows = (topic == number).nonzero().flatten()
        domain[rows], domain_centres[number] = spherical_kmeans(images[rows], domains, _derived(seed, 1 + number))
    sizes = torch.bincount(topic * domains + domain, minlength=topics * domains).view(topics, domains)
    return Clusters(topic, domain, topic_centres, domain_centres, sizes >= least)


def without_caption(images: Tensor, captions: Tensor, ridge: float = 1.0) -> Tensor:
    """Return the residuals ``[N, D]`` of a ridge regression from unit caption features to unit image features.

    Images of a topic differ more by content than by style; the residuals emphasise style.

    Args:
        images: Raw image features ``[N, D]``.
        captions: Raw caption features ``[N, D]``.
        ridge: Weight of the squared coefficients.
    """
    x, predictors = (F.normalize(features.detach().double().cpu(), dim=1) for features in (images, captions))
    predictors = torch.cat([predictors, torch.ones(len(predictors), 1, dtype=predictors.dtype)], dim=1)
    gram = predictors.t() @ predictors + ridge * torch.eye(predictors.shape[1], dtype=predictors.dtype)
    residuals: Tensor = x - predictors @ torch.linalg.solve(gram, predictors.t() @ x)
    return residuals.float()


def spherical_kmeans(features: Tensor, clusters: int, seed: int) -> tuple[Tensor, Tensor]:
    """Cluster directions: k-means on unit rows, with centres normalised to length 1.

    A row belongs to the centre of the largest cosine. This can differ from the nearest mean of k-means, because the
    mean of scattered rows is short. The centres are not updated afterwards. More than :data:`EXACT_ROWS` rows are
    clustered in mini-batches.

    Args:
        features: ``[N, D]`` with N >= 1, of any length.
        clusters: K; may be larger than N.
        seed: Seed of the initialisations, 0 to 2^32 - 1.

    Returns:
        The cluster of each row ``[N]`` int64, and the unit centres ``[K, D]`` float32, zeros for empty clusters.

    Raises:
        ConfigError: scikit-learn is missing.
    """
    try:
        sklearn, threads = import_module("sklearn.cluster"), import_module("threadpoolctl")
    except ImportError as error:
        raise ConfigError(
            'Clustering needs scikit-learn, which is not installed: pip install "vlprompt[meta]"'
        ) from error
    rows = F.normalize(features.detach().float().cpu(), dim=1).numpy()
    wanted = min(clusters, len(rows))
    # One thread, because several threads sum in an order that is not deterministic.
    with threads.threadpool_limits(1), warnings.catch_warnings():
        # Repeated captions can give fewer clusters than requested; the remaining ones are empty.
        warnings.filterwarnings("ignore", "Number of distinct clusters")
        if len(rows) <= EXACT_ROWS:
            model = sklearn.KMeans(wanted, n_init=_STARTS, random_state=seed)
        else:
            model = sklearn.MiniBatchKMeans(wanted, n_init=_STARTS, random_state=seed, batch_size=4096)
        means = model.fit(rows).cluster_centers_
        means /= np.linalg.norm(means, axis=1, keepdims=True).clip(1e-12)
        nearest = torch.from_numpy((rows @ means.T).argmax(axis=1))
    centres = torch.zeros(clusters, rows.shape[1])
    present = nearest.unique()
    centres[present] = torch.from_numpy(means).float()[present]
    return nearest, centres


def _derived(*parts: int) -> int:
    """Return a seed in the range of scikit-learn, for the first level or for one topic."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _sha256(tensors: dict[str, Tensor]) -> str:
    return sha256_tensors(tensors, lambda name, x: f"{name} {x.dtype} {list(x.shape)}\n")
