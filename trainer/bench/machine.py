"""The computer that was measured, in facts without which no figure means anything."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import psutil
import torch

from ..doctor import examine

_NEEDED = ("lorasmith", "python", "system", "torch", "diffusers", "transformers", "peft", "accelerate")


def machine() -> dict[str, Any]:
    versions = examine()["versions"]
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return gpu | {
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "versions": {name: versions[name] for name in _NEEDED},
    }


def cpu_name() -> str:
    """As its maker calls it, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
