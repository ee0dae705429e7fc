"""Gradient regulators: small networks that map the gradient of a prompt to an update direction.

GRAM (arXiv 2303.06571) learns such a function together with a prompt initialisation; its form is not published. This
reconstruction has two forms: ``rescale-gate`` after SUPMER's ``grad_trans``, and ``sigmoid-gate`` after ProMetaR. Both
map a zero gradient to zero and are close to the identity at initialisation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vlprompt.errors import ConfigError

Kind = Literal["rescale-gate", "sigmoid-gate"]
Sharing = Literal["tensor", "shape"]
GATE_HIDDEN = 24
"""Hidden units of the gate's network (SUPMER: model/grad_trans.py)."""
TINY = 1e-8


@dataclass(frozen=True)
class RegulatorSettings:
    """Settings of the regulating function, which the paper does not specify.

    Attributes:
        kind: Form of the function: ``rescale-gate`` or ``sigmoid-gate``.
        sharing: ``tensor``: one regulator per prompt tensor, so one per modality and layer. ``shape``: one for all
            tensors of a shape; ``rescale-gate`` acts on rows, so all tensors of a width share one.
        rank: k, the bottleneck of the two layers of a ``rescale-gate``.
        bottleneck: Hidden units of a ``sigmoid-gate``.
        gate_bias: Initial logit of all gates; 4 passes 98 % of the raw gradient, infinity all of it.
    """

    kind: Kind = "rescale-gate"
    sharing: Sharing = "tensor"
    rank: int = 64
    bottleneck: int = 8
    gate_bias: float = 4.0


class RescaleGate(nn.Module):
    """``psi(g) = (1 - c) ghat + c g`` for every row ``g`` ``[W]`` of a prompt's gradient.

    ``h`` is ``g`` after two layers ``ReLU(B A g + b)``, with ``A`` ``[k, W]`` and ``B`` ``[W, k]``. ``ghat`` is ``h``
    rescaled to the length of ``g``. The gate ``c = sigmoid(w2 ReLU(w1 e + b1) + b2)`` depends on the task's mean
    feature ``e``.

    Args:
        width: W.
        embed_dim: D, the size of the task's feature.
        settings: Rank and gate bias.
    """

    def __init__(self, width: int, embed_dim: int, settings: RegulatorSettings) -> None:
        super().__init__()
        rank = settings.rank
        self.down = nn.ParameterList([nn.Parameter(torch.randn(rank, width)) for _ in range(2)])
        self.up = nn.ParameterList([nn.Parameter(torch.randn(width, rank)) for _ in range(2)])
        self.bias = nn.ParameterList([nn.Parameter(torch.zeros(width)) for _ in range(2)])
        self.hidden = nn.Linear(embed_dim, GATE_HIDDEN)
        self.gate = nn.Linear(GATE_HIDDEN, 1)
        nn.init.constant_(self.gate.bias, settings.gate_bias)

    def openness(self, feature: Tensor) -> Tensor:
        """Return c, a scalar in 0..1: the share of the raw gradient that passes, for a task's mean feature ``[D]``."""
        return self.gate(self.hidden(feature).relu()).sigmoid().squeeze(-1)  # type: ignore[no-any-return]

    def rescaled(self, gradient: Tensor) -> Tensor:
        """Return ``ghat``, with the shape and row lengths of ``gradient`` ``[..., W]``."""
        h = gradient
        for down, up, bias in zip(self.down, self.up, self.bias, strict=True):
            h = ((h @ down.t()) @ up.t() + bias).relu()
        return h * (_length(gradient) / (_length(h) + TINY))

    def forward(self, gradient: Tensor, feature: Tensor) -> Tensor:
        """Return the regulated gradient ``[..., W]`` for the task's mean feature ``[D]``."""
        c = self.openness(feature)
        return (1 - c) * self.rescaled(gradient) + c * gradient


def _length(rows: Tensor) -> Tensor:
    # At a zero row the derivative of the root is infinite, and infinity times zero is NaN.
    square = rows.square().sum(dim=-1, keepdim=True)
    return torch.where(square > 0, square, torch.ones_like(square)).sqrt() * (square > 0)


class SigmoidGate(nn.Module):
    """``psi(g) = g * sigmoid(U2 U1 vec(g) + b)`` with a fixed ``b`` and no other bias.

    ``U2`` is initialised to zero, so all entries start with the same share.

    Args:
        shape: Shape of the prompt tensor.
        settings: Bottleneck and gate bias.
    """

    def __init__(self, shape: Sequence[int], settings: RegulatorSettings) -> None:
        super().__init__()
        numbers = math.prod(shape)
        self.down = nn.Linear(numbers, settings.bottleneck, bias=False)
        self.up = nn.Linear(settings.bottleneck, numbers, bias=False)
        nn.init.zeros_(self.up.weight)
        self.offset = settings.gate_bias

    def shares(self, gradient: Tensor) -> Tensor:
        """Return the share in 0..1 of every entry of ``gradient`` that passes."""
        return (self.up(self.down(gradient.flatten())) + self.offset).sigmoid().view_as(gradient)  # type: ignore[no-any-return]

    def forward(self, gradient: Tensor, feature: Tensor) -> Tensor:
        """Return the regulated gradient; the task's ``feature`` is not used."""
        return gradient * self.shares(gradient)


class Regulator(nn.Module):
    """A regulator for every prompt tensor of a method.

    Args:
        shapes: Shape of each prompt tensor by its name (:meth:`vlprompt.methods.PromptMethod.prompt_tensors`).
        embed_dim: D, the size of a task's feature.
        settings: Form and sizes.

    Raises:
        ConfigError: There are no prompts.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], embed_dim: int, settings: RegulatorSettings) -> None:
        super().__init__()
        if not shapes:
            raise ConfigError("there are no prompts whose gradients can be regulated; omit the regulator")
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.settings, self.embed_dim = settings, embed_dim
        self.gates = nn.ModuleDict()
        for name, shape in self.shapes.items():
            key = self._key(name)
            if key not in self.gates:
                rescales = settings.kind == "rescale-gate"
                self.gates[key] = (
                    RescaleGate(shape[-1], embed_dim, settings) if rescales else SigmoidGate(shape, settings)
                )

    def _key(self, name: str) -> str:
        if self.settings.sharing == "tensor":
            return name.replace(".", "-")  # module names must not contain dots
        shape = self.shapes[name]
        return "x".join(map(str, shape[-1:] if self.settings.kind == "rescale-gate" else shape))

    def forward(self, name: str, gradient: Tensor, feature: Tensor) -> Tensor:
        """Return the regulated gradient of the tensor ``name``; the gradient itself if the tensor is not a prompt.

        Args:
            name: The tensor's name in its method.
            gradient: Gradient of the tensor, with the shape given for it.
            feature: ``[D]``, the mean unit image feature of the task.
        """
        if name not in self.shapes:
            return gradient
        regulated: Tensor = self.gates[self._key(name)](gradient, feature.to(gradient.dtype))
        return regulated
