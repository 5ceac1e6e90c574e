"""Peak memory of one run among many in a process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import torch


class Peak:
    """read(): bytes at the peak since this was made, beyond what was in use then (the loaded base). On a GPU the
    allocator's count; on a CPU resident memory, whose high-water mark Linux lets a process reset; elsewhere None."""

    def __init__(self, device: torch.device):
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)
            return
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what an earlier run freed must not hide this one's growth
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.start = _status("VmRSS") or 0

    def read(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.start
        peak = _status("VmHWM")
        return None if peak is None else max(0, peak - self.start)


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), None)


def exhausted(error: BaseException) -> bool:
    """Whether it says that a device, or the machine, has no memory left."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
