"""The files to share of one checkpoint of a run: LoRA files in each format, with card, thumbnail and grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..datasets.dataset import bucket_counts, tag_frequency
from .events import Step, read_events
from .export import Facts, FolderFacts, Precision, export, verify, write
from .files import atomic_file
from .jobs import RunFolder
from .keys import Format
from .models import Base, load_base
from .plan import Plan
from .sample import before_after_grid

FORMATS: tuple[Format, ...] = ("kohya", "diffusers")


def publish(
    base: Base,
    plan: Plan,
    run: RunFolder,
    step: int,
    name: str,
    folder: Path,
    formats: Sequence[Format] = FORMATS,
    precision: Precision = "fp16",
) -> list[Path]:
    """Write and verify the adapter on `base`; returns the `.safetensors` paths.

    The first format's file is `<name>.safetensors`, with all else beside it; the other's `<name>-<format>.safetensors`.

    Raises:
        ExportError: if a file on disk is not the same as the trained model.
    """
    facts = facts_of(plan, run, step, name)

    def load_fresh() -> Base:
        return load_base(plan.base, base.dtype, base.device)

    main, *others = formats
    paths = [folder / f"{name}.safetensors", *(folder / f"{name}-{other}.safetensors" for other in others)]
    export(base, paths[0], facts, load_fresh, main, precision)
    for path, other in zip(paths[1:], others, strict=True):
        write(base, path, other, facts, precision)
        verify(path, base, load_fresh)
    if grid := preview_grid(plan, run, step):
        with atomic_file(folder / f"{name}-grid.png") as temporary:
            grid.save(temporary, "PNG")
    return paths


def facts_of(plan: Plan, run: RunFolder, step: int, name: str) -> Facts:
    """What is known of a run at one of its steps."""
    records = list(read_events(run.events))
    steps = [record for record in records if isinstance(record.event, Step) and record.event.step <= step]
    recent = [record.event.loss for record in steps[-50:] if isinstance(record.event, Step)]
    previews = sorted(run.samples(step).glob("*.png"))
    return Facts(
        name=name,
        config=plan.config,
        folders=tuple(_folders(plan)),
        buckets=bucket_counts(plan.examples),
        tag_frequency=tag_frequency(plan.examples),
        steps=step,
        images_seen=plan.images_by_step[step - 1],
        started=records[0].time if records else None,
        finished=steps[-1].time if steps else None,
        loss=sum(recent) / len(recent) if recent else None,
        picture=_open(previews[0]) if previews else None,
    )


def preview_grid(plan: Plan, run: RunFolder, step: int) -> Image.Image | None:
    """The previews of the untouched base and of a step, side by side; None if one of them was not drawn."""
    before, after = (sorted(run.samples(number).glob("*.png")) for number in (0, step))
    if not before or len(before) != len(after):
        return None
    title = f"{plan.config.name}, step {step}"
    pictures = [_open(path) for path in before], [_open(path) for path in after]
    return before_after_grid(*pictures, plan.config.sample.prompts, title, columns=2, side=256)


def _folders(plan: Plan) -> list[FolderFacts]:
    """One entry for each data folder and repeat count in it."""
    counts: dict[tuple[Path, int, str], int] = {}
    for example in plan.examples:
        key = (example.source.path, example.item.repeats, example.source.trigger)
        counts[key] = counts.get(key, 0) + 1
    return [FolderFacts(str(path), images, repeats, trigger) for (path, repeats, trigger), images in counts.items()]


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
