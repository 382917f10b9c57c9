"""The files to share of one checkpoint of a run: LoRA files or whole models, with card, thumbnail and grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from .card import is_whole_model, write_beside
from .config import RunConfig
from .errors import ExportError
from .events import PlanMade, Step, history
from .export import Precision, export
from .files import atomic_file
from .jobs import RunFolder
from .metadata import Facts, FolderFacts
from .models import Base, load_base
from .sample import before_after_grid, drawn_like
from .wholemodel import save_checkpoint_file, save_model_folder

Kind = Literal["lora", "full"]
Format = Literal["kohya", "ldm", "diffusers"]
FORMATS: dict[Kind, tuple[Format, ...]] = {"lora": ("kohya", "diffusers"), "full": ("ldm", "diffusers")}
"""By what was trained. The first is what clients read, a file; a whole model for diffusers is a folder."""


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a run, on a live base."""

    run: RunFolder
    config: RunConfig
    base: Base
    step: int
    images: int
    """Images seen up to this step."""


def publish(
    trained: Trained, name: str, folder: Path, formats: Sequence[Format] = (), precision: Precision = "fp16"
) -> list[Path]:
    """Write and verify the files, all formats if none is named; returns `<name>.safetensors`, `<name>-diffusers...`.

    Card, sidecar and thumbnail stand beside the first of them.

    Raises:
        ExportError: if a file on disk is not the same as the trained model, after the other formats were written.
    """
    facts, kind = facts_of(trained, name), trained.config.adapter.kind
    paths, refused = [], []
    for format in FORMATS[kind]:
        try:
            if format in formats or not formats:
                paths.append(_write(trained.base, folder, name, format, facts, precision))
        except ExportError as error:  # what can be written is
            refused += error.problems
    if refused:
        raise ExportError.of(refused)
    write_beside(paths[0], facts, trained.base.info)
    if grid := preview_grid(trained):
        with atomic_file(folder / f"{name}-grid.png") as temporary:
            grid.save(temporary, "PNG")
    return paths


def _write(base: Base, folder: Path, name: str, format: Format, facts: Facts, precision: Precision) -> Path:
    """One file or folder, verified."""
    lora = not is_whole_model(facts)
    path = folder / (
        f"{name}.safetensors" if format != "diffusers" else f"{name}-diffusers{'.safetensors' if lora else ''}"
    )
    device, dtype = base.device, base.dtype
    if format == "ldm":
        save_checkpoint_file(base, path, precision)
    elif lora:
        export(base, path, facts, lambda: load_base(base.info, dtype, device), format, precision)
    else:
        save_model_folder(base, path, precision)
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
    what = "with the LoRA" if trained.config.adapter.kind == "lora" else "as it was trained"
    return before_after_grid(untouched, tuned, prompts, title, columns=2, side=256, after_is=what)


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
