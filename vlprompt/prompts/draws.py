"""Random draws of training steps, identical in a resumed run and in all processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vlprompt._random import seeded_random


class Draws(nn.Module):
    """A seed and a count of the steps; both are saved in training checkpoints, not in heads.

    The seed is drawn from torch's generator when the method is created, so ``torch.manual_seed`` determines both the
    initial parameters and the draws.
    """

    seed_and_count: Tensor

    def __init__(self) -> None:
        super().__init__()
        seed = torch.randint(2**31, (1,), dtype=torch.int64, device="cpu")
        self.register_buffer("seed_and_count", torch.cat([seed, torch.zeros_like(seed)]))

    @contextmanager
    def step(self, device: torch.device) -> Iterator[None]:
        """Seed torch's generators for the next step inside the context, and restore them afterwards.

        Args:
            device: Device of the draws.
        """
        seed, count = self.seed_and_count.tolist()
        self.seed_and_count[1] += 1
        with seeded_random((seed * 1_000_003 + count) % 2**63, device):
            yield
