"""Aspect-ratio buckets, and the order in which batches are drawn from them. No image is ever dropped."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class Fit:
    """How an image is brought to its bucket: enlarged or reduced until it covers it, then cropped at the centre."""

    original: Size
    resized: Size
    bucket: Size
    crop_left: int
    crop_top: int

    @property
    def cropped_share(self) -> float:
        """Share of the resized image's pixels that are cut off, 0 to 1."""
        return 1 - (self.bucket[0] * self.bucket[1]) / (self.resized[0] * self.resized[1])

    @property
    def enlargement(self) -> float:
        """Factor by which one side grows; below 1 the image is reduced."""
        return max(self.resized[0] / self.original[0], self.resized[1] / self.original[1])


@lru_cache
def bucket_sizes(resolution: int, step: int) -> tuple[Size, ...]:
    """All bucket sizes: sides are multiples of `step`, the area is at most resolution squared, the ratio at most 4.

    For each width the tallest height that fits is taken (NovelAI 2022, as kohya's trainer does it).
    """
    side = max(step, resolution // step * step)
    sizes = {(side, side)}
    for width in range(step, 2 * side + 1, step):
        height = min(side * side // width // step * step, 2 * side)
        if height >= step and max(width, height) <= 4 * min(width, height):
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def fit(width: int, height: int, resolution: int, step: int) -> Fit:
    """Choose the bucket whose aspect ratio is nearest (in log space, larger area first) and say how to get there."""
    ratio = math.log(width / height)
    bucket = min(
        bucket_sizes(resolution, step), key=lambda size: (abs(math.log(size[0] / size[1]) - ratio), -size[0] * size[1])
    )
    scale = max(bucket[0] / width, bucket[1] / height)
    resized = max(bucket[0], round(width * scale)), max(bucket[1], round(height * scale))
    return Fit((width, height), resized, bucket, (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2)


@dataclass(frozen=True)
class Entry:
    """What the batch order needs to know of an image."""

    bucket: Size
    shows: float
    """How often it is shown in one epoch; 0.5 is every other epoch."""


class BatchOrder:
    """An endless, seeded sequence of batches; each is a list of indices of images that share a bucket.

    The sequence depends on nothing but the entries, the batch size and the seed, so any place in it can be found again.
    In each epoch every image comes as often as its `shows` says; the last batch of a bucket may be smaller.
    """

    def __init__(self, entries: Sequence[Entry], batch: int, seed: int) -> None:
        if not entries:
            raise ValueError("no images")
        self.entries, self.batch, self.seed = list(entries), batch, seed

    def epoch(self, number: int) -> list[list[int]]:
        """The batches of one epoch, shuffled."""
        shuffle = random.Random(f"{self.seed}/{number}").shuffle
        by_bucket: dict[Size, list[int]] = {}
        for index, entry in enumerate(self.entries):
            stagger = index / len(self.entries)
            shows = math.floor((number + 1) * entry.shows + stagger) - math.floor(number * entry.shows + stagger)
            by_bucket.setdefault(entry.bucket, []).extend([index] * shows)
        batches = []
        for _, indices in sorted(by_bucket.items()):
            shuffle(indices)
            batches += [indices[start : start + self.batch] for start in range(0, len(indices), self.batch)]
        shuffle(batches)
        return batches

    def __iter__(self) -> Iterator[list[int]]:
        number = 0
        while True:
            yield from self.epoch(number)
            number += 1

    def steps(self, batches_per_step: int) -> Iterator[list[list[int]]]:
        """The same sequence in groups: what one optimizer step sees, over all processes."""
        batches = iter(self)
        while True:
            yield [next(batches) for _ in range(batches_per_step)]


def images_by_step(order: BatchOrder, batches_per_step: int, budget: int) -> list[int]:
    """Images seen after each step, up to the first step that reaches the budget; its length is the number of steps."""
    seen: list[int] = []
    total = 0
    for step in order.steps(batches_per_step):
        total += sum(len(batch) for batch in step)
        seen.append(total)
        if total >= budget:
            return seen
    raise AssertionError("the order is endless")
