"""Baking: changes of any form, made into the plain LoRA that every client reads, with what is lost in that."""

from __future__ import annotations

import math

import torch

from ..datasets.workers import Progress
from .delta import Baked, Changes, Delta, baked
from .models import Base
from .sharing.metadata import BakedFacts
from .verify import Layer


class Losses:
    """What plain LoRAs lack of the changes that they were made of, gathered layer by layer."""

    def __init__(self) -> None:
        self._change: dict[str, float] = {}
        self._rest: dict[str, float] = {}

    def add(self, component: str, made: Baked) -> None:
        self._change[component] = math.hypot(self._change.get(component, 0.0), made.change)
        self._rest[component] = math.hypot(self._rest.get(component, 0.0), made.rest)

    @property
    def shares(self) -> dict[str, float]:
        """|rest| / |change| by component."""
        return {name: self._rest[name] / change if change else 0.0 for name, change in self._change.items()}


def bake(
    base: Base, changes: Changes, rank: int, progress: Progress | None = None
) -> tuple[dict[str, list[Delta]], BakedFacts]:
    """The nearest plain LoRAs, of at most a rank, to the changes of a base's layers, and what they lack.

    Of `base`, shapes are enough unless there are DoRAs.
    """
    plain: dict[str, list[Delta]] = {}
    losses = Losses()
    done, total = 0, sum(len(own) for own in changes.values())
    for component, own in changes.items():
        for delta in own:
            weight = Layer(delta, base.components[component]).weight
            place = fastest()
            shaped = torch.empty_like(weight, device=place) if weight.device.type == "meta" else weight.to(place)
            made = baked(delta, shaped, rank)
            plain.setdefault(component, []).append(made.delta.on("cpu"))
            losses.add(component, made)
            done += 1
            if progress:
                progress(done, total)
    return plain, BakedFacts(rank, losses.shares)


def fastest() -> str:
    """The device on which matrices are decomposed."""
    return "cuda" if torch.cuda.is_available() else "cpu"
