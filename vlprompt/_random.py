"""Seeds that are derived from facts, and draws that leave torch's generators as they were."""

from __future__ import annotations

import contextlib
import hashlib
import random
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


class NumpyRandom:
    """NumPy's ``RandomState(seed)``, as far as permutations go, without NumPy: MT19937 of Matsumoto and Nishimura.

    Python's generator is the same; only its seeding differs.

    Args:
        seed: A number from 0 to 2**32 - 1; of larger ones the last 32 bits count.
    """

    def __init__(self, seed: int) -> None:
        state = [seed & 0xFFFFFFFF]
        for place in range(1, 624):
            state.append((1812433253 * (state[-1] ^ (state[-1] >> 30)) + place) & 0xFFFFFFFF)
        self._bits = random.Random()
        self._bits.setstate((3, (*state, 624), None))

    def permutation(self, count: int) -> list[int]:
        """Return ``RandomState.permutation(count)``; ``choice(count, size, replace=False)`` is its first entries."""
        order = list(range(count))
        for last in range(count - 1, 0, -1):
            mask = (1 << last.bit_length()) - 1
            while (place := self._bits.getrandbits(32) & mask) > last:
                pass
            order[last], order[place] = order[place], order[last]
        return order


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
