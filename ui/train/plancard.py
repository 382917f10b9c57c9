"""A plan in words, as a card: what will be done, how long it takes as far as that is known, and what it writes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...trainer.architectures import FAMILY_TITLES
from ...trainer.errors import LorasmithError, Problem, UserError
from ...trainer.estimate import Disk, Pace, amount, disk_of, free_bytes, lack_of_disk, pace_of
from ...trainer.status import duration
from ...trainer.story import Story
from ..html import esc, notice, problems
from ..planner import SOURCE, Planned
from .draft import FACTORS, Quality, Values, images_of

PLANNING = '<p class="planning">Planning...</p>'


@dataclass(frozen=True)
class Foreseen:
    """A plan with what it needs here."""

    planned: Planned
    pace: Pace | None
    """None: nothing like it was trained here yet."""
    disk: Disk
    free: int
    """Bytes on the disk of the runs folder."""

    @classmethod
    def of(cls, planned: Planned, runs: Path, stories: Iterable[Story]) -> Foreseen:
        """Look at the earlier runs and the disk.

        Raises:
            UserError: if the disk is too small.
        """
        disk, free = disk_of(planned.facts, planned.config), free_bytes(runs)
        if problem := lack_of_disk(disk, free, runs):
            raise UserError.of([problem])
        return cls(planned, pace_of(planned.facts, planned.config, stories), disk, free)

    @property
    def seconds(self) -> float | None:
        return self.seconds_of(self.planned.facts["steps"])

    def seconds_of(self, steps: int) -> float | None:
        return self.pace.seconds(steps, self.planned.config) if self.pace else None

    def facts(self) -> dict[str, Any]:
        """For machines: the plan's facts, with what it needs here."""
        return self.planned.facts | {
            "seconds": self.seconds and round(self.seconds),
            "disk_bytes": self.disk.needed,
            "free_bytes": self.free,
        }

    # -- in words -----------------------------------------------------------------------------------------------------

    def card(self) -> str:
        lines = "".join(f"<p>{esc(line)}</p>" for line in self._lines)
        looks = "".join(notice(warning, kind="warning") for warning in self.planned.warnings)
        return f'<div class="plan">{lines}{self.techniques}</div>{looks}'

    @property
    def _lines(self) -> list[str]:
        validation = [self.validation] if self.planned.facts["validation"] else []
        return [self.what, self.length, *validation, self.time, self.room, self.memory]

    @property
    def what(self) -> str:
        facts, config = self.planned.facts, self.planned.config
        family = FAMILY_TITLES[facts["base"]["family"]]
        base = "the pocket base" if config.base.model == "pocket" else f"{facts['base']['model']} ({family})"
        parts = " and ".join(_words(part["name"]) for part in facts["trained"])
        weights = sum(part["parameters"] for part in facts["trained"])
        kind = "the weights themselves" if config.adapter.kind == "full" else f"a {_KINDS[config.adapter.kind]}"
        return f"Trains {kind} for {base}, on its {parts}: {_count(weights)} weights."

    @property
    def length(self) -> str:
        facts = self.planned.facts
        images = "1 image" if facts["images"] == 1 else f"{facts['images']} images"
        times = f"{facts['shows_per_image']:.3g}"
        captions = facts["captions"]
        captioned = "all with a caption" if captions == facts["images"] else f"{captions} with a caption"
        return (
            f"{images}, {captioned}, each seen about {times} times: {facts['steps']:,} steps "
            f"of at most {facts['batch']} images."
        )

    @property
    def validation(self) -> str:
        """Of the loss that is measured with the same images and noise each time."""
        facts = self.planned.facts["validation"]
        if by_scores := facts["by"] == "scores":
            pictures, every = f"{facts['pictures']:,}", f"{facts['every']:,}"
            told = f"Each {every} steps {pictures} pictures are drawn and scored: {facts['told']}."
        else:
            told = f"The validation loss is measured each {facts['every']:,} steps: {facts['told']}."
        if facts["patience"]:
            what = "they were not better" if by_scores else "it was not lower"
            told += f" The run ends early if {what} {facts['patience']:,} times in a row."
        return told

    @property
    def time(self) -> str:
        if self.pace is None or self.seconds is None:
            return "How long it takes is known after the first steps: nothing like it was trained here yet."
        return f"About {duration(self.seconds)}, as {self.pace.source}."

    @property
    def room(self) -> str:
        disk = self.disk
        checkpoints = "1 checkpoint" if disk.checkpoints == 1 else f"{disk.checkpoints} checkpoints"
        files = "1 file" if disk.files == 1 else f"{disk.files} files"
        previews = f"{disk.previews:,} previews, {amount(disk.previews * disk.preview)}, " if disk.previews else ""
        return (
            f"Saves {checkpoints}, {amount(disk.saved)}, {previews}and {files} to share, "
            f"{amount(disk.files * disk.file)}; {amount(self.free)} are free."
        )

    @property
    def memory(self) -> str:
        return f"If the memory is full, {self.planned.facts['if_memory_is_full']}."

    @property
    def techniques(self) -> str:
        """What makes it fast and lean here, and what is off, each with its reason."""
        found = self.planned.facts["techniques"]
        on = ", ".join(one["name"] for one in found if one["on"])
        reasons = (f"{one['name']}{'' if one['on'] else ' (off)'}: {one['why']}" for one in found)
        told = "".join(f"<li>{esc(reason)}</li>" for reason in reasons)
        return f"<details><summary>Saves time and memory by: {esc(on)}.</summary><ul>{told}</ul></details>"

    def choices(self, values: Values) -> list[tuple[str, str]]:
        """The qualities, with the steps of each, and the time where it is known."""
        return [(self._choice(values, quality), quality) for quality in FACTORS]

    def _choice(self, values: Values, quality: Quality) -> str:
        facts = self.planned.facts
        steps = max(1, round(facts["steps"] * images_of(values, quality) / facts["images_seen"]))
        seconds = self.seconds_of(steps)
        return f"{quality}: {steps:,} steps" + (f", about {duration(seconds)}" if seconds is not None else "")


def in_the_way(error: LorasmithError) -> str:
    """What keeps a run from starting, each problem with its place and its fix."""
    told = [Problem(problem.where.removeprefix(f"{SOURCE}: "), problem.what, problem.fix) for problem in error.problems]
    count = "One thing stands" if len(told) == 1 else f"{len(told)} things stand"
    return f'<p class="planning">{count} in the way of a start.</p>{problems(type(error).of(told))}'


_KINDS = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT adapter", "boft": "BOFT adapter"}


def _words(part: str) -> str:
    return {"unet": "UNet", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}.get(part, part)


def _count(number: int) -> str:
    return f"{number / 1e6:.3g} million" if number >= 1e6 else f"{number:,}"
