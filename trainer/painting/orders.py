"""What is to be drawn: a wall of checkpoints and strengths, or single pictures. An order is a value that goes through a
file to the painter, and knows the name of each of its pictures; a picture whose file is there is drawn."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ..bases import POCKET
from ..config import SampleSection
from ..errors import Problem, RunError, UserError
from ..jobs import RunFolder
from ..jsonfile import read_json
from .samplers import MOST_STEPS, SAMPLERS, Sampler

__all__ = ["SAMPLERS", "Cell", "Look", "Order", "PictureOrder", "Sampler", "WallOrder", "drawn_folder", "read_order"]

MOST_PICTURES = 1000
"""Of one order; more are hours even on a fast GPU."""

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_Step = Annotated[int, Field(ge=0, lt=2**31)]
_Strength = Annotated[float, Field(ge=-10, le=10)]
_Prompt = Annotated[str, Field(max_length=5000)]
_Prompts = Annotated[tuple[_Prompt, ...], Field(min_length=1, max_length=100)]
_Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(min_length=1, max_length=100)]
_Path = Annotated[str, Field(max_length=5000)]


@dataclass(frozen=True)
class Look:
    """How pictures are drawn, apart from prompt and seed; the bounds are those of `[sample]`."""

    __pydantic_config__: ClassVar = _STRICT

    negative_prompt: _Prompt = ""
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] = 25
    guidance: Annotated[float, Field(ge=1, le=50)] = 7.0
    sampler: Sampler = "ddim"
    size: Annotated[int, Field(ge=0, le=4096)] = 0
    """Side of the square picture, in pixels; 0: the base's."""

    @classmethod
    def of(cls, settings: SampleSection) -> Look:
        """As a run's previews are drawn."""
        return cls(settings.negative_prompt, settings.steps, settings.guidance)


@dataclass(frozen=True)
class Cell:
    """One picture: what a checkpoint makes of a prompt at a strength. At strength 0 it is the untouched base, which is
    the same for all checkpoints: then `step` is 0."""

    step: int
    strength: float
    prompt: str
    seed: int


@dataclass(frozen=True)
class WallOrder:
    """Checkpoints by strengths, for each of the prompts and seeds."""

    __pydantic_config__: ClassVar = _STRICT

    run: Annotated[_Path, Field(min_length=1)]
    """The absolute path of its folder."""
    steps: Annotated[tuple[_Step, ...], Field(min_length=1, max_length=100)]
    """Of the checkpoints."""
    strengths: Annotated[tuple[_Strength, ...], Field(min_length=1, max_length=100)]
    prompts: _Prompts
    seeds: _Seeds
    look: Look = field(default_factory=Look)
    scored_with: Annotated[tuple[_Prompt, ...], Field(max_length=100)] | None = None
    """Prompts besides its own that its scores are made from, of which more make better scores; None: no scores are
    wanted. It makes no picture another."""

    base: ClassVar[str] = ""
    loras: ClassVar[tuple[tuple[str, float], ...]] = ()

    def cells(self) -> list[Cell]:
        """What is to be drawn, each once, in the order in which it is drawn: the base first, then row by row."""
        cells = (
            _cell(step, strength, prompt, seed)
            for prompt in self.prompts
            for seed in self.seeds
            for step in (0, *self.steps)
            for strength in (self.strengths if step else (0.0,) if 0 in self.strengths else ())
        )
        return list(dict.fromkeys(cells))

    def judged(self) -> WallOrder:
        """The wall that its scores are made from: with all prompts."""
        return replace(self, prompts=tuple(dict.fromkeys((*self.prompts, *(self.scored_with or ())))), scored_with=None)

    def of_the_base(self) -> WallOrder:
        """What the base alone makes of its prompts."""
        return replace(self, steps=self.steps[:1], strengths=(0.0,))

    def file(self, cell: Cell) -> Path:
        """Where a picture is, or will be: a name made of all that makes the picture, so that it never shows another.

        Raises:
            RunError: if there is no such checkpoint.
        """
        return self.files([cell])[cell]

    def files(self, cells: Iterable[Cell] | None = None) -> dict[Cell, Path]:
        """Where each picture is, or will be, likewise; of all cells if none are named.

        Raises:
            RunError: if there is no such checkpoint.
        """
        run = RunFolder(Path(self.run))
        drawn_with = cache(lambda step: _drawn_with(run, step))  # what is on disk is looked at once for a row
        names = {
            cell: _name({"of": drawn_with(cell.step if cell.strength else None), **_drawn_how(cell, self.look)})
            for cell in (self.cells() if cells is None else cells)
        }
        return {cell: run.path / "compare" / f"{name}.png" for cell, name in names.items()}

    def sheet(self) -> Path:
        """Where the wall is kept as one picture, under a name made of all that is on it."""
        cells = [file.stem for file in self.files().values()]
        name = _name({"cells": cells, "steps": self.steps, "strengths": [float(at) for at in self.strengths]})
        return Path(self.run) / "compare" / f"wall-{name}.png"


@dataclass(frozen=True)
class PictureOrder:
    """Pictures of each prompt with each seed, by a run's checkpoint or by a base alone, with other LoRAs on."""

    __pydantic_config__: ClassVar = _STRICT

    prompts: _Prompts
    seeds: _Seeds
    run: _Path = ""
    """The absolute path of a run's folder; empty: none."""
    step: _Step = 0
    """Of the checkpoint; 0 without a run."""
    strength: _Strength = 1.0
    base: _Path = ""
    """As in `base.model`; empty: the run's."""
    loras: Annotated[tuple[tuple[Annotated[_Path, Field(min_length=1)], _Strength], ...], Field(max_length=20)] = ()
    """Files, each with its strength."""
    look: Look = field(default_factory=Look)

    def cells(self) -> list[Cell]:
        strength = self.strength if self.run else 0.0
        return list(
            dict.fromkeys(_cell(self.step, strength, text, seed) for text in self.prompts for seed in self.seeds)
        )

    def file(self, cell: Cell, runs: Path) -> Path:
        """Where a picture is, or will be, likewise.

        Raises:
            RunError: if there is no such checkpoint.
            UserError: if a LoRA file is not there.
        """
        made: dict[str, Any] = {"of": {}}
        if self.run:
            made["of"] = _drawn_with(RunFolder(Path(self.run)), cell.step if cell.strength else None)
        if self.base:
            made["base"] = [self.base, _traces_of_base(self.base)]
        made["loras"] = [[Path(path).name, _trace(Path(path)), float(at)] for path, at in self.loras if at]
        return drawn_folder(runs) / f"{_name({**made, **_drawn_how(cell, self.look)})}.png"

    def files(self, runs: Path) -> list[Path]:
        """Those of all pictures; beside each, with the ending .json, is what `settings_of` tells."""
        return [self.file(cell, runs) for cell in self.cells()]


Order = WallOrder | PictureOrder


def drawn_folder(runs: Path) -> Path:
    """Where the pictures of `PictureOrder`s are."""
    return runs / ".pictures"


def files_of(order: Order, runs: Path) -> dict[Cell, Path]:
    """Where each picture of an order is, or will be.

    Raises:
        RunError: if there is no such checkpoint.
        UserError: if a LoRA file is not there.
    """
    if isinstance(order, WallOrder):
        return order.files()
    return {cell: order.file(cell, runs) for cell in order.cells()}


def _cell(step: int, strength: float, prompt: str, seed: int) -> Cell:
    return Cell(step if strength else 0, float(strength), prompt, seed)


# ---------------------------------------------------------------------------------------------------------------------
# names of pictures


def _name(picture: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(picture, sort_keys=True).encode()).hexdigest()[:16]


def _drawn_how(cell: Cell, look: Look) -> dict[str, Any]:
    how = {**asdict(look), "guidance": float(look.guidance)}
    return {"prompt": cell.prompt, "seed": cell.seed, "strength": float(cell.strength), "look": how}


def _drawn_with(run: RunFolder, step: int | None) -> dict[str, Any]:
    """The base of a run, and its checkpoint, where one that takes another's place is another one; None: the base
    alone, as at strength 0."""
    saved = run.saved_steps()
    if not saved or (step is not None and step not in saved):
        what = f"has no checkpoint of step {step}" if saved else "has no checkpoint yet"
        raise RunError(what, str(run.path), f"Checkpoints: {', '.join(map(str, saved)) or 'none'}.")
    base = {"base": saved_base(run, saved[-1])}
    if step is None:
        return base
    return {**base, "run": run.name, "step": step, "checkpoint": checkpoint_trace(run, step)}


def saved_base(run: RunFolder, step: int) -> str:
    """The identity of the base that a checkpoint was trained on.

    Raises:
        RunError: if the checkpoint is damaged.
    """
    file = run.checkpoint(step) / "state.json"
    try:
        return str(read_json(file)["base"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"cannot be read ({error})", str(file), "Remove this checkpoint's folder.") from error


def checkpoint_trace(run: RunFolder, step: int) -> list[int]:
    """What changes when a checkpoint is written again."""
    return _trace(run.checkpoint(step) / "adapter.safetensors")


def _trace(file: Path) -> list[int]:
    """What changes when a file is written again."""
    try:
        found = file.stat()
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", str(file), "Check its path, or take another.") from error
    return [found.st_size, found.st_mtime_ns]


def _traces_of_base(model: str) -> list[Any]:
    """Likewise of a base: its file, the weights of its folder, or the Hub's commit that is on this computer."""
    path = POCKET if model == "pocket" else Path(model).expanduser()
    if path.is_dir():
        return [_trace(file) for file in sorted(path.glob("*/*.safetensors"))]
    return _trace(path) if path.is_file() else [_commit(model)]


def _commit(model: str) -> str:
    """Of a model on the Hub that was downloaded before; empty for any other."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "model_index.json")
    except HFValidationError:
        return ""
    return Path(found).parent.name if isinstance(found, str) else ""


# ---------------------------------------------------------------------------------------------------------------------
# as text


_KINDS: dict[str, type[Order]] = {"wall": WallOrder, "pictures": PictureOrder}


def write_order(order: Order) -> str:
    """As JSON, which `read_order` reads.

    Raises:
        UserError: if a value is out of its bounds.
    """
    kind = next(name for name, kind in _KINDS.items() if isinstance(order, kind))
    text = json.dumps({"kind": kind, **asdict(order)}, allow_nan=True)
    read_order(text)
    return text


def read_order(text: str, where: str = "order") -> Order:
    """An order from its JSON; every value is checked.

    Raises:
        UserError: with all that is wrong, each with its place.
    """
    try:
        values = json.loads(text)  # NaN is told of below, with its place
    except (ValueError, RecursionError):
        raise UserError("is not JSON", where, _AGAIN) from None
    kind = _KINDS.get(str(values.pop("kind", ""))) if isinstance(values, dict) else None
    if kind is None:
        raise UserError("is no order", where, _AGAIN)
    try:
        order = _adapter(kind).validate_json(json.dumps(values))
    except (ValidationError, ValueError, RecursionError) as error:
        raise UserError.of(_explained(error, where)) from None
    if problems := list(_problems(order, where)):
        raise UserError.of(problems)
    return order


_AGAIN = "Order the pictures again."


def _adapter(kind: type[Order]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _explained(error: Exception, where: str) -> list[Problem]:
    if not isinstance(error, ValidationError):
        return [Problem(where, "is no order", _AGAIN)]
    return [
        Problem(
            ".".join(map(str, detail["loc"])) or where, detail["msg"].replace("Input should", "should"), "Change it."
        )
        for detail in error.errors()
    ]


def _problems(order: Order, where: str) -> Iterable[Problem]:
    """What is wrong with values that are sound alone."""
    if isinstance(order, WallOrder) or order.run:
        if not Path(order.run).is_absolute():
            yield Problem("run", f"{order.run!r} is not an absolute path", "Give the whole path of the run's folder.")
    elif not order.base:
        yield Problem("base", "neither a run nor a base is named", "Name one of them.")
    if isinstance(order, WallOrder) and 0 in order.steps:
        yield Problem("steps", "0 is no checkpoint", "For the untouched base take strength 0.")
    if isinstance(order, WallOrder) and order.scored_with is not None and not any(order.strengths):
        yield Problem("strengths", "0 alone shows nothing of what was trained", "Give others, or ask for no scores.")
    if isinstance(order, PictureOrder) and order.run and order.strength and not order.step:
        yield Problem("step", "no checkpoint is named", "Name one, or take strength 0.")
    if (count := math.prod(_counts(order))) > MOST_PICTURES:
        fewer = "fewer checkpoints, strengths or seeds, or no scores" if isinstance(order, WallOrder) else "fewer seeds"
        yield Problem(where, f"{count} pictures are too many at once", f"Order up to {MOST_PICTURES}: {fewer}.")


def _counts(order: Order) -> list[int]:
    if isinstance(order, WallOrder):
        return [len(order.steps), len(order.strengths), len(order.judged().prompts), len(order.seeds)]
    return [len(order.prompts), len(order.seeds)]


def settings_of(picture: Path) -> PictureOrder | None:
    """The order by which a single picture was drawn, with its own prompt and seed alone; None if that is not known."""
    try:
        order = read_order(picture.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, UserError):
        return None
    return order if isinstance(order, PictureOrder) else None
