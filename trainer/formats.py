"""In which formats a run can be written, by what was trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .config import Kind, RunConfig

Format = Literal["kohya", "ldm", "diffusers"]
FORMATS: dict[Kind, tuple[Format, ...]] = {
    "lora": ("kohya", "diffusers"),
    "dora": ("kohya", "diffusers"),
    "full": ("ldm", "diffusers"),
    **dict.fromkeys(("loha", "lokr", "oft", "boft"), ("kohya",)),
}
"""By what was trained. The first is what clients read, a file; a whole model for diffusers is a folder."""


def formats_of(config: RunConfig, baked: bool = False) -> tuple[Format, ...]:
    """The formats in which a run, or a plain LoRA baked of it, can be written.

    diffusers loads the lengths of a DoRA for the UNet alone.
    """
    kind = config.adapter.kind
    if kind == "dora" and config.adapter.text_encoder and not baked:
        return ("kohya",)
    return FORMATS["lora" if baked else kind]
