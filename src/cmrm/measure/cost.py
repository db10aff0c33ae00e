"""Peak memory of a block of work: CUDA's allocator where the model lies on a GPU, else the process on Linux."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""What makes Linux forget a process's peak (man 5 proc)."""


@dataclass
class Peak:
    """What `peak_memory` found."""

    extra: int | None = None
    """Bytes above what was held at the beginning, set when the block ends; None where they cannot be measured."""


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure a block. What the C allocator keeps for later is given back first, so that one block does not hide another's peak."""
    found = Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.extra = torch.cuda.max_memory_allocated(device) - before
        return
    if not _forget_peak():
        yield found
        return
    held = _kib("VmRSS")
    yield found
    found.extra = max(0, _kib("VmHWM") - held) * 1024


def _forget_peak() -> bool:
    """Give free memory back and reset the process's peak; False where the system does not offer it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        RESET.write_text(_RESET_PEAK)
    except (OSError, AttributeError, TypeError):  # no such file, no such function, no C library to be had by no name
        return False
    return True


def _kib(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"{STATUS} has no {name}")
