"""What this computer has: versions, devices, disk. For bug reports, and before a first run."""

from __future__ import annotations

import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from . import __version__
from .files import user_cache

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "pillow", "gradio", "xformers")


def examine() -> dict[str, dict[str, Any]]:
    """Topics, each with its facts by name."""
    return {"versions": versions(), "devices": _devices(), "disk": _disk()}


def versions() -> dict[str, str]:
    found = {"lorasmith": __version__, "python": platform.python_version(), "system": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _devices() -> dict[str, Any]:
    import torch

    memory = psutil.virtual_memory()
    found: dict[str, Any] = {
        "cpu cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free",
    }
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        found[f"gpu {number}"] = f"{device.name}, {device.total_memory / 2**30:.1f} GiB"
    if not torch.cuda.is_available():
        built_for = (
            f"PyTorch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "PyTorch is a CPU build"
        )
        found["gpu"] = f"none that PyTorch can use ({built_for})"
    return found


def _disk() -> dict[str, str]:
    cache = user_cache()
    places = {"here": Path.cwd(), "cache": next(folder for folder in (cache, *cache.parents) if folder.exists())}
    free = {name: f"{shutil.disk_usage(place).free / 2**30:.1f} GiB free" for name, place in places.items()}
    used = sum(file.stat().st_size for file in cache.rglob("*.safetensors")) if cache.exists() else 0
    return free | {"cache in use": f"{used / 2**20:.0f} MiB in {cache}"}
