"""Alignment of a test image's tokens with those of source images (PromptAlign, Abdul Samadh et al., NeurIPS 2023).

The loss compares means and variances of the image tower's tokens, per layer, position and channel: those over the views
of a test image with those over source images (arXiv 2311.01459). As in the published code, the tokens are the inputs of
the blocks, with that layer's prompts inserted.
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
    """Record the inputs of the first ``layers`` blocks while images are encoded: a list of ``[B, T, W]``."""
    seen: list[Tensor] = []
    blocks = tower.visual.transformer.resblocks[:layers]
    hooks = [block.register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0])) for block in blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def aligned_layers(tower: ImageTower, depth: int) -> int:
    """Return the number of aligned layers: ``depth - 1``, as in the published loop.

    The last block is never aligned, because only its class token is computed.
    """
    return max(0, min(depth - 1, tower.layers - 1))


def token_statistics(
    tower: ImageTower, batches: Iterable[Tensor], tokens: VisualTokens, layers: int
) -> tuple[Tensor, Tensor]:
    """Return mean and variance ``[L, T, W]`` of the inputs of the first ``layers`` blocks over all images.

    Args:
        tower: The image tower.
        batches: Normalised images ``[B, 3, H, W]``.
        tokens: Prompts inserted into the image tower.
        layers: L.

    Raises:
        ConfigError: There are no images.
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
        raise ConfigError("there are no images to compute source statistics from; accepted: one or more")
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp(min=0).float()


def alignment_loss(seen: list[Tensor], views: int, mean: Tensor, variance: Tensor) -> Tensor:
    """Return ``[B]``: half the mean absolute difference of means and of variances, summed over the layers.

    Args:
        seen: L tensors ``[B * n, T, W]``, the tokens of n views of each image.
        views: n.
        mean: Source means ``[L, T, W]``.
        variance: Source variances ``[L, T, W]``.
    """
    tokens = torch.stack(seen).unflatten(1, (-1, views))  # [L, B, n, T, W]
    view_mean = tokens.mean(dim=2)
    view_variance = (tokens - view_mean[:, :, None]).square().mean(dim=2)
    mean_gap = (view_mean - mean[:, None]).abs().mean(dim=(2, 3))
    variance_gap = (view_variance - variance[:, None]).abs().mean(dim=(2, 3))
    loss: Tensor = (0.5 * mean_gap + 0.5 * variance_gap).sum(dim=0)
    return loss


def coupled_tokens(values: Mapping[str, Tensor], views: int) -> tuple[Tensor, dict[int, Tensor], VisualTokens]:
    """Return text context, deep text context and image tokens of B images, each with its own coupled prompts.

    Args:
        values: The tensors of :class:`vlprompt.prompts.CoupledPrompts` by name, each with a leading B.
        views: n, the number of views per image; image tokens are ``[B * n, M, W]``.

    Returns:
        Context ``[B, M, W]``, a map from layer to deep context ``[B, M, W]``, and the image tokens.
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
    """Tunes coupled prompts of both towers on every test image, then scores its view 0.

    Attributes:
        score: Takes prompts by name, each with a leading B, images ``[B * n, 3, H, W]`` and n; returns logits
            ``[B, n, C]``.
        tower: The image tower with the aligned tokens.
        lr: Step size of AdamW.
        steps: Steps per image, one or more.
        weight: Factor of :func:`alignment_loss`.
        layers: Number of aligned layers; 0 for none.
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
        """Return the result of :meth:`tune`, computed for ``images_at_once`` images at a time to limit memory."""
        chunks = zip(first.split(images_at_once), kept.split(images_at_once), strict=True)
        return torch.cat([self.tune(start, *chunk, source) for chunk in chunks])

    def tune(self, start: Mapping[str, Tensor], first: Tensor, kept: Tensor, source: tuple[Tensor, Tensor]) -> Tensor:
        """Return the logits ``[B, C]`` of test views ``first`` ``[B, 3, H, W]``.

        Args:
            start: Initial prompts of every image, by name.
            first: The test views.
            kept: The views ``[B, n, 3, H, W]`` used in the loss.
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
                gradients = torch.autograd.grad(loss.sum(), list(values.values()))
            values = optimizer.step(values, dict(zip(values, gradients, strict=True)))
        with torch.no_grad():
            return self.score(values, first, 1)[:, 0]


def as_buffers(module: nn.Module) -> list[str]:
    """Turn the parameters of ``module`` into buffers, which are not trained, and return their names."""
    names = [name for name, _ in module.named_parameters()]
    for name in names:
        owner, _, last = name.rpartition(".")
        holder = module.get_submodule(owner)
        value = holder.get_parameter(last).detach().clone()
        delattr(holder, last)
        holder.register_buffer(last, value, persistent=False)
    return names
