"""stable-diffusion.cpp: what it draws with a LoRA, beside what it draws of the same model with the change merged.

It takes full-size checkpoint files only, and gives pictures; those of a merged checkpoint stand for the live model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.errors import UserError
from lorasmith.trainer.export import write
from lorasmith.trainer.keys import Format
from lorasmith.trainer.loraread import merged
from lorasmith.trainer.models import load_base
from lorasmith.trainer.sharing.metadata import Facts
from lorasmith.trainer.verify import live_changes
from lorasmith.trainer.wholemodel import save_checkpoint_file

from .asked import Readings, RealClient
from .bases import ARCHITECTURE, FamilyName
from .cases import KINDS, adapt, file_stem
from .places import LOG, Say, run_script
from .verdicts import Verdict, errors_of, reading_of

TOLERANCE = 0.05
"""Of the picture's change. Untrained layers make rounding large: pictures of one merged model, saved in fp16 and in
fp32, are 0.04 of the change apart that a LoHa makes which changes colours by four of 255 steps."""
_SIDE = 64  # pixels


def draw_all(
    client: RealClient, python: Path, family: FamilyName, readings: Readings, folder: Path, say: Say
) -> Iterator[Verdict]:
    """What it makes of each file, by one small picture each."""
    folder.mkdir(parents=True, exist_ok=True)
    say(f"writing a checkpoint of a full-size {family} with random weights")
    plain = load_base(inspect_base(f"random:{ARCHITECTURE[family]}"), _DTYPE[family])
    checkpoint, whole = folder / "base.safetensors", folder / "merged.safetensors"
    save_checkpoint_file(plain, checkpoint)
    before = _required(_picture(python, folder, checkpoint, None), folder)
    for kind in dict.fromkeys(kind for kind, _ in readings):
        say(f"asking {client.title} about {family} {kind}")
        adapted = copy.deepcopy(plain)
        adapt(adapted, kind)
        files: dict[Format, Path] = {
            format: folder / f"{file_stem(family, kind, format)}.safetensors" for format in KINDS[kind].formats
        }
        for format, file in files.items():
            write(adapted, file, format, Facts(kind))
        changes = live_changes(adapted)
        del adapted
        with merged(plain.components, changes, 1.0):
            save_checkpoint_file(plain, whole)
        live = _required(_picture(python, folder, whole, None), folder)
        whole.unlink()
        for format, file in files.items():
            known = family, kind, format, client.title
            expected = client.expected(kind, format, readings)
            drawn = _picture(python, folder, checkpoint, file)
            if drawn is None:
                yield Verdict(*known, "none", expected, {}, f"it drew nothing; see {folder / LOG}")
                continue
            pictures = {"picture": drawn}, {"picture": live}, {"picture": before}
            yield Verdict(*known, reading_of(*pictures, TOLERANCE), expected, errors_of(*pictures))


_DTYPE: dict[FamilyName, torch.dtype] = {"sd1": torch.float32, "sdxl": torch.float16}  # two of them fit in 24 GiB


def _picture(python: Path, folder: Path, model: Path, lora: Path | None) -> Tensor | None:
    """(64 * 64 * 3,) in 0 to 255; None if it drew none. A process for each, for it may abort."""
    out = folder / "picture.ppm"
    out.unlink(missing_ok=True)
    job = {"model": str(model), "lora": lora and str(lora), "out": str(out), "side": _SIDE}
    run_script(python, job, "sdcpp_picture.py", folder)
    if not out.is_file():
        return None
    with Image.open(out) as picture:
        return torch.from_numpy(np.asarray(picture, dtype=np.float32).copy()).flatten()


def _required(picture: Tensor | None, folder: Path) -> Tensor:
    """A picture that others can be compared with; what is not finite, it draws in one colour."""
    if picture is None or picture.std() < 1:
        raise UserError("draws nothing without a LoRA", "stable-diffusion.cpp", f"See {folder / LOG}.")
    return picture
