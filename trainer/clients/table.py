"""Which clients read which kind of file, and what to do where one does not.

Read and measured in their code: A1111 1.10, ComfyUI, Forge, InvokeAI 6.14, diffusers 0.42, sd-scripts, SD.Next, and
stable-diffusion.cpp of 2025. A plain LoRA in kohya's names is the one kind that all of them read alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from ..config import Kind

if TYPE_CHECKING:
    from ..delta import Form

Client = Literal["A1111", "ComfyUI", "Forge", "InvokeAI", "diffusers", "sd-scripts", "SD.Next", "stable-diffusion.cpp"]
Reading = Literal["same", "other", "none"]
"""same: it does what was trained. other: it takes the file and does something else. none: it refuses or skips it."""
CLIENTS: tuple[Client, ...] = get_args(Client)

FORM_OF: dict[Kind, Form] = {
    "lora": "lora",
    "dora": "dora",
    "loha": "loha",
    "lokr": "lokr",
    "oft": "full",  # no client reads PEFT's rotations; the change they make is exact, and as large as the layers
    "boft": "full",
}
"""The form of the file, by `adapter.kind`; of kind "full" comes a whole model."""


def _readings(most: Reading, others: dict[Client, Reading]) -> dict[Client, Reading]:
    return {client: others.get(client, most) for client in CLIENTS}


_LYCORIS = _readings("same", {"diffusers": "none", "sd-scripts": "none"})
COMPATIBILITY: dict[Form, dict[Client, Reading]] = {
    "lora": _readings("same", {}),
    # The lengths of rows: ComfyUI divides by those of the base's weight, A1111, InvokeAI, Forge and SD.Next take them
    # for those of columns, sd-scripts and stable-diffusion.cpp drop them. diffusers reads its own file of the UNet.
    "dora": _readings("other", {"diffusers": "same"}),
    "loha": _LYCORIS,
    "lokr": _readings("same", {"diffusers": "none", "sd-scripts": "none", "InvokeAI": "none"}),
    "full": _LYCORIS,
}
_INSTEAD = "lorasmith resize writes a plain LoRA of it"
_NOTES: dict[Form, str] = {
    "dora": "diffusers reads it of the UNet alone: with text encoders (adapter.text_encoder) no diffusers file is "
    "written.",
    "lokr": "InvokeAI would read it, but finds out for which base it is only if that is an SDXL.",
    "full": "what oft and boft change is stored whole, so that the file is as large as the adapted layers.",
}


def unread_by(form: Form) -> list[str]:
    """What a person should know before training such a kind; empty for a plain LoRA."""
    told = []
    if skipping := read_by(form, "none"):
        told.append(f"{form}: {_listed(skipping)} do not read it; {_INSTEAD}.")
    if differing := read_by(form, "other"):
        told.append(f"{form}: {_listed(differing)} make another change of it; {_INSTEAD}.")
    return told + ([f"{form}: {_NOTES[form]}"] if form in _NOTES else [])


def read_by(form: Form, how: Reading) -> list[str]:
    """The clients that read it so."""
    return [client for client, reading in COMPATIBILITY[form].items() if reading == how]


def _listed(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
