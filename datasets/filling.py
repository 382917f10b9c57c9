"""Fills the empty captions of a folder with what a model writes; what a person wrote is never lost.

Each batch's captions are on disk before the next batch is described, so that a run which was interrupted goes on where
it was when it is started again. What a machine wrote is recorded (`machine.py`), with how it was asked: the same model
would write the same again, so that overwriting, too, goes on instead of starting over.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal

from ..trainer.errors import DataError, LorasmithError, Problem
from ..trainer.events import Event, Phase, Warned
from ..trainer.files import atomic_file, write_text
from .captioners import Captioner, Choice, memory_is_full
from .captions import tidy, with_trigger
from .folder import Found, Item, look
from .images import UnreadableImageError, read_rgb
from .machine import Entry, append, entry_of, read_record
from .sidecars import METADATA, UNREAD_METADATA

Emit = Callable[[Event], None]
Overwrite = Literal["none", "machine", "all"]
"""Which captions are replaced besides filling empty ones: those of machines that nobody has edited, or all."""
Owner = Literal["person", "machine", "in doubt"]
"""Whose a caption is; in doubt is what stands in a file with a problem."""

TEXT_SUFFIXES = (".txt", ".caption")
_NO_CAPTION = ("none", "folder name")


@dataclass(frozen=True)
class Author:
    """A model and how it is asked; the same one writes the same caption again."""

    model: str
    kind: str
    settings: str

    def wrote(self, entry: Entry | None) -> bool:
        return entry is not None and (entry.model, entry.kind, entry.settings) == (self.model, self.kind, self.settings)


@dataclass(frozen=True)
class Written:
    """A caption that was written."""

    image: Path
    file: Path
    caption: str


@dataclass
class Filled:
    """What was done to a folder."""

    author: Author
    written: list[Written] = field(default_factory=list)
    left: Counter[Owner] = field(default_factory=Counter)
    """How many images were left alone, by whose their captions are."""
    kept: list[Path] = field(default_factory=list)
    """Copies of what persons had written."""
    skipped: list[Problem] = field(default_factory=list)
    """Why images have no caption after all, and what else keeps the folder from being trained on."""

    def facts(self) -> dict[str, Any]:
        """For machines."""
        return {
            **asdict(self.author),
            "written": [{"image": str(w.image), "file": str(w.file), "caption": w.caption} for w in self.written],
            "left": dict(self.left),
            "kept": [str(path) for path in self.kept],
            "skipped": [asdict(problem) for problem in self.skipped],
        }


@dataclass(frozen=True)
class Job:
    """An image to be described."""

    image: Path
    file: Path
    """Where its caption goes."""
    before: bytes | None
    """What the file held when the folder was looked at; None if it was not there."""
    is_a_persons: bool
    """Whether it is a person's words that will be replaced."""


def fill(
    folder: Path,
    choice: Choice,
    emit: Emit,
    overwrite: Overwrite = "none",
    batch: int = 8,
    prefix: str = "",
    device: str = "auto",
) -> Filled:
    """Describe the images of a folder that have no caption; the model is loaded only if there are any.

    A prefix stands before every caption, with a comma between unless the prefix ends with a space.

    Raises:
        DataError: if there is no such folder, or it holds no images.
        LorasmithError: if the model cannot be loaded, or a batch does not fit into the memory.
    """
    found = look(folder, progress=lambda done, total: emit(Phase("looking at images", done, total)))
    if not found.items:
        raise DataError.of(found.problems)
    settings = f"{choice.settings} prefix={prefix!r}" if prefix else choice.settings
    filled = Filled(Author(choice.files.name, choice.kind, settings))

    def skip(problem: Problem) -> None:
        filled.skipped.append(problem)
        emit(Warned(str(problem)))

    jobs: list[Job] = []
    for decision in (*found.problems, *_decisions(found, overwrite, filled.author)):
        if isinstance(decision, Job):
            jobs.append(decision)
        elif isinstance(decision, Problem):
            skip(decision)
        else:
            filled.left[decision] += 1
    if not jobs:
        return filled
    emit(Phase(f"loading {choice.files.name}"))
    captioner = choice.load(device)
    for done, (job, outcome) in enumerate(_describe(captioner, jobs, batch)):
        emit(Phase("captioning", done, len(jobs)))
        if isinstance(outcome, Problem):
            skip(outcome)
        elif outcome:
            _write(job, with_prefix(outcome, prefix), filled)
        else:
            skip(Problem(str(job.image), "the model found no words for it", _NO_WORDS[choice.kind == "wd-tagger"]))
    emit(Phase("captioning", len(jobs), len(jobs)))
    return filled


_NO_WORDS = ("Write its caption yourself.", "Lower --threshold, exclude less, or write its caption yourself.")


def with_prefix(caption: str, prefix: str) -> str:
    """`a drawing of ` is put before as it is, `mystyle` like a trigger word: with a comma, and not twice."""
    return prefix + caption if prefix.endswith(" ") else with_trigger(caption, prefix)


# ---------------------------------------------------------------------------------------------------------------------
# which images are described


def _decisions(found: Found, overwrite: Overwrite, author: Author) -> Iterator[Job | Owner | Problem]:
    """For each image: what to do, or whose caption is left alone, or why it has no caption after all."""
    images_of_stem = Counter(item.path.with_suffix("") for item in found.items)
    doubtful = _Doubt(found.problems)
    records: dict[Path, Mapping[str, Entry]] = {}
    taken: set[Path] = set()
    for item in found.items:
        folder = item.path.parent
        if doubtful.about(item.path):
            yield "in doubt"
            continue
        is_empty = item.source in _NO_CAPTION or not any(item.captions)
        if not is_empty and overwrite != "all" and not (item.machine and overwrite == "machine"):
            yield "machine" if item.machine else "person"
            continue
        file = _caption_file(item, shares_stem=images_of_stem[item.path.with_suffix("")] > 1)
        if file is None:
            what = f"its caption is in {item.source}, where none is written"
            yield Problem(str(item.path), what, "Remove it from there; then a .txt file can take its place.")
            continue
        if folder not in records:
            records[folder] = read_record(folder)
        same = item.machine and author.wrote(records[folder].get(file.name))
        if same or file in taken:  # one caption file may serve several images of the same stem
            yield "machine"
            continue
        taken.add(file)
        yield Job(item.path, file, _bytes_of(file), is_a_persons=not (is_empty or item.machine))


class _Doubt:
    """Whether a problem leaves open what the caption of an image is: one of its own files, or a table of its folder."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        places = [Path(re.sub(r" line \d+$", "", problem.where)) for problem in problems]
        self.stems = {place.with_suffix("") for place in places}
        self.folders = {place.parent for place in places if place.name in (*METADATA, *UNREAD_METADATA)}

    def about(self, image: Path) -> bool:
        return image in self.stems or image.with_suffix("") in self.stems or not self.folders.isdisjoint(image.parents)


def _caption_file(item: Item, shares_stem: bool) -> Path | None:
    """The text file that holds the caption, or will hold it; None if the caption is in a table or in JSON.

    Of images that differ in their suffix only, each gets a file of its own, `cat.png.txt`.
    """
    if item.source in _NO_CAPTION:
        return item.path.with_name(f"{item.path.name if shares_stem else item.path.stem}.txt")
    file = item.path.with_name(item.source)
    return file if file.suffix.lower() in TEXT_SUFFIXES and file.is_file() else None


# ---------------------------------------------------------------------------------------------------------------------
# describing and writing


def _describe(captioner: Captioner, jobs: Sequence[Job], batch: int) -> Iterator[tuple[Job, str | Problem]]:
    """Each job with its caption, or why there is none. The next batch is decoded while the model runs."""
    batches = [jobs[start : start + batch] for start in range(0, len(jobs), batch)]
    with ThreadPoolExecutor(max_workers=1) as decoder:
        ahead = decoder.submit(_decode, captioner, batches[0])
        for number in range(len(batches)):
            decoded = ahead.result()
            if number + 1 < len(batches):
                ahead = decoder.submit(_decode, captioner, batches[number + 1])
            if decoded.jobs:
                yield from zip(decoded.jobs, _captions(captioner, decoded.prepared, batch), strict=True)
            yield from decoded.failed


@dataclass
class _Decoded:
    jobs: list[Job] = field(default_factory=list)
    prepared: Any = None
    failed: list[tuple[Job, Problem]] = field(default_factory=list)


def _decode(captioner: Captioner, jobs: Sequence[Job]) -> _Decoded:
    """A batch as the model takes it, without images that have become unreadable since the folder was looked at."""
    decoded, pictures = _Decoded(), []
    for job in jobs:
        try:
            pictures.append(read_rgb(job.image)[0])
            decoded.jobs.append(job)
        except (UnreadableImageError, OSError) as error:
            problem = Problem(str(job.image), f"cannot be read as an image ({error})", "Save it again or remove it.")
            decoded.failed.append((job, problem))
    if pictures:
        decoded.prepared = captioner.prepare(pictures)
    return decoded


def _captions(captioner: Captioner, prepared: Any, batch: int) -> list[str]:
    try:
        return [tidy(caption) for caption in captioner.describe(prepared)]
    except captioner.failures as error:
        if not memory_is_full(error):
            raise
        fix = f"Use --batch {batch // 2}" if batch > 1 else "End what else uses it, or use --device cpu"
        what = f"{batch} pictures at once do not fit into the memory"
        raise LorasmithError(what, "--batch", f"{fix}; what is written stays, and the rest follows.") from error


def _write(job: Job, caption: str, filled: Filled) -> None:
    """Record, then write: should the process die between, no caption of a machine passes for a person's."""
    if _bytes_of(job.file) != job.before:  # somebody has written it while the model ran
        filled.left["person"] += 1
        return
    if job.is_a_persons:
        filled.kept.append(_keep_a_copy(job.file))
    append(job.file.parent, entry_of(job.file.name, caption, **asdict(filled.author)))
    write_text(job.file, f"{caption}\n")
    filled.written.append(Written(job.image, job.file, caption))


def _keep_a_copy(file: Path) -> Path:
    """`cat.txt.bak`, or the next free name; no second copy of the same words."""
    names = (file.with_name(f"{file.name}.bak{number if number > 1 else ''}") for number in count(1))
    words = file.read_bytes()
    copy = next(path for path in names if not path.exists() or path.read_bytes() == words)
    if not copy.exists():
        with atomic_file(copy) as temporary:
            temporary.write_bytes(words)
    return copy


def _bytes_of(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None
