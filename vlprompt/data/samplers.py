"""Samplers whose batches do not depend on how many processes share them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DistributedSampler

from vlprompt._random import derived_seed
from vlprompt.errors import ConfigError

#: What a sampler yields: epoch and position in the list of samples.
Key = tuple[int, int]


class KeySampler(DistributedSampler[Key]):
    """What samplers of keys share: their length, rank and epoch.

    A DistributedSampler by type, because Lightning replaces any other sampler by one that pads, and because it then
    calls ``set_epoch``. Nothing of the parent's arithmetic is used.
    """

    def __init__(self, length: int, *, rank: int, world_size: int) -> None:
        self.length, self.rank, self.num_replicas, self.epoch = length, rank, world_size, 0
        # What torch's own class keeps and other code may read.
        self.shuffle, self.seed, self.drop_last = False, 0, False
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank is {rank}; with {world_size} processes ranks run from 0 to {world_size - 1}.")


class TrainSampler(KeySampler):
    """Yield ``(epoch, index)`` in an order that depends on ``(seed, epoch)`` alone.

    The epoch's order is cut into global batches of ``batch_size``. Rank ``r`` of ``W`` yields the ``r``-th ``W``-th of
    every global batch, so that ``W`` processes see exactly the batches of one. The last, incomplete batch is dropped;
    if there are fewer samples than ``batch_size``, the epoch is one short batch, shared out as evenly as can be.

    Args:
        length: Number of training samples.
        batch_size: Global batch size ``B``, over all processes.
        seed: Seed of the orders.
        rank: This process.
        world_size: Number of processes ``W``.

    Raises:
        ConfigError: If ``W`` does not divide ``B``, if there is nothing to train on, or less than one sample a process.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(length, rank=rank, world_size=world_size)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size!r}; accepted: whole numbers from 1.")
        if batch_size % world_size:
            lower = max(batch_size - batch_size % world_size, world_size)
            raise ConfigError(
                f"batch_size is {batch_size}, the global batch, which {world_size} processes cannot share "
                f"equally. Use --recipe.batch_size {lower}, or another number of --trainer.devices."
            )
        if length < world_size:
            raise ConfigError(
                f"There are {length} training images for {world_size} processes; each needs at least one. "
                "Use fewer --trainer.devices or more --data.shots."
            )
        self.batch_size, self.seed, self.shuffle, self.drop_last = batch_size, seed, True, True

    @property
    def local_batch_size(self) -> int:
        """Samples of one global batch that one rank sees: the batch size of its DataLoader."""
        return self.batch_size // self.num_replicas

    def local_slice(self) -> tuple[int, int]:
        """Return first and last-plus-one position of this rank in a global batch."""
        size = min(self.batch_size, self.length)
        each, extra = divmod(size, self.num_replicas)
        start = self.rank * each + min(self.rank, extra)
        return start, start + each + (self.rank < extra)

    def scale(self) -> float:
        """Return ``local_count * W / global_count``: weighs a local mean so that ranks average to the global mean."""
        start, stop = self.local_slice()
        return (stop - start) * self.num_replicas / min(self.batch_size, self.length)

    def __iter__(self) -> Iterator[Key]:
        """Yield this rank's keys of the current epoch."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator).tolist()
        size = min(self.batch_size, self.length)
        start, stop = self.local_slice()
        for first in range(0, len(order) - size + 1, size):
            for index in order[first + start : first + stop]:
                yield self.epoch, index

    def __len__(self) -> int:
        """Return the number of keys this rank yields in an epoch."""
        start, stop = self.local_slice()
        return max(1, self.length // self.batch_size) * (stop - start)


class EvalSampler(KeySampler):
    """Yield every index exactly once over all ranks: rank ``r`` of ``W`` yields ``r, r + W, r + 2W, ...``.

    Nothing is padded: ranks may have one sample more or less, and none at all where there are more ranks than samples.
    """

    def __init__(self, length: int, *, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(length, rank=rank, world_size=world_size)

    def __iter__(self) -> Iterator[Key]:
        """Yield this rank's keys; the epoch is always 0."""
        return ((0, index) for index in range(self.rank, self.length, self.num_replicas))

    def __len__(self) -> int:
        """Return the number of keys this rank yields."""
        return len(range(self.rank, self.length, self.num_replicas))
