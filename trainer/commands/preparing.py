"""Commands before a training: a configuration, its data and its plan."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import ConfigError
from .options import ConfigFile, Json, Overrides, print_json, refuse_unwritable

if TYPE_CHECKING:
    from ...datasets.filling import Filled
    from ..configfile import Origin
    from ..plan import Plan


def init(
    file: Annotated[Path, typer.Argument(help="The TOML file to write.")],
    images: Annotated[str, typer.Option(help="The folder of images, or what else data.path may be.")],
    base: Annotated[str, typer.Option(help="A Hub id, a diffusers folder, pocket, or random:sd15, ...")] = "pocket",
    name: Annotated[str, typer.Option(help="The run's name; the file's name without .toml if not given.")] = "",
    trigger: Annotated[str, typer.Option(help="The word that will call the style.")] = "",
    recipe: Annotated[str, typer.Option(help="A shipped recipe; the one for the base's family if not given.")] = "",
) -> None:
    """Write a commented configuration for a folder of images."""
    from ...configs import recipe_for, recipe_names
    from ...datasets.folder import scan
    from ...datasets.unpack import as_folder
    from ..bases import inspect_base
    from ..configfile import to_toml, validate
    from ..files import user_cache, write_text

    if file.exists():
        raise ConfigError("exists already", str(file), "Choose another name, or remove it.")
    if file.suffix.lower() != ".toml":
        raise ConfigError("does not end in .toml", str(file), f"Call it {file.name}.toml.")
    refuse_unwritable(file.parent, str(file))
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
    from ...datasets.checks import BLOCKED, examine
    from ...datasets.repair import check_place, write_copy
    from ...datasets.report import report, verdict
    from ...datasets.unpack import as_folder
    from ..console import Reporter
    from ..events import Phase
    from ..files import user_cache

    folder = as_folder(data, user_cache())
    if fix:
        check_place(folder, fix)
        refuse_unwritable(fix, "--fix")
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
        print_json(facts)
    else:
        typer.echo(verdict(examination))
    if examination.is_blocked:
        raise typer.Exit(BLOCKED)


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
    from ...datasets.captioners import choose
    from ...datasets.filling import fill
    from ..console import Reporter

    if folder.is_dir():
        refuse_unwritable(folder, str(folder))
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
        print_json(filled.facts())
    else:
        _print_filled(filled, folder)
    if filled.skipped:
        raise typer.Exit(1)


def plan(
    file: ConfigFile,
    set_: Overrides = None,
    vram: Annotated[
        float | None, typer.Option(min=1, max=1024, metavar="GB", help="Plan for an NVIDIA card with so much memory.")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Try a few steps of the largest batch, to know time and memory.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Validate a configuration, and say what would happen, in how much memory and time."""
    from ..console import Reporter
    from ..jobs import check_name_is_free
    from ..prospect import prospect

    made, origins = plan_of(file, set_)
    check_name_is_free(made.config)
    with Reporter() as report:
        foreseen = prospect(made, vram, probe, report)
    if as_json:
        print_json(made.facts() | foreseen.facts() | {"origins": origins})
        return
    from ..console import print_origins, print_plan

    print_plan(made)
    for line in foreseen.lines():
        typer.echo(line)
    print_origins(made.config, origins)


def doctor(as_json: Json = False) -> None:
    """Versions, devices and disk of this computer."""
    from ..doctor import examine

    facts = examine()
    if as_json:
        print_json(facts)
        return
    for topic, values in facts.items():
        typer.echo(topic)
        for name, value in values.items():
            typer.echo(f"  {name}: {value}")


def plan_of(file: Path, overrides: list[str] | None) -> tuple[Plan, dict[str, Origin]]:
    """The plan of a file, and where each of its settings comes from."""
    from ..configfile import read_with_provenance
    from ..console import Reporter
    from ..events import Phase
    from ..plan import make_plan

    config, origins = read_with_provenance(file, overrides or [])
    with Reporter() as report:
        made = make_plan(
            config, lambda done, total: report(Phase("reading images", done, total)) if total > _MANY else None
        )
    return made, origins


_MANY = 100
"""Images; reading fewer takes no time worth a word."""


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


def _path_from(start: Path, data: str) -> str:
    """A `data.path` that counts from here, told from a folder: relative where that is possible, with forward slashes;
    a name on the Hub stays."""
    from ...datasets.unpack import Address

    address = Address.of(data)
    there = address.local.absolute()
    if not there.exists():
        return data
    try:
        place = Path(os.path.relpath(there, start.absolute())).as_posix()
    except ValueError:  # another drive
        place = there.as_posix()
    return address.with_place(place)
