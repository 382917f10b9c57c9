"""What is known of a run when its files are written, and how much of it may be told.

One switch decides, `export.metadata`. Under "safe" nothing of this computer and nothing that may be a caption leaves
it: of a path only its last part, and not even that where it is a person's home; of captions only the tags that many
images share; of the previews' prompts only those that are none of the training captions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ...datasets.captions import tags
from ..bases import BaseInfo
from ..config import ExportSection, RunConfig
from ..strengths import AS_TRAINED, Strengths

if TYPE_CHECKING:
    from ..sample import Drawing

_LONGEST_TAG, _MOST_WORDS = 40, 4
"""Characters, and words, of what counts as a tag; what is longer is a sentence."""
_PRIVATE = re.compile(r"[a-z]:[\\/]|^[~/\\]|[\\/](home|users)[\\/]|\S@\S+\.\S|://", re.IGNORECASE)
"""In a tag: a path, an address of mail or of the web."""
_HOME = re.compile(r"(?:^|[\\/])(?:home|users|documents and settings)[\\/]+[^\\/]+[\\/]*$|^~[^\\/]*$", re.IGNORECASE)


@dataclass(frozen=True)
class FolderFacts:
    """One folder of training images."""

    path: str
    images: int
    repeats: int = 1
    """How often each image was shown in one epoch."""
    trigger: str = ""

    @property
    def name(self) -> str:
        return last_part(self.path)


@dataclass(frozen=True)
class BakedFacts:
    """What became of changes of other kinds that were written as a plain LoRA."""

    rank: int
    lost: Mapping[str, float]
    """|rest| / |change| by component."""


@dataclass(frozen=True)
class Preview:
    """A picture that was drawn with what is exported, and how."""

    picture: Image.Image
    prompt: str
    number: int
    """Its place among the previews, which decides its seed."""
    drawing: Drawing
    base: str
    """The base, as it is told."""

    @property
    def seed(self) -> int:
        return self.drawing.seed + self.number


@dataclass(frozen=True)
class Thumbnail:
    """A picture that a person has chosen to stand for the file."""

    picture: Image.Image
    prompt: str = ""
    """What it was drawn from; empty if its file does not say."""
    number: int | None = None
    """Its place among the previews, if it is one of them."""


@dataclass(frozen=True)
class Facts:
    """What is known of a run when its LoRA is written. Every field but the name may be missing."""

    name: str
    """Name of the LoRA; the file is `<name>.safetensors`."""
    config: RunConfig | None = None
    folders: tuple[FolderFacts, ...] = ()
    buckets: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """(width, height) in pixels to number of images."""
    tag_frequency: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Folder to tag to number of images; a tag is what stands between two commas, in lower case."""
    steps: int | None = None
    """Optimizer steps behind these weights."""
    planned_steps: int | None = None
    """Those of the whole run."""
    images_seen: int | None = None
    epochs: float | None = None
    """How often all images were shown."""
    started: float | None = None
    """Unix time."""
    finished: float | None = None
    loss: float | None = None
    """Mean training loss near the end."""
    previews: tuple[Preview, ...] = ()
    """What the style looks like."""
    thumbnail: Thumbnail | None = None
    """The picture that stands for it; None: the first preview."""
    baked: BakedFacts | None = None
    strengths: Strengths = AS_TRAINED
    """At which the file holds what was trained."""
    merged_from: tuple[str, ...] = ()
    """What it was made of, if that was not one training alone: titles, as of checkpoints whose mean it is."""
    has_embedding: bool = True
    """Whether new tokens are part of it, where some were trained."""

    @property
    def settings(self) -> ExportSection:
        return self.config.export if self.config else ExportSection()

    @property
    def title(self) -> str:
        """The title given, and what was done to the weights since; or the name, which says that already."""
        done = [f"baked to rank {self.baked.rank}"] if self.baked else []
        done += [f"at strength {self.strengths}"] if self.strengths != AS_TRAINED else []
        given = self.settings.title
        return (f"{given} ({', '.join(done)})" if given and done else given) or self.name

    @property
    def is_as_trained(self) -> bool:
        """Whether the file does what was trained, and so what the previews show."""
        return self.baked is None and self.strengths == AS_TRAINED and not self.merged_from

    @property
    def recommended(self) -> float:
        """The strength that others are told to use; what is in the file already is not asked for again."""
        inside = self.strengths.everywhere
        return round(self.settings.strength / inside, 4) if inside > 0 else self.settings.strength

    @property
    def pictured(self) -> Preview | None:
        """The preview that stands for it; None if there is none, or if a picture was chosen that is none of them."""
        number = self.thumbnail.number if self.thumbnail else next((p.number for p in self.previews), None)
        return next((preview for preview in self.previews if preview.number == number), None)

    @property
    def picture(self) -> Image.Image | None:
        """The picture that stands for it."""
        return self.thumbnail.picture if self.thumbnail else self.pictured and self.pictured.picture

    @property
    def picture_prompt(self) -> str:
        """What that picture was drawn from, as far as it may be told."""
        chosen = self.thumbnail or self.pictured
        return self.told_prompt(chosen.prompt) if chosen and chosen.prompt else ""

    @property
    def triggers(self) -> list[str]:
        """The words that call the style, each once, in order. They are always told: without them it cannot be used."""
        given = [folder.trigger for folder in self.folders]
        given += [data.trigger for data in self.config.data if not data.regularization] if self.config else []
        return list(dict.fromkeys(word for word in given if word))

    # -----------------------------------------------------------------------------------------------------------------
    # how much of it is told

    @property
    def tells_training(self) -> bool:
        return self.settings.metadata != "none"

    @property
    def tells_all(self) -> bool:
        return self.settings.metadata == "all"

    @cached_property
    def told_tags(self) -> dict[str, dict[str, int]]:
        """Folder's name to tag to number of images; a folder that has none to tell is left out."""
        if not self.tells_training:
            return {}
        names = unique(last_part(folder) for folder in self.tag_frequency)
        told = {
            name: {str(tag): int(count) for tag, count in counts.items() if self._tells_tag(tag, count)}
            for name, counts in zip(names, self.tag_frequency.values(), strict=True)
        }
        return {name: counts for name, counts in told.items() if counts}

    def _tells_tag(self, tag: str, count: int) -> bool:
        if self.tells_all or tag in self._trigger_tags:
            return True
        is_short = len(tag) <= _LONGEST_TAG and len(re.split(r"[\s_]+", tag.strip())) <= _MOST_WORDS
        return count >= self.settings.tag_threshold and is_short and not _PRIVATE.search(tag)

    def told_prompt(self, prompt: str) -> str:
        """A prompt of the previews; empty if it must not be told, because it may be a caption or has untold tags.

        Whoever gives no `sample.prompts` has captions for prompts, and an exported configuration cannot tell. So what
        consists of nothing but the tags of captions may be one, and what holds one of their rare tags gives that away.
        """
        if not self.tells_training:
            return ""
        parts = set(tags(prompt)) - self._trigger_tags
        of_captions = parts & {tag for counts in self.tag_frequency.values() for tag in counts}
        told = {tag for counts in self.told_tags.values() for tag in counts}
        may_be_caption = not self.tag_frequency or (parts and parts == of_captions)
        is_told = not may_be_caption and of_captions <= told and not _PRIVATE.search(prompt)
        return prompt if self.tells_all or is_told else ""

    @cached_property
    def _trigger_tags(self) -> set[str]:
        return {tag for trigger in self.triggers for tag in tags(trigger)}


def hub_id(info: BaseInfo) -> str | None:
    """`owner/name` of a base from the Hub; None for a folder of this computer or a built-in base."""
    return info.model if info.source == info.model and HUB_ID.fullmatch(info.model) else None


def base_name(info: BaseInfo) -> str:
    """What a base is called where others read it."""
    return hub_id(info) or last_part(info.model, "base")


HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")


def last_part(path: str, instead: str = "images") -> str:
    """The last part of a path or Hub id, of any system: nothing of this computer, and in place of a person's home
    something else."""
    parts = [part for part in re.split(r"[\\/]+", path) if part not in ("", ".", "..")]
    if not parts or _HOME.search(path.strip()) or parts[-1] == _user():
        return instead
    return parts[-1].encode("utf-8", "replace").decode()


def _user() -> str:
    """The name of this computer's user, as their home has it; empty where there is none."""
    try:
        return Path.home().name
    except RuntimeError:
        return ""


def unique(names: Iterable[str]) -> list[str]:
    """The names in order; one that comes again gets a number."""
    found: list[str] = []
    for name in names:
        number = sum(other == name or other.startswith(f"{name}_") for other in found)
        found.append(f"{name}_{number + 1}" if name in found else name)
    return found
