"""`ratings.jsonl`: what a person said of a run's pictures, one JSON object a line, only ever appended to.

    {"better": "samples/step-000400/00.png", "worse": "samples/step-000100/00.png", "prompt": "ink an owl"}
    {"picture": "compare/1f2e.png", "up": true, "prompt": "ink an owl"}
    {"neither": ["samples/step-000400/01.png", "samples/step-000100/01.png"], "prompt": "ink a cat"}
    {"undo": true}

Paths are those below the run's folder, with forward slashes. A prompt that is not given is read from the picture, where
Lorasmith and others write it. Of two lines about the same picture, or the same two pictures, the later one holds;
`undo` takes back the last line that was not taken back yet.
"""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ..errors import Problem, UserError
from ..files import flush_folder, make_folder
from ..jobs import RunFolder
from ..jsonfile import LARGEST, parse_json

_PathText = Annotated[str, Field(min_length=1, max_length=1000)]
_PICTURES = {".png", ".jpg", ".jpeg", ".webp"}


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Pair(_Line):
    """Two pictures of one prompt, of which one is better."""

    better: _PathText
    worse: _PathText
    prompt: str | None = Field(default=None, max_length=5000)

    @property
    def pictures(self) -> tuple[str, ...]:
        return self.better, self.worse


class Neither(_Line):
    """Two pictures of one prompt, of which none is better."""

    neither: Annotated[list[_PathText], Field(min_length=2, max_length=2)]
    prompt: str | None = Field(default=None, max_length=5000)

    @property
    def pictures(self) -> tuple[str, ...]:
        return tuple(self.neither)


class Thumb(_Line):
    """A single picture that is liked, or not."""

    picture: _PathText
    up: bool
    prompt: str | None = Field(default=None, max_length=5000)

    @property
    def pictures(self) -> tuple[str, ...]:
        return (self.picture,)


class Undo(_Line):
    """The line before holds no more."""

    undo: Literal[True]


Rating = Pair | Neither | Thumb
_KEYS: dict[str, type[_Line]] = {"better": Pair, "neither": Neither, "picture": Thumb, "undo": Undo}


@dataclass(frozen=True)
class Ratings:
    """The ratings file of a run, or another about its pictures."""

    run: RunFolder
    file: Path

    @classmethod
    def of(cls, run: RunFolder) -> Ratings:
        """The one that the browser app writes."""
        return cls(run, run.path / "ratings" / "ratings.jsonl")

    def standing(self) -> list[Rating]:
        """What was said and holds still, in the order in which it was said; nothing of a file that is not there.

        Raises:
            UserError: with every line that is wrong.
        """
        lines = list(self._lines())
        if problems := [line for line in lines if isinstance(line, Problem)]:
            raise UserError.of(problems)
        said: list[Rating] = []
        for line in lines:
            if isinstance(line, Undo):
                del said[-1:]
            elif not isinstance(line, Problem):
                said.append(line)
        last: dict[Hashable, Rating] = {}
        for rating in said:
            last.pop(_about(rating), None)  # so that it stands where it was said last
            last[_about(rating)] = rating
        return list(last.values())

    def add(self, rating: Rating) -> None:
        """Say something of a picture, or of two.

        Raises:
            UserError: if a picture is not one of this run.
        """
        if problems := list(self._wrong_pictures(rating, "")):
            raise UserError.of(problems)
        self._append(rating)

    def undo(self) -> None:
        """Take back what was said last; nothing if nothing was."""
        if self.standing():
            self._append(Undo(undo=True))

    def path_of(self, picture: str) -> Path:
        return self.run.path / picture

    def name_of(self, picture: Path) -> str:
        """What a picture below the run's folder is called in the file."""
        return picture.relative_to(self.run.path).as_posix()

    def _append(self, line: _Line) -> None:
        """Add a line, on the disk before anything that follows it happens, in place of one that a power cut tore."""
        make_folder(self.file.parent)
        is_new = not self.file.exists()
        text = json.dumps(line.model_dump(exclude_none=True), ensure_ascii=True) + "\n"
        with self.file.open("a+b") as file:
            file.seek(0)
            whole, ended, rest = file.read().rpartition(b"\n")
            if _is_torn(rest):
                file.truncate(len(whole) + len(ended))
                rest = b""
            file.write((b"\n" if rest else b"") + text.encode())
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            flush_folder(self.file.parent)

    def _lines(self) -> Iterator[Rating | Undo | Problem]:
        try:
            with self.file.open("rb") as file:
                content = file.read(LARGEST + 1)
        except FileNotFoundError:
            return
        if len(content) > LARGEST:
            yield Problem(str(self.file), f"has more than {LARGEST >> 20} MiB", "Name a file of ratings.")
            return
        lines = content.split(b"\n")
        for number, line in enumerate(lines, 1):
            if line.strip() and not (number == len(lines) and _is_torn(line)):
                yield from self._read(line, f"{self.file}:{number}")

    def _read(self, line: bytes, where: str) -> Iterator[Rating | Undo | Problem]:
        try:
            values = parse_json(line.decode("utf-8"))
        except ValueError as error:
            yield Problem(where, f"is no JSON ({error})", "Mend that line, or take it away.")
            return
        kinds = [kind for key, kind in _KEYS.items() if isinstance(values, dict) and key in values]
        if len(kinds) != 1:
            fix = 'Write {"better": ..., "worse": ...}, {"picture": ..., "up": true} or {"neither": [..., ...]}.'
            yield Problem(where, "says neither which of two is better, nor whether one is liked", fix)
            return
        try:
            found: Any = TypeAdapter(kinds[0]).validate_python(values)
        except ValidationError as error:
            for detail in error.errors():
                place = ".".join(map(str, detail["loc"]))
                yield Problem(where, f"{place}: {detail['msg'].lower()}", "Mend that line, or take it away.")
            return
        problems = [] if isinstance(found, Undo) else list(self._wrong_pictures(found, where))
        yield from problems or [found]

    def _wrong_pictures(self, rating: Rating, where: str) -> Iterator[Problem]:
        for name in rating.pictures:
            if not self._is_below_the_run(name):
                what = f"{name!r} is no picture below {self.run.path}"
                fix = f'Name it as it is below that folder, such as "samples/step-000100/00.png" ({_endings()}).'
                yield Problem(where or "rating", what, fix)
        if len(set(rating.pictures)) < len(rating.pictures):
            yield Problem(where or "rating", "compares a picture with itself", "Name two.")

    def _is_below_the_run(self, name: str) -> bool:
        """Whether it is the name of a picture that no link leads out of the run's folder. It need not be there: what is
        not can be said of what was there."""
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
            return False
        try:
            inside = self.path_of(name).resolve().is_relative_to(self.run.path.resolve())
        except (OSError, ValueError, RuntimeError):  # no file can have such a name
            return False
        return inside and path.suffix.lower() in _PICTURES


def prompt_in(picture: Path) -> str | None:
    """The prompt that a picture was drawn with, as Lorasmith, A1111 and others write it; None if it tells none."""
    try:
        with Image.open(picture) as opened:
            opened.load()
            told = opened.info
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    if isinstance(prompt := told.get("positive_prompt"), str):
        return prompt
    parameters = told.get("parameters")
    if not isinstance(parameters, str):
        return None
    return parameters.partition("\nNegative prompt:")[0].partition("\nSteps:")[0]


def _about(rating: Rating) -> Hashable:
    """A pair is the same whichever was found better; a thumb is about one picture."""
    return frozenset(rating.pictures)


def _is_torn(rest: bytes) -> bool:
    """Whether what stands behind the last end of a line is the beginning of one: an object ends in a brace."""
    return bool(rest.strip()) and not rest.rstrip().endswith(b"}")


def _endings() -> str:
    return ", ".join(sorted(_PICTURES))
