"""Tuning of text context for single test images, many images at once (TPT, Shu et al., NeurIPS 2022).

Every image starts from the same context, so (1) the text of the first step is encoded once for all images, and only
the cotangent of its features differs from image to image: one kept graph serves them all, or a Jacobian that was
computed before; (2) after a step each image has context of its own, which all its classes share as a prefix; (3) AdamW
works element by element, so the steps of B images are one step of the stacked context ``[B, M, W]``. All three are
exact (specs/test_time_and_cache.md 1.6).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlprompt.backbone import TokenLayout
from vlprompt.backbone.layout import check_row_lengths, context_slot
from vlprompt.backbone.text_tower import TextTower
from vlprompt.errors import ConfigError
from vlprompt.prompts.words import words_of
from vlprompt.testtime.selection import gather_views, marginal_entropy

#: From layout and context ``[G, M, W]`` (or ``[1, C, M, W]``, class-specific) to unit text features ``[G, C, D]``.
Encode = Callable[[TokenLayout, Tensor], Tensor]
#: From logits ``[B, V, C]`` and unit features ``[B, V, D]`` to the chosen views ``[B, n]``.
Select = Callable[[Tensor, Tensor], Tensor]

WEIGHT_DECAY = 0.01
"""AdamW's default, which the published code leaves on: context shrinks a little in every step."""


class StackedAdamW:
    """AdamW on tensors ``[B, ...]``, one row per image; it is elementwise, so rows do not see each other.

    Args:
        lr: Step size.
        weight_decay: Decoupled decay; with ``lr`` 0 nothing moves.
    """

    def __init__(self, lr: float, weight_decay: float = WEIGHT_DECAY) -> None:
        self.lr, self.weight_decay = lr, weight_decay
        self.betas, self.eps = (0.9, 0.999), 1e-8
        self.count = 0
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``values`` after one step along ``gradients`` of the same names and shapes."""
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
    """What tuning gives for B images.

    Attributes:
        logits: ``[B, C]`` of view 0 with the image's own context.
        selected: ``[B, n]`` the views that drive the loss.
        losses: ``[B, S]`` marginal entropy in nats before each of S steps.
        gradients: ``[B, S, M, W]`` of the loss with respect to the context.
        contexts: ``[B, S, M, W]`` the context after each step.
    """

    logits: Tensor
    selected: Tensor
    losses: Tensor
    gradients: Tensor
    contexts: Tensor


@dataclass(frozen=True)
class ContextTuner:
    """Tunes the context of every test image on its own views, and scores its view 0.

    Attributes:
        encode: Encodes context to unit text features.
        layout: The prompts of C classes, one group.
        scale: The factor of cosines.
        lr: AdamW's step size.
        steps: S steps for every image; 0 gives the logits of the start.
        images_at_once: Images whose own prompts are encoded together; a matter of memory only.
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
            start: Context ``[M, W]`` that every image begins with.
            views: Unit image features ``[B, V, D]``, view 0 the test view.
            select: Chooses views by the logits of the start; later steps keep the choice.
            jacobian: :meth:`jacobian` of ``start``, which replaces the backward passes of the first step.
        """
        with torch.enable_grad():
            context = start.detach().clone().requires_grad_(jacobian is None and self.steps > 0 and len(views) > 0)
            text = self.encode(self.layout, context[None])[0]  # one graph for all images
        views, fixed = views.detach().clone(), text.detach()
        with torch.no_grad():
            logits = self.scale * views @ fixed.t()
            selected = select(logits, views)
            if not len(views) or not self.steps:
                nothing = fixed.new_zeros(len(views), 0)
                empty = nothing.reshape(len(views), 0, 1, 1).expand(-1, -1, *start.shape)
                return Tuned(logits[:, 0], selected, nothing, empty, empty)
        tuned = []
        for part in torch.arange(len(views), device=views.device).split(self.images_at_once):
            own = gather_views(views[part], selected[part])
            loss, cotangents = _cotangents(self.scale, own, logits[part], selected[part])
            if jacobian is not None:
                gradient = (cotangents.flatten(1) @ jacobian.flatten(0, 1).flatten(1)).unflatten(1, start.shape)
            else:
                rows = [torch.autograd.grad(text, context, row, retain_graph=True)[0] for row in cotangents]
                gradient = torch.stack(rows)
            tuned.append(self._rest(start.detach().expand_as(gradient), views[part, 0], own, loss, gradient))
        columns = [torch.cat(column) for column in zip(*tuned, strict=True)]
        return Tuned(columns[0], selected, *columns[1:])

    def _rest(
        self, context: Tensor, first: Tensor, own: Tensor, loss: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Take the step along the first ``gradient`` and those after it; return the fields of :class:`Tuned`."""
        optimizer = StackedAdamW(self.lr)
        layout = self.layout.select_groups([0] * len(first))  # kept with its plan: blocks are of one size
        losses, gradients, contexts = [loss], [gradient], []
        for step in range(self.steps):
            context = optimizer.step({"context": context}, {"context": gradients[-1]})["context"]
            contexts.append(context)
            if step == self.steps - 1:
                break
            with torch.enable_grad():
                context = context.requires_grad_()
                logits = self.scale * own @ self.encode(layout, context).transpose(1, 2)
                each = marginal_entropy(logits)  # [b]; their sum keeps the images apart
                gradients.append(torch.autograd.grad(each.sum(), context)[0])
            losses.append(each.detach())
        with torch.no_grad():
            logits = self.scale * torch.einsum("bd,bcd->bc", first, self.encode(layout, context))
        contexts = [each.detach() for each in contexts]
        return logits, torch.stack(losses, 1), torch.stack(gradients, 1), torch.stack(contexts, 1)

    @torch.inference_mode(False)
    def jacobian(self, start: Tensor) -> Tensor:
        """Return the derivatives ``[C, D, M, W]`` of unit text features with respect to the shared context ``[M, W]``.

        Every class is given context of its own, so that one backward pass per feature dimension serves all classes: D
        passes, worth their time from about D images on.

        Raises:
            ConfigError: It would take more than half of the memory.
        """
        classes = self.layout.classes
        with torch.no_grad():
            width = self.encode(self.layout.select(0, 1), start[None].detach()).shape[-1]
        needed, most = classes * width * start.numel() * 4, _memory(start.device) // 2
        if needed > most:
            raise ConfigError(
                f"settings.jacobian is true, and that of {classes} classes takes {needed / 2**30:.1f} GiB; here "
                f"{most / 2**30:.1f} GiB may be used. Leave it false: one backward pass per image gives the same"
            )
        found = start.new_empty(classes, width, *start.shape)
        # A block of classes so small that its graph stays below the tower's own limit, beyond which it would recompute.
        for begin in range(0, classes, _CLASSES_AT_ONCE):
            part = self.layout.select(begin, min(begin + _CLASSES_AT_ONCE, classes))
            own = TokenLayout(part.slots, part.lengths, class_specific=True)
            with torch.enable_grad():
                context = start.detach().expand(1, part.classes, *start.shape).clone().requires_grad_()
                text = self.encode(own, context)[0]
                for d in range(width):
                    gradient = torch.autograd.grad(text[:, d].sum(), context, retain_graph=True)[0]
                    found[begin : begin + part.classes, d] = gradient[0]
        return found


_CLASSES_AT_ONCE = 200


def tuned_layout(text: TextTower, class_names: Sequence[str], words: str, length: int, before: int) -> TokenLayout:
    """Return prompts with ``before`` of ``length`` vectors in front of the class name and the others behind it.

    ``words + " NAME."`` is tokenised whole, and its first ``length`` tokens are the vectors' (TPT: custom_clip.py).

    Raises:
        ClassNameError: Prompts longer than the text tower takes, all of them listed.
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


def _cotangents(scale: Tensor, own: Tensor, logits: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses ``[b]`` of views ``own`` ``[b, n, D]`` and their cotangents ``[b, C, D]`` for the text."""
    with torch.enable_grad():
        chosen = gather_views(logits, selected).requires_grad_()
        loss = marginal_entropy(chosen)
        by_logit = torch.autograd.grad(loss.sum(), chosen)[0]  # [b, n, C]
    return loss.detach(), scale * by_logit.transpose(1, 2) @ own


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
