"""Process groups: which process this is, and what several processes share.

The functions import torch when called: ``vlprompt --help`` must not wait for it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar

from vlprompt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

_T = TypeVar("_T")
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")


def local_rank() -> int:
    """Return the number of this process on its machine, as the launcher set it; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", 0))


def check_launcher(devices: int = 1) -> None:
    """Raise ConfigError if the environment has the variables of a launcher that did not start this process.

    A process with a rank above 0 writes and prints nothing, because it leaves that to the first one. A launcher also
    sets MASTER_ADDR. Slurm's variables are set in every job; they matter if Slurm started several copies.

    Args:
        devices: Number of processes of the run.
    """
    given = {name: os.environ[name] for name in _RANKS if name in os.environ}
    if wrong := [f"{name} is {value!r}" for name, value in given.items() if not value.strip().isdecimal()]:
        raise ConfigError(f"{wrong[0]} in the environment; accepted: the number of a process. Remove it with unset")
    slurm, ours = given.pop("SLURM_PROCID", "0"), "MASTER_ADDR" in os.environ
    least = 0 if devices > 1 else 1  # several processes are not started if there is a rank
    if not ours and (stray := [f"{name}={value}" for name, value in given.items() if int(value) >= least]):
        names = " ".join(text.partition("=")[0] for text in stray)
        raise ConfigError(
            f"the environment has {', '.join(stray)}, as in a process of a launcher, but not MASTER_ADDR, so no "
            f"launcher started this one. Remove what is left over: unset {names}"
        )
    if not ours and int(slurm):
        raise ConfigError(
            f"SLURM_PROCID is {slurm}: Slurm started this command {os.environ.get('SLURM_NTASKS', 'several')} times. "
            "Start it once (srun --ntasks 1) and give the number of processes: --trainer.devices N"
        )


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
