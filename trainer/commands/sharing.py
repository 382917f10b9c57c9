"""Commands on what a run has trained: pictures of it, and files to share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import UserError
from ..painting.samplers import MOST_STEPS, Sampler
from .options import (
    BlockStrengths,
    Json,
    Rank,
    RunPath,
    Strength,
    numbers,
    print_json,
    print_lost,
    progress_of,
    refuse_taken,
    refuse_unwritable,
)

OwnPrecision = Annotated[
    Literal["fp16", "bf16", "fp32"] | None,
    typer.Option("--precision", help="Precision of the files; export.precision if not given."),
]
ExportFolder = Annotated[Path | None, typer.Option("--out", help="The folder; the run's exports/ if not given.")]
Bundle = Annotated[bool, typer.Option("--bundle", help="Also write a .zip of all, with a card and a license note.")]


def sample(
    path: RunPath,
    prompt: Annotated[list[str], typer.Option(help="What to draw; may be repeated.")],
    step: Annotated[int | None, typer.Option(help="The checkpoint; the newest if not given.")] = None,
    strength: Strength = 1.0,
    block: BlockStrengths = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="The first picture's seed; sample.seed if not given.")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What not to draw; sample.negative_prompt if not given.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=MOST_STEPS, help="Steps of the sampler; sample.steps if not given.")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(min=1, max=50, help="Classifier-free guidance scale; sample.guidance if not given."),
    ] = None,
    sampler: Annotated[Sampler, typer.Option(help="Which sampler; that of the previews is ddim.")] = "ddim",
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
    given = {"seed": seed, "negative_prompt": negative_prompt, "steps": steps, "guidance": guidance, "sampler": sampler}
    drawing = Drawing.of(trained.config.sample, base.info.resolution)
    drawing = replace(drawing, **{key: value for key, value in given.items() if value is not None})
    with adapter.strength(base, strengths):
        pictures = draw(base, prompt, drawing)
    folder = out or _new_folder(trained.run.path / "samples", f"own-step-{trained.step:06d}")
    lora = f"{name} step {trained.step} at {strengths}"
    save_previews(folder, pictures, prompt, drawing, base.info.short_name, lora)
    for number in range(len(prompt)):
        typer.echo(folder / f"{number:02d}.png")


def paint(
    runs: Annotated[Path, typer.Argument(metavar="RUNS", help="The folder that holds run folders.")],
    idle: Annotated[float, typer.Option(min=0, help="Seconds without an order after which it ends.")] = 300.0,
) -> None:
    """Draw what the browser app orders; it starts this by itself."""
    from ..painting.painter import paint as work

    work(runs, idle)


def interpolate(
    path: RunPath,
    steps: Annotated[str, typer.Option(help="The checkpoints, as in 300,400,500; with --with, one of each run.")] = "",
    weights: Annotated[str, typer.Option(help="Their shares, as in 1,1,2; equal if not given.")] = "",
    with_: Annotated[Path | None, typer.Option("--with", metavar="RUN", help="Average with this run.")] = None,
    rank: Rank = None,
    extrapolate: Annotated[bool, typer.Option(help="Allow negative weights.")] = False,
    strength: Strength = 1.0,
    block: BlockStrengths = None,
    precision: OwnPrecision = None,
    out: ExportFolder = None,
    bundle: Bundle = False,
    as_json: Json = False,
) -> None:
    """Write the weighted mean of checkpoints, of a run or of two, as files to share: often better than each of them."""
    if out:
        refuse_unwritable(out, "--out")

    from ..release import release
    from ..soups import interpolate_run
    from ..strengths import Strengths

    strengths = Strengths.parse(strength, block or [])
    wanted, shares = numbers(steps, int, "--steps"), numbers(weights, float, "--weights")
    with progress_of("averaging") as progress:
        mean = interpolate_run(path, wanted, shares, with_, rank, extrapolate, progress)
    folder = out or mean.trained.run.exports
    changes, sources = mean.changes, mean.merged_from
    files = release(
        mean.trained,
        mean.name,
        folder,
        precision=precision,
        strengths=strengths,
        bundle=bundle,
        changes=changes,
        merged_from=sources,
    )
    _say_what_was_written(files, mean.lost, as_json)


def export(
    path: RunPath,
    step: Annotated[int | None, typer.Option(help="The checkpoint; the newest if not given.")] = None,
    format_: Annotated[
        str, typer.Option("--format", help="kohya or diffusers; of a whole model, ldm or diffusers; all if not given.")
    ] = "",
    precision: OwnPrecision = None,
    out: ExportFolder = None,
    strength: Strength = 1.0,
    block: BlockStrengths = None,
    bake: Annotated[
        int | None, typer.Option(min=1, metavar="RANK", help="Write a plain LoRA of this rank of whatever was trained.")
    ] = None,
    bundle: Bundle = False,
    thumbnail: Annotated[
        Path | None, typer.Option(help="The picture that stands for the file; the first preview if not given.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="export.KEY=VALUE", help="Override a setting of [export]; may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the files to share, load them back, and compare them with the trained model; say what each client makes of
    them. A strength other than 1 becomes a part of the file."""
    if out:
        refuse_unwritable(out, "--out")

    from ..formats import Format, formats_of
    from ..jobs import open_run
    from ..lorafile import LoraFile
    from ..run import export_run
    from ..strengths import Strengths

    config = open_run(path).read_config()
    if bake and config.adapter.kind == "full":
        raise UserError("has no effect: the run trained the base's own weights", "--bake", "Remove it.")
    there = formats_of(config, baked=bool(bake))
    wanted = [name.strip() for name in format_.split(",")] if format_ else []
    formats: list[Format] = [name for name in there if name in wanted]
    if unknown := [name for name in wanted if name not in there]:
        fix = f"Formats: {', '.join(there)}."
        if unknown[0] == "diffusers":
            fix += " diffusers does not load this kind; with --bake RANK a plain LoRA is written, which it does."
        raise UserError(f"there is no format {unknown[0]!r} of this run", "--format", fix)
    strengths = Strengths.parse(strength, block or [])
    files = export_run(path, step, formats, out, precision, bake or 0, strengths, bundle, set_ or [], thumbnail)
    lost = json.loads(LoraFile.open(files[0]).metadata["lorasmith_baked_lost"]) if bake else {}
    _say_what_was_written(files, lost, as_json)


def publish(
    source: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The .zip of an export, or the folder of one.")],
    repo: Annotated[str, typer.Option(help="The repository on the Hub, as owner/name; it is made if not there.")],
    private: Annotated[bool, typer.Option(help="Only you see it.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Also where the repository holds something else.")] = False,
) -> None:
    """Upload a bundle to the Hugging Face Hub, with the token of `hf auth login` or HF_TOKEN."""
    from ..sharing.hub import publish as upload

    published = upload(source, repo, private, overwrite=overwrite)
    typer.echo(published.url)


def _say_what_was_written(files: Sequence[Path], lost: Mapping[str, float], as_json: bool) -> None:
    """The files, and of LoRA files which clients do not do with them what was trained."""
    from ..jobs import VERIFIED

    found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.name.endswith(VERIFIED)]
    reports = [report for each in found for report in each["files"]]
    if as_json:
        print_json({"written": [str(file) for file in files], "lost": lost, "files": reports})
        return
    for file in files:
        typer.echo(file)
    print_lost(lost)
    for report in reports:
        same = [client["client"] for client in report["clients"] if client["reading"] == "same"]
        typer.echo(f"{report['file']} does what was trained in {', '.join(same) or 'no client'}")
        for client in report["clients"] if report["format"] == "kohya" else []:
            if client["reading"] != "same":
                typer.echo(f"  {client['client']}: {client['reading']}. {client['why']}")


def _new_folder(parent: Path, name: str) -> Path:
    """The first of `name`, `name-2`, `name-3`, ... that does not exist."""
    numbers = (name if number == 1 else f"{name}-{number}" for number in range(1, 1_000_000))
    return next(parent / candidate for candidate in numbers if not (parent / candidate).exists())
