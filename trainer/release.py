"""The files to share of one checkpoint of a run: LoRA files or whole models, with card, thumbnail and grid.

If new tokens were trained, their embeddings are a file of their own, because most clients read them only so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from . import __version__
from .baking import bake
from .bases import FamilyName
from .card import embedding_folder, is_whole_model, write_beside
from .config import Kind, RunConfig
from .delta import Changes
from .errors import ExportError
from .events import PlanMade, Step, history
from .export import Precision, export, trained_changes
from .files import atomic_file
from .jobs import RunFolder
from .metadata import Facts, FolderFacts, embedding_file
from .models import Base, load_base
from .pivotal import token_embeddings
from .sample import before_after_grid, drawn_like
from .wholemodel import save_checkpoint_file, save_model_folder

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


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a run, on a live base."""

    run: RunFolder
    config: RunConfig
    base: Base
    step: int
    images: int
    """Images seen up to this step."""


def release(
    trained: Trained,
    name: str,
    folder: Path,
    formats: Sequence[Format] = (),
    precision: Precision = "fp16",
    bake_to: int = 0,
) -> list[Path]:
    """Write and verify the files, all formats if none is named; returns `<name>.safetensors`, `<name>-diffusers...`.

    With `bake_to`, a plain LoRA of that rank is made of whatever was trained, `<name>-baked<rank>.safetensors`. Card,
    sidecar and thumbnail stand beside the first file; embeddings of new tokens in `<name>-embedding/`, as
    `<trigger>.safetensors`.

    Raises:
        ExportError: if a file on disk is not the same as the trained model, after the other formats were written.
    """
    facts, changes = facts_of(trained, name), None
    if bake_to:
        changes, baked = bake(trained.base, trained_changes(trained.base), bake_to)
        name = f"{name}-baked{bake_to}"
        facts = replace(facts, name=name, baked=baked)
    paths, refused = [], []
    for format in formats_of(trained.config, bool(bake_to)):
        try:
            if format in formats or not formats:
                paths.append(_write(trained.base, folder, name, format, facts, precision, changes))
        except ExportError as error:  # what can be written is
            refused += error.problems
    if refused:
        raise ExportError.of(refused)
    write_beside(paths[0], facts, trained.base.info)
    if file := embedding_file(facts):
        paths.append(write_embedding(trained.base, folder / embedding_folder(f"{name}.safetensors") / file))
    if not bake_to and (grid := preview_grid(trained)):  # the pictures are of what was trained
        with atomic_file(folder / f"{name}-grid.png") as temporary:
            grid.save(temporary, "PNG")
    return paths


def _write(
    base: Base, folder: Path, name: str, format: Format, facts: Facts, precision: Precision, changes: Changes | None
) -> Path:
    """One file or folder, verified."""
    lora = not is_whole_model(facts)
    path = folder / (
        f"{name}.safetensors" if format != "diffusers" else f"{name}-diffusers{'.safetensors' if lora else ''}"
    )
    device, dtype = base.device, base.dtype
    if format == "ldm":
        save_checkpoint_file(base, path, precision)
    elif lora:
        export(base, path, facts, lambda: load_base(base.info, dtype, device), format, precision, changes)
    else:
        save_model_folder(base, path, precision)
    return path


_EMBEDDINGS: dict[FamilyName, dict[str, str]] = {
    "sd1": {"text_encoder": "emb_params"},
    "sd2": {"text_encoder": "emb_params"},
    "sdxl": {"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
}
"""What clients call the vectors of each text encoder."""


def write_embedding(base: Base, path: Path) -> Path:
    """Write the vectors of new tokens, (tokens, width) in fp32, and read them back.

    Raises:
        ExportError: if they hold NaN or infinity, or the file is not the same.
    """
    names = _EMBEDDINGS[base.info.family]
    vectors = {names[part]: vector.float().cpu().contiguous() for part, vector in token_embeddings(base).items()}
    if not all(vector.isfinite().all() for vector in vectors.values()):
        fix = "Export an earlier checkpoint; train with a lower optimizer.token_lr."
        raise ExportError("the embeddings of the new tokens hold NaN or infinity", path.name, fix)
    with atomic_file(path) as temporary:
        save_file(vectors, temporary, {"lorasmith_version": __version__})
        written = load_file(temporary)
        if written.keys() != vectors.keys() or not all(torch.equal(written[name], vectors[name]) for name in vectors):
            raise ExportError("is not what was written", path.name, "Export it again, to another disk.")
    return path


def facts_of(trained: Trained, name: str) -> Facts:
    """What is known of a run at one of its steps, from what it wrote down."""
    records = history(trained.run.events)
    steps = [r for r in records if isinstance(r.event, Step) and r.event.step <= trained.step]
    recent = [r.event.loss for r in steps[-_RECENT:] if isinstance(r.event, Step)]
    plans = [r.event.plan for r in records if isinstance(r.event, PlanMade)]
    dataset = plans[-1].get("dataset", {}) if plans else {}
    folders = dataset.get("folders", [])
    previews = sorted(trained.run.samples(trained.step).glob("*.png"))
    return Facts(
        name=name,
        config=trained.config,
        folders=tuple(FolderFacts(folder, n, repeats, trigger) for folder, n, repeats, trigger in folders),
        buckets={(width, height): images for width, height, images in dataset.get("buckets", [])},
        tag_frequency=dataset.get("tag_frequency", {}),
        steps=trained.step,
        images_seen=trained.images,
        started=records[0].time if records else None,
        finished=steps[-1].time if steps else None,
        loss=sum(recent) / len(recent) if recent else None,
        picture=_open(previews[0]) if previews else None,
    )


_RECENT = 50  # steps whose mean loss is the final loss


def preview_grid(trained: Trained) -> Image.Image | None:
    """The previews of the untouched base and of a step, side by side; None if they cannot be compared."""
    before, after = trained.run.samples(0), trained.run.samples(trained.step)
    if not drawn_like(before) or drawn_like(before) != drawn_like(after):
        return None
    untouched, tuned = ([_open(path) for path in sorted(folder.glob("*.png"))] for folder in (before, after))
    prompts = [text.split("\n")[0] for text in drawn_like(before)]
    title = f"{trained.config.name}, step {trained.step}"
    what = "with the LoRA" if trained.config.adapter.kind != "full" else "as it was trained"
    return before_after_grid(untouched, tuned, prompts, title, columns=2, side=256, after_is=what)


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
