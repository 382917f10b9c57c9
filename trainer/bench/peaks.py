"""The most memory that this process has had, of the computer or of its GPU, in bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import torch

MIB = 2**20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak(device: torch.device) -> int:
    """Since the process began, or since it was forgotten: of a GPU what tensors took; of the computer what was
    resident."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_resident()


def reserved(device: torch.device) -> int | None:
    """What PyTorch took of a GPU to have it at hand; None without one."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def forget_peak(device: torch.device) -> bool:
    """Let the peak begin anew; False where the system cannot: of a process's memory only Linux does (proc(5))."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _peak_resident() -> int:
    if sys.platform == "linux":  # getrusage may tell the peak of the process that started this one
        [line] = [line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
