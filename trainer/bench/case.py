"""What is measured: a training on random pictures, and how many of its steps."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..bases import BaseInfo
from ..config import RunConfig
from ..configfile import validate
from ..errors import ConfigError
from ..plan import as_trained, base_of

LEAST_WARMUP, LEAST_STEPS, LEAST_ROUNDS = 2, 5, 3
"""What a figure needs before anything is claimed from it."""
_STEPS_ON_A_GPU = 40
_LEAST_PICTURES = 4
_OF_THE_BENCH = (
    "name",
    "runs",
    "recipe",
    "data",
    "buckets",
    "save",
    "sample",
    "export",
    "budget.images",
    "runtime.cache",
)
_WORDS = ("a", "red", "green", "quiet", "large", "house", "river", "mountain", "by", "under", "night", "in", "ink")


@dataclass(frozen=True)
class Protocol:
    """How it is measured."""

    warmup: int = LEAST_WARMUP
    """Steps that are dropped at the beginning of each round."""
    steps: int = 0
    """Steps of each round that are kept. 0: 5 on a CPU, 40 on a GPU."""
    rounds: int = LEAST_ROUNDS
    threads: int = 0
    """Of PyTorch. 0: one on a CPU, PyTorch's own choice beside a GPU."""

    def kept(self, on_cpu: bool) -> int:
        """Steps of each round that are kept on a CPU, or on a GPU."""
        return self.steps or (LEAST_STEPS if on_cpu else _STEPS_ON_A_GPU)

    def most(self) -> int:
        """No more steps than these are trained: the first one, and one that is never taken, because more is done at a
        run's last step."""
        return 2 + self.rounds * (self.warmup + max(self.kept(True), self.kept(False)))

    @property
    def is_enough(self) -> bool:
        """Whether something may be claimed from it."""
        steps = self.kept(on_cpu=True)
        return self.warmup >= LEAST_WARMUP and steps >= LEAST_STEPS and self.rounds >= LEAST_ROUNDS


@dataclass(frozen=True)
class Case:
    """A training of the UNet alone, at a constant learning rate, without previews and checkpoints."""

    base: str = "pocket"
    resolution: int = 0
    """Side of the square pictures, in pixels. 0: as the base was trained."""
    batch: int = 1
    rank: int = 16
    """alpha is the same."""
    targets: str = "attention"
    precision: str = "auto"
    overrides: tuple[str, ...] = ()
    """Further settings, as `--set` takes them."""

    def config(self, folder: Path, name: str, steps: int) -> RunConfig:
        """The run of so many steps that is measured; the pictures lie in `folder / "pictures"`.

        Raises:
            ConfigError: if a setting is wrong, or not for the one who asks to choose.
        """
        refuse(self.overrides, _OF_THE_BENCH, "--set", "is chosen by the bench itself")
        config = validate(self._values(folder, name), "bench", self.overrides)
        config.budget.images = steps * config.budget.batch * config.budget.accumulate
        return config

    def _values(self, folder: Path, name: str) -> dict[str, Any]:
        """With the objective of the plain loop: squares of errors, as they are."""
        return {
            "name": name,
            "runs": str(folder / "runs"),
            "base": {"model": self.base},
            "data": [{"path": str(folder / "pictures"), "resolution": self.resolution, "caption_dropout": 0.0}],
            "adapter": {
                "rank": self.rank,
                "alpha": float(self.rank),
                "targets": self.targets,
                "text_encoder": False,
            },
            "budget": {"images": 1, "batch": self.batch},
            "optimizer": {"lr": 1e-4, "weight_decay": 0.01, "schedule": "constant", "warmup": 0.0},
            "objective": {"weighting": "none"},
            "save": {"every": 0},
            "sample": {"every": 0},
            "runtime": {"precision": self.precision, "cache": str(folder / f"cache of {name}")},
        }


def refuse(overrides: Sequence[str], settings: Sequence[str], option: str, why: str) -> None:
    """
    Raises:
        ConfigError: for the first override of one of these settings or sections.
    """
    for override in overrides:
        if is_among(override, settings):
            raise ConfigError(why, f"{option} {override}", "Leave it out.")


def is_among(override: str, settings: Sequence[str]) -> bool:
    """Whether it sets one of these, or something in a section of this name."""
    dotted = override.partition("=")[0].strip()
    return any(f"{dotted}.".startswith(f"{name}.") for name in settings)


def base_and_side(config: RunConfig) -> tuple[BaseInfo, int]:
    """The base as it is trained, and the side of the pictures in pixels.

    Raises:
        BaseModelError: if the base cannot be found.
        ConfigError: if pictures of this side would be cropped.
    """
    base = as_trained(base_of(config), config)
    [side] = config.data[0].resolutions or [base.resolution]
    if side % base.bucket_step:
        what = f"{side} is no multiple of the {base.bucket_step} px this base works in"
        raise ConfigError(what, "--resolution", f"Leave it 0 for the base's {base.resolution} px.")
    return base, side


def make_pictures(config: RunConfig, side: int) -> None:
    """Captioned pictures of colours that run into each other, as many as give whole batches; the same each time."""
    folder, batch = Path(config.data[0].path), config.budget.batch
    folder.mkdir()
    colours, words = np.random.default_rng(0), random.Random(0)
    for number in range(batch * math.ceil(_LEAST_PICTURES / batch)):
        small = Image.fromarray(colours.integers(0, 256, (8, 8, 3), np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number:04d}.png")
        caption = " ".join(words.choices(_WORDS, k=8))
        (folder / f"{number:04d}.txt").write_text(f"{caption}, {number}\n", encoding="utf-8")
