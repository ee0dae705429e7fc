"""Bi-level optimisation: differentiable gradient steps on a task, for any method.

Inner: ``theta' = theta - alpha psi(g)`` with ``g`` the gradient of the support loss at ``theta``. Outer: the query loss
at ``theta'``, with gradients for ``theta`` and the regulator. First order treats ``g`` as a constant; second order
differentiates through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlprompt.methods import PromptMethod

Tensors = dict[str, Tensor]
Order = Literal["first", "second"]
TaskLoss = Literal["infonce", "cross-entropy"]
Regulate = Callable[[str, Tensor], Tensor]


def adapted(
    loss: Callable[[Tensors], Tensor],
    start: Mapping[str, Tensor],
    rates: Mapping[str, float],
    *,
    steps: int = 1,
    order: Order = "first",
    regulate: Regulate | None = None,
) -> Tensors:
    """Return ``start`` after gradient steps on ``loss``, as a differentiable function of ``start`` and ``regulate``.

    Args:
        loss: Returns the support loss of tensors named as in ``start``.
        start: Tensors that require gradients.
        rates: The rate alpha of each tensor.
        steps: Number of steps; 0 returns ``start``.
        order: ``second`` differentiates through the gradients of the steps.
        regulate: Takes a tensor's name and gradient, returns the update direction; None: the gradient itself.
    """
    tensors = dict(start)
    for _ in range(steps):
        value = loss(tensors)
        # A parameter without influence on this loss does not change.
        gradients = torch.autograd.grad(
            value, list(tensors.values()), create_graph=order == "second", allow_unused=True
        )
        for (name, tensor), gradient in zip(list(tensors.items()), gradients, strict=True):
            if gradient is not None:
                direction = gradient if regulate is None else regulate(name, gradient)
                tensors[name] = tensor - rates[name] * direction
    return tensors


class _LossOf(nn.Module):
    """Wrapper that computes a method's loss, so ``torch.func.functional_call`` can replace its trainable parameters."""

    def __init__(self, method: PromptMethod, kind: TaskLoss) -> None:
        super().__init__()
        self.method, self.kind = method, kind

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        step = self.method.step(inputs, labels)
        total = torch.stack(list(self.method.step_losses(step).values())).sum()
        if self.kind == "infonce":
            # The image-to-text half is the method's cross-entropy, with captions as classes.
            to_text = F.cross_entropy(step.logits, labels)
            to_image = F.cross_entropy(step.logits.t(), labels)
            total = total + (to_image - to_text) / 2
        return total


def task_loss(
    method: PromptMethod, tensors: Mapping[str, Tensor], inputs: Tensor, labels: Tensor, kind: TaskLoss
) -> Tensor:
    """Return the loss of ``method`` on a batch, with ``tensors`` in place of its trainable parameters.

    Args:
        method: Any method, created for the task's classes.
        tensors: Trainable parameters by name.
        inputs: Images ``[B, 3, H, W]`` or raw features ``[B, D]``.
        labels: ``[B]``.
        kind: ``cross-entropy``: the method's loss terms. ``infonce``: the same, but the cross-entropy is the mean of
            both directions over the ``B x B`` logits, where image ``i`` belongs to class ``i``. The temperature is the
            backbone's, 1/100 in OpenAI's weights.
    """
    replaced = {f"method.{name}": tensor for name, tensor in tensors.items()}
    loss: Tensor = torch.func.functional_call(_LossOf(method, kind), replaced, (inputs, labels))
    return loss


def inner_rates(method: PromptMethod, rate: float) -> dict[str, float]:
    """Return the inner rate of each trainable parameter, with the method's factors (lower for MoCoOp's layer norms)."""
    rate_of = {id(parameter): group["lr"] for group in method.parameter_groups(rate) for parameter in group["params"]}
    return {name: rate_of.get(id(parameter), 0.0) for name, parameter in method.trainable_parameters()}


@contextmanager
def differentiable(order: Order) -> Iterator[None]:
    """Use attention kernels that support second derivatives if ``order`` is ``second``; fused kernels do not."""
    with sdpa_kernel(SDPBackend.MATH) if order == "second" else nullcontext():
        yield
