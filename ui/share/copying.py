"""An exported file goes into the folder where a WebUI or ComfyUI looks for it."""

from __future__ import annotations

import shutil
from pathlib import Path

from ...trainer.errors import UserError
from ...trainer.files import atomic_file, sha256_of, writable

_FOLDERS = {"lora": ("models/Lora", "models/loras"), "model": ("models/Stable-diffusion", "models/checkpoints")}
"""Below the folder of a program: of the WebUIs and of ComfyUI."""
_COMPANIONS = (".png", ".json")


def copy_to(file: Path, folder: Path, companions: bool = True, whole_model: bool = False) -> list[Path]:
    """Copy a file, and with `companions` its picture and its notes; returns the new paths, also of those that were
    there already. Where the folder is a program's own, they go where that one looks for them.

    Raises:
        UserError: if there is no such folder, it cannot be written, or other files of these names are in it.
    """
    if not folder.is_dir():
        fix = "Name the folder of a WebUI or of ComfyUI, or the one in it where its LoRAs are."
        raise UserError("there is no such folder", str(folder), fix)
    below = (folder / name for name in _FOLDERS["model" if whole_model else "lora"])
    target = next((found for found in below if found.is_dir()), folder)
    if reason := writable(target):
        raise UserError(reason, str(target), "Choose another folder, or change its permissions.")
    beside = [file.with_suffix(ending) for ending in _COMPANIONS] if companions else []
    sources = [file, *(found for found in beside if found.is_file())]
    copies = {source: target / source.name for source in sources}
    taken = [copy for source, copy in copies.items() if copy.exists() and not _same(source, copy)]
    if taken:
        what = f"another file of the name {taken[0].name} is there already"
        raise UserError(what, str(target), "Move that one away, or choose another folder: nothing was copied.")
    for source, copy in copies.items():
        if not copy.exists():
            with atomic_file(copy) as temporary:
                shutil.copyfile(source, temporary)
    return list(copies.values())


def _same(one: Path, other: Path) -> bool:
    is_file = other.is_file() and one.stat().st_size == other.stat().st_size
    return is_file and sha256_of(one) == sha256_of(other)
