"""How long a run will take and how much disk it will fill, from what was measured here and from what is trained.

Nothing is guessed: a time comes from earlier runs of the same kind in the same folder, or it is not known.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from .config import RunConfig
from .configfile import read_config
from .errors import LorasmithError, Problem
from .formats import formats_of
from .story import Story

_STEPS_TO_TRUST = 5
"""A run with fewer says nothing: the first steps are slow."""
_SAME_AREA = 0.05
"""Buckets whose pixels differ by less than this share are trained at the same resolution."""
_FORWARD, _BACKWARD = 1, 2
"""What a forward and a backward pass cost, in forward passes (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361)."""
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
_STATE = {"adamw8bit": 2, "lion": 4, "lion8bit": 1, "prodigy": 16}
"""Bytes that an optimizer keeps for each weight; most keep two numbers in fp32."""
_BYTES_OF_A_PIXEL = 2
"""Of a PNG of a photograph, about."""
_ROOM = 64 << 20
"""Bytes for the log and the configuration."""


# ---------------------------------------------------------------------------------------------------------------------
# time


@dataclass(frozen=True)
class Pace:
    """How fast runs of one kind were here."""

    runs: int
    """How many of them were measured."""
    step: float
    """Seconds; the median over all their steps."""
    picture: float
    """Seconds for one denoising step of one preview; 0 where none was drawn."""
    validation: float = 0.0
    """Seconds for one measure of the validation loss, or of the scores; 0 where none was taken."""
    reckoned: bool = False
    """Whether the runs refined nothing, and the reference's pass was added to their steps."""

    @property
    def source(self) -> str:
        """Which runs tell it, in words."""
        which = "run without preferences" if self.reckoned else "such run"
        runs = f"one {which}" if self.runs == 1 else f"{self.runs} {which.replace('run', 'runs')}"
        return f"{runs} took here" + (", and a forward pass more for the reference" if self.reckoned else "")

    def seconds(self, steps: int, config: RunConfig) -> float:
        """For so many steps, and the previews and validations that come with them."""
        previews = _previews(steps, config) * config.sample.steps * self.picture
        return steps * self.step + previews + _rounds(steps, config.validation.every) * self.validation


def pace_of(facts: Mapping[str, Any], config: RunConfig, stories: Iterable[Story]) -> Pace | None:
    """From the runs that trained the same parts of the same base, at the same resolution, with as many pictures at once
    and with the same runtime settings; None if there are none. `facts` and `config` are those of a plan.

    A run that refines is like others that do. Where there are none, the one whose style it refines is known: with as
    many pictures at once, it lacks the reference's pass alone.
    """
    told = [story for story in stories if len(story.steps) >= _STEPS_TO_TRUST]
    kind = _kind(facts)
    if like := [story for story in told if _is_like(story, kind, facts, config)]:
        return _pace_of(like, facts)
    plain = kind | {"refines": False}
    if kind["refines"] and (like := [story for story in told if _is_like(story, plain, facts, config)]):
        pace = _pace_of(like, facts)
        return replace(pace, step=pace.step * _with_the_reference(config), reckoned=True)
    return None


def _with_the_reference(config: RunConfig) -> float:
    """By how much longer a step takes in which another forward pass of each picture tells the reference's errors."""
    again = _FORWARD if config.runtime.gradient_checkpointing else 0
    return 1 + _FORWARD / (_FORWARD + again + _BACKWARD)


def _pace_of(like: Sequence[Story], facts: Mapping[str, Any]) -> Pace:
    drawn = [seconds for story in like for seconds in _seconds_of_pictures(story)]
    measured = facts.get("validation", {})
    by_scores = measured.get("by") == "scores"
    asked = [s for story in like for s in (story.scored_seconds if by_scores else story.prediction_seconds)]
    times = measured.get("pictures" if by_scores else "predictions", 0)
    return Pace(
        runs=len(like),
        step=statistics.median(seconds for story in like for seconds in story.steps.seconds),
        picture=statistics.median(drawn) if drawn else 0.0,
        validation=times * statistics.median(asked) if asked else 0.0,
    )


def _is_like(story: Story, kind: Mapping[str, Any], facts: Mapping[str, Any], config: RunConfig) -> bool:
    then = story.plan.plan if story.plan else {}
    if _kind(then) != kind or abs(_area(then) / _area(facts) - 1) > _SAME_AREA:
        return False
    earlier = _config_beside(story)
    return earlier is not None and earlier.runtime == config.runtime.model_copy(update={"cache": earlier.runtime.cache})


def _kind(facts: Mapping[str, Any]) -> dict[str, Any]:
    parts = [(part["name"], part["modules"], part["parameters"]) for part in facts.get("trained", [])]
    said = facts.get("preference")
    return {"base": facts.get("base"), "at_once": _at_once(facts), "trained": parts, "refines": bool(said)}


def _at_once(facts: Mapping[str, Any]) -> float:
    """Pictures of a step; of one that refines the mean over its pairs, which have two, and its thumbs."""
    batch, said = facts.get("batch", 0), facts.get("preference") or {}
    pairs, thumbs = (sum(said.get(key, 0) for key in keys) for keys in (["pairs"], ["thumbs_up", "thumbs_down"]))
    return batch * (1 + pairs / (pairs + thumbs)) if pairs else batch


def _area(facts: Mapping[str, Any]) -> float:
    """Pixels of a mean image, in its bucket."""
    sizes = [(size.split("x"), count) for size, count in facts.get("buckets", {}).items()]
    images = sum(count for _, count in sizes)
    return sum(int(width) * int(height) * count for (width, height), count in sizes) / images if images else 1.0


def _config_beside(story: Story) -> RunConfig | None:
    """The configuration of the run whose story it is; None if it cannot be read."""
    file = story.path.parent / "config.toml"
    try:
        return _config_of(file, file.stat().st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=512)
def _config_of(file: Path, changed: int) -> RunConfig | None:
    """A configuration, read again when its file has `changed`."""
    del changed
    try:
        return read_config(file)
    except LorasmithError:
        return None


def _seconds_of_pictures(story: Story) -> Iterator[float]:
    """Of each round of previews, the seconds for one denoising step of one picture."""
    config = _config_beside(story)
    return (seconds / config.sample.steps for seconds in story.picture_seconds) if config else iter(())


# ---------------------------------------------------------------------------------------------------------------------
# disk


@dataclass(frozen=True)
class Disk:
    """What a run writes."""

    checkpoints: int
    """How many are kept."""
    checkpoint: int
    """Bytes of one."""
    files: int
    """Files to share."""
    file: int
    """Bytes of one; of a whole model, those of its trained weights alone."""
    previews: int = 0
    preview: int = 0
    """Bytes of one. None of them is ever removed: they show how the run went."""

    @property
    def saved(self) -> int:
        """Bytes of all checkpoints that are kept."""
        return self.checkpoints * self.checkpoint

    @property
    def needed(self) -> int:
        """Bytes that must be free; a checkpoint is written before an older one is removed."""
        return self.saved + self.checkpoint + self.files * self.file + self.previews * self.preview + _ROOM


def disk_of(facts: Mapping[str, Any], config: RunConfig) -> Disk:
    """From the trained weights in fp32 with what the optimizer keeps of each; `facts` and `config` are a plan's."""
    weights = sum(part["parameters"] for part in facts["trained"])
    averaged = 8 if config.optimizer.ema_decay else 0
    state = _STATE.get(config.optimizer.kind, 8)
    formats = config.export.formats or formats_of(config)
    return Disk(
        checkpoints=_checkpoints(facts["steps"], config),
        checkpoint=weights * (4 + state + averaged),
        files=len(formats) * (2 if config.export.bundle else 1),
        file=weights * _BYTES[config.export.precision],
        previews=_previews(facts["steps"], config),
        preview=facts["preview_side"] ** 2 * _BYTES_OF_A_PIXEL,
    )


def _checkpoints(steps: int, config: RunConfig) -> int:
    save, measured = config.save, config.validation.every
    made = -(-steps // save.every) if save.every else 1
    if save.keep_best and (not save.every or measured % save.every):
        made += steps // measured  # at most: one where each validation is the best so far
    return made if save.keep == "all" else min(made, int(save.keep) + save.keep_best)


def _previews(steps: int, config: RunConfig) -> int:
    return _rounds(steps, config.sample.every) * len(config.sample.prompts)


def _rounds(steps: int, every: int) -> int:
    """Before the first step, each so many steps, and at the last; 0 is never."""
    return 1 + -(-steps // every) if every else 0


def free_bytes(folder: Path) -> int:
    """On the disk that holds a folder, which need not be there yet."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return shutil.disk_usage(there).free


def lack_of_disk(disk: Disk, free: int, folder: Path) -> Problem | None:
    """Why a run would fill the disk; None if it fits."""
    if disk.needed <= free:
        return None
    what = (
        f"the run writes about {amount(disk.needed)} ({disk.checkpoints} checkpoints of {amount(disk.checkpoint)}, "
        f"{disk.previews:,} previews of {amount(disk.preview)} and {disk.files} files of {amount(disk.file)}), and "
        f"{amount(free)} are free on its disk"
    )
    return Problem(str(folder), what, "Free some space, raise save.every or sample.every, or set save.keep = 2.")


# ---------------------------------------------------------------------------------------------------------------------
# in words


def amount(count: int) -> str:
    """Bytes in the unit that a person would use, as `170 MB`."""
    number, unit = float(count), "bytes"
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 999.5 or unit == "GB":
            break
        number /= 1000
    return f"{number:.1f} {unit}" if number < 9.95 and unit != "bytes" else f"{number:,.0f} {unit}"
