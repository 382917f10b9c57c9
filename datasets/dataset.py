"""Folders, caption rules and buckets together: what the trainer is shown."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..trainer.errors import DataError, Problem
from .buckets import Entry, Fit, Size, fit
from .captions import tags, with_trigger
from .folder import Item, scan
from .images import read_rgb


@dataclass(frozen=True)
class Source:
    """One folder and its rules, as a `[[data]]` table gives them."""

    path: Path
    trigger: str
    weight: float
    resolution: int
    caption_dropout: float


@dataclass(frozen=True)
class Example:
    """One image as it is trained."""

    item: Item
    source: Source
    caption: str
    """The final string, with its trigger word."""
    fit: Fit

    @property
    def name(self) -> str:
        """The path below the data folder, with forward slashes."""
        return self.item.path.relative_to(self.source.path).as_posix()

    @property
    def entry(self) -> Entry:
        return Entry(self.fit.bucket, self.item.repeats * self.source.weight)

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's size conditions: original height and width, crop top and left, target height and width."""
        (width, height), (target_width, target_height) = self.fit.original, self.fit.bucket
        return height, width, self.fit.crop_top, self.fit.crop_left, target_height, target_width


def load_examples(sources: Sequence[Source], bucket_step: int) -> list[Example]:
    """Scan all folders.

    Raises:
        DataError: with every problem of every folder.
    """
    examples: list[Example] = []
    problems: list[Problem] = []
    for source in sources:
        try:
            examples += [_example(item, source, bucket_step) for item in scan(source.path)]
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError.of(problems)
    return examples


def _example(item: Item, source: Source, bucket_step: int) -> Example:
    return Example(
        item=item,
        source=source,
        caption=with_trigger(item.caption, source.trigger),
        fit=fit(item.width, item.height, source.resolution, bucket_step),
    )


def read_pixels(example: Example) -> np.ndarray:
    """The resized and cropped picture: (height, width, 3), 8 bit."""
    image, _ = read_rgb(example.item.path)
    left, top, (width, height) = example.fit.crop_left, example.fit.crop_top, example.fit.bucket
    image = image.resize(example.fit.resized, Image.Resampling.LANCZOS)
    return np.asarray(image.crop((left, top, left + width, top + height)))


def bucket_counts(examples: Sequence[Example]) -> dict[Size, int]:
    """Images in each bucket, fullest first."""
    return dict(Counter(example.fit.bucket for example in examples).most_common())


def tag_frequency(examples: Sequence[Example]) -> dict[str, dict[str, int]]:
    """kohya's `ss_tag_frequency`: for each folder's name, in how many images each tag occurs."""
    frequency: dict[str, Counter[str]] = {}
    for example in examples:
        frequency.setdefault(example.source.path.name, Counter()).update(set(tags(example.caption)))
    return {folder: dict(counts.most_common()) for folder, counts in frequency.items()}


def dataset_fingerprint(examples: Sequence[Example]) -> str:
    """A hash of everything that decides what is trained on: image bytes, captions, crops, order and weights."""
    rows = [
        (e.item.sha256, e.caption, e.fit.bucket, e.fit.resized, e.entry.shows, e.source.caption_dropout)
        for e in examples
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
