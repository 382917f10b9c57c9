"""Samplers: each draws another picture of the same prompt and seed, the same one each time, and says its name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from lorasmith.trainer.bases import BaseInfo, inspect_base
from lorasmith.trainer.models import Base, load_base
from lorasmith.trainer.painting.samplers import MOST_STEPS, SAMPLERS, Sampler
from lorasmith.trainer.sample import Drawing, draw, save_picture, scheduler_of

from . import tiny
from .command import lorasmith
from .conftest import trained_run

PROMPT = "emoji of pizza"
DRAWING = Drawing("", 5, 6, 7.0, 64)


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(inspect_base("pocket"))


def pixels(base: Base, drawing: Drawing) -> np.ndarray:
    [picture] = draw(base, [PROMPT], drawing)
    return np.asarray(picture).astype(int)


def test_every_sampler_draws_its_own_picture_and_the_same_each_time(base: Base):
    assert set(SAMPLERS) == set(get_args(Sampler))
    drawn = {sampler: pixels(base, replace(DRAWING, sampler=sampler)) for sampler in SAMPLERS}
    for sampler, picture in drawn.items():
        assert (picture == pixels(base, replace(DRAWING, sampler=sampler))).all(), sampler
        assert (picture != pixels(base, replace(DRAWING, sampler=sampler, seed=6))).any(), sampler
        assert picture.std() > 20, sampler
    assert len({picture.tobytes() for picture in drawn.values()}) == len(SAMPLERS)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_most_steps_stay_within_the_schedule(base: Base, sampler: Sampler):
    scheduler = scheduler_of(base, sampler)
    scheduler.set_timesteps(MOST_STEPS)
    assert scheduler.timesteps.min() >= 0
    assert scheduler.timesteps.max() < len(base.scheduler.alphas_cumprod)


def test_with_many_steps_samplers_without_new_noise_agree(base: Base):
    """They solve the same equation, so what differs is the error of their steps."""
    drawing = replace(DRAWING, steps=50, guidance=1.0)
    ddim, *others = (pixels(base, replace(drawing, sampler=sampler)) for sampler in SAMPLERS if sampler != "euler-a")
    apart = [abs(ddim - other).mean() for other in others]
    assert max(apart) < 2
    assert abs(ddim - pixels(base, replace(drawing, sampler="euler-a"))).mean() > max(apart)


def of_zero_snr(info: BaseInfo) -> BaseInfo:
    return replace(info, prediction="v_prediction", zero_terminal_snr=True)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("family", ["sd2", "sdxl", "zero snr"])
def test_samplers_go_with_every_family_and_with_zero_snr(
    tmp_path_factory: pytest.TempPathFactory, family: str, sampler: Sampler
):
    folder = tiny.MAKERS[family if family in tiny.MAKERS else "sd2"](tmp_path_factory.mktemp("base"))
    info = inspect_base(str(folder))
    tiny_base = load_base(of_zero_snr(info) if family == "zero snr" else info)
    drawing = Drawing("", 5, 4, 3.0, info.resolution, sampler)
    [one], [other] = draw(tiny_base, [PROMPT], drawing), draw(tiny_base, [PROMPT], drawing)
    assert one.tobytes() == other.tobytes()
    assert np.asarray(one).std() > 0  # what is no number would be black


def test_a_picture_names_its_sampler_as_a1111_does(base: Base, tmp_path: Path):
    names = ["DDIM", "Euler", "Euler a", "DPM++ 2M", "DPM++ 2M Karras"]
    assert list(SAMPLERS.values()) == names
    for sampler, name in SAMPLERS.items():
        drawing = replace(DRAWING, sampler=sampler)
        save_picture(tmp_path / "one.png", Image.new("RGB", (64, 64)), PROMPT, drawing, "pocket", "")
        with Image.open(tmp_path / "one.png") as picture:
            assert f"Steps: 6, Sampler: {name}, CFG scale: 7.0, Seed: 5, " in picture.info["parameters"]
            assert picture.info["sampler"] == name
    assert [file.name for file in tmp_path.iterdir()] == ["one.png"]


def test_what_is_called_after_a_step_may_end_the_drawing(base: Base):
    before, taken = pixels(base, DRAWING), []

    def after_step() -> None:
        taken.append(1)
        if len(taken) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(base, [PROMPT], DRAWING, after_step)
    assert len(taken) == 3
    assert (pixels(base, DRAWING) == before).all()


def test_sample_draws_as_its_options_say(short_run, tmp_path: Path):
    run = trained_run(short_run(budget={"images": 4})).run
    options = ["--sampler", "euler-a", "--steps", 2, "--guidance", 3, "--negative-prompt", "ugly", "--seed", 9]
    drawn = lorasmith(tmp_path, "sample", run.path, "--prompt", PROMPT, *options).stdout.strip()
    with Image.open(drawn) as picture:
        assert picture.info["parameters"].startswith(
            f"{PROMPT}\nNegative prompt: ugly\nSteps: 2, Sampler: Euler a, CFG scale: 3.0, Seed: 9, "
        )
    for wrong in (["--sampler", "magic"], ["--steps", 0], ["--guidance", 0.5]):
        assert wrong[0] in lorasmith(tmp_path, "sample", run.path, "--prompt", "x", *wrong, code=2).stderr
