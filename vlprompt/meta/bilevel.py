"""Learning to learn: gradient steps on a task that stay differentiable, for any method (seed_methods 3.a).

Inner: ``theta' = theta - alpha psi(g)`` with ``g`` the gradient of the support loss at ``theta``. Outer: the query loss
at ``theta'``, whose gradient reaches ``theta`` and the regulator. First order takes ``g`` for a constant; second order
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
    """Return ``start`` after gradient steps on ``loss``, as a function of ``start`` and of what ``regulate`` learns.

    Args:
        loss: The support loss of tensors named as in ``start``.
        start: Tensors that require gradients.
        rates: The rate alpha of each.
        steps: Number of steps; 0 returns ``start``.
        order: Whether the result is differentiated through the steps' gradients.
        regulate: From a tensor's name and gradient to the direction taken; None: the gradient itself.
    """
    tensors = dict(start)
    for _ in range(steps):
        value = loss(tensors)
        # A learnable that this loss does not reach stays as it is.
        gradients = torch.autograd.grad(
            value, list(tensors.values()), create_graph=order == "second", allow_unused=True
        )
        for (name, tensor), gradient in zip(list(tensors.items()), gradients, strict=True):
            if gradient is not None:
                direction = gradient if regulate is None else regulate(name, gradient)
                tensors[name] = tensor - rates[name] * direction
    return tensors


class _LossOf(nn.Module):
    """A method whose call is its loss, so that ``torch.func.functional_call`` can replace the learnables."""

    def __init__(self, method: PromptMethod, kind: TaskLoss) -> None:
        super().__init__()
        self.method, self.kind = method, kind

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        step = self.method.step(inputs, labels)
        total = torch.stack(list(self.method.step_losses(step).values())).sum()
        if self.kind == "infonce":
            # The image-to-text half is the method's own cross-entropy, over captions as classes.
            to_text = F.cross_entropy(step.logits, labels)
            to_image = F.cross_entropy(step.logits.t(), labels)
            total = total + (to_image - to_text) / 2
        return total


def task_loss(
    method: PromptMethod, tensors: Mapping[str, Tensor], inputs: Tensor, labels: Tensor, kind: TaskLoss
) -> Tensor:
    """Return the loss of ``method`` on a batch, with ``tensors`` in the place of its learnables.

    Args:
        method: Any method, made for the task's classes.
        tensors: Learnables by name.
        inputs: Images ``[B, 3, H, W]`` or raw features ``[B, D]``.
        labels: ``[B]``.
        kind: ``cross-entropy``: the method's own loss terms. ``infonce``: the same with the cross-entropy replaced by
            the mean of both directions over the ``B x B`` logits, image ``i`` belonging to class ``i``
            (the temperature is the backbone's own, 1/100 in OpenAI's weights).
    """
    replaced = {f"method.{name}": tensor for name, tensor in tensors.items()}
    loss: Tensor = torch.func.functional_call(_LossOf(method, kind), replaced, (inputs, labels))
    return loss


def inner_rates(method: PromptMethod, rate: float) -> dict[str, float]:
    """Return the inner rate of each learnable, with the method's own factors (MoCoOp's layer norms learn slower)."""
    of = {id(parameter): group["lr"] for group in method.parameter_groups(rate) for parameter in group["params"]}
    return {name: of.get(id(parameter), 0.0) for name, parameter in method.trainable_parameters()}


@contextmanager
def differentiable(order: Order) -> Iterator[None]:
    """Choose attention kernels that can be differentiated twice, where that is needed: fused ones cannot."""
    with sdpa_kernel(SDPBackend.MATH) if order == "second" else nullcontext():
        yield
