"""Gradient regulators: small networks that turn the gradient of a prompt into the direction that is taken instead.

GRAM (arXiv 2303.06571) learns such a function together with a prompt initialisation; its form is not published. These
are the two of our reconstruction (seed_methods 3.b): ``rescale-gate`` after SUPMER's ``grad_trans``, ``sigmoid-gate``
after ProMetaR. Both leave a zero gradient zero, and start near the identity.
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
    """What the paper leaves open about the regulating function.

    Attributes:
        kind: Its form: ``rescale-gate`` or ``sigmoid-gate``.
        sharing: One regulator for each prompt tensor (so one per modality and layer), or one for all tensors of a
            shape; ``rescale-gate`` works row by row and shares among all tensors of a width.
        rank: k, the bottleneck of a ``rescale-gate``'s two layers.
        bottleneck: Hidden units of a ``sigmoid-gate``.
        gate_bias: Logit that all gates start from; 4 lets 98 % of the raw gradient through, infinity all of it.
    """

    kind: Kind = "rescale-gate"
    sharing: Sharing = "tensor"
    rank: int = 64
    bottleneck: int = 8
    gate_bias: float = 4.0


class RescaleGate(nn.Module):
    """``psi(g) = (1 - c) ghat + c g`` on every row ``g`` ``[W]`` of a prompt's gradient (seed_methods 3.b, 3.c).

    ``h`` is ``g`` after two layers ``ReLU(B A g + b)``, with ``A`` ``[k, W]`` and ``B`` ``[W, k]``; ``ghat`` is ``h``
    at the length of ``g``; the gate ``c = sigmoid(w2 ReLU(w1 e + b1) + b2)`` looks at the task's mean feature ``e``.

    Args:
        width: W.
        embed_dim: D, of the task's feature.
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
        """Return c, a scalar in 0..1: how much of the raw gradient passes, for a task's mean feature ``[D]``."""
        return self.gate(self.hidden(feature).relu()).sigmoid().squeeze(-1)  # type: ignore[no-any-return]

    def rescaled(self, gradient: Tensor) -> Tensor:
        """Return ``ghat``, of the shape and row lengths of ``gradient`` ``[..., W]``."""
        h = gradient
        for down, up, bias in zip(self.down, self.up, self.bias, strict=True):
            h = ((h @ down.t()) @ up.t() + bias).relu()
        return h * (_length(gradient) / (_length(h) + TINY))

    def forward(self, gradient: Tensor, feature: Tensor) -> Tensor:
        """Return the regulated gradient, of the shape of ``gradient`` ``[..., W]``; ``feature`` is ``[D]``."""
        c = self.openness(feature)
        return (1 - c) * self.rescaled(gradient) + c * gradient


def _length(rows: Tensor) -> Tensor:
    # The root's slope at a zero row would be infinite, and infinity times zero no number.
    square = rows.square().sum(dim=-1, keepdim=True)
    return torch.where(square > 0, square, torch.ones_like(square)).sqrt() * (square > 0)


class SigmoidGate(nn.Module):
    """``psi(g) = g * sigmoid(U2 U1 vec(g) + b)``, bias-free but for the fixed ``b`` (seed_methods 3.b).

    ``U2`` starts at zero, so that every entry starts with the same share.

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
        """Return the regulated gradient; the task's ``feature`` plays no part."""
        return gradient * self.shares(gradient)


class Regulator(nn.Module):
    """A regulator for every prompt tensor of a method.

    Args:
        shapes: Shape of each prompt tensor by its name (:meth:`vlprompt.methods.PromptMethod.prompt_tensors`).
        embed_dim: D, of a task's feature.
        settings: Form and sizes.

    Raises:
        ConfigError: There are no prompts.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], embed_dim: int, settings: RegulatorSettings) -> None:
        super().__init__()
        if not shapes:
            raise ConfigError("there are no prompts whose gradients could be regulated; leave the regulator away")
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
            return name.replace(".", "-")  # a module's name holds no dots
        shape = self.shapes[name]
        return "x".join(map(str, shape[-1:] if self.settings.kind == "rescale-gate" else shape))

    def forward(self, name: str, gradient: Tensor, feature: Tensor) -> Tensor:
        """Return the regulated gradient of the tensor ``name``; of one that is no prompt, the gradient itself.

        Args:
            name: The tensor's name in its method.
            gradient: Its gradient, of any shape that was announced.
            feature: ``[D]``, the mean unit image feature of the task.
        """
        if name not in self.shapes:
            return gradient
        regulated: Tensor = self.gates[self._key(name)](gradient, feature.to(gradient.dtype))
        return regulated
