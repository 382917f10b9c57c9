"""What trains, a GPU or this computer's processors, and how much memory it has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import psutil
import torch

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A device with memory of its own."""

    kind: Literal["cpu", "cuda", "mps"]
    name: str
    room: int
    """Bytes that a run may take."""
    is_here: bool = True

    @property
    def is_gpu(self) -> bool:
        return self.kind != "cpu"

    @property
    def memory(self) -> str:
        """Whose memory it is, in words."""
        if not self.is_here:
            return f"{self.name}'s memory"
        return f"the memory of the GPU ({self.name})" if self.is_gpu else "this computer's memory"


def kind_here() -> Literal["cpu", "cuda", "mps"]:
    """What accelerate takes for a run on this computer."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None:
        return "cpu"
    return "mps" if found.type == "mps" else "cuda"


def has_bf16_on_cpu() -> bool:
    """Whether this computer's processors have the instructions; without them bf16 is emulated, many times as slow as
    fp32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def device_here() -> Device:
    """With what is free now, and what this process holds of it, for the run comes in its place."""
    kind = kind_here()
    if kind == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return Device(kind, torch.cuda.get_device_name(), free)
    return Device(kind, kind, psutil.virtual_memory().available + process_bytes())


def card(gigabytes: float) -> Device:
    """An NVIDIA GPU with so much memory, in GB as makers count them, which are GiB."""
    return Device("cuda", f"a card with {gigabytes:g} GB", int(gigabytes * GIB), is_here=False)


@cache
def process_bytes() -> int:
    """What this process takes before it has any weights: PyTorch and all other libraries, as they are in a run's."""
    from . import loop  # noqa: F401  # with all that a run imports

    return psutil.Process().memory_info().rss


def binary(count: float) -> str:
    """Bytes as memory is counted, as `340 MiB` or `2.9 GiB`."""
    if count < 999.5 * 2**20:
        return f"{count / 2**20:,.0f} MiB" if count >= 9.95 * 2**20 else f"{count / 2**20:.1f} MiB"
    return f"{count / GIB:.2f} GiB" if count < 9.95 * GIB else f"{count / GIB:.1f} GiB"
