"""Baking: changes of any form, written as the plain LoRA that every client reads, with what is lost in that."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..datasets.workers import Progress
from .anatomy import skeleton
from .bases import FAMILY_TITLES, FamilyName, inspect_base
from .delta import Changes, Delta, baked
from .errors import Problem, UserError
from .export import DTYPES, Exported, Precision, castable, save, shape_of, tensors
from .lorafile import LoraFile, guess_family
from .loraread import read_lora
from .metadata import BakedFacts, rewritten
from .models import Base, load_base
from .verify import Layer, verify_tensors

_PUBLISHED: dict[FamilyName, str] = {"sd1": "random:sd15", "sd2": "random:sd21", "sdxl": "random:sdxl"}


@dataclass(frozen=True)
class BakedFile:
    """A plain LoRA that was made of another file."""

    file: Exported
    facts: BakedFacts


def bake(
    base: Base, changes: Changes, rank: int, progress: Progress | None = None
) -> tuple[dict[str, list[Delta]], BakedFacts]:
    """The nearest plain LoRAs, of at most a rank, to the changes of a base's layers, and what they lack.

    Of `base`, shapes are enough unless there are DoRAs.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain: dict[str, list[Delta]] = {}
    lost: dict[str, float] = {}
    done, total = 0, sum(len(own) for own in changes.values())
    for component, own in changes.items():
        change = rest = 0.0
        for delta in own:
            weight = Layer(delta, base.components[component]).weight
            shaped = torch.empty_like(weight, device=device) if weight.device.type == "meta" else weight.to(device)
            made = baked(delta, shaped, rank)
            plain.setdefault(component, []).append(made.delta.on("cpu"))
            change, rest = math.hypot(change, made.change), math.hypot(rest, made.rest)
            done += 1
            if progress:
                progress(done, total)
        if own:
            lost[component] = rest / change if change else 0.0
    return plain, BakedFacts(rank, lost)


def bake_file(
    source: Path,
    rank: int,
    target: Path,
    model: str = "",
    precision: Precision = "fp16",
    progress: Progress | None = None,
) -> BakedFile:
    """A plain LoRA, of at most a rank, of a file of any trainer; what the file says about itself goes along.

    `model` is the base that the file was made for. A DoRA needs its weights; without one, layers are taken to be those
    of the published model of the family that the file is recognised as.

    Raises:
        UserError: if the family is not known, if a DoRA's base is not named, or if the file does not fit the base.
        ExportError: if what was written is not what was meant.
    """
    file = LoraFile.open(source)
    info = inspect_base(model or _PUBLISHED[_family_of(file)])
    base = skeleton(info)
    try:
        changes = read_lora(source, base.components, info.family)
    except UserError as error:
        raise error if model else UserError.of([*error.problems, _taken_for(info.family)]) from error
    if any(delta.form == "dora" for own in changes.values() for delta in own):
        if not model:
            what = "is a DoRA, whose change depends on the base's own weights"
            raise UserError(what, str(source), "Name the base it was trained on with --base.")
        base = load_base(info)
    plain, facts = bake(base, changes, rank, progress)
    written = castable(base, plain, "kohya", DTYPES[precision])
    weights = tensors(base, written, "kohya")
    header = partial(rewritten, file.metadata, target.stem, info, shape_of(base, written), facts)
    unverified = target.with_name(f"{target.stem}.unverified.safetensors")
    try:
        exported = save(unverified, weights, header, "kohya", precision)
        verify_tensors(unverified, base, plain)
        unverified.replace(target)
    finally:
        unverified.unlink(missing_ok=True)
    return BakedFile(dataclasses.replace(exported, path=target), facts)


def _family_of(file: LoraFile) -> FamilyName:
    family, because = guess_family(file)
    if family is None:
        what = f"is for a base that cannot be told: {because}"
        raise UserError(what, str(file.path), "Name the base it was made for with --base.")
    return family


def _taken_for(family: FamilyName) -> Problem:
    what = f"not given, so the file was taken to be for a published {FAMILY_TITLES[family]}"
    return Problem("--base", what, "If it is for a model of another shape, name that.")
