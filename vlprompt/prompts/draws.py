"""Random draws of training steps that a resumed run, and every process of several, makes alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vlprompt._random import seeded_random


class Draws(nn.Module):
    """A seed of its own and a count of the steps drawn for; both lie in the training checkpoint, not in heads.

    The seed comes from torch's generator when the method is made, so that one ``torch.manual_seed`` decides both what
    is learned from and what is drawn.
    """

    seed_and_count: Tensor

    def __init__(self) -> None:
        super().__init__()
        seed = torch.randint(2**31, (1,), dtype=torch.int64, device="cpu")
        self.register_buffer("seed_and_count", torch.cat([seed, torch.zeros_like(seed)]))

    @contextmanager
    def step(self, device: torch.device) -> Iterator[None]:
        """Let torch's generators draw for the next step inside; afterwards they are where they were before.

        Args:
            device: Where the draws are made.
        """
        seed, count = self.seed_and_count.tolist()
        self.seed_and_count[1] += 1
        with seeded_random((seed * 1_000_003 + count) % 2**63, device):
            yield
