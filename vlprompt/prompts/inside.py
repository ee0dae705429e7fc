"""Learnables inside a tower's blocks: low-rank updates of the attention's projections, and masks over its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.backbone.added import PARTS, Added, Update
from vlprompt.errors import HeadError
from vlprompt.prompts.draws import Draws

_NAMES = dict(zip(PARTS, ("q_proj", "k_proj", "v_proj", "out_proj"), strict=True))


def plant(root: nn.Module, path: str, leaf: nn.Module) -> None:
    """Put ``leaf`` at the dotted ``path`` under ``root``, so that its tensors are named as in the tower's model."""
    *between, last = path.split(".")
    for name in between:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(last, leaf)


class _Update(nn.Module):
    """One update ``scale * B A x``: ``lora_A`` ``[r, W]``, uniform within 1 / sqrt(W), and ``lora_B`` ``[W, r]``, 0."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.Linear(width, rank, bias=False)
        self.lora_B = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.lora_B.weight)


class LowRank(nn.Module):
    """Low-rank updates of attention projections (CLIP-LoRA: loralib/layers.py).

    ``y = W x + b + scale * B A dropout(x)``, two thin products; B A itself is made for :meth:`merged` alone. Tensors
    are named as PEFT names them under a model in open_clip's form, with projections told apart as in CLIP-LoRA:
    ``model.visual.transformer.resblocks.0.attn.q_proj.lora_A.weight``.

    Args:
        rank: r.
        scale: Factor of the updates.
        dropout: Part of the update's input that a training step leaves out, drawn for each projection by itself.
    """

    def __init__(self, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.rank, self.scale, self.dropout = rank, scale, dropout
        self.model = nn.Module()
        self.draws = Draws()
        self._places: dict[str, list[tuple[int, str]]] = {}
        self._drops = False

    def add(self, prefix: str, width: int, layers: Sequence[int], parts: Sequence[str]) -> None:
        """Create the updates of one tower.

        Args:
            prefix: What stands before ``transformer`` in the model's names: "visual." or "".
            width: W.
            layers: Which layers have updates.
            parts: Which of q, k, v and o.
        """
        self._places[prefix] = [(layer, part) for layer in layers for part in parts]
        for layer, part in self._places[prefix]:
            plant(self.model, self._path(prefix, layer, part), _Update(width, self.rank))

    @staticmethod
    def _path(prefix: str, layer: int, part: str) -> str:
        return f"{prefix}transformer.resblocks.{layer}.attn.{_NAMES[part]}"

    def _owner(self, prefix: str, layer: int, part: str) -> Any:
        return self.model.get_submodule(self._path(prefix, layer, part))

    @contextmanager
    def dropping(self, device: torch.device) -> Iterator[None]:
        """Drop inputs of what is encoded inside, a training step; scores never drop."""
        with self.draws.step(device):
            self._drops = True
            try:
                yield
            finally:
                self._drops = False

    def added(self, prefix: str) -> Added:
        """Return the updates of a tower as it takes them."""
        places = self._places.get(prefix, [])
        return Added({place: self._update(self._owner(prefix, *place)) for place in places})

    def _update(self, own: Any) -> Update:
        # Bound here: the backward pass may encode a piece of text again when the step is over.
        rate = self.dropout if self._drops else 0.0

        def update(x: Tensor) -> Tensor:
            x = F.dropout(x.to(own.lora_A.weight.dtype), rate, training=rate > 0)
            result: Tensor = own.lora_B(own.lora_A(x)) * self.scale
            return result

        return update

    def merged(self, prefix: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tower's attention weights with the updates in them, by their names inside the tower.

        Args:
            prefix: Which tower.
            parameters: Its frozen parameters, by name.
        """
        found: dict[str, Tensor] = {}
        for layer, part in self._places.get(prefix, []):
            name = f"transformer.resblocks.{layer}.attn." + ("out_proj.weight" if part == "o" else "in_proj_weight")
            weight = found.setdefault(name, parameters[name].detach().float().clone())
            own, width = self._owner(prefix, layer, part), weight.shape[1]
            start = 0 if part == "o" else "qkv".index(part) * width
            product = own.lora_B.weight.detach() @ own.lora_A.weight.detach()
            weight[start : start + width] += self.scale * product
        return found


class _Masked(torch.autograd.Function):
    """``weight`` where ``scores`` exceed the threshold, else 0; the gradient of a score is that of the weight times it.

    The straight-through estimator of R-AMT (code/modules/masklayers.py 20-24). Only the frozen weight is kept for the
    backward pass, which it is anyway.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, weight: Tensor, threshold: float) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.where(scores > threshold, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return (gradients[0] * weight).float(), None, None


def masked(weight: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Return ``weight`` where ``scores`` exceed ``threshold``, else 0, straight through to the scores."""
    result: Tensor = _Masked.apply(scores, weight, threshold)
    return result


class Masks(nn.Module):
    """Scores over frozen weights, of which those above a threshold let their weight through.

    Scores are named as the weights: ``visual.transformer.resblocks.0.attn.in_proj_weight.scores``.

    Args:
        initial: Every score's start.
        threshold: What a score has to exceed; one that equals it masks its weight out.
    """

    def __init__(self, initial: float, threshold: float) -> None:
        super().__init__()
        self.initial, self.threshold = initial, threshold
        self._weights: dict[str, list[str]] = {}

    def add(self, prefix: str, weights: Mapping[str, Tensor]) -> None:
        """Create the scores of one tower's ``weights``; ``prefix`` tells towers apart, such as "visual."."""
        self._weights[prefix] = list(weights)
        for name, weight in weights.items():
            leaf = nn.Module()
            leaf.register_parameter("scores", nn.Parameter(torch.full_like(weight, self.initial, dtype=torch.float32)))
            plant(self, prefix + name, leaf)

    def scores(self, prefix: str) -> dict[str, nn.Parameter]:
        """Return one tower's scores by the name of their weight inside it."""
        return {name: self.get_parameter(f"{prefix}{name}.scores") for name in self._weights.get(prefix, [])}

    def overrides(self, prefix: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return one tower's masked weights by name, of its frozen ``parameters``."""
        return {name: masked(parameters[name], own, self.threshold) for name, own in self.scores(prefix).items()}

    def packed_state(self, prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``state`` with every tensor of scores as its bits; ``prefix`` stands before the scores' names."""
        own = {prefix + name for name, _ in self.named_parameters()}
        return {name: pack(value > self.threshold) if name in own else value for name, value in state.items()}

    def unpacked_state(self, prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a ``state`` of :meth:`packed_state` with scores: the initial one where a bit is set, 0 elsewhere.

        Raises:
            HeadError: Tensors that are not the bits of these scores.
        """
        found = dict(state)
        for name, own in self.named_parameters():
            bits = state.get(prefix + name)
            if bits is None:
                continue  # whoever loads the state names what is missing
            expected = -(-own.numel() // 8)
            if bits.dtype != torch.uint8 or list(bits.shape) != [expected]:
                raise HeadError(f"{prefix}{name}: {bits.dtype}, shape {list(bits.shape)}, expected uint8, [{expected}]")
            found[prefix + name] = unpack(bits, own.shape) * self.initial
        return found


def pack(through: Tensor) -> Tensor:
    """Return a boolean tensor of n entries as bits, uint8 ``[ceil(n / 8)]``; the first entry is the lowest bit."""
    flat = through.flatten().to(torch.uint8)
    places = 2 ** torch.arange(8, device=flat.device)
    return (F.pad(flat, (0, -len(flat) % 8)).reshape(-1, 8) * places).sum(dim=1).to(torch.uint8)


def unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    """Return the zeros and ones of ``shape``, float32, that :func:`pack` made ``bits`` of."""
    places = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    through = bits[:, None].bitwise_and(places).bool()
    return through.flatten()[: shape.numel()].reshape(shape).float()
