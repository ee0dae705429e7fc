"""Trainable parameters inside a tower's blocks: low-rank updates of attention projections, and masks of weights."""

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
    """Add ``leaf`` at the dotted ``path`` under ``root``: its tensors get the names of the tower's model."""
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

    ``y = W x + b + scale * B A dropout(x)``, computed as two thin products; only :meth:`merged` computes B A. Tensors
    have PEFT's names on a model of open_clip, with separate projections as in CLIP-LoRA:
    ``model.visual.transformer.resblocks.0.attn.q_proj.lora_A.weight``.

    Args:
        rank: r.
        scale: Factor of the updates.
        dropout: Fraction of the update's input that a training step drops, drawn for each projection separately.
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
            prefix: Prefix of ``transformer`` in the model's names: "visual." or "".
            width: W.
            layers: Layers with updates.
            parts: Projections with updates, of q, k, v and o.
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
        """Apply dropout to the updates inside the context, for one training step; scoring has no dropout."""
        with self.draws.step(device):
            self._drops = True
            try:
                yield
            finally:
                self._drops = False

    def added(self, prefix: str) -> Added:
        """Return the updates of a tower, in the form of its ``added`` argument."""
        places = self._places.get(prefix, [])
        return Added({place: self._update(self._owner(prefix, *place)) for place in places})

    def _update(self, own: Any) -> Update:
        # The rate is bound here: the backward pass may encode text again after the step.
        rate = self.dropout if self._drops else 0.0

        def update(x: Tensor) -> Tensor:
            x = F.dropout(x.to(own.lora_A.weight.dtype), rate, training=rate > 0)
            result: Tensor = own.lora_B(own.lora_A(x)) * self.scale
            return result

        return update

    def merged(self, prefix: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tower's attention weights with the updates merged, by their names in the tower.

        Args:
            prefix: Prefix of the tower.
            parameters: Its frozen parameters, by name.
        """
        merged: dict[str, Tensor] = {}
        for layer, part in self._places.get(prefix, []):
            name = f"transformer.resblocks.{layer}.attn." + ("out_proj.weight" if part == "o" else "in_proj_weight")
            weight = merged.setdefault(name, parameters[name].detach().float().clone())
            lora, width = self._owner(prefix, layer, part), weight.shape[1]
            start = 0 if part == "o" else "qkv".index(part) * width
            product = lora.lora_B.weight.detach() @ lora.lora_A.weight.detach()
            weight[start : start + width] += self.scale * product
        return merged


class _Masked(torch.autograd.Function):
    """``weight`` where ``scores`` exceed the threshold, else 0; a score's gradient is the weight's times the weight.

    The straight-through estimator of R-AMT (code/modules/masklayers.py 20-24). Only the frozen weight is saved for the
    backward pass.
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
    """Return ``weight`` where ``scores`` exceed ``threshold``, else 0, with straight-through gradients."""
    result: Tensor = _Masked.apply(scores, weight, threshold)
    return result


class Masks(nn.Module):
    """Binary masks of frozen weights: a weight is used if its score exceeds a threshold.

    Scores have the names of the weights: ``visual.transformer.resblocks.0.attn.in_proj_weight.scores``.

    Args:
        initial: Initial value of all scores.
        threshold: A weight is used if its score is above this value.
    """

    def __init__(self, initial: float, threshold: float) -> None:
        super().__init__()
        self.initial, self.threshold = initial, threshold
        self._weights: dict[str, list[str]] = {}

    def add(self, prefix: str, weights: Mapping[str, Tensor]) -> None:
        """Create the scores of a tower's ``weights``; ``prefix`` identifies the tower, such as "visual."."""
        self._weights[prefix] = list(weights)
        for name, weight in weights.items():
            leaf = nn.Module()
            leaf.register_parameter("scores", nn.Parameter(torch.full_like(weight, self.initial, dtype=torch.float32)))
            plant(self, prefix + name, leaf)

    def scores(self, prefix: str) -> dict[str, nn.Parameter]:
        """Return a tower's scores by the names of the weights in the tower."""
        return {name: self.get_parameter(f"{prefix}{name}.scores") for name in self._weights.get(prefix, [])}

    def overrides(self, prefix: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a tower's masked weights by name, from its frozen ``parameters``."""
        return {name: masked(parameters[name], scores, self.threshold) for name, scores in self.scores(prefix).items()}

    def packed_state(self, prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``state`` with every tensor of scores packed to bits; ``prefix`` precedes the names of the scores."""
        score_names = {prefix + name for name, _ in self.named_parameters()}
        return {name: pack(value > self.threshold) if name in score_names else value for name, value in state.items()}

    def unpacked_state(self, prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a ``state`` of :meth:`packed_state` with scores: the initial value where a bit is set, 0 elsewhere.

        Raises:
            HeadError: A tensor does not have the form of packed scores.
        """
        unpacked = dict(state)
        for name, scores in self.named_parameters():
            bits = state.get(prefix + name)
            if bits is None:
                continue  # missing names are reported when the state is loaded
            expected = -(-scores.numel() // 8)
            if bits.dtype != torch.uint8 or list(bits.shape) != [expected]:
                raise HeadError(f"{prefix}{name}: {bits.dtype}, shape {list(bits.shape)}, expected uint8, [{expected}]")
            unpacked[prefix + name] = unpack(bits, scores.shape) * self.initial
        return unpacked


def pack(through: Tensor) -> Tensor:
    """Return a boolean tensor of n entries as bits, uint8 ``[ceil(n / 8)]``; the first entry is the lowest bit."""
    flat = through.flatten().to(torch.uint8)
    places = 2 ** torch.arange(8, device=flat.device)
    return (F.pad(flat, (0, -len(flat) % 8)).reshape(-1, 8) * places).sum(dim=1).to(torch.uint8)


def unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    """Return the zeros and ones that :func:`pack` packed, float32 of ``shape``."""
    places = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    through = bits[:, None].bitwise_and(places).bool()
    return through.flatten()[: shape.numel()].reshape(shape).float()
