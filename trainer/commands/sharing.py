"""Commands on what a run has trained: pictures of it, and files to share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from .files import print_lost
from .options import BlockStrengths, FilePrecision, Rank, RunPath, Strength, refuse_taken, refuse_unwritable

if TYPE_CHECKING:
    from ..release import Format


def sample(
    path: RunPath,
    prompt: Annotated[list[str], typer.Option(help="What to draw; may be repeated.")],
    step: Annotated[int | None, typer.Option(help="The checkpoint; the newest if not given.")] = None,
    strength: Strength = 1.0,
    block: BlockStrengths = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="The first picture's seed; sample.seed if not given.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A new folder for the pictures.")] = None,
) -> None:
    """Draw pictures with what a run has trained."""
    from dataclasses import replace

    from ..strengths import Strengths

    strengths = Strengths.parse(strength, block or [])
    if out:
        refuse_taken(out, "--out")

    from .. import adapter
    from ..run import load_run
    from ..sample import Drawing, draw, save_previews

    trained = load_run(path, step)
    base, name = trained.base, trained.run.name
    drawing = Drawing.of(trained.config.sample, base.info.resolution)
    drawing = drawing if seed is None else replace(drawing, seed=seed)
    with adapter.strength(base, strengths):
        pictures = draw(base, prompt, drawing)
    folder = out or _new_folder(trained.run.path / "samples", f"own-step-{trained.step:06d}")
    lora = f"{name} step {trained.step} at {strengths}"
    save_previews(folder, pictures, prompt, drawing, base.info.short_name, lora)
    for number in range(len(prompt)):
        typer.echo(folder / f"{number:02d}.png")


def export(
    path: RunPath,
    step: Annotated[int | None, typer.Option(help="The checkpoint; the newest if not given.")] = None,
    format_: Annotated[
        str, typer.Option("--format", help="kohya or diffusers; of a whole model, ldm or diffusers; all if not given.")
    ] = "",
    precision: FilePrecision = "fp16",
    out: Annotated[Path | None, typer.Option(help="The folder; the run's exports/ if not given.")] = None,
    bake: Annotated[
        int | None, typer.Option(min=1, metavar="RANK", help="Write a plain LoRA of this rank of whatever was trained.")
    ] = None,
) -> None:
    """Write the files to share, load them back, and compare them with the trained model."""
    if out:
        refuse_unwritable(out, "--out")

    from ..jobs import open_run
    from ..lorafile import LoraFile
    from ..release import formats_of
    from ..run import export_run

    config = open_run(path).read_config()
    if bake and config.adapter.kind == "full":
        raise UserError("has no effect: the run trained the base's own weights", "--bake", "Remove it.")
    there = formats_of(config, baked=bool(bake))
    wanted = [name.strip() for name in format_.split(",")] if format_ else list(there)
    formats: list[Format] = [name for name in there if name in wanted]
    if unknown := [name for name in wanted if name not in there]:
        fix = f"Formats: {', '.join(there)}."
        if unknown[0] == "diffusers":
            fix += " diffusers does not load this kind; with --bake RANK a plain LoRA is written, which it does."
        raise UserError(f"there is no format {unknown[0]!r} of this run", "--format", fix)
    files = export_run(path, step, formats, out, precision, bake or 0)
    for file in files:
        typer.echo(file)
    if bake:
        print_lost(json.loads(LoraFile.open(files[0]).metadata["lorasmith_baked_lost"]))


def interpolate(
    path: RunPath,
    steps: Annotated[str, typer.Option(help="The checkpoints, as in 300,400,500.")],
    weights: Annotated[str, typer.Option(help="Their shares, as in 1,1,2; equal if not given.")] = "",
    rank: Rank = None,
    out: Annotated[Path | None, typer.Option(help="The folder; the run's exports/ if not given.")] = None,
    precision: FilePrecision = "fp16",
) -> None:
    """Write the mean of several checkpoints as files to share."""


def publish(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of exported files.")],
    repo: Annotated[str, typer.Option(help="The repository on the Hub, as owner/name.")],
) -> None:
    """Upload files to share to the Hugging Face Hub."""


def _new_folder(parent: Path, name: str) -> Path:
    """The first of `name`, `name-2`, `name-3`, ... that does not exist."""
    numbers = (name if number == 1 else f"{name}-{number}" for number in range(1, 1_000_000))
    return next(parent / candidate for candidate in numbers if not (parent / candidate).exists())
