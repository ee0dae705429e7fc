"""Samplers whose batches do not depend on the number of processes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DistributedSampler

from vlprompt._random import derived_seed
from vlprompt.errors import ConfigError

#: Item of a sampler: epoch and index of the sample.
Key = tuple[int, int]


class KeySampler(DistributedSampler[Key]):
    """Base class of samplers of keys: length, rank and epoch.

    A subclass of DistributedSampler, because Lightning replaces other samplers by one that pads and does not call their
    ``set_epoch``. The arithmetic of the parent class is not used.
    """

    def __init__(self, length: int, *, rank: int, world_size: int) -> None:
        self.length, self.rank, self.num_replicas, self.epoch = length, rank, world_size, 0
        # Attributes of the parent class, which other code may read.
        self.shuffle, self.seed, self.drop_last = False, 0, False
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank is {rank}; with {world_size} processes ranks run from 0 to {world_size - 1}.")


class TrainSampler(KeySampler):
    """Yield ``(epoch, index)`` in an order that depends on ``(seed, epoch)`` only.

    The order of an epoch is cut into global batches of ``batch_size``. Rank ``r`` of ``W`` yields slice ``r`` of ``W``
    of every global batch, so that ``W`` processes together see the batches of one process. The last, incomplete batch
    is dropped, or shared as evenly as possible; a rank without a share of it yields its first sample with weight 0. If
    there are fewer samples than ``batch_size``, the epoch is one such short batch.

    Args:
        length: Number of training samples.
        batch_size: Global batch size ``B``, over all processes.
        seed: Seed of the orders.
        rank: Rank of this process.
        world_size: Number of processes ``W``.
        drop_last: Whether an incomplete batch is dropped, unless it is the only one.

    Raises:
        ConfigError: If ``W`` does not divide ``B``, or there are fewer samples than processes.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
    ) -> None:
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
        self.batch_size, self.seed, self.shuffle, self.drop_last = batch_size, seed, True, drop_last

    @property
    def local_batch_size(self) -> int:
        """Samples of a global batch per rank: the batch size of its DataLoader."""
        return self.batch_size // self.num_replicas

    def _sizes(self) -> list[int]:
        """Return the sizes of the global batches of an epoch."""
        full, rest = divmod(self.length, self.batch_size)
        keeps_rest = rest and (not full or not self.drop_last)
        return [self.batch_size] * full + ([rest] if keeps_rest else [])

    def _slice(self, size: int) -> tuple[int, int]:
        """Return start and stop of this rank's slice of a global batch of ``size`` samples."""
        each, extra = divmod(size, self.num_replicas)
        start = self.rank * each + min(self.rank, extra)
        return start, start + each + (self.rank < extra)

    def _scale(self, size: int) -> float:
        start, stop = self._slice(size)
        return (stop - start) * self.num_replicas / size

    def scale(self) -> float:
        """Return ``local_count * W / global_count``, the weight of a local mean in the mean over ranks.

        It is that of the first batch; an incomplete last batch may have another one (:meth:`scales`).
        """
        return self._scale(self._sizes()[0])

    def scales(self) -> dict[int, float]:
        """Return the weight of an incomplete last batch, by its number, if the epoch has more than this batch."""
        *others, last = self._sizes()
        return {len(others): self._scale(last)} if others and last < self.batch_size else {}

    def __iter__(self) -> Iterator[Key]:
        """Yield this rank's keys of the current epoch."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator).tolist()
        first = 0
        for size in self._sizes():
            start, stop = self._slice(size)
            for index in order[first + start : first + stop] or order[first : first + 1]:
                yield self.epoch, index
            first += size

    def __len__(self) -> int:
        """Return the number of keys this rank yields in an epoch."""
        slices = [self._slice(size) for size in self._sizes()]
        return sum(max(stop - start, 1) for start, stop in slices)


class EvalSampler(KeySampler):
    """Yield every index exactly once over all ranks: rank ``r`` of ``W`` yields entries ``r, r + W, r + 2W, ...``.

    Nothing is padded: ranks may differ by one sample, and have none if there are more ranks than samples.

    Args:
        length: Number of samples.
        order_seed: Seed of a random order of the samples; None for the order of the list.
        rank: Rank of this process.
        world_size: Number of processes ``W``.
    """

    def __init__(self, length: int, *, order_seed: int | None = None, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(length, rank=rank, world_size=world_size)
        self.order_seed = order_seed

    def order(self) -> list[int]:
        """Return the indices of all ranks in the order in which they are evaluated."""
        if self.order_seed is None:
            return list(range(self.length))
        generator = torch.Generator().manual_seed(derived_seed(self.order_seed))
        order: list[int] = torch.randperm(self.length, generator=generator).tolist()
        return order

    def __iter__(self) -> Iterator[Key]:
        """Yield this rank's keys; the epoch is always 0."""
        return ((0, index) for index in self.order()[self.rank :: self.num_replicas])

    def __len__(self) -> int:
        """Return the number of keys this rank yields."""
        return len(range(self.rank, self.length, self.num_replicas))
