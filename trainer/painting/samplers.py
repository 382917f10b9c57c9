"""The samplers that pictures can be drawn with, by the names that A1111 gives them."""

from __future__ import annotations

from typing import Literal

Sampler = Literal["ddim", "euler", "euler-a", "dpm++-2m", "dpm++-2m-karras"]

SAMPLERS: dict[Sampler, str] = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler-a": "Euler a",
    "dpm++-2m": "DPM++ 2M",
    "dpm++-2m-karras": "DPM++ 2M Karras",
}

MOST_STEPS = 500
"""Of sampling. Near 1000 some samplers would step beyond a schedule of 1000 time-steps, as all bases have it."""
