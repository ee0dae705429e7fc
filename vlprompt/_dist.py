"""Process groups: which process this is, and what several processes share.

The functions import torch when called: ``vlprompt --help`` must not wait for it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

_T = TypeVar("_T")


def local_rank() -> int:
    """Return the number of this process on its machine, as the launcher set it; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main_process() -> bool:
    """Whether this process is the one that writes; Lightning starts the others with a rank in the environment."""
    return local_rank() == 0 and int(os.environ.get("NODE_RANK", 0)) == 0


def in_group() -> bool:
    """Whether a process group has been initialised."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def rank_and_size() -> tuple[int, int]:
    """Return the rank of this process and the number of processes; ``(0, 1)`` without a group."""
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if in_group() else (0, 1)


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over all processes, in place, and return it."""
    import torch.distributed as dist

    if in_group():
        dist.all_reduce(tensor)
    return tensor


def gathered(value: _T) -> list[_T]:
    """Return the ``value`` of every process, by rank. All processes have to call this."""
    import torch.distributed as dist

    if not in_group():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def first_process_says(flag: bool) -> bool:
    """Return the ``flag`` of the first process. All processes have to call this; without a group it is this one's."""
    import torch
    import torch.distributed as dist

    if not in_group():
        return flag
    on_gpu = dist.get_backend() == "nccl"
    said = torch.tensor([int(flag)], device=torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu")
    dist.broadcast(said, src=0)
    return bool(said.item())
