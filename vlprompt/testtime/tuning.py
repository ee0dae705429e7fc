"""Tuning of text context for single test images, many images at once (TPT, Shu et al., NeurIPS 2022).

Three exact shortcuts process many images together. (1) Every image starts from the same context, so the text of the
first step is encoded once. Images differ only in the cotangent of the text features, which is applied to one retained
graph or to a precomputed Jacobian. (2) After a step each image has its own context, shared by its classes as a prefix.
(3) AdamW is elementwise, so the steps of B images are one step of the stacked context ``[B, M, W]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlprompt._memory import total_memory
from vlprompt._shapes import check_shape
from vlprompt.backbone import TokenLayout
from vlprompt.backbone.layout import check_row_lengths, context_slot
from vlprompt.backbone.text_tower import TextTower
from vlprompt.errors import ConfigError
from vlprompt.prompts.words import words_of
from vlprompt.testtime.selection import gather_views, marginal_entropy

#: Takes a layout and context ``[G, M, W]`` (class-specific: ``[1, C, M, W]``); returns unit text features
#: ``[G, C, D]``.
Encode = Callable[[TokenLayout, Tensor], Tensor]
#: Takes logits ``[B, V, C]`` and unit features ``[B, V, D]``; returns the chosen views ``[B, n]``.
Select = Callable[[Tensor, Tensor], Tensor]

WEIGHT_DECAY = 0.01
"""AdamW's default, which the published code keeps: the context shrinks slightly in every step."""


class StackedAdamW:
    """AdamW on tensors ``[B, ...]``, one row per image; the update is elementwise, so rows are independent.

    Args:
        lr: Step size.
        weight_decay: Decoupled weight decay; with ``lr`` 0 nothing changes.
    """

    def __init__(self, lr: float, weight_decay: float = WEIGHT_DECAY) -> None:
        self.lr, self.weight_decay = lr, weight_decay
        self.betas, self.eps = (0.9, 0.999), 1e-8
        self.count = 0
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``values`` after one step with ``gradients`` of the same names and shapes."""
        self.count += 1
        (b1, b2), stepped = self.betas, {}
        for name, value in values.items():
            gradient = gradients[name]
            first, second = self.moments.get(name, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
            first = b1 * first + (1 - b1) * gradient
            second = b2 * second + (1 - b2) * gradient.square()
            self.moments[name] = first, second
            scale = second.sqrt() / (1 - b2**self.count) ** 0.5 + self.eps
            decayed = value.detach() * (1 - self.lr * self.weight_decay)
            stepped[name] = decayed - self.lr / (1 - b1**self.count) * first / scale
        return stepped


@dataclass(frozen=True)
class Tuned:
    """Result of tuning for B images.

    Attributes:
        logits: ``[B, C]``, logits of view 0 with the tuned context of the image.
        selected: ``[B, n]``, the views used in the loss.
        losses: ``[B, S]``, marginal entropy in nats before each of S steps.
        gradients: ``[B, S, M, W]``, gradients of the loss with respect to the context.
        contexts: ``[B, S, M, W]``, the context after each step.
    """

    logits: Tensor
    selected: Tensor
    losses: Tensor
    gradients: Tensor
    contexts: Tensor


@dataclass(frozen=True)
class ContextTuner:
    """Tunes the context of every test image on its views, then scores its view 0.

    Attributes:
        encode: Encodes context to unit text features.
        layout: The prompts of C classes, in one group.
        scale: Factor of the cosines.
        lr: Step size of AdamW.
        steps: S, the number of steps per image; 0 returns the logits of the initial context.
        images_at_once: Number of images whose prompts are encoded together; affects only memory.
    """

    encode: Encode
    layout: TokenLayout
    scale: Tensor
    lr: float
    steps: int = 1
    images_at_once: int = 8

    @torch.inference_mode(False)
    def tune(self, start: Tensor, views: Tensor, select: Select, jacobian: Tensor | None = None) -> Tuned:
        """Return the tuned scores of B images.

        Args:
            start: Initial context ``[M, W]`` of every image.
            views: Unit image features ``[B, V, D]``; view 0 is the test view.
            select: Chooses views by the logits of the initial context; later steps keep the choice.
            jacobian: Result of :meth:`jacobian` for ``start``; replaces the backward passes of the first step.

        Raises:
            DataError: ``views`` of another shape, or that are no floats.
        """
        with torch.enable_grad():
            context = start.detach().clone().requires_grad_(jacobian is None and self.steps > 0 and len(views) > 0)
            text = self.encode(self.layout, context[None])[0]  # one graph for all images
        check_shape(views, "views", ("B", "V", text.shape[1]))
        views, fixed = views.detach().clone(), text.detach()
        with torch.no_grad():
            logits = self.scale * views @ fixed.t()
            selected = select(logits, views)
            if not len(views) or not self.steps:
                nothing = fixed.new_zeros(len(views), 0)
                empty = nothing.reshape(len(views), 0, 1, 1).expand(-1, -1, *start.shape)
                return Tuned(logits[:, 0], selected, nothing, empty, empty)
        tuned = []
        for block in torch.arange(len(views), device=views.device).split(self.images_at_once):
            chosen = gather_views(views[block], selected[block])
            loss, cotangents = _cotangents(self.scale, chosen, logits[block], selected[block])
            if jacobian is not None:
                gradient = (cotangents.flatten(1) @ jacobian.flatten(0, 1).flatten(1)).unflatten(1, start.shape)
            else:
                rows = [torch.autograd.grad(text, context, row, retain_graph=True)[0] for row in cotangents]
                gradient = torch.stack(rows)
            tuned.append(self._rest(start.detach().expand_as(gradient), views[block, 0], chosen, loss, gradient))
        columns = [torch.cat(column) for column in zip(*tuned, strict=True)]
        return Tuned(columns[0], selected, *columns[1:])

    def _rest(
        self, context: Tensor, first: Tensor, views: Tensor, loss: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Take the step with the first ``gradient`` and all later ones; return the fields of :class:`Tuned`."""
        optimizer = StackedAdamW(self.lr)
        layout = self.layout.select_groups([0] * len(first))  # cached with its plan, as all blocks have one size
        losses, gradients, contexts = [loss], [gradient], []
        for step in range(self.steps):
            context = optimizer.step({"context": context}, {"context": gradients[-1]})["context"]
            contexts.append(context)
            if step == self.steps - 1:
                break
            with torch.enable_grad():
                context = context.requires_grad_()
                logits = self.scale * views @ self.encode(layout, context).transpose(1, 2)
                entropies = marginal_entropy(logits)  # [b]; the gradients of their sum are independent
                gradients.append(torch.autograd.grad(entropies.sum(), context)[0])
            losses.append(entropies.detach())
        with torch.no_grad():
            logits = self.scale * torch.einsum("bd,bcd->bc", first, self.encode(layout, context))
        contexts = [entropies.detach() for entropies in contexts]
        return logits, torch.stack(losses, 1), torch.stack(gradients, 1), torch.stack(contexts, 1)

    @torch.inference_mode(False)
    def jacobian(self, start: Tensor) -> Tensor:
        """Return the derivatives ``[C, D, M, W]`` of unit text features with respect to the shared context ``[M, W]``.

        Every class gets its own copy of the context, so one backward pass per feature dimension covers all classes. The
        D passes are faster than those of the images for about D images or more.

        Raises:
            ConfigError: The result would take more than half of the memory.
        """
        classes = self.layout.classes
        with torch.no_grad():
            width = self.encode(self.layout.select(0, 1), start[None].detach()).shape[-1]
        needed, most = classes * width * start.numel() * 4, total_memory(start.device) // 2
        if needed > most:
            raise ConfigError(
                f"settings.jacobian is true, but the Jacobian of {classes} classes takes {needed / 2**30:.1f} GiB, "
                f"more than the {most / 2**30:.1f} GiB allowed here. Set it to false: a backward pass per image gives "
                "the same result"
            )
        result = start.new_empty(classes, width, *start.shape)
        # Blocks are so small that the tower encodes them without chunks, which would recompute activations.
        for begin in range(0, classes, _CLASSES_AT_ONCE):
            block = self.layout.select(begin, min(begin + _CLASSES_AT_ONCE, classes))
            specific = TokenLayout(block.slots, block.lengths, class_specific=True)
            with torch.enable_grad():
                context = start.detach().expand(1, block.classes, *start.shape).clone().requires_grad_()
                text = self.encode(specific, context)[0]
                for d in range(width):
                    gradient = torch.autograd.grad(text[:, d].sum(), context, retain_graph=True)[0]
                    result[begin : begin + block.classes, d] = gradient[0]
        return result


_CLASSES_AT_ONCE = 200


def tuned_layout(text: TextTower, class_names: Sequence[str], words: str, length: int, before: int) -> TokenLayout:
    """Return prompts with ``before`` of ``length`` vectors before the class name and the others after it.

    ``words + " NAME."`` is tokenised, and the vectors replace its first ``length`` tokens (TPT: custom_clip.py).

    Raises:
        ClassNameError: Prompts are too long for the text tower; the text lists all of them.
    """
    rows = []
    slots = [context_slot(m) for m in range(length)]
    for name in class_names:
        start, *tokens = text.tokens(f"{words} {words_of(name)}.")
        rest = tokens[length:]
        inside = len(text.tokens(words_of(name))) - 2 if before < length else 0
        rows.append([start, *slots[:before], *rest[:inside], *slots[before:], *rest[inside:]])
    what = f"{length} context tokens, the name and a period"
    check_row_lengths(class_names, [len(row) for row in rows], text.context_length, what)
    return TokenLayout.from_rows([rows])


def _cotangents(scale: Tensor, views: Tensor, logits: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses ``[b]`` of ``views`` ``[b, n, D]`` and their cotangents ``[b, C, D]`` for the text features."""
    with torch.enable_grad():
        chosen = gather_views(logits, selected).requires_grad_()
        loss = marginal_entropy(chosen)
        by_logit = torch.autograd.grad(loss.sum(), chosen)[0]  # [b, n, C]
    return loss.detach(), scale * by_logit.transpose(1, 2) @ views
