"""The device that trains here, and how much of its memory is used, in one line; without torch."""

from __future__ import annotations

import time
from contextlib import suppress

import psutil

_GB = 1e9
_SECONDS = 3.0
"""Several tabs ask each second; once in a while is enough."""
_last: tuple[float, str] = (0.0, "")


def device_line() -> str:
    """As in "NVIDIA GeForce RTX 4070: 7.4 of 12.0 GB used"; of a computer without such a card, its own memory."""
    global _last
    asked, line = _last
    if not line or time.monotonic() - asked > _SECONDS:
        line = _gpu_line() or _cpu_line()
        _last = (time.monotonic(), line)
    return line


def _gpu_line() -> str:
    """Empty without an NVIDIA card or its driver."""
    import pynvml

    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        lines = []
        for number in range(pynvml.nvmlDeviceGetCount()):
            device = pynvml.nvmlDeviceGetHandleByIndex(number)
            memory = pynvml.nvmlDeviceGetMemoryInfo(device)
            name = pynvml.nvmlDeviceGetName(device)
            used, total = float(memory.used) / _GB, float(memory.total) / _GB
            lines.append(f"{name}: {used:.1f} of {total:.1f} GB used")
        return "; ".join(lines)
    return ""


def _cpu_line() -> str:
    memory = psutil.virtual_memory()
    used = (memory.total - memory.available) / _GB
    return f"No NVIDIA GPU: the processor trains. {used:.1f} of {memory.total / _GB:.1f} GB memory used"
