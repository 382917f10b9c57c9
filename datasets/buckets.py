"""Aspect-ratio buckets, and the order in which batches are drawn from them. No image is ever dropped."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class Fit:
    """How an image is brought to its bucket: enlarged or reduced until it covers it, then cropped."""

    original: Size
    resized: Size
    bucket: Size
    crop_left: int
    crop_top: int

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The part of the original that is shown: left, top, right, bottom, in its own pixels."""
        across, down = self.original[0] / self.resized[0], self.original[1] / self.resized[1]
        right, bottom = self.crop_left + self.bucket[0], self.crop_top + self.bucket[1]
        return self.crop_left * across, self.crop_top * down, right * across, bottom * down

    @property
    def cropped_share(self) -> float:
        """Share of the resized image's pixels that are cut off, 0 to 1."""
        return 1 - (self.bucket[0] * self.bucket[1]) / (self.resized[0] * self.resized[1])

    @property
    def enlargement(self) -> float:
        """Factor by which one side grows; below 1 the image is reduced."""
        return max(self.resized[0] / self.original[0], self.resized[1] / self.original[1])


@dataclass(frozen=True)
class BucketRules:
    """Which buckets there are; sides in pixels."""

    step: int
    """All sides are multiples of it."""
    min_edge: int = 0
    max_edge: int = 0
    """Shortest and longest side; 0: as the area and the ratio allow."""
    max_ratio: float = 4.0
    """The longest side is at most so many times the shortest."""
    upscale: bool = True
    """Whether an image smaller than its bucket is enlarged; if not, it goes to a smaller bucket."""


@lru_cache
def bucket_sizes(resolution: int, rules: BucketRules) -> tuple[Size, ...]:
    """All bucket sizes: sides are multiples of the step, the area is at most resolution squared.

    For each width the tallest height that fits is taken (NovelAI 2022, as kohya's trainer does it). The square is
    always there.
    """
    step = rules.step
    side = max(step, resolution // step * step)
    shortest = max(step, math.ceil(rules.min_edge / step) * step)
    longest = min(math.floor(side * rules.max_ratio), rules.max_edge or side * side) // step * step
    sizes = {(side, side)}
    for width in range(shortest, longest + 1, step):
        height = min(side * side // width // step * step, longest)
        if height >= shortest and max(width, height) <= rules.max_ratio * min(width, height):
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def fit(width: int, height: int, resolution: int, rules: BucketRules) -> Fit:
    """Choose the bucket whose aspect ratio is nearest (in log space, larger area first) and say how to get there."""
    ratio = math.log(width / height)
    sizes = bucket_sizes(resolution, rules)
    if not rules.upscale:
        inside = tuple(size for size in sizes if size[0] <= width and size[1] <= height)
        is_smaller = width * height < resolution * resolution
        sizes = inside if inside and not is_smaller else (_inside(width, height, resolution, rules),)
    bucket = min(sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - ratio), -size[0] * size[1]))
    return fit_to(width, height, bucket)


def fit_to(width: int, height: int, bucket: Size, zoom: float = 1.0, place: tuple[float, float] = (0.5, 0.5)) -> Fit:
    """Cover a bucket with an image; `zoom` enlarges it further, `place` says where the rest is cut off: 0 to 1 is from
    all of it on the right (at the bottom) to all of it on the left (at the top)."""
    scale = zoom * max(bucket[0] / width, bucket[1] / height)
    resized = max(bucket[0], round(width * scale)), max(bucket[1], round(height * scale))
    spare = resized[0] - bucket[0], resized[1] - bucket[1]
    return Fit((width, height), resized, bucket, int(spare[0] * place[0]), int(spare[1] * place[1]))


def _inside(width: int, height: int, resolution: int, rules: BucketRules) -> Size:
    """The largest bucket within an image that area and ratio allow; one step at least."""
    step, side = rules.step, max(rules.step, resolution // rules.step * rules.step)
    short, long = sorted(max(step, edge // step * step) for edge in (width, height))
    short = min(short, side)
    longest = min(long, side * side // short, math.floor(short * rules.max_ratio), rules.max_edge or long)
    long = max(short, longest // step * step)
    return (short, long) if width < height else (long, short)


@dataclass(frozen=True)
class Entry:
    """What the batch order needs to know of an image."""

    buckets: tuple[Size, ...]
    """Of its views, which its showings take in turn."""
    shows: float
    """How often it is shown in one epoch; 0.5 is every other epoch."""


@dataclass(frozen=True)
class Shot:
    """One showing of one image."""

    image: int
    """Its place in the list of entries."""
    number: int
    """How often it was shown before."""


class BatchOrder:
    """An endless, seeded sequence of batches; each is a list of showings that share a bucket.

    The sequence depends on nothing but the entries, the batch size and the seed, so any place in it can be found again.
    In each epoch every image comes as often as its `shows` says; the last batch of a bucket may be smaller.
    """

    def __init__(self, entries: Sequence[Entry], batch: int, seed: int) -> None:
        if not entries:
            raise ValueError("no images")
        self.entries, self.batch, self.seed = list(entries), batch, seed

    def epoch(self, number: int) -> list[list[Shot]]:
        """The batches of one epoch, shuffled."""
        shuffle = random.Random(f"{self.seed}/{number}").shuffle
        by_bucket: dict[Size, list[Shot]] = {}
        for index, entry in enumerate(self.entries):
            stagger = index / len(self.entries)
            before, after = (math.floor(epochs * entry.shows + stagger) for epochs in (number, number + 1))
            for count in range(before, after):
                bucket = entry.buckets[count % len(entry.buckets)]
                by_bucket.setdefault(bucket, []).append(Shot(index, count))
        batches = []
        for _, shots in sorted(by_bucket.items()):
            shuffle(shots)
            batches += [shots[start : start + self.batch] for start in range(0, len(shots), self.batch)]
        shuffle(batches)
        return batches

    def __iter__(self) -> Iterator[list[Shot]]:
        number = 0
        while True:
            yield from self.epoch(number)
            number += 1

    def steps(self, batches_per_step: int) -> Iterator[list[list[Shot]]]:
        """The same sequence in groups: what one optimizer step sees, over all processes."""
        batches = iter(self)
        while True:
            yield [next(batches) for _ in range(batches_per_step)]


def images_by_step(order: BatchOrder, batches_per_step: int, budget: int, step: int = 0, seen: int = 0) -> list[int]:
    """Images seen after each further step, up to the first that reaches the budget, by a run that stands at `step`
    and has seen so many; none if it has reached the budget."""
    after: list[int] = []
    for batches in islice(order.steps(batches_per_step), step, None):
        if seen >= budget:
            break
        seen += sum(map(len, batches))
        after.append(seen)
    return after
