"""What several tests share: a folder of pictures, and a short run's configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import settings
from PIL import Image, ImageDraw

from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.configfile import merge, validate
from lorasmith.trainer.jobs import create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.plan import make_plan

settings.register_profile("lorasmith", deadline=None, derandomize=True)  # a slow machine is no failure
settings.load_profile("lorasmith")
torch.set_num_threads(1)  # models as small as these lose time to a second thread


def draw_picture(number: int, size: tuple[int, int]) -> Image.Image:
    """A different simple picture for each number."""
    picture = Image.new("RGB", size, (40 * number % 256, 90, 255 - 30 * number % 256))
    width, height = size
    pen = ImageDraw.Draw(picture)
    pen.ellipse((width // 5, height // 5, width // 5 + 10 + 3 * number, height - 10), (255, 220, 20 * number % 256))
    return picture


def trained_run(config: RunConfig) -> Trainer:
    """A run that was carried out, without an export."""
    plan = make_plan(config)
    trainer = Trainer(plan, create_run(plan.config), lambda event: None)
    assert trainer.train(lambda: False) == "finished"
    return trainer


@pytest.fixture(autouse=True)
def accelerate_forgets():
    """accelerate keeps device and precision for a whole process; a process that trains has one run, a test has many."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Seven captioned pictures of three shapes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(7):
        size = [(96, 96), (160, 80), (80, 150)][number % 3]
        draw_picture(number, size).save(folder / f"picture {number}.png")
        (folder / f"picture {number}.txt").write_text(f"emoji of thing {number}", encoding="utf-8")
    return folder


@pytest.fixture
def short_run(pictures: Path, tmp_path: Path):
    """A function that gives a run of a few small steps, with settings laid over."""

    def make(**over: object) -> RunConfig:
        values = {
            "name": "short",
            "runs": str(tmp_path / "runs"),
            "data": [{"path": str(pictures), "trigger": "trg", "caption_dropout": 0.2}],
            "adapter": {"rank": 4, "alpha": 4.0},
            "budget": {"images": 16, "batch": 2, "accumulate": 2},
            "optimizer": {"lr": 1e-3, "text_encoder_lr": 1e-3},
            "save": {"every": 0},
            "sample": {"every": 0},
            "runtime": {"cache": str(tmp_path / "cache")},
        }
        return validate(merge(values, over))

    return make
