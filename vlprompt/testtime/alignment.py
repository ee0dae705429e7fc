"""Alignment of a test image's tokens with those of source images (PromptAlign, Abdul Samadh et al., NeurIPS 2023).

Means and variances of the image tower's tokens, per layer, position and channel, over the views of a test image should
be those over the images that the prompts were trained on (arXiv 2311.01459). The published code takes what goes into a
block, with that layer's prompts in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlprompt.backbone.image_tower import ImageTower, VisualTokens
from vlprompt.errors import ConfigError
from vlprompt.testtime.selection import marginal_entropy
from vlprompt.testtime.tuning import StackedAdamW


@contextmanager
def block_inputs(tower: ImageTower, layers: int) -> Iterator[list[Tensor]]:
    """Record what goes into the first ``layers`` blocks while images are encoded: a list of ``[B, T, W]``."""
    seen: list[Tensor] = []
    blocks = tower.visual.transformer.resblocks[:layers]
    hooks = [block.register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0])) for block in blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def aligned_layers(tower: ImageTower, depth: int) -> int:
    """Return how many layers are aligned: the published loop stops one before ``depth`` of them.

    The last block is never among them, because only its class token is computed.
    """
    return max(0, min(depth - 1, tower.layers - 1))


def token_statistics(
    tower: ImageTower, batches: Iterable[Tensor], tokens: VisualTokens, layers: int
) -> tuple[Tensor, Tensor]:
    """Return mean and variance ``[L, T, W]`` of the inputs of the first ``layers`` blocks over all images.

    Args:
        tower: The image tower.
        batches: Normalised images ``[B, 3, H, W]``.
        tokens: The prompts that the images are encoded with.
        layers: L.

    Raises:
        ConfigError: No images.
    """
    count, total, squares = 0, None, None
    for images in batches:
        with torch.no_grad(), block_inputs(tower, layers) as seen:
            tower.encode(images, tokens)
        if not len(images):
            continue
        stacked = torch.stack(seen).double()  # [L, B, T, W]
        sums = stacked.sum(dim=1), stacked.square().sum(dim=1)
        total = sums[0] if total is None else total + sums[0]
        squares = sums[1] if squares is None else squares + sums[1]
        count += len(images)
    if total is None or squares is None:
        raise ConfigError("there are no images to compute source statistics from; accepted: one or more of them")
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp(min=0).float()


def alignment_loss(seen: list[Tensor], views: int, mean: Tensor, variance: Tensor) -> Tensor:
    """Return ``[B]``: over the layers, the sum of half the mean absolute differences of means and of variances.

    Args:
        seen: L tensors ``[B * n, T, W]``, the tokens of n views of each image.
        views: n.
        mean: Source means ``[L, T, W]``.
        variance: Source variances ``[L, T, W]``.
    """
    tokens = torch.stack(seen).unflatten(1, (-1, views))  # [L, B, n, T, W]
    own_mean = tokens.mean(dim=2)
    own_variance = (tokens - own_mean[:, :, None]).square().mean(dim=2)
    first = (own_mean - mean[:, None]).abs().mean(dim=(2, 3))
    second = (own_variance - variance[:, None]).abs().mean(dim=(2, 3))
    loss: Tensor = (0.5 * first + 0.5 * second).sum(dim=0)
    return loss


def coupled_tokens(values: Mapping[str, Tensor], views: int) -> tuple[Tensor, dict[int, Tensor], VisualTokens]:
    """Return text context, deep text context and image tokens of B images that have coupled prompts of their own.

    Args:
        values: The tensors of :class:`vlprompt.prompts.CoupledPrompts` by name, each with a leading B.
        views: n images of each are encoded: image tokens are ``[B * n, M, W]``.

    Returns:
        ``[B, M, W]``, layer to ``[B, M, W]``, and the tokens.
    """
    depth = sum(name.startswith("context.deep.") for name in values)
    context = values["context.ctx"]
    deep = {layer: values[f"context.deep.{layer - 1}"] for layer in range(1, depth + 1)}

    def tokens_of(vectors: Tensor, name: str) -> Tensor:
        mapped = vectors @ values[f"{name}.weight"].transpose(1, 2) + values[f"{name}.bias"][:, None]
        return mapped.repeat_interleave(views, dim=0)

    tokens = {layer: tokens_of(vectors, f"projections.{layer - 1}") for layer, vectors in deep.items()}
    return context, deep, VisualTokens(tokens_of(context, "proj"), tokens)


@dataclass(frozen=True)
class CoupledTuner:
    """Tunes coupled prompts of both towers on every test image, and scores its view 0.

    Attributes:
        score: From prompts by name, each with a leading B, images ``[B * n, 3, H, W]`` and n to logits ``[B, n, C]``.
        tower: The image tower, whose tokens are aligned.
        lr: AdamW's step size.
        steps: Steps for every image, one or more.
        weight: Factor of :func:`alignment_loss`.
        layers: Layers that are aligned; 0 for none.
    """

    score: Callable[[Mapping[str, Tensor], Tensor, int], Tensor]
    tower: ImageTower
    lr: float
    steps: int
    weight: float
    layers: int

    def tune_in_parts(
        self,
        start: Mapping[str, Tensor],
        first: Tensor,
        kept: Tensor,
        source: tuple[Tensor, Tensor],
        images_at_once: int,
    ) -> Tensor:
        """Return what :meth:`tune` does, with so many images at a time: a matter of memory only."""
        parts = zip(first.split(images_at_once), kept.split(images_at_once), strict=True)
        return torch.cat([self.tune(start, *part, source) for part in parts])

    def tune(self, start: Mapping[str, Tensor], first: Tensor, kept: Tensor, source: tuple[Tensor, Tensor]) -> Tensor:
        """Return the logits ``[B, C]`` of test views ``first`` ``[B, 3, H, W]``.

        Args:
            start: Prompts that every image begins with, by name.
            first: The test views.
            kept: The views ``[B, n, 3, H, W]`` that drive the loss.
            source: Mean and variance ``[L, T, W]`` of source tokens.
        """
        count = kept.shape[1]
        values = {name: value.expand(len(first), *value.shape).clone() for name, value in start.items()}
        optimizer = StackedAdamW(self.lr)
        for _ in range(self.steps):
            with torch.enable_grad():
                values = {name: value.requires_grad_() for name, value in values.items()}
                with block_inputs(self.tower, self.layers) as seen:
                    loss = marginal_entropy(self.score(values, kept.flatten(0, 1), count))
                if seen:
                    loss = loss + self.weight * alignment_loss(seen, count, *source)
                found = torch.autograd.grad(loss.sum(), list(values.values()))
            values = optimizer.step(values, dict(zip(values, found, strict=True)))
        with torch.no_grad():
            return self.score(values, first, 1)[:, 0]


def as_buffers(module: nn.Module) -> list[str]:
    """Turn the parameters of ``module`` into buffers of the same names, which nothing trains; return the names."""
    names = [name for name, _ in module.named_parameters()]
    for name in names:
        owner, _, last = name.rpartition(".")
        holder = module.get_submodule(owner)
        value = holder.get_parameter(last).detach().clone()
        delattr(holder, last)
        holder.register_buffer(last, value, persistent=False)
    return names
