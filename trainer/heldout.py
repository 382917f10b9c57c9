"""What the validation loss is measured on: images that a run is not trained on, and bands of its time-steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ..datasets.dataset import Example
from .config import ObjectiveSection, ValidationSection

_FEWEST = 2
"""A single image would say more about itself than about the run."""
_BANDS = 4


def hold_out(examples: Sequence[Example], settings: ValidationSection) -> tuple[list[Example], list[Example]]:
    """The images that are trained, and those that are held out, each in the order they came in.

    Of the style's files those with the smallest SHA-256 are held out. That depends on no name, order or seed; with
    further images it stays as it was, but for the share of these. A file that is there twice is held out with its twin,
    and none that is a regularisation image as well.
    """
    chosen = _chosen(examples, settings) if settings.every and settings.by == "loss" else set[str]()
    held_out = [example for example in examples if example.item.sha256 in chosen]
    return [example for example in examples if example.item.sha256 not in chosen], held_out


def _chosen(examples: Sequence[Example], settings: ValidationSection) -> set[str]:
    prior = {example.item.sha256 for example in examples if example.source.regularization}
    style = sorted({example.item.sha256 for example in examples} - prior)
    if not settings.share or len(style) < settings.min_images:
        return set()
    return set(style[: max(_FEWEST, round(settings.share * len(style)))])


def bands_of(objective: ObjectiveSection, total: int = 1000) -> list[tuple[int, int]]:
    """The time-steps that are trained, of `total`, in equal bands: the first and the last of each."""
    first, after = objective.min_timestep, min(objective.max_timestep, total - 1) + 1
    edges = [first + (after - first) * number // _BANDS for number in range(_BANDS + 1)]
    return [(low, high - 1) for low, high in pairwise(edges) if high > low]
