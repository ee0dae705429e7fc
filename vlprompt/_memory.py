"""Memory of the machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_TABLE = Path("/proc/meminfo")
#: Bytes that are assumed where the system does not say: on Windows.
ASSUMED = 8 << 30


def total_memory(device: torch.device | None = None) -> int:
    """Return the bytes of memory of a CUDA ``device``, otherwise of the machine.

    Limits are derived from the total and not from the free memory where a repeated run has to sum in the same order.
    """
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return ASSUMED


def free_memory() -> int:
    """Return the bytes of memory that are available; half of all where the system does not say."""
    if _TABLE.is_file():
        lines = dict(line.split(":", 1) for line in _TABLE.read_text().splitlines())
        if "MemAvailable" in lines:
            return int(lines["MemAvailable"].split()[0]) * 1024
    return total_memory() // 2
