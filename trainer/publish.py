"""The files to share of one checkpoint of a run: LoRA files in each format, with card, thumbnail and grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .card import write_beside
from .config import RunConfig
from .events import PlanMade, Step, history
from .export import Precision, export
from .files import atomic_file
from .jobs import RunFolder
from .keys import Format
from .metadata import Facts, FolderFacts
from .models import Base, load_base
from .sample import before_after_grid, drawn_like

FORMATS: tuple[Format, ...] = ("kohya", "diffusers")


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
    trained: Trained, name: str, folder: Path, formats: Sequence[Format] = FORMATS, precision: Precision = "fp16"
) -> list[Path]:
    """Write and verify the LoRA files; returns their paths: `<name>.safetensors` for kohya, `<name>-diffusers...`.

    Card, sidecar and thumbnail stand beside the first of them.

    Raises:
        ExportError: if a file on disk is not the same as the trained model.
    """
    facts, base = facts_of(trained, name), trained.base

    def load_fresh() -> Base:
        return load_base(base.info, dtype, device)

    device, dtype = base.device, base.dtype
    paths = []
    for format in formats:
        paths.append(folder / (f"{name}.safetensors" if format == "kohya" else f"{name}-{format}.safetensors"))
        export(base, paths[-1], facts, load_fresh, format, precision)
    write_beside(paths[0], facts, base.info)
    if grid := preview_grid(trained):
        with atomic_file(folder / f"{name}-grid.png") as temporary:
            grid.save(temporary, "PNG")
    return paths


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
    return before_after_grid(untouched, tuned, prompts, title, columns=2, side=256)


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
