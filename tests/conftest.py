"""What several tests share: a folder of pictures, and a short run's configuration."""

from __future__ import annotations

import gc
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import settings
from PIL import Image, ImageDraw
from xdist.scheduler.loadscope import LoadScopeScheduling

from lorasmith.trainer.bases import BaseInfo, inspect_base
from lorasmith.trainer.baseweights import rewrite, unchanged
from lorasmith.trainer.checkpoint import load_checkpoint
from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.configfile import merge, validate
from lorasmith.trainer.events import Event
from lorasmith.trainer.jobs import create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.plan import Plan, make_plan
from lorasmith.trainer.startup import start_quickly

from . import tiny

pytest_plugins = ["tests.browser"]

settings.register_profile("lorasmith", deadline=None, derandomize=True)  # a slow machine is no failure
settings.load_profile("lorasmith")
torch.set_num_threads(1)  # models as small as these lose time to a second thread
start_quickly()


_FILES = (
    "adapter",
    "export",
    "interpolation",
    "extraction",
    "baseweights",
    "real_clients",
    "sample",
    "merge",
    "painting",
)
_MANY_ALIKE = {f"test_{name}" for name in _FILES}
_FURTHER = re.compile(
    r"\[(?!(lora-)?sdxl(-0\.05)?\]).*(sd2|sdxl|1e-05)|\[(loha|lokr of|boft|pissa|olora|dora\]|oft\]|full\])|dtype1"
)
"""Tests that are the same on a further family, kind or precision take many minutes together: `make test-all` runs them,
and `make test` mostly those on SD 1 and of a plain LoRA."""
_ELABORATE = {
    "test_share": ("the_size_that_comes", "a_thumbnail_that_is_no_picture_is_told_by", "that_was_killed_is_not_done"),
    "test_ui_share": (
        "an_export_outlives_the_server",
        "an_answer_that_is_missing_is_told",
        "follows_what_is_chosen",
        "a_failure_is_told",
        "copied_into_the_folder",
        "nothing_is_published_without",
        "without_checkpoints_has_nothing",
    ),
    "test_ui_robust": ("a_run_outlives_the_server_and_is_found_again", "more_tabs_than_lines"),
    "test_ui_playground": ("what_cannot_be_drawn", "are_drawn_kept_and_loaded", "without_a_run_a_base"),
    "test_ui_compare": (
        "wall_of_two_by_two",
        "without_the_training_images",
        "leaks_a_second_seed",
        "a_mistake_is_told_beside",
        "without_a_run_the_page",
    ),
    "test_ui_images": ("first_visit", "dropped_on_the_page", "two_tabs", "a_phone_shows_all"),
    "test_ui_shell": ("only_the_page_that_is_shown",),
    "test_ui_train": ("recipe_follows", "without_a_run_the_example"),
    "test_painting": ("an_idle_painter_ends_and_the_next_order",),
    "test_requests": ("several_processes_answer_as_one", "change_nothing[averages]", "change_nothing[dropout]"),
    "test_cli": ("previews_can_be_switched_off_at_resume", "set_goes_before_the_file"),
    "test_queue": ("a_run_of_the_command_line_is_waited_for", "two_runs_are_trained_one_after_the_other"),
    "test_export": ("the_same_picture[sd1-kohya-al", "the_same_picture[sd1-diffusers-al"),
    "test_real_clients": ("narrow_files_have_the_key_sets",),
    "test_averages": ("[an average within pytorch-optimizer]",),
    "test_interpolation": ("two_runs_may_differ_in_rank",),
    "test_demo": ("the_measure_tells_true_pictures_apart",),
    "test_train": ("previews_of_other_prompts_are_never_paired", "two_processes_take_the_same"),
    "test_stepgraph": (
        *("by_one_train[sdxl", "by_one_train[huber", "by_one_train[min-snr", "by_one_train[bf16]"),
        *("by_one_train[many", "by_one_train[peft", "by_one_train[dora", "by_one_train[lokr", "by_one_train[pissa"),
        "2_n[1]",
    ),
    "test_fewbits": ("go_with_it[loha", "go_with_it[dropout", "go_with_it[plain", "one_for_the_full_base[int8"),
}
"""Tests that take ten seconds to a minute each, in several processes, of what others show on the way."""


_LONG = re.compile("test_(queue|painting|cli|requests|train|resume|share|wall|export|effects|footprint|real_clients)")
"""Files that take long and have few tests; they come first, so that none is left to one process at the end."""
_WHOLE_STORIES = ("test_ui_story", "test_ui_train", "test_ui_robust", "test_ui_api")
"""Browsers and servers that train. They share one process and all other browsers a second one, for more at a time
starve each other; and they get a second try, which the report tells."""


class FileByFile(LoadScopeScheduling):
    """All tests of a file in one process, which makes once what they share; and browsers in two of all. pytest-xdist's
    own way to group tests (`--dist loadgroup`) does nothing with pytest 9.2, and says nothing
    (https://github.com/pytest-dev/pytest-xdist/issues/1386)."""

    def _split_scope(self, nodeid: str) -> str:
        name = Path(nodeid.partition("::")[0]).stem
        if not name.startswith("test_ui_"):
            return name
        return "stories" if name in _WHOLE_STORIES else "pages"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileByFile:
    config.option.loadscopereorder = False  # `_turn` has put them in order
    return FileByFile(config, log)


def _turn(item: pytest.Item) -> int:
    """Browsers are begun first, because their two groups take longest; then files that take long."""
    name = item.path.stem
    return 0 if name in _WHOLE_STORIES else 1 if name.startswith("test_ui_") else 2 if _LONG.match(name) else 3


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_turn)
    for item in items:
        is_alike = item.path.stem in _MANY_ALIKE and _FURTHER.search(item.name)
        if is_alike or any(words in item.name for words in _ELABORATE.get(item.path.stem, ())):
            item.add_marker(pytest.mark.exhaustive)
        if item.path.stem.startswith("test_ui_"):
            item.add_marker(pytest.mark.flaky(reruns=1))


def pytest_collection_finish() -> None:
    """A million things outlive all tests; the search for garbage passes them over from here on."""
    gc.collect()
    gc.freeze()


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


def gone_on(stopped: Trainer, plan: Plan, events: list[Event]) -> Trainer:
    """A run as it goes on from where another process has saved it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    saved = load_checkpoint(stopped.run.checkpoint(max(stopped.run.saved_steps())))
    return Trainer(replace(plan, step=saved.state.step, seen=saved.state.images), stopped.run, events.append, saved)


def tiny_run(folder: Path) -> dict[str, Any]:
    """Settings of a run of three steps, without previews, on a tiny base and eight pictures."""
    images = folder / "images"
    images.mkdir()
    for number in range(8):
        draw_picture(number, (32, 32)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"thing {number}", encoding="utf-8")
    return {
        "name": "run",
        "base": {"model": str(tiny.make_sd1(folder / "base", layers_per_block=1))},
        "data": [{"path": str(images), "trigger": "trg"}],
        "adapter": {"rank": 4, "alpha": 4.0},
        "budget": {"images": 12, "batch": 4},
        "optimizer": {"lr": 3e-3, "text_encoder_lr": 1e-3},
        "sample": {"every": 0},
        "save": {"every": 0},
        "runtime": {"precision": "fp32", "cache": str(folder / "cache")},
    }


def unpack(path: Path, folder: Path) -> BaseInfo:
    """The model of one file as a diffusers folder, as `lorasmith convert` writes it."""
    info = inspect_base(str(path))
    rewrite(info, folder, unchanged)
    return info


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


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all runs that ask nothing of it but to be trained."""
    return tiny.make_sd1(tmp_path_factory.mktemp("base") / "tiny", layers_per_block=1)


@pytest.fixture
def short_run(pictures: Path, tmp_path: Path, tiny_base: Path):
    """A function that gives a run of a few small steps on a tiny base, with settings laid over."""

    def make(**over: object) -> RunConfig:
        values = {
            "name": "short",
            "runs": str(tmp_path / "runs"),
            "base": {"model": str(tiny_base)},
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
