"""The `lorasmith` command. Heavy imports stay inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import __version__
from .errors import INTERRUPTED, ConfigError, LorasmithError, TrainingError, UserError

if TYPE_CHECKING:
    from ..datasets.filling import Filled
    from .configfile import Origin
    from .plan import Plan
    from .release import Format
    from .run import Finished

app = typer.Typer(
    name="lorasmith",
    help="From a folder of images to a Stable Diffusion style LoRA that works everywhere.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigFile = Annotated[Path, typer.Argument(help="The configuration, a TOML file.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or its name under runs/.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting; may be repeated.")
]
FilePrecision = Annotated[Literal["fp16", "bf16", "fp32"], typer.Option("--precision", help="Precision of the file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]


def main() -> None:
    """The entry point: errors a person can act on are shown without a traceback, with their exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")  # a Windows console may be set to another code page
    signal.signal(signal.SIGINT, _interrupted)
    try:
        app()
    except Exception as error:
        told = for_a_person(error)
        if told is None:
            raise
        typer.echo(f"error: {told}", err=True)
        sys.exit(told.exit_code)


def for_a_person(error: Exception) -> LorasmithError | None:
    """What a person can do about an error; None if only a programmer can."""
    if isinstance(error, LorasmithError):
        return error
    if isinstance(error, OSError) and error.filename:
        what = f"cannot be read or written ({error.strerror})"
        return UserError(what, str(error.filename), "Check its path and permissions, or choose another place.")
    if isinstance(error, OSError):
        return UserError((error.strerror or " ".join(str(error).split())).rstrip("."))
    if type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch"):
        return TrainingError(
            "the GPU's memory is full",
            "",
            "End what else uses it, or set the variable CUDA_VISIBLE_DEVICES to nothing and use the CPU.",
        )
    return None


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Ctrl-C where there is nothing to save."""
    del number, frame
    typer.echo("interrupted", err=True)
    sys.exit(INTERRUPTED)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lorasmith {__version__}")
        raise typer.Exit


@app.callback()
def lorasmith(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """From a folder of images to a Stable Diffusion style LoRA that works everywhere."""
    del version


# ---------------------------------------------------------------------------------------------------------------------
# before training


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder that holds run folders.")] = Path("runs"),
) -> None:
    """Train the example style on the embedded base; make before/after pictures and a LoRA file."""
    _refuse_unwritable(out, "--out")
    from .demo import run_demo

    finished = run_demo(out)
    if finished.stopped_by:
        _say_how_it_ended(finished)


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="The TOML file to write.")],
    images: Annotated[str, typer.Option(help="The folder of images, or what else data.path may be.")],
    base: Annotated[str, typer.Option(help="A Hub id, a diffusers folder, pocket, or random:sd15, ...")] = "pocket",
    name: Annotated[str, typer.Option(help="The run's name; the file's name without .toml if not given.")] = "",
    trigger: Annotated[str, typer.Option(help="The word that will call the style.")] = "",
    recipe: Annotated[str, typer.Option(help="A shipped recipe; the one for the base's family if not given.")] = "",
) -> None:
    """Write a commented configuration for a folder of images."""
    from ..configs import recipe_for, recipe_names
    from ..datasets.folder import scan
    from ..datasets.unpack import as_folder
    from .bases import inspect_base
    from .configfile import to_toml, validate
    from .files import user_cache, write_text

    if file.exists():
        raise ConfigError("exists already", str(file), "Choose another name, or remove it.")
    if file.suffix.lower() != ".toml":
        raise ConfigError("does not end in .toml", str(file), f"Call it {file.name}.toml.")
    _refuse_unwritable(file.parent, str(file))
    count = len(scan(as_folder(images, user_cache())))
    found = inspect_base(base)
    recipe = recipe or recipe_for(base, found.family, found.prediction)
    if recipe not in recipe_names():
        raise ConfigError(f"there is no recipe {recipe!r}", "--recipe", f"Recipes: {', '.join(recipe_names())}.")
    answers = {
        "name": name or file.stem,
        "recipe": recipe,
        "base": {"model": base},
        "data": [{"path": _path_from(file.parent, images), "trigger": trigger}],
    }
    config = validate(answers, source="init")
    write_text(file, to_toml(config))
    typer.echo(f"{file}: {count} images, base {found.title}, recipe {recipe}")
    typer.echo(f"Look at it, then: lorasmith plan {file}")


@app.command()
def check(
    data: Annotated[str, typer.Argument(metavar="DIR", help="The folder of images, or what else data.path may be.")],
    resolution: Annotated[
        int, typer.Option(min=64, max=4096, help="The side in pixels that the images are to be trained at.")
    ] = 512,
    trigger: Annotated[str, typer.Option(metavar="WORD", help="The word that will call the style.")] = "",
    caption_lines: Annotated[
        Literal["join", "variants"], typer.Option(help="What the lines of a caption file are; as data.caption_lines.")
    ] = "join",
    fix: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write a mended copy to this new folder; DIR stays as it is.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Look for what would spoil a training. Exit code 3 if training would not start."""
    from ..datasets.checks import BLOCKED, examine
    from ..datasets.repair import check_place, write_copy
    from ..datasets.report import report, verdict
    from ..datasets.unpack import as_folder
    from .console import Reporter
    from .events import Phase
    from .files import user_cache

    folder = as_folder(data, user_cache())
    if fix:
        check_place(folder, fix)
        _refuse_unwritable(fix, "--fix")
    with Reporter() as show:
        examination = examine(folder, resolution, trigger, caption_lines, lambda *phase: show(Phase(*phase)))
    for line in [] if as_json else report(examination):
        typer.echo(line)
    facts = examination.facts()
    if fix:
        with Reporter() as show:
            repairs = write_copy(examination, fix, lambda *counts: show(Phase("copying", *counts)))
        facts["copy"] = {"folder": str(fix)} | repairs.facts()
        typer.echo(f"mended copy in {fix}: {repairs}", err=as_json)
    if as_json:
        _print_json(facts)
    else:
        typer.echo(verdict(examination))
    if examination.is_blocked:
        raise typer.Exit(BLOCKED)


@app.command()
def caption(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of images.")],
    model: Annotated[str, typer.Option(help="blip, florence2, wd-tagger, a Hub id, or a folder that holds a model.")],
    kind: Annotated[
        Literal["blip", "florence2", "wd-tagger"] | None, typer.Option(help="Refuse models of another kind.")
    ] = None,
    style: Annotated[
        Literal["sentence", "detailed", "paragraph", "tags"] | None,
        typer.Option(help="florence2 writes detailed, sentence or paragraph; the others have one style each."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images described at once.")] = 8,
    overwrite: Annotated[
        Literal["none", "machine", "all"],
        typer.Option(help="Also replace captions that machines wrote and nobody has edited; or all, a copy is kept."),
    ] = "none",
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Least probability of a tag; 0.35 if not given.")
    ] = None,
    character_threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Likewise of a character's name; 0.85 if not given.")
    ] = None,
    max_tags: Annotated[int | None, typer.Option(min=1, help="The most probable so many; all if not given.")] = None,
    exclude_tags: Annotated[str | None, typer.Option(metavar="TAG,TAG", help="Tags that are never written.")] = None,
    prefix: Annotated[
        str, typer.Option(help="Put before each caption, with a comma; without one if it ends with a space.")
    ] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    as_json: Json = False,
) -> None:
    """Let a model write the captions that are missing. Exit code 1 if an image has none after all."""
    from ..datasets.captioners import choose
    from ..datasets.filling import fill
    from .console import Reporter

    if folder.is_dir():
        _refuse_unwritable(folder, str(folder))
    excluded = None if exclude_tags is None else tuple(tag.strip() for tag in exclude_tags.split(",") if tag.strip())
    choice = choose(
        model,
        kind,
        style,
        threshold=threshold,
        character_threshold=character_threshold,
        max_tags=max_tags,
        exclude_tags=excluded,
    )
    try:
        with Reporter() as report:
            filled = fill(folder, choice, report, overwrite, batch, prefix, device)
    except SystemExit:  # Ctrl-C
        typer.echo("What is written stays; the same command goes on from there.", err=True)
        raise
    if as_json:
        _print_json(filled.facts())
    else:
        _print_filled(filled, folder)
    if filled.skipped:
        raise typer.Exit(1)


@app.command()
def plan(file: ConfigFile, set_: Overrides = None, as_json: Json = False) -> None:
    """Validate a configuration, and say what would happen."""
    from .jobs import check_name_is_free

    made, origins = _plan_of(file, set_)
    check_name_is_free(made.config)
    if as_json:
        _print_json(made.facts() | {"origins": origins})
    else:
        from .console import print_origins, print_plan

        print_plan(made)
        print_origins(made.config, origins)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, devices and disk of this computer."""
    from .doctor import examine

    facts = examine()
    if as_json:
        _print_json(facts)
        return
    for topic, values in facts.items():
        typer.echo(topic)
        for name, value in values.items():
            typer.echo(f"  {name}: {value}")


# ---------------------------------------------------------------------------------------------------------------------
# training


@app.command()
def train(file: ConfigFile, set_: Overrides = None) -> None:
    """Train, export and verify. The first Ctrl-C stops and saves."""
    from .console import Reporter, print_plan
    from .jobs import check_name_is_free, is_main_process

    made, _ = _plan_of(file, set_)
    if is_main_process():
        check_name_is_free(made.config)
        print_plan(made)
    from . import run

    with Reporter() as report:
        finished = run.train(made, report)
    _say_how_it_ended(finished)


@app.command()
def resume(path: RunPath, set_: Overrides = None) -> None:
    """Continue a stopped, interrupted or failed run exactly where it was saved."""
    from . import run
    from .console import Reporter
    from .jobs import open_run

    with Reporter() as report:
        finished = run.resume(open_run(path), set_ or [], report)
    _say_how_it_ended(finished)


@app.command()
def stop(path: RunPath) -> None:
    """Ask a running run to save and stop after its current step."""
    from .jobs import open_run

    run = open_run(path)
    run.ask_to_stop()
    typer.echo(f"{run.name} will save and stop after its current step")


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="The folder that holds run folders.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List runs and where each of them stands."""
    from dataclasses import asdict

    from .jobs import find_runs

    found = [(run, run.status()) for run in find_runs(folder)]
    if as_json:
        _print_json([{"name": run.name, "path": str(run.path), **asdict(status)} for run, status in found])
    elif not found:
        typer.echo(f"no runs in {folder}")
    for run, status in found if not as_json else []:
        typer.echo(f"{run.name}: {status.sentence}")


# ---------------------------------------------------------------------------------------------------------------------
# after training


@app.command()
def sample(
    path: RunPath,
    prompt: Annotated[list[str], typer.Option(help="What to draw; may be repeated.")],
    step: Annotated[int | None, typer.Option(help="The checkpoint; the newest if not given.")] = None,
    strength: Annotated[float, typer.Option(help="Strength of what was trained; 0 is the untouched base.")] = 1.0,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="The first picture's seed; sample.seed if not given.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A new folder for the pictures.")] = None,
) -> None:
    """Draw pictures with what a run has trained."""
    from dataclasses import replace

    if not math.isfinite(strength):
        raise UserError(f"{strength} is no strength", "--strength", "Give a number; 1 is as it was trained.")
    if out and out.exists():
        raise UserError("exists already", str(out), "Name a new folder.")
    if out:
        _refuse_unwritable(out, "--out")

    from . import adapter
    from .run import load_run
    from .sample import Drawing, draw, save_previews

    trained = load_run(path, step)
    base, name = trained.base, trained.run.name
    drawing = Drawing.of(trained.config.sample, base.info.resolution)
    drawing = drawing if seed is None else replace(drawing, seed=seed)
    with adapter.strength(base, strength):
        pictures = draw(base, prompt, drawing)
    folder = out or _new_folder(trained.run.path / "samples", f"own-step-{trained.step:06d}")
    lora = f"{name} step {trained.step} at {strength:g}"
    save_previews(folder, pictures, prompt, drawing, base.info.short_name, lora)
    for number in range(len(prompt)):
        typer.echo(folder / f"{number:02d}.png")


@app.command()
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
        _refuse_unwritable(out, "--out")

    from .jobs import open_run
    from .lorafile import LoraFile
    from .release import formats_of
    from .run import export_run

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
        _say_what_is_lost(json.loads(LoraFile.open(files[0]).metadata["lorasmith_baked_lost"]))


@app.command()
def bake(
    file: Annotated[Path, typer.Argument(help="A LoRA .safetensors file of any kind and trainer.")],
    rank: Annotated[int, typer.Option(min=1, help="The rank of the plain LoRA.")],
    out: Annotated[Path, typer.Option(help="The new .safetensors file.")],
    base: Annotated[
        str, typer.Option(help="The base it was made for, as in base.model. Only a DoRA, or an unusual base, needs it.")
    ] = "",
    precision: FilePrecision = "fp16",
) -> None:
    """Make a plain LoRA, which every client reads, of a LoHa, LoKr, DoRA, full file, or LoRA of a larger rank."""
    if out.exists():
        raise UserError("exists already", str(out), "Choose another name.")
    if out.suffix != ".safetensors":
        raise UserError("does not end in .safetensors", str(out), "Clients go by the ending: add it.")
    _refuse_unwritable(out.parent, "--out")

    from .baking import bake_file
    from .console import Reporter
    from .events import Phase

    with Reporter() as report:
        made = bake_file(file, rank, out, base, precision, lambda *counts: report(Phase("baking layers", *counts)))
    typer.echo(out)
    _say_what_is_lost(made.facts.lost)


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="A base as in base.model, or a .safetensors file made by this command.")
    ],
    target: Annotated[Path, typer.Argument(help="A new .safetensors file, or a new folder for diffusers.")],
    precision: Annotated[
        Literal["fp16", "bf16", "fp32"] | None, typer.Option(help="Precision of the file; fp16 if not given.")
    ] = None,
) -> None:
    """A whole model as one file in the original layout (LDM), which clients call a checkpoint; or back to a folder."""
    if target.exists():
        raise UserError("exists already", str(target), "Choose another name.")
    _refuse_unwritable(target.parent, str(target))
    to_file, from_file = target.suffix == ".safetensors", source.endswith(".safetensors")
    if to_file == from_file:
        fix = "Give one .safetensors file, and a folder or base as the other."
        raise UserError("source and target are of the same kind", f"{source} {target}", fix)

    if precision and not to_file:
        raise UserError("has no effect: a folder keeps the file's precision", "--precision", "Remove it.")

    from .bases import inspect_base
    from .models import load_base
    from .wholemodel import save_checkpoint_file, unpack

    if to_file:
        save_checkpoint_file(load_base(inspect_base(source)), target, precision or "fp16")
    else:
        for assumption in unpack(Path(source), target).assumptions:
            typer.echo(f"warning: {assumption}", err=True)
    typer.echo(target)


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="A LoRA .safetensors file.")], as_json: Json = False) -> None:
    """Say what is in a LoRA file."""
    from .lorafile import inspect as inspect_file

    facts = inspect_file(file)
    if as_json:
        _print_json(facts)
        return
    for name, value in facts.items():
        typer.echo(f"{name}: {json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value}")


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port of the page.")] = 7860,
    folder: Annotated[Path, typer.Option("--runs", help="The folder that holds run folders.")] = Path("runs"),
) -> None:
    """Open the browser app: runs, their progress, previews and files."""
    _refuse_unwritable(folder, "--runs")

    from ..ui.app import serve

    serve(folder, port)


# ---------------------------------------------------------------------------------------------------------------------


def _plan_of(file: Path, overrides: list[str] | None) -> tuple[Plan, dict[str, Origin]]:
    """The plan of a file, and where each of its settings comes from."""
    from .configfile import read_with_provenance
    from .console import Reporter
    from .events import Phase
    from .plan import make_plan

    config, origins = read_with_provenance(file, overrides or [])
    with Reporter() as report:
        made = make_plan(
            config, lambda done, total: report(Phase("reading images", done, total)) if total > _MANY else None
        )
    return made, origins


_MANY = 100
"""Images; reading fewer takes no time worth a word."""


def _refuse_unwritable(folder: Path, where: str) -> None:
    """Before anything is loaded."""
    from .files import writable

    if reason := writable(folder):
        raise UserError(reason, where, "Choose another place.")


def _print_filled(filled: Filled, folder: Path) -> None:
    """What was done to a folder's captions, with the first three."""
    typer.echo(f"written: {len(filled.written)} captions by {filled.author.model} ({filled.author.settings})")
    for written in filled.written[:3]:
        typer.echo(f"  {written.image.relative_to(folder)}: {written.caption!r}")
    owners = {"person": "written by a person", "machine": "written by a machine", "in doubt": "in doubt, see below"}
    for owner, number in filled.left.items():
        typer.echo(f"left alone: {number} {owners[owner]}")
    if filled.kept:
        example = filled.kept[0].relative_to(folder)
        typer.echo(f"kept: {len(filled.kept)} that persons had written, as copies such as {example}")
    for problem in filled.skipped:
        typer.echo(f"skipped: {problem}")


def _say_how_it_ended(finished: Finished) -> None:
    if finished.stopped_by:
        typer.echo(f"{finished.run.path}: {finished.run.status().sentence}")
        typer.echo(f"Continue with: lorasmith resume {finished.run.path}", err=True)
        if finished.stopped_by == "signal":
            raise typer.Exit(INTERRUPTED)
    for file in finished.exports:
        typer.echo(file)


def _say_what_is_lost(lost: Mapping[str, float]) -> None:
    for component, share in lost.items():
        typer.echo(f"{component}: {share:.2%} of the change is lost")


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def _path_from(start: Path, data: str) -> str:
    """A `data.path` that counts from here, told from a folder: relative where that is possible, with forward slashes;
    a name on the Hub stays."""
    from ..datasets.unpack import Address

    address = Address.of(data)
    there = address.local.absolute()
    if not there.exists():
        return data
    try:
        place = Path(os.path.relpath(there, start.absolute())).as_posix()
    except ValueError:  # another drive
        place = there.as_posix()
    return address.with_place(place)


def _new_folder(parent: Path, name: str) -> Path:
    """The first of `name`, `name-2`, `name-3`, ... that does not exist."""
    numbers = (name if number == 1 else f"{name}-{number}" for number in range(1, 1_000_000))
    return next(parent / candidate for candidate in numbers if not (parent / candidate).exists())


if __name__ == "__main__":
    main()
