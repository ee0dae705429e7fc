"""TFUP-T: adapters trained on unlabelled images with pseudo-labels of TFUP (Long et al., arXiv 2404.16339).

A residual on the text classifier and a small network on image features are trained, first on images that TFUP is
confident of, then on all images with new pseudo-labels at every step. Official code: wlb12345/TFUP. The published code
keeps the epoch that is best on the test images; here it is the last one, or the best on validation images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.caches.tfup import TFUP, TFUPCacheSettings, marginal_loss
from vlprompt.caches.training import CacheRecipe, TrainingStep, orders
from vlprompt.config.effect import switched_off
from vlprompt.config.types import Count, Fraction, NonNegative, validated

_NAMES = ("text_residual", "image_down", "image_up")


@validated("settings.adaptation")
class Adaptation:
    """Settings of the adapters of TFUP-T; the defaults are the official ones.

    Attributes:
        text_ratio: Share of the residual in the text classifier.
        image_ratio: Share of the network's output in image features.
        warmup_epochs: Epochs on the images that TFUP is confident of; the others are on all images.
        warmup_fraction: Number of those images as a fraction of all, shared among the classes, at least 9 each (0.5 for
            VisDA and two domains of Office-31).
        confidence: Probability above which a pseudo-label of the second stage counts.
        marginal_weight: Weight of the term that spreads a batch over the classes.
        use_cache: Add the cache to the logits after training, too. The published results are without.
    """

    text_ratio: Fraction = 0.5
    image_ratio: Fraction = 0.2
    warmup_epochs: Count = 5
    warmup_fraction: NonNegative = 0.75
    confidence: Fraction = 0.9
    marginal_weight: NonNegative = 0.3
    use_cache: bool = False


@validated("settings")
class TFUPTrainedSettings(TFUPCacheSettings):
    """Settings of TFUP-T; the defaults are the official ones.

    Attributes:
        alpha: Weight of the cache.
        beta: Sharpness of the affinities.
        temperature: Factor of the cosines before the softmax that ranks and compares images.
        cache_shots: Images selected by each class; 0 follows the paper.
        training: Training of the adapters (a rate of 0.05 for Office-31); ``epochs`` counts both stages.
        adaptation: The adapters and the two stages.
    """

    training: CacheRecipe = CacheRecipe(
        epochs=30, batch_size=256, lr=0.012, eps=0.003, weight_decay=0.1, drop_last=True
    )
    adaptation: Adaptation = Adaptation()

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        off: dict[str, str] = {}
        if not min(self.adaptation.warmup_epochs, self.training.epochs):
            off |= switched_off("there are no warm-up epochs", "adaptation.warmup_fraction")
        if self.adaptation.warmup_epochs >= self.training.epochs:
            names = ("adaptation.confidence", "adaptation.marginal_weight")
            off |= switched_off("settings.adaptation.warmup_epochs covers all epochs", *names)
        return off


class TFUPTrained(TFUP):
    """``logits = scale f' W'^T``, with the text residual in W' and the image adapter in f'.

    ``W' = normalise(0.5 W + 0.5 R)`` of the raw text classifier, and ``f' = normalise(0.8 g + 0.2 A(g))`` of raw image
    features g, A two linear maps without bias, each followed by a ReLU, of width D / 4. Arguments are those of
    :class:`~vlprompt.caches.base.FeatureClassifier`; ``text_features`` are raw, and their length sets the effect of the
    residual.
    """

    Settings = TFUPTrainedSettings
    fitted = (*TFUP.fitted, *_NAMES)

    def build(self, text_features: Tensor) -> None:
        """Create the fitted buffers."""
        super().build(text_features)
        self._keep("raw_text", text_features)
        dim = text_features.shape[1]
        for name, shape in zip(_NAMES, ((0, dim), (0, dim), (dim, 0)), strict=True):
            self._keep(name, text_features.new_zeros(*shape))

    def fit(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        *,
        views: Tensor | None = None,
        val: tuple[Tensor, Tensor] | None = None,
        seed: int = 1,
    ) -> TFUPTrained:
        """Fill the cache, then train the adapters.

        Args:
            features: Raw features ``[U, D]`` of the test view of unlabelled images.
            labels: Ignored.
            views: Raw features ``[W, U, D]`` of random views: epoch e trains on view e mod W. The official code draws
                new views in every epoch, which W = epochs reproduces. Default: ``features``.
            val: Raw features ``[M, D]`` and labels ``[M]``. The adapters of the best epoch on them are kept. Default:
                those of the last epoch.
            seed: Seed of the initial adapters and of the order of the images.

        Raises:
            DataError: No images, or features of another size.
        """
        super().fit(features)
        views = features[None] if views is None or not len(views) else views
        count = max(9, int(self.settings.adaptation.warmup_fraction * len(features) / self.classes))
        rows = self.select(features, count).flatten()
        targets = super()._scored(features[rows]).argmax(dim=-1)
        self.begin(seed)
        warm = min(self.settings.adaptation.warmup_epochs, self.settings.training.epochs)
        order = orders(len(rows), warm, seed, 1), orders(len(features), self.settings.training.epochs - warm, seed, 2)
        best, kept = -1.0, {name: self.get_buffer(name) for name in _NAMES}
        for step in self.training_steps(features, views[:, rows], targets, views, *order):
            if not step.ends_epoch:
                continue
            accuracy = self.score(*val) if val is not None and len(val[1]) else float(step.epoch)
            if accuracy > best:
                best, kept = accuracy, {name: self.get_buffer(name) for name in _NAMES}
        self._set(**kept)
        return self

    def begin(self, seed: int) -> None:
        """Initialise the adapters: a residual of zero, and linear maps drawn as by PyTorch, from ``seed``."""
        dim = self.text.shape[1]
        hidden, generator = max(dim // 4, 1), torch.Generator().manual_seed(seed)
        down = (2 * torch.rand(hidden, dim, generator=generator) - 1) / dim**0.5
        up = (2 * torch.rand(dim, hidden, generator=generator) - 1) / hidden**0.5
        self._set(text_residual=torch.zeros(self.classes, dim), image_down=down, image_up=up)

    def adapted(self, features: Tensor, adapters: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return unit adapted features ``[B, D]`` of raw ``features`` ``[B, D]``, and the unit text classifier."""
        values = {name: self.get_buffer(name) for name in _NAMES} if adapters is None else adapters
        adaptation, raw = self.settings.adaptation, features.to(self.text)
        ratio, text_ratio = adaptation.image_ratio, adaptation.text_ratio
        change = F.relu(F.relu(raw @ values["image_down"].t()) @ values["image_up"].t())
        text = (1 - text_ratio) * self.get_buffer("raw_text") + text_ratio * values["text_residual"]
        return F.normalize(ratio * change + (1 - ratio) * raw, dim=-1), F.normalize(text, dim=-1)

    def adapter_logits(
        self, features: Tensor, adapters: Mapping[str, Tensor] | None = None, *, cache: bool = False
    ) -> Tensor:
        """Return logits ``[B, C]`` of raw ``features`` ``[B, D]`` by the adapters, with or without the cache."""
        unit, text = self.adapted(features, adapters)
        logits = self.get_buffer("logit_scale") * unit @ text.t()
        return self.combine(logits, self.affinity(unit, text)) if cache else logits

    def _scored(self, features: Tensor) -> Tensor:
        if not self.is_fitted:
            return self.zeroshot(self.unit(features))
        return self.adapter_logits(features, cache=self.settings.adaptation.use_cache)

    def training_steps(
        self,
        features: Tensor,
        warm_views: Tensor,
        warm_targets: Tensor,
        views: Tensor,
        warm_order: Sequence[Tensor],
        order: Sequence[Tensor],
    ) -> Iterator[TrainingStep]:
        """Train the adapters in place, step by step; yield a description of each step once it is done.

        The learning rate reaches zero after as many steps as all epochs would have on the warm-up images alone, and
        rises again after that, as in the published code.

        Args:
            features: Raw features ``[U, D]`` of the test views, the source of the pseudo-labels of the second stage.
            warm_views: Raw features ``[W, R, D]`` of views of the R warm-up images; epoch e uses view e mod W.
            warm_targets: Labels ``[R]`` of the warm-up images.
            views: Raw features ``[W, U, D]`` of views of all images.
            warm_order: The order ``[R]`` of the images in each epoch of the first stage.
            order: The order ``[U]`` of the images in each epoch of the second stage.
        """
        with torch.inference_mode(False), torch.enable_grad():
            adapters = {name: nn.Parameter(self.get_buffer(name).clone()) for name in _NAMES}
            period = (len(warm_order) + len(order)) * self.settings.training.batches(len(warm_targets))
            optimizer, schedule = self.settings.training.optimizer(list(adapters.values()), period)
        for epoch, rows in enumerate([*warm_order, *order]):
            warm = epoch < len(warm_order)
            source = warm_views if warm else views
            recipe = self.settings.training
            batches = rows.to(source.device).split(recipe.batch_size)[: recipe.batches(len(rows))]
            for number, batch in enumerate(batches, 1):
                targets = warm_targets[batch] if warm else self._confident(features[batch])
                with torch.inference_mode(False), torch.enable_grad():
                    logits = self.adapter_logits(source[epoch % len(source), batch].clone(), adapters)
                    terms = {"ce": self._cross_entropy(logits, targets.clone())}
                    if not warm:
                        terms["marginal"] = marginal_loss(logits)
                    weight = self.settings.adaptation.marginal_weight
                    loss = terms["ce"] if warm else terms["ce"] + weight * terms["marginal"]
                    optimizer.zero_grad()
                    loss.backward()
                    lr = float(optimizer.param_groups[0]["lr"])
                    optimizer.step()
                    schedule.step()
                self._set(**{name: parameter.data for name, parameter in adapters.items()})
                gradients = {name: p.grad for name, p in adapters.items() if p.grad is not None}
                values = {name: float(term.detach()) for name, term in terms.items()}
                ends, value = number == len(batches), float(loss.detach())
                yield TrainingStep(epoch, ends, lr, batch, targets, logits.detach(), value, gradients, values)

    @torch.no_grad()
    def _confident(self, features: Tensor) -> Tensor:
        """Return the pseudo-labels ``[B]`` of adapters and cache; -1 where they are not confident."""
        sure, labels = self.adapter_logits(features, cache=True).softmax(dim=-1).max(dim=-1)
        return labels.masked_fill(sure <= self.settings.adaptation.confidence, -1)

    @staticmethod
    def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over labelled images; zero, not NaN, where there are none."""
        total = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
        return total / (targets >= 0).sum().clamp(min=1)

    def for_classes(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return the fitted buffers for other classes: class i of them is class ``rows[i]`` of this classifier."""
        residual = self.get_buffer("text_residual")
        return super().for_classes(rows) | {"text_residual": residual[list(rows)] if len(residual) else residual}

    def misfits(self, state: Mapping[str, Tensor]) -> list[str]:
        """Return what in a ``state`` of fitted buffers contradicts itself or the classes, in words."""
        dim, filled = self.text.shape[1], len(state["labels"]) > 0
        hidden = len(state["image_down"])
        expected = {
            "text_residual": (self.classes if filled else 0, dim),
            "image_down": (hidden, dim),
            "image_up": (dim, hidden),
        }
        wrong = [
            f"{name}: shape {list(state[name].shape)}, expected {list(shape)}"
            for name, shape in expected.items()
            if tuple(state[name].shape) != shape
        ]
        return super().misfits(state) + wrong
