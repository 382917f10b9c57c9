"""The training images of a run, as a wall of it shows pictures: square, of its size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ...datasets.dataset import Example, load_examples
from ...datasets.images import read_rgb
from ..config import RunConfig
from ..encoder import to_tensor
from ..errors import DataError, UserError
from ..heldout import hold_out
from ..jobs import RunFolder
from ..plan import base_of, bucket_rules, source_of, style_of

MOST = 100
"""Images that are looked at; of more, so many are taken, spread evenly."""
_MOST_REFINEMENTS = 1000
"""Of refinements; a file could name its own run."""


@dataclass(frozen=True)
class TrainingImages:
    examples: tuple[Example, ...]
    """Each file once, without regularisation images and those that are held out."""
    of: int
    """Of so many."""

    def pictures(self, rows: Sequence[int], size: int) -> Tensor:
        """(N, 3, size, size) in -1 to 1: the middle of each."""
        return to_tensor([_square(self.examples[row].item.path, size) for row in rows])

    @property
    def captions(self) -> list[str]:
        return [example.caption for example in self.examples]


def training_images(run: RunFolder) -> TrainingImages:
    """
    Raises:
        UserError: if they are not where the run has found them.
        RunError: if it refines a run that is not there any more.
    """
    config = _that_taught(run)
    base = base_of(config)
    try:
        found = load_examples(
            [source_of(data, config, base) for data in config.data], bucket_rules(config, base), config.seed
        )
    except DataError as error:
        what = f"the images that it was trained on cannot be read ({error.problems[0].what})"
        fix = "Put them back, or draw the wall without scores (in a command: --no-scores)."
        raise UserError(what, error.problems[0].where or str(run.path), fix) from error
    trained, _ = hold_out(found, config.validation)
    return some_images(trained)


def some_images(trained: list[Example]) -> TrainingImages:
    """Of those that a run is trained on."""
    distinct = list({example.item.sha256: example for example in style_of(trained)}.values())
    stride = max(1, -(-len(distinct) // MOST))
    return TrainingImages(tuple(distinct[::stride]), len(distinct))


def _that_taught(run: RunFolder) -> RunConfig:
    """Of a run that refines another, whose own images are rated pictures, the configuration of the one refined."""
    config = run.read_config()
    for _ in range(_MOST_REFINEMENTS):
        if not config.preference.start:
            break
        config = RunFolder(Path(config.preference.start).expanduser().parents[1]).read_config()
    return config


def drawn_pictures(files: Sequence[Path]) -> Tensor:
    """Pictures of one size, (N, 3, H, W) in -1 to 1."""
    pictures = []
    for file in files:
        with Image.open(file) as picture:
            pictures.append(picture.convert("RGB"))
    return to_tensor(pictures) if pictures else torch.empty(0)


def _square(file: Path, size: int) -> Image.Image:
    return ImageOps.fit(read_rgb(file)[0], (size, size), Image.Resampling.LANCZOS)
