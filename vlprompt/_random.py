"""Seeds that are derived from facts, and draws that leave torch's generators as they were."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def hashed_number(text: str) -> int:
    """Return a 64-bit number that depends on every character: the first bytes of the SHA-256 of ``text``."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def derived_seed(*parts: int) -> int:
    """Return a 63-bit seed that depends on every part: for one generator per (seed, epoch, index)."""
    return hashed_number(":".join(str(part) for part in parts)) >> 1


@contextlib.contextmanager
def restored_random() -> Iterator[None]:
    """Restore the state of torch's CPU generator afterwards."""
    import torch

    state = torch.default_generator.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


@contextlib.contextmanager
def seeded_random(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's CPU generator, and that of a CUDA ``device``, and restore them afterwards.

    ``torch.manual_seed`` would also seed the generators of all other devices, which nothing restores.
    """
    import torch

    cuda = device if device is not None and device.type == "cuda" else None
    cuda_state = None if cuda is None else torch.cuda.get_rng_state(cuda)
    with restored_random():
        torch.default_generator.manual_seed(seed)
        try:
            if cuda is not None:
                with torch.cuda.device(cuda):
                    torch.cuda.manual_seed(seed)
            yield
        finally:
            if cuda is not None and cuda_state is not None:
                torch.cuda.set_rng_state(cuda_state, cuda)
