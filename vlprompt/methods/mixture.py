"""What methods share whose class weights are a router's mixture of experts' prompts, another one for every image."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt._dist import sum_over_processes
from vlprompt.backbone import TokenLayout
from vlprompt.methods.base import PromptMethod
from vlprompt.prompts import ExpertContexts


class PromptMixture(PromptMethod):
    """G experts and a router: a subclass creates them, and its settings have ``top_k`` and ``drop_unused_experts``.

    ``experts`` holds the contexts, ``gate`` maps unit image features ``[B, D]`` to routing logits ``[B, G]``, ``w``
    ``[1, D]`` (or None) is added to all text features. ``layout`` has the experts' prompts, ``virtual_layout`` those of
    all classes of the data set, where they differ.
    """

    text_features_per = "expert"
    settings: Any
    experts: ExpertContexts
    gate: nn.Linear
    w: nn.Parameter | None
    layout: TokenLayout
    virtual_layout: TokenLayout

    def expert_text_features(self, used: Tensor | None = None, *, virtual: bool = False) -> Tensor:
        """Return unit text features ``[G, C, D]`` of the experts' prompts, ``w`` added before normalisation.

        Args:
            used: ``[G]`` booleans: experts left out are not encoded and get zero features; None: all are encoded.
            virtual: Take all classes of the data set, in prompts that end in a period.
        """
        layout = self.virtual_layout if virtual else self.layout
        if used is None or bool(used.all()):
            return self.once(f"virtual {virtual}", lambda: self._encode(layout, self.experts.vectors()))
        chosen = used.nonzero().squeeze(1)
        # Chosen by index, so that experts left out still get a gradient, of zero.
        some = self._encode(layout.select_groups(chosen.tolist()), self.experts.vectors().index_select(0, chosen))
        return some.new_zeros(len(used), *some.shape[1:]).index_copy(0, chosen, some)

    def _encode(self, layout: TokenLayout, vectors: Tensor) -> Tensor:
        features = self.encode_text(layout, vectors)
        return self.unit_text(features if self.w is None else features + self.w)

    def route(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Return routing logits and gates, both ``[B, G]``: gates are a softmax over the top experts, else zero."""
        logits = self.gate(unit)
        top, chosen = logits.topk(self.settings.top_k, dim=-1)
        return logits, torch.zeros_like(logits).scatter(-1, chosen, top.softmax(dim=-1).to(logits.dtype))

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the mixtures ``[B, C, D]`` of raw image ``features`` ``[B, D]``: the exact classifier of each image.

        Without features, return ``[C, D]``: the mean expert, an approximation for code that takes one matrix only; a
        warning says so. Mixtures are sums of unit vectors and are not normalised again (official code).
        """
        if features is None:
            warnings.warn(
                "a mixture of prompts has class weights per image; text_features(features) gives them exactly "
                "[B, C, D], this [C, D] is the mean of the experts",
                stacklevel=2,
            )
            return F.normalize(self.expert_text_features().mean(dim=0), dim=-1)
        gates = self.route(self.unit_image(features))[1]
        return torch.einsum("bg,gcd->bcd", gates, self.expert_text_features())

    def logits(self, features: Tensor) -> Tensor:
        """Return ``[B, C]``: the gate-weighted sum of the experts' logits for raw ``features`` ``[B, D]``."""
        unit = self.unit_image(features)
        return self._mix(unit, self.route(unit)[1], self.expert_text_features())

    def _mix(self, unit: Tensor, gates: Tensor, expert_text_features: Tensor) -> Tensor:
        # <v, sum_g a_g t_gc> = sum_g a_g <v, t_gc>: no [B, C, D] mixture is formed.
        cosines = torch.einsum("bd,gcd->bgc", unit, expert_text_features)
        return self.backbone.logit_scale * torch.einsum("bg,bgc->bc", gates, cosines)

    # -- training -----------------------------------------------------------------------------------------------
    def training_text_features(self, unit_image: Tensor, features: Tensor) -> Tensor:
        """Return the experts' unit features ``[G, C, D]``; zero for experts that are left out."""
        return self.expert_text_features(self._used(self.route(unit_image)[1]))

    def training_logits(self, unit_image: Tensor, weights: Tensor) -> Tensor:
        """Return the mixed logits ``[B, C]``."""
        return self._mix(unit_image, self.route(unit_image)[1], weights)

    def _used(self, gates: Tensor) -> Tensor | None:
        return _by_any_process((gates > 0).any(dim=0)) if self.settings.drop_unused_experts else None


def _by_any_process(used: Tensor) -> Tensor:
    """Return ``used`` ``[G]`` over the whole batch, which several processes may share."""
    return sum_over_processes(used.int()) > 0
