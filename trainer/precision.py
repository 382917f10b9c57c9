"""In which precision a run computes, and keeps its base."""

from __future__ import annotations

from typing import Literal

import torch

from .config import Precision, RunConfig

MixedPrecision = Literal["no", "fp16", "bf16"]
"""As accelerate names them."""
DTYPES: dict[MixedPrecision, torch.dtype] = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def mixed_precision(setting: Precision) -> MixedPrecision:
    """The precision of base and activations on this computer."""
    if setting != "auto":
        return "no" if setting == "fp32" else setting
    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def base_dtype(config: RunConfig, precision: MixedPrecision) -> torch.dtype:
    """What the base's weights are kept in. fp32 if they are trained: below it, small changes would be lost."""
    return torch.float32 if config.adapter.kind == "full" else DTYPES[precision]
