"""The two stages of training the demo: a ResNet and the text tower contrastively, then a ViT by distillation.

A small convolutional network learns from few drawings much faster than a transformer. The ViT then learns the ResNet's
image features and shares its text tower. The random numbers of a step depend only on (seed, stage, step), so a stopped
run resumes exactly, and batches are the same on CPU and GPU.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from captions import Vocabulary, caption, icon_caption, kind_caption, plain_prompt
from drawings import load_style
from models import Texts, build, optimisers
from open_clip.model import CLIP
from sources import ICONS, TRAINING, Emoji, Icon
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from views import Views

from vlprompt._files import replacing

EMOJI_A_BATCH, ICONS_A_BATCH, KIND_SHARE = 192, 64, 0.12
WARMUP, KEEP_EVERY = 60, 200
#: Processes that prepare batches for a GPU; on a CPU the main process prepares them.
WORKERS = 8
#: Optimiser steps of each stage.
STEPS = {"contrast": 2000, "distil": 1400}
_FLIP = ("animals-nature", "food-drink", "activities", "objects", "travel-places", "smileys-emotion")


@dataclass
class Batch:
    """Images and captions of one step.

    ``same[i, j]`` is true if caption j also fits image i. ``classes`` holds the indices of the drawn things among the
    captions of :meth:`Corpus.captions`.
    """

    images: Tensor
    captions: list[str]
    same: Tensor
    classes: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on ``device``."""
        return Batch(self.images.to(device), self.captions, self.same.to(device), self.classes.to(device))


class Corpus:
    """The drawings used in training: emoji that are not novel, in the training styles, and icons."""

    def __init__(self, folder: Path, emoji: list[Emoji], icons: list[Icon]) -> None:
        by_key = {symbol.key: symbol for symbol in emoji if not symbol.novel}
        words = {icon.words for icon in icons}
        drawings: dict[str, list[int]] = {}
        icon_drawings: dict[str, list[int]] = {}
        pixels, count = [], 0
        for style in (*TRAINING, *(style + ending for style, endings in ICONS.items() for ending in endings)):
            keys, images = load_style(folder, style)
            for index, key in enumerate(keys):
                if key in by_key:
                    drawings.setdefault(key, []).append(count + index)
                elif key in words:
                    icon_drawings.setdefault(key, []).append(count + index)
            pixels.append(torch.from_numpy(images))
            count += len(images)
        self._pixels = torch.cat(pixels)
        held_back = {symbol.label for symbol in emoji if symbol.novel}  # novel names are also removed from keywords
        self.emoji = [
            replace(by_key[key], tags=[tag for tag in by_key[key].tags if tag not in held_back])
            for key in sorted(drawings)
        ]
        self.icons = sorted(icon_drawings)
        self._drawings = [drawings[symbol.key] for symbol in self.emoji] + [icon_drawings[name] for name in self.icons]
        # Flags are numerous and similar, so they have lower weights.
        weights = np.array([0.25 if symbol.subgroup == "country-flag" else 1.0 for symbol in self.emoji])
        self._weights = weights / weights.sum()

    def captions(self, generator: random.Random, plain: bool = False) -> list[str]:
        """Return one caption per thing: emoji first, then icons."""
        if plain:
            return [plain_prompt(symbol.label) for symbol in self.emoji] + [
                f"an icon of a {name}." for name in self.icons
            ]
        captions = [caption(symbol, generator) for symbol in self.emoji]
        return captions + [icon_caption(name, generator) for name in self.icons]

    def batch(self, key: str) -> Batch:
        """Return the batch determined by ``key``."""
        generator = random.Random(key)
        numbers = np.random.default_rng(generator.getrandbits(64))
        chosen = numbers.choice(len(self.emoji), EMOJI_A_BATCH, replace=False, p=self._weights)
        icons = numbers.choice(len(self.icons), ICONS_A_BATCH, replace=False)
        classes = [*chosen.tolist(), *(icons + len(self.emoji)).tolist()]
        captions, kinds, may_flip = [], [], []
        for index in classes:
            if index >= len(self.emoji):
                captions.append(icon_caption(self.icons[index - len(self.emoji)], generator))
                kinds.append(None)
                may_flip.append(False)
                continue
            symbol = self.emoji[index]
            by_kind = generator.random() < KIND_SHARE
            captions.append(kind_caption(symbol, generator) if by_kind else caption(symbol, generator))
            kinds.append(symbol.subgroup if by_kind else None)
            may_flip.append(symbol.group in _FLIP and symbol.subgroup not in ("time", "writing"))
        subgroups = [self.emoji[index].subgroup if index < len(self.emoji) else "" for index in classes]
        same = torch.tensor([[kind == subgroup for kind in kinds] for subgroup in subgroups])
        same.fill_diagonal_(True)
        pixels = self._pixels[[generator.choice(self._drawings[index]) for index in classes]]
        views = Views(torch.Generator().manual_seed(generator.getrandbits(63)))
        return Batch(views(pixels, torch.tensor(may_flip)), captions, same, torch.tensor(classes))


class Batches(Dataset[Batch]):
    """The batches of a stage by step, independent of the number of worker processes."""

    def __init__(self, corpus: Corpus, seed: int, name: str) -> None:
        self._corpus, self._key = corpus, f"{seed} {name}"

    def __getitem__(self, step: int) -> Batch:
        torch.set_num_threads(1)
        return self._corpus.batch(f"{self._key} {step}")


@dataclass
class Stage:
    """Inputs of the training loop."""

    learner: nn.Module
    optimisers: list[torch.optim.Optimizer]
    rates: tuple[float, float]
    loss: Callable[[Batch, int], Tensor]
    clip: float


def contrast(texts: Texts, device: torch.device) -> Stage:
    """Return the stage of contrastive training of the ResNet and the text tower, as in CLIP.

    The caption of a kind fits many images of a batch. It must match all of them, and they are not its negatives.
    """
    network = texts.to(device).network
    network.visual = network.visual.to(memory_format=torch.channels_last)
    texts.train()
    diagonal = torch.eye(EMOJI_A_BATCH + ICONS_A_BATCH, dtype=torch.bool, device=device)

    def loss(batch: Batch, step: int) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            images = network.visual(batch.images.contiguous(memory_format=torch.channels_last))
            captions = texts(batch.captions)
        with torch.no_grad():
            network.logit_scale.clamp_(0, math.log(100))
        logits = network.logit_scale.exp() * F.normalize(images.float(), dim=-1) @ captions.T
        diagonal_labels = torch.arange(len(logits), device=device)
        from_images = F.cross_entropy(logits.masked_fill(batch.same & ~diagonal, -1e4), diagonal_labels)
        wanted = batch.same.float().T
        from_texts = -(wanted / wanted.sum(1, keepdim=True) * F.log_softmax(logits.T, 1)).sum(1).mean()
        return (from_images + from_texts) / 2

    rates = 1.5e-3, 2.5e-3
    return Stage(texts, optimisers(texts, *rates), rates, loss, 1.0)


def distil(student: CLIP, texts: Texts, corpus: Corpus, seed: int, steps: int, device: torch.device) -> Stage:
    """Return the stage in which the ViT learns the ResNet's image features and logits; the text tower is fixed."""
    teacher = texts.to(device).network
    texts.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        captioned = [corpus.captions(random.Random(f"{seed} captions {index}"), index == 0) for index in range(8)]
        known = torch.stack([torch.cat([texts(chunk) for chunk in chunks(captions, 512)]) for captions in captioned])
    scale = teacher.logit_scale.exp().item()
    visual = student.to(device).visual
    visual.train()

    def loss(batch: Batch, step: int) -> Tensor:
        torch.manual_seed(hash_of(f"{seed} patches {step}"))  # patch dropout draws from the global generator
        visual.patch_dropout.prob = 0.5 if step < 0.85 * steps else 0.0
        chosen = torch.Generator().manual_seed(hash_of(f"{seed} choice {step}"))
        which = torch.randint(len(known), (known.shape[1],), generator=chosen)
        classes = known[which.to(device), torch.arange(known.shape[1], device=device)]
        # For short sequences plain products are faster on a CPU than fused attention.
        with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            images = torch.cat([visual(chunk) for chunk in batch.images.split(64)])
            with torch.no_grad():
                wanted = teacher.visual(batch.images.contiguous(memory_format=torch.channels_last))
        images, wanted = F.normalize(images.float(), dim=-1), F.normalize(wanted.float(), dim=-1)
        logits = scale * images @ classes.T
        teaching = F.softmax(scale * wanted @ classes.T, 1)
        names = 0.5 * F.cross_entropy(logits, batch.classes) - 0.5 * (teaching * F.log_softmax(logits, 1)).sum(1).mean()
        pairs = F.cross_entropy(20 * images @ wanted.T, torch.arange(len(images), device=device))
        return names + pairs + 2 * (1 - (images * wanted).sum(1)).mean()

    rates = 1.2e-3, 2.5e-3
    return Stage(visual, optimisers(visual, *rates), rates, loss, 2.0)


def hash_of(text: str) -> int:
    """Return a 63-bit number for ``text``, the same in every process."""
    return random.Random(text).getrandbits(63)


def chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Yield ``items`` in lists of ``size``."""
    return (items[start : start + size] for start in range(0, len(items), size))


def run(
    stage: Stage, name: str, corpus: Corpus, seed: int, steps: int, file: Path, report: Callable[..., None]
) -> None:
    """Run ``stage`` to its end, resuming from ``file`` if it holds an earlier state."""
    start, device = 0, next(stage.learner.parameters()).device
    if file.is_file():
        state = torch.load(file, map_location=device, weights_only=True)
        stage.learner.load_state_dict(state["learner"])
        for optimiser, saved in zip(stage.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        start = state["step"]
    learned = [p for p in stage.learner.parameters() if p.requires_grad]
    began, recent = time.monotonic(), []
    workers = 0 if device.type == "cpu" else min(WORKERS, os.cpu_count() or 1)
    batches = DataLoader(Batches(corpus, seed, name), None, sampler=range(start, steps), num_workers=workers)
    for step, batch in enumerate(batches, start):
        factor = min(1, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for optimiser, rate in zip(stage.optimisers, stage.rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
            optimiser.zero_grad(set_to_none=True)
        loss = stage.loss(batch.to(device), step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, stage.clip)
        for optimiser in stage.optimisers:
            optimiser.step()
        recent.append(loss.detach())
        if (step + 1) % 25 == 0:
            left = (time.monotonic() - began) / (step + 1 - start) * (steps - step - 1)
            report(name, step + 1, steps, torch.stack(recent).mean().item(), left)
            recent = []
        if (step + 1) % KEEP_EVERY == 0 or step + 1 == steps:
            state = {
                "step": step + 1,
                "learner": stage.learner.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in stage.optimisers],
            }
            with replacing(file) as temporary, temporary.open("wb") as stream:
                torch.save(state, stream)


def train_contrast(
    folder: Path,
    corpus: Corpus,
    vocabulary: Vocabulary,
    vectors: Tensor,
    seed: int,
    report: Callable[..., None],
    device: torch.device,
) -> Texts:
    """Train the ResNet and the text tower with ``seed``; a file in ``folder`` allows resuming."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    texts = Texts(build("demo-rn", len(vocabulary.ids)), vocabulary, vectors)
    run(contrast(texts, device), "contrast", corpus, seed, STEPS["contrast"], folder / f"contrast-{seed}.pt", report)
    texts.requires_grad_(False)
    return texts.cpu().eval()


def train_distil(
    folder: Path, corpus: Corpus, texts: Texts, seed: int, report: Callable[..., None], device: torch.device
) -> CLIP:
    """Train the ViT on the outputs of ``texts`` and its ResNet; return the network with the trained image tower."""
    torch.manual_seed(seed + 1000)
    student = build("demo", len(texts.vectors))
    stage = distil(student, texts, corpus, seed, STEPS["distil"], device)
    run(stage, "distil", corpus, seed, STEPS["distil"], folder / f"distil-{seed}.pt", report)
    texts.cpu()
    return student.cpu().eval()
