"""Peak memory of a block of code: torch's allocations on the GPU, the process's memory on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """Peak in MB (10^6 bytes), set at the end of the block; ``None`` if the system does not report it."""

    megabytes: float | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak inside the block; on the CPU (Linux only) it includes interpreter, libraries and weights."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.megabytes = round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
        return
    known = True
    try:
        _RESET.write_text("5")  # reset the peak to the current memory
    except OSError:
        known = False
    yield peak
    if known:
        lines = _STATUS.read_text().splitlines()
        kilobytes = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
        peak.megabytes = None if kilobytes is None else round(kilobytes * 1.024 / 1000, 1)
