"""Commands on files of any trainer: what is in them, and others made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import UserError
from .options import (
    BaseOfFile,
    BlockStrengths,
    Energy,
    FilePrecision,
    Json,
    LoraFormat,
    LoraPath,
    NewFile,
    Rank,
    Strength,
    print_json,
    print_lost,
    progress_of,
    refuse_taken,
    require_file_name,
)

NewFormat = Annotated[
    Literal["kohya", "diffusers"] | None, typer.Option("--format", help="Names in a LoRA; kohya if not given.")
]

BROKEN = 3
"""Exit code of `verify` for a file that does not do what it should."""


def verify(file: LoraPath, base: BaseOfFile = "", as_json: Json = False) -> None:
    """Say what is wrong with a LoRA file, what each client makes of it, and what it does to its base. Exit code 3 if it
    does not work."""
    from ..diagnosis.examination import examine_file, report

    with progress_of("examining") as progress:
        examination = examine_file(file, base, progress)
    if as_json:
        print_json(examination.facts())
    else:
        for line in report(examination):
            typer.echo(line)
    if not examination.works:
        raise typer.Exit(BROKEN)


def inspect(file: LoraPath, as_json: Json = False) -> None:
    """Say what is in a LoRA file; no model is loaded."""
    import json

    from ..diagnosis.finding import Finding
    from ..diagnosis.inspection import inspect as inspect_file

    facts = inspect_file(file)
    if as_json:
        print_json(facts)
        return
    found = [Finding(**finding) for finding in facts.pop("findings")]
    for name, value in facts.items():
        typer.echo(f"{name}: {json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value}")
    for finding in found:
        typer.echo(finding)


def convert(
    source: Annotated[str, typer.Argument(help="A LoRA file of any trainer; or a whole model, as in base.model.")],
    target: Annotated[Path, typer.Argument(help="A new .safetensors file; of a whole model, or a new folder.")],
    format_: NewFormat = None,
    base: BaseOfFile = "",
    precision: Annotated[
        Literal["fp16", "bf16", "fp32"] | None, typer.Option(help="Precision; that of the source if not given.")
    ] = None,
) -> None:
    """Give a LoRA file other names; or write a whole model as one file (a checkpoint), or as a diffusers folder."""
    if _is_lora(Path(source)):
        from ..filetools.convert import convert_lora

        require_file_name(target, "TARGET")
        with progress_of("converting layers") as progress:
            convert_lora(Path(source), target, format_ or "kohya", base, precision, progress)
    else:
        from ..bases import inspect_base
        from ..baseweights import rewrite, unchanged

        for option, given in (("--format", format_), ("--base", base)):
            if given:
                raise UserError(f"has no effect: {source} is a whole model", option, "Remove it.")
        refuse_taken(target, "TARGET")
        info = inspect_base(source)
        with progress_of("converting weights") as progress:
            rewrite(info, target, unchanged, precision, target.stem, progress)
        for assumption in info.assumptions:
            typer.echo(f"warning: {assumption}", err=True)
    typer.echo(target)


def merge(
    loras: Annotated[
        list[str], typer.Argument(metavar="FILE[:STRENGTH]...", help="LoRA files, each with its strength if not 1.")
    ],
    out: Annotated[Path, typer.Option(help="The new .safetensors file; with --into, or a new folder for diffusers.")],
    into: Annotated[str, typer.Option(metavar="BASE", help="Make them part of this base, as in base.model.")] = "",
    rank: Rank = None,
    energy: Energy = None,
    block: BlockStrengths = None,
    format_: NewFormat = None,
    base: BaseOfFile = "",
    precision: Annotated[
        Literal["fp16", "bf16", "fp32"] | None,
        typer.Option(help="Precision; fp16 of a LoRA, that of BASE with --into, if not given."),
    ] = None,
) -> None:
    """Make one LoRA of several, or bake the strengths of one file into it; with --into, a whole model. Nothing is lost
    without --rank or --energy, and the ranks add up."""
    from ..loraread import parse_merge
    from ..strengths import Strengths

    if block and len(loras) > 1:
        what = "cannot be given for several files at once"
        raise UserError(what, "--block", "Bake them into each file first: lorasmith merge FILE --block ... --out FILE")
    parsed = [parse_merge(text, "FILE") for text in loras]
    sources = [(path, Strengths.parse(strength, block or [])) for path, strength in parsed]
    if into:
        from ..bases import inspect_base
        from ..filetools.intobase import merge_into_base

        for option, given in (("--rank", rank), ("--energy", energy), ("--format", format_), ("--base", base)):
            if given:
                raise UserError("has no effect on a whole model", option, "Remove it, or --into.")
        refuse_taken(out, "--out")
        with progress_of("merging weights") as progress:
            merge_into_base(inspect_base(into), sources, out, precision, progress)
    else:
        from ..filetools.merging import merge_loras

        require_file_name(out, "--out")
        with progress_of("merging layers") as progress:
            made = merge_loras(
                sources, out, rank or 0, energy or 0.0, format_ or "kohya", base, precision or "fp16", progress
            )
        print_lost(made.lost)
    typer.echo(out)


def resize(
    file: LoraPath,
    out: NewFile,
    rank: Rank = None,
    energy: Energy = None,
    format_: LoraFormat = "kohya",
    base: BaseOfFile = "",
    precision: FilePrecision = "fp16",
) -> None:
    """Make a plain LoRA of another rank, which every client reads, of a LoRA, LoHa, LoKr, DoRA or full file."""
    require_file_name(out, "--out")
    _require_one(rank, energy)
    from ..filetools.resizing import resize as resize_file

    with progress_of("resizing layers") as progress:
        made = resize_file(file, out, rank or 0, energy or 0.0, base, format_, precision, progress)
    print_lost(made.lost)
    typer.echo(out)


def extract(
    tuned: Annotated[str, typer.Argument(help="A fine-tuned model, as in base.model.")],
    original: Annotated[str, typer.Argument(help="The model that it was tuned from.")],
    out: NewFile,
    rank: Rank = None,
    energy: Energy = None,
    conv_rank: Annotated[
        int | None, typer.Option(min=1, help="The rank of 3x3 convolutions, if not that of --rank.")
    ] = None,
    format_: LoraFormat = "kohya",
    precision: FilePrecision = "fp16",
) -> None:
    """Make a LoRA of the difference between a fine-tuned model and its original."""
    require_file_name(out, "--out")
    _require_one(rank, energy)
    if conv_rank and not rank:
        raise UserError("has no effect without --rank", "--conv-rank", "Remove it.")
    from ..filetools.extraction import extract as extract_lora

    with progress_of("comparing layers") as progress:
        made = extract_lora(
            tuned, original, out, rank or 0, energy or 0.0, conv_rank or 0, format_, precision, progress=progress
        )
    for sentence in made.told:
        typer.echo(f"warning: {sentence}", err=True)
    print_lost(made.lost)
    typer.echo(out)


def blend(
    first: Annotated[str, typer.Argument(help="A whole model, as in base.model: the original.")],
    second: Annotated[str, typer.Argument(help="Another of the same shape, such as one tuned from it.")],
    out: Annotated[Path, typer.Option(help="The new .safetensors file, or a new folder for diffusers.")],
    strength: Strength = 0.5,
    block: BlockStrengths = None,
    precision: Annotated[
        Literal["fp16", "bf16", "fp32"] | None, typer.Option(help="Precision; that of FIRST if not given.")
    ] = None,
) -> None:
    """Interpolate two whole models weight by weight: 0 is the first, 1 the second (WiSE-FT)."""
    refuse_taken(out, "--out")
    from ..filetools.blending import blend_bases
    from ..strengths import Strengths

    with progress_of("blending weights") as progress:
        blend_bases(first, second, Strengths.parse(strength, block or []), out, precision, progress)
    typer.echo(out)


def _is_lora(path: Path) -> bool:
    """Whether it is a file that holds changes of layers."""
    from ..lorafile import LoraFile

    if path.suffix.lower() != ".safetensors" or not path.is_file():
        return False
    file = LoraFile.open(path)
    return bool(file.layers) or any(key.startswith("lora_") or ".lora_" in key for key in file.shapes)


def _require_one(rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise UserError("give one of the two", "--rank, --energy", "A rank such as 32, or an energy such as 0.95.")
