"""The most memory that a stretch of work took: on the GPU what torch had, on the CPU what the process had."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """The peak in MB (10^6 bytes) once the work is over; ``None`` where the system does not tell."""

    megabytes: float | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of what runs inside; of a CPU process with interpreter, libraries and weights (Linux only)."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.megabytes = round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
        return
    known = True
    try:
        _RESET.write_text("5")  # the process's peak starts anew from what it has now
    except OSError:
        known = False
    yield peak
    if known:
        lines = _STATUS.read_text().splitlines()
        kilobytes = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
        peak.megabytes = None if kilobytes is None else round(kilobytes * 1.024 / 1000, 1)
