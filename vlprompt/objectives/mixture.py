"""Loss terms of mixtures of prompts: text-level supervision of experts and supervision of the router."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROUTING_BOOST = 10.0
"""Added to the best affinities before the routing target's softmax (MoCoOp: prompting/moe.py 110-127)."""


def text_to_text_loss(expert_text_features: Tensor, prototypes: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the mean cross-entropy of each expert's class features against its group's prototypes.

    MoCoOp's grouped text supervision (seed_methods 1.b), after LASP's text-to-text loss.

    Args:
        expert_text_features: ``[G, C, D]`` features of the learned prompts, unit length.
        prototypes: ``[G, C, D]`` features of the hand-written templates, unit length; class c's is the target of row c.
        temperature: Factor on the cosines: 1 in MoCoOp's official code, exp(logit scale) in LASP.
    """
    cosines = temperature * expert_text_features @ prototypes.transpose(1, 2)  # [G, C, C]
    target = torch.arange(cosines.shape[1], device=cosines.device).expand(len(cosines), -1)
    return F.cross_entropy(cosines.flatten(0, 1), target.flatten())


def routing_target(affinity: Tensor, top_k: int) -> Tensor:
    """Return soft routing targets ``[B, G]``: softmax of ``affinity`` with the ``top_k`` largest raised by ten.

    Args:
        affinity: ``[B, G]`` cosines between each image and its label's prototype in each group. The target is not
            detached, so image-side learnables are reached through it, as in the official code.
        top_k: How many experts an image is sent to.
    """
    best = affinity.topk(top_k, dim=-1).indices
    return (affinity + torch.zeros_like(affinity).scatter(-1, best, ROUTING_BOOST)).softmax(dim=-1)


def routing_loss(routing_logits: Tensor, target: Tensor) -> Tensor:
    """Return the soft cross-entropy of routing logits ``[B, G]`` over all experts with ``target`` ``[B, G]``."""
    return F.cross_entropy(routing_logits, target)
