"""The `lorasmith` command. Heavy imports stay inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import io
import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from . import __version__
from .commands import choosing, files, measuring, preparing, queue, refining, reporting, sharing, sweeping, training
from .errors import INTERRUPTED, LorasmithError, TrainingError, UserError
from .startup import start_quickly

app = typer.Typer(
    name="lorasmith",
    help="From a folder of images to a Stable Diffusion style LoRA that works everywhere.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """The entry point: errors a person can act on are shown without a traceback, with their exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")  # a Windows console may be set to another code page
    signal.signal(signal.SIGINT, _interrupted)
    start_quickly()
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


for command in (
    *(training.demo, preparing.init, preparing.check, preparing.caption, preparing.plan, preparing.doctor),
    *(training.train, training.resume, training.verify_resume, training.stop, training.save, training.preview),
    *(training.runs, sweeping.sweep, measuring.bench, training.ui),
    *(sharing.sample, choosing.compare, choosing.tune_strength, choosing.leaks, reporting.report, refining.refine),
    *(sharing.interpolate, sharing.export, sharing.publish),
    *(files.verify, files.inspect, files.convert, files.merge, files.resize, files.extract, files.blend),
):
    app.command()(command)
app.command(hidden=True)(sharing.paint)
app.add_typer(queue.app)


if __name__ == "__main__":
    main()
