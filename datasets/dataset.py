"""Folders, caption rules, views and buckets together: what the trainer is shown."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ..trainer.errors import DataError, Problem
from .buckets import BucketRules, Entry, Fit, Shot, Size
from .captions import TRIGGER_PLACE, CaptionRules, caption_variants, has_wildcard, tags
from .folder import Item, look
from .images import read_alpha, read_grey, read_rgb
from .masks import MaskFrom
from .sidecars import Lines
from .views import Augmentation, View, show, views_of
from .workers import Progress

LEAST_SIDE = 16
"""Pixels. An image with a shorter side has nothing to learn from."""
MOST_OBLONG = 16
"""An image longer than so many times its width would lose nearly all of itself to the crop."""


@dataclass(frozen=True)
class Source:
    """One folder and its rules, as a `[[data]]` table gives them."""

    path: Path
    resolutions: tuple[int, ...]
    captions: CaptionRules = field(default_factory=CaptionRules)
    weight: float = 1.0
    machine_weight: float = 1.0
    """Multiplies `weight` for images whose caption a machine wrote."""
    caption_dropout: float = 0.0
    machine_caption_dropout: float = 0.0
    """Added to `caption_dropout` for captions that a machine wrote."""
    lines: Lines = "join"
    mask: MaskFrom = "files"
    unmasked_weight: float = 0.0
    """Weight of the loss where a mask is black."""
    regularization: bool = False
    loss_weight: float = 1.0
    """Of each image; for regularisation images the weight of prior preservation."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    label: str = ""
    """What the person calls it, if `path` is not what they named."""

    @property
    def name(self) -> str:
        return self.label or self.path.name

    def told(self, where: str) -> str:
        """A place as the person knows it: `photos.zip/a.png` for a file of the folder that it was unpacked to."""
        return where.replace(str(self.path), self.name, 1) if self.name != self.path.name else where


@dataclass(frozen=True)
class Example:
    """One image as it is trained."""

    item: Item
    source: Source
    captions: tuple[str, ...]
    """The final strings, with their trigger word; each showing takes one."""
    views: tuple[View, ...]
    """Each showing takes the next."""
    name: str = field(default="")
    """The path below the data folder, with forward slashes."""

    @property
    def caption(self) -> str:
        """The first of its captions."""
        return self.captions[0]

    @property
    def fit(self) -> Fit:
        """Of the first view."""
        return self.views[0].fit

    @cached_property
    def entry(self) -> Entry:
        weight = self.source.weight * (self.source.machine_weight if self.item.machine else 1)
        return Entry(tuple(view.fit.bucket for view in self.views), self.item.repeats * weight)

    @property
    def caption_dropout(self) -> float:
        """How likely the empty caption takes the place of its own."""
        extra = self.source.machine_caption_dropout if self.item.machine else 0
        return min(1.0, self.source.caption_dropout + extra)

    @property
    def is_masked(self) -> bool:
        return self.item.mask is not None or (self.source.mask == "alpha" and self.item.transparent)


@dataclass(frozen=True)
class Showing:
    """One image as one step sees it."""

    example: Example
    view: View
    caption: str


def showing(examples: Sequence[Example], shot: Shot) -> Showing:
    """Views in turn; captions at random, so that no caption stays with one view. The same shot is always the same."""
    example = examples[shot.image]
    captions = example.captions
    number = random.Random(f"{example.item.sha256}/{shot.number}").randrange(len(captions)) if len(captions) > 1 else 0
    return Showing(example, example.views[shot.number % len(example.views)], captions[number])


def load_examples(
    sources: Sequence[Source], rules: BucketRules, seed: int = 0, progress: Progress | None = None
) -> list[Example]:
    """Scan all folders.

    Raises:
        DataError: with every problem of every folder.
    """
    examples: list[Example] = []
    problems: list[Problem] = []
    for source in sources:
        try:
            found = look(source.path, source.lines, source.mask, progress, source.unmasked_weight)
        except DataError as error:
            problems += error.problems
            continue
        told = [*found.problems, *unfit(found.items), *_without_effect(source, found.items)]
        problems += [replace(problem, where=source.told(problem.where)) for problem in told]
        examples += [_example(item, source, rules, f"{seed}/{len(examples) + n}") for n, item in enumerate(found.items)]
    if problems:
        raise DataError.of(problems)
    return examples


def _example(item: Item, source: Source, rules: BucketRules, seed: str) -> Example:
    views = views_of(item.width, item.height, source.resolutions, rules, source.augmentation, seed)
    turn = int(item.sha256[:8], 16) % len(views)  # so that the images of an epoch show different kinds of views
    return Example(
        item=item,
        source=source,
        captions=caption_variants(item.captions, source.captions, seed),
        views=views[turn:] + views[:turn],
        name=item.path.relative_to(source.path).as_posix(),
    )


def unfit(items: Sequence[Item]) -> Iterator[Problem]:
    """Images that can be decoded, but not be learned from."""
    for item in items:
        short, long = sorted((item.width, item.height))
        if short < LEAST_SIDE:
            what = f"is only {item.width} x {item.height} pixels"
            yield Problem(str(item.path), what, f"Remove it; {LEAST_SIDE} pixels a side are the least.")
        elif long > MOST_OBLONG * short:
            what = f"is {item.width} x {item.height} pixels, and nearly all of it would be cropped off"
            yield Problem(str(item.path), what, "Cut it into parts, or remove it.")


def _without_effect(source: Source, items: Sequence[Item]) -> Iterator[Problem]:
    """Rules that meet nothing they could apply to, and captions that miss a rule."""
    where, rules = str(source.path), source.captions
    captions = [caption for item in items for caption in item.captions]
    if source.mask == "alpha" and items and not any(item.transparent for item in items):
        yield Problem(where, 'no image is transparent, so data.mask = "alpha" has no effect', "Remove it.")
    masked = any(item.mask or (source.mask == "alpha" and item.transparent) for item in items)
    if source.unmasked_weight and items and not masked:
        yield Problem(where, "no image has a mask, so data.unmasked_weight has no effect", "Remove it.")
    if rules.wildcards and items and not any(map(has_wildcard, captions)):
        yield Problem(where, "no caption holds a wildcard such as {a|b}, so data.wildcards has no effect", "Remove it.")
    mark = rules.keep_tokens_separator
    if mark and items and not any(mark in caption for caption in captions):
        yield Problem(where, f"no caption holds {mark!r}, so data.keep_tokens_separator has no effect", "Remove it.")
    if not rules.trigger and any(TRIGGER_PLACE in caption for caption in captions):
        yield Problem(where, f"captions hold {TRIGGER_PLACE}, but there is no trigger", "Set data.trigger.")
    machine = [item for item in items if item.machine]
    if items and not machine:
        for key, value, usual in (
            ("machine_weight", source.machine_weight, 1.0),
            ("machine_caption_dropout", source.machine_caption_dropout, 0.0),
        ):
            if value != usual:
                what = f"no caption was written by a machine, so data.{key} has no effect"
                yield Problem(where, what, "Remove it.")


def read_pixels(example: Example, view: View) -> np.ndarray:
    """The picture as a view shows it: (height, width, 3), 8 bit."""
    return np.asarray(show(read_rgb(example.item.path)[0], view))


def read_mask(example: Example, view: View, factor: int) -> np.ndarray:
    """The loss weight of each latent of a masked image, 0 to 1, (height / factor, width / factor): means of areas."""
    mask = read_grey(example.item.mask.path) if example.item.mask else read_alpha(example.item.path)
    assert mask is not None, "only for masked images"
    size = example.fit.original
    seen = show(mask if mask.size == size else mask.resize(size), view)
    width, height = seen.size
    areas = np.asarray(seen, dtype=np.float32).reshape(height // factor, factor, width // factor, factor)
    floor = example.source.unmasked_weight
    return floor + (1 - floor) * areas.mean((1, 3)) / 255


def bucket_counts(examples: Sequence[Example]) -> dict[Size, int]:
    """Images in each bucket, fullest first; one with several views is counted in the bucket of each resolution."""
    counts = Counter(bucket for example in examples for bucket in set(example.entry.buckets))
    return dict(counts.most_common())


def tag_frequency(examples: Sequence[Example]) -> dict[str, dict[str, int]]:
    """kohya's `ss_tag_frequency`: for each folder's name, in how many images each tag occurs."""
    frequency: dict[str, Counter[str]] = {}
    for example in examples:
        frequency.setdefault(example.source.name, Counter()).update(set(tags(example.caption)))
    return {folder: dict(counts.most_common()) for folder, counts in frequency.items()}
