"""Pictures on demand: an order is drawn as it says, picture by picture, by a process that may be killed at any time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from lorasmith.trainer.adapter import strength
from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.choosing.choice import choice_file, read_choice
from lorasmith.trainer.choosing.judge import judge_wall
from lorasmith.trainer.config import AdapterSection
from lorasmith.trainer.configfile import validate
from lorasmith.trainer.errors import RunError, UserError
from lorasmith.trainer.export import export
from lorasmith.trainer.fitting import put_on
from lorasmith.trainer.full import trained_weights
from lorasmith.trainer.jobs import RunFolder
from lorasmith.trainer.models import load_base
from lorasmith.trainer.painting.easel import Drawn, Easel, Ticket
from lorasmith.trainer.painting.orders import (
    Cell,
    Look,
    Order,
    PictureOrder,
    WallOrder,
    files_of,
    read_order,
    settings_of,
    write_order,
)
from lorasmith.trainer.painting.painter import Painter
from lorasmith.trainer.painting.studio import Studio
from lorasmith.trainer.run import load_run
from lorasmith.trainer.sample import Drawing, draw
from lorasmith.trainer.sharing.metadata import Facts

from . import tiny
from .conftest import draw_picture, trained_run

LOOK = Look(steps=2)
PROMPT = "trg, emoji of pizza"


def train_short(folder: Path, name: str, **over: object) -> Path:
    """A run of four steps with checkpoints 2 and 4, as of which pictures are visibly others."""
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    for number in range(4):
        draw_picture(number, (64, 64)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"emoji of thing {number}", encoding="utf-8")
    values: dict[str, object] = {
        "name": name,
        "runs": str(folder / "runs"),
        "data": [{"path": str(pictures), "trigger": "trg"}],
        "adapter": {"rank": 4, "alpha": 4.0},
        "budget": {"images": 8, "batch": 2},
        "optimizer": {"lr": 2e-2, "text_encoder_lr": 2e-2},
        "save": {"every": 2},
        "sample": {"every": 0},
        "runtime": {"cache": str(folder / "cache")},
    }
    return trained_run(validate(values | over)).run.path


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_short(tmp_path_factory.mktemp("trained"), "short")


@pytest.fixture
def run(original: Path, tmp_path: Path) -> RunFolder:
    """A run of its own for each test, whose files are as old as those of the others."""
    return RunFolder(shutil.copytree(original, tmp_path / "runs" / "short"))


@pytest.fixture
def wall(run: RunFolder) -> WallOrder:
    return WallOrder(str(run.path), (2, 4), (0.0, 1.0), (PROMPT,), (1,), LOOK)


@pytest.fixture(scope="module")
def detail(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA file for the pocket base."""
    return lora_of("pocket", tmp_path_factory.mktemp("files") / "detail.safetensors")


def lora_of(model: str, file: Path) -> Path:
    base = load_base(inspect_base(model))
    put_on(base, AdapterSection(rank=4, alpha=4.0), seed=1)
    for number, parameter in enumerate(trained_weights(base).values()):
        values = np.random.default_rng(number).normal(0, 0.15, tuple(parameter.shape))
        parameter.data.add_(parameter.data.new_tensor(values))
    export(base, file, Facts(file.stem), lambda: load_base(base.info), precision="fp32")
    return file


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def drawn(order: Order, runs: Path, studio: Studio | None = None) -> dict[Cell, np.ndarray]:
    files = files_of(order, runs)
    (studio or Studio()).draw(order, files)
    return {cell: pixels(file) for cell, file in files.items()}


def by_hand(base, prompt: str = PROMPT, seed: int = 1) -> np.ndarray:
    [picture] = draw(base, [prompt], Drawing("", seed, LOOK.steps, LOOK.guidance, base.info.resolution))
    return np.asarray(picture).astype(int)


# ---------------------------------------------------------------------------------------------------------------------
# orders


def test_an_order_comes_back_from_its_text_as_it_was(wall: WallOrder):
    pictures = PictureOrder(
        ("a", "\N{SNOWMAN} é"), (0, 2**63 - 1), loras=(("/a.safetensors", 0.5),), base="pocket", look=LOOK
    )
    others = replace(pictures, run=wall.run, step=2, strength=0.25), replace(wall, scored_with=("a",))
    for order in (wall, pictures, *others):
        assert read_order(write_order(order)) == order


WALL = {"kind": "wall", "run": str(Path("/runs/x").absolute()), "steps": [2], "strengths": [1], "prompts": ["a"]}
WALL |= {"seeds": [1]}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is no order"),
        ('{"kind": ["wall"]}', "is no order"),
        ('{"kind": "wall"}', "seeds: Field required"),
        (json.dumps(WALL | {"prompt": "a"}), "prompt: Unexpected"),
        (json.dumps(WALL | {"run": "../x"}), "run: '../x' is not an absolute path"),
        (json.dumps(WALL | {"steps": []}), "steps: Tuple should have at least 1 item"),
        (json.dumps(WALL | {"steps": [0]}), "steps: 0 is no checkpoint"),
        (json.dumps(WALL | {"steps": [-1]}), "steps.0: should be greater than or equal to 0"),
        (json.dumps(WALL | {"steps": [1.5]}), "steps.0: should be a valid integer"),
        (json.dumps(WALL | {"strengths": [11]}), "strengths.0: should be less than or equal to 10"),
        (json.dumps(WALL | {"strengths": [float("nan")]}), "strengths.0: should be a finite number"),
        (json.dumps(WALL | {"strengths": ["1"]}), "strengths.0: should be a valid number"),
        (json.dumps(WALL | {"prompts": "a"}), "prompts: should be a valid"),
        (json.dumps(WALL | {"prompts": ["a" * 6000]}), "prompts.0: String should have at most 5000"),
        (json.dumps(WALL | {"seeds": [2**63]}), "seeds.0: "),
        (json.dumps(WALL | {"seeds": [True]}), "seeds.0: should be a valid integer"),
        (json.dumps(WALL | {"look": {"sampler": "magic"}}), "look.sampler: should be 'ddim'"),
        (json.dumps(WALL | {"look": {"steps": 0}}), "look.steps: should be greater"),
        (json.dumps(WALL | {"look": {"size": 5000}}), "look.size: should be less"),
        (json.dumps(WALL | {"steps": [*range(1, 60)], "seeds": [*range(60)]}), "3540 pictures are too many at once"),
        (
            json.dumps(WALL | {"steps": [*range(1, 60)], "scored_with": [*"bcdefghijklmnopqr"]}),
            "1062 pictures are too many at once. Order up to 1000: fewer checkpoints, strengths or seeds, or no scores",
        ),
        (json.dumps(WALL | {"strengths": [0], "scored_with": []}), "strengths: 0 alone shows nothing of what was"),
        ('{"kind": "pictures", "prompts": ["a"], "seeds": [1]}', "base: neither a run nor a base is named"),
        (json.dumps({"kind": "pictures", "prompts": ["a"], "seeds": [1], "run": WALL["run"]}), "step: no checkpoint"),
        ('{"kind": "pictures", "prompts": ["a"], "seeds": [1], "base": "b", "loras": [["", 1]]}', "loras.0.0: "),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_no_order_is_refused_with_its_place(text: str, told: str):
    with pytest.raises(UserError) as caught:
        read_order(text)
    assert told in str(caught.value)


def test_an_order_of_before_there_were_scores_wants_none_and_scores_make_no_picture_another(wall: WallOrder):
    values = json.loads(write_order(wall))
    del values["scored_with"]
    assert read_order(json.dumps(values)) == wall
    scored = replace(wall, scored_with=(PROMPT, "b"))
    assert (scored.files(), scored.sheet()) == (wall.files(), wall.sheet())
    assert scored.judged() == replace(wall, prompts=(PROMPT, "b"))


def test_a_wall_has_the_base_once_and_then_row_by_row(wall: WallOrder):
    cells = replace(wall, strengths=(0, 0.5, 1)).cells()
    assert cells == [Cell(0, 0.0, PROMPT, 1), *(Cell(step, at, PROMPT, 1) for step in (2, 4) for at in (0.5, 1.0))]
    assert len(replace(wall, seeds=(1, 2, 2), prompts=("a", "b")).cells()) == 4 * 3
    assert len(replace(wall, strengths=(1.0,)).cells()) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda order, cell: (order, replace(cell, step=4)),
        lambda order, cell: (order, replace(cell, strength=0.9)),
        lambda order, cell: (order, replace(cell, prompt="b")),
        lambda order, cell: (order, replace(cell, seed=2)),
        *(
            lambda order, cell, part=part: (replace(order, look=replace(order.look, **part)), cell)
            for part in ({"negative_prompt": "x"}, {"steps": 3}, {"guidance": 6.5}, {"sampler": "euler"}, {"size": 32})
        ),
    ],
)
def test_another_picture_has_another_name(wall: WallOrder, change: Callable):
    cell = Cell(2, 1.0, "a", 1)
    other_order, other_cell = change(wall, cell)
    assert wall.file(cell) != other_order.file(other_cell)


def test_a_checkpoint_that_is_written_again_makes_other_pictures_but_the_base_none(wall: WallOrder, run: RunFolder):
    trained, untouched = Cell(2, 1.0, "a", 1), Cell(0, 0.0, "a", 1)
    before = wall.file(trained), wall.file(untouched)
    os.utime(run.checkpoint(2) / "adapter.safetensors", (1, 1))
    assert wall.file(trained) != before[0]
    assert wall.file(untouched) == before[1]
    assert wall.file(Cell(4, 1, "a", 1)) == wall.file(Cell(4, 1.0, "a", 1))


def test_what_is_not_there_is_refused_before_anything_starts(run: RunFolder, wall: WallOrder, tmp_path: Path):
    easel = Easel(run.path.parent)
    lora = PictureOrder((PROMPT,), (1,), base="pocket", loras=((str(tmp_path / "none.safetensors"), 1.0),))
    elsewhere = replace(wall, run=str(shutil.copytree(run.path, tmp_path / "elsewhere")))
    for order, told in (
        (replace(wall, steps=(3,)), "has no checkpoint of step 3. Checkpoints: 2, 4."),
        (lora, "none.safetensors: cannot be read"),
        (elsewhere, "lies in another folder of runs"),
        (replace(wall, strengths=(99.0,)), "strengths.0: should be less"),
    ):
        with pytest.raises(UserError) as caught:
            easel.place(order)
        assert told in str(caught.value)
    assert not easel.tickets()
    assert not easel.is_attended()


def test_a_ticket_of_nothing_is_refused_or_has_failed(tmp_path: Path):
    easel = Easel(tmp_path)
    with pytest.raises(UserError, match="is no ticket"):
        easel.ticket("../../x")
    gone = easel.ticket("0" * 20 + "-00000000")
    assert gone.state().state == "failed"
    gone.cancel()
    assert list(tmp_path.iterdir()) == []


def test_ordering_brings_no_torch():
    names = ["orders", "easel", "wall", "sheet", "painter"]
    code = "import sys; " + "; ".join(f"import lorasmith.trainer.painting.{name}" for name in names)
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# what is drawn


def test_strength_0_is_the_base_and_others_are_the_checkpoint_at_them(wall: WallOrder, run: RunFolder):
    order = replace(wall, strengths=(0.0, 0.5, 1.0))
    pictures = drawn(order, run.path.parent)
    assert (pictures[Cell(0, 0.0, PROMPT, 1)] == by_hand(load_base(inspect_base("pocket")))).all()
    for step in (2, 4):
        trained = load_run(run.path, step)
        for at in (0.5, 1.0):
            with strength(trained.base, at):
                assert (pictures[Cell(step, at, PROMPT, 1)] == by_hand(trained.base)).all()
    assert len({picture.tobytes() for picture in pictures.values()}) == 5


def test_a_picture_says_how_it_was_drawn(wall: WallOrder, run: RunFolder):
    drawn(wall, run.path.parent)
    with Image.open(wall.file(Cell(4, 1.0, PROMPT, 1))) as picture:
        told = picture.info
    assert told["positive_prompt"] == PROMPT
    assert told["seed"] == "1"
    assert told["lora"] == "short step 4 at 1"
    how = "Steps: 2, Sampler: DDIM, CFG scale: 7.0, Seed: 1, Size: 64x64, Model: pocket, Lora: short step 4 at 1"
    assert told["parameters"] == f"{PROMPT}\nNegative prompt: \n{how}"
    assert not any(str(run.path.parent) in str(value) for value in told.values())
    with Image.open(wall.file(Cell(0, 0.0, PROMPT, 1))) as picture:
        assert picture.info["lora"] == "none"


def test_a_lora_file_twice_at_a_half_is_once_at_one(run: RunFolder, detail: Path):
    studio, runs, file = Studio(), run.path.parent, str(detail)
    alone = PictureOrder((PROMPT,), (1,), base="pocket", look=LOOK)
    once, twice = replace(alone, loras=((file, 1.0),)), replace(alone, loras=((file, 0.5), (file, 0.5)))
    [one], [two], [none] = (list(drawn(order, runs, studio).values()) for order in (once, twice, alone))
    assert abs(one - two).max() <= 1
    assert abs(one - none).max() > 8
    assert (none == by_hand(load_base(inspect_base("pocket")))).all()  # nothing of it has stayed
    assert abs(one - by_hand(load_base(inspect_base("pocket", merge=[file])))).max() <= 1
    with Image.open(twice.files(runs)[0]) as picture:
        assert picture.info["lora"] == "detail at 0.5, detail at 0.5"


def test_a_lora_file_goes_with_a_checkpoint(run: RunFolder, detail: Path):
    order = PictureOrder((PROMPT,), (1,), str(run.path), 4, 0.5, loras=((str(detail), 0.5),), look=LOOK)
    [both] = drawn(order, run.path.parent).values()
    trained = load_run(run.path, 4)
    with strength(trained.base, 0.5):
        assert abs(both - by_hand(trained.base)).max() > 8
    config = trained.config.model_copy(deep=True)
    config.base.merge = [f"{detail}:0.5"]
    merged = load_base(inspect_base("pocket", merge=config.base.merge))
    put_on(merged, config.adapter, config.seed)
    for name, parameter in trained_weights(merged).items():
        parameter.data.copy_(trained_weights(trained.base)[name].data)
    with strength(merged, 0.5):
        assert abs(both - by_hand(merged)).max() <= 1


@pytest.mark.parametrize(
    "settings",
    [
        {"adapter": {"kind": "full"}, "optimizer": {"lr": 2e-3, "text_encoder_lr": 2e-3}},
        {"adapter": {"rank": 4, "alpha": 4.0, "new_tokens": 2}},
        {"adapter": {"kind": "dora", "rank": 4, "alpha": 4.0}},
    ],
    ids=["full", "new tokens", "dora"],
)
def test_other_kinds_go_from_the_base_to_what_was_trained(tmp_path: Path, settings: dict, detail: Path):
    run = RunFolder(train_short(tmp_path, "other", **settings))
    order = WallOrder(str(run.path), (4,), (0.0, 0.5, 1.0), (PROMPT,), (1,), LOOK)
    studio = Studio()
    base, half, whole = drawn(order, run.path.parent, studio).values()
    assert (base == by_hand(load_base(inspect_base("pocket")))).all()
    assert (whole == by_hand(load_run(run.path, 4).base)).all()
    assert abs(half - base).max() > 0
    assert abs(half - whole).max() > 0

    with_lora = PictureOrder((PROMPT,), (1,), str(run.path), 4, 1.0, loras=((str(detail), 1.0),), look=LOOK)
    [both] = drawn(with_lora, run.path.parent, studio).values()
    assert abs(both - whole).max() > 8
    shutil.rmtree(run.path / "compare")
    again = drawn(order, run.path.parent, studio).values()
    assert all((one == other).all() for one, other in zip(again, (base, half, whole), strict=True))


def test_a_base_that_has_changed_draws_nothing(run: RunFolder, wall: WallOrder):
    for step in (2, 4):
        state = run.checkpoint(step) / "state.json"
        state.write_text(state.read_text(encoding="utf-8").replace('"base": "', '"base": "another'), encoding="utf-8")
    with pytest.raises(RunError, match="the base model has changed"):
        drawn(wall, run.path.parent)
    assert not (run.path / "compare").exists()


def test_a_run_is_drawn_on_another_base_of_its_family(run: RunFolder, tmp_path: Path):
    other = shutil.copytree(inspect_base("pocket").source, tmp_path / "other")
    order = PictureOrder((PROMPT,), (1,), str(run.path), 4, look=LOOK)
    named = replace(order, base=str(other))
    [own], [same] = drawn(order, run.path.parent).values(), drawn(named, run.path.parent).values()
    assert order.files(run.path.parent) != named.files(run.path.parent)
    assert (own == same).all()


def test_a_size_that_the_base_cannot_draw_is_refused(run: RunFolder, wall: WallOrder):
    with pytest.raises(UserError, match=r"60 pixels do not divide by") as caught:
        drawn(replace(wall, look=replace(LOOK, size=60)), run.path.parent)
    assert caught.value.problems[0].fix.startswith("Take ")


def test_the_settings_of_a_single_picture_are_kept_beside_it(run: RunFolder, detail: Path):
    look = Look("ugly", 2, 5.0, "euler-a", 32)
    order = PictureOrder(("a", "b"), (1, 2), str(run.path), 2, 0.5, loras=((str(detail), 0.5),), look=look)
    drawn(order, run.path.parent)
    files = order.files(run.path.parent)
    assert [settings_of(file) for file in files] == [
        replace(order, prompts=(prompt,), seeds=(seed,)) for prompt in "ab" for seed in (1, 2)
    ]
    assert pixels(files[0]).shape == (32, 32, 3)
    assert settings_of(run.path / "none.png") is None


# ---------------------------------------------------------------------------------------------------------------------
# the process that draws


@pytest.fixture
def easel(run: RunFolder) -> Iterator[Easel]:
    easel = Easel(run.path.parent, idle=120)
    yield easel
    end(easel)


def end(easel: Easel) -> None:
    """End the painter of an easel at once, as a computer does that runs out of memory."""
    for name in ("painter.json", "started.json"):
        if (file := easel.folder / name).exists():
            owner = json.loads(file.read_text(encoding="utf-8"))
            if psutil.pid_exists(owner["pid"]) and easel.is_attended():
                process = psutil.Process(owner["pid"])
                process.kill()
                process.wait(30)


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it took too long"
        time.sleep(0.02)


def outcome(ticket: Ticket) -> Drawn:
    until(lambda: ticket.state().has_ended)
    return ticket.state()


def test_the_painter_draws_what_is_ordered_and_nothing_twice(easel: Easel, wall: WallOrder, tmp_path: Path):
    seen: list[tuple[int, int]] = []
    ticket = easel.place(wall)
    assert ticket.state().state in ("waiting", "loading")

    def is_done() -> bool:
        state = ticket.state()
        there = sum(file.is_file() for file in ticket.files())
        assert there >= state.done
        seen.append((state.done, there))
        return state.has_ended

    until(is_done)
    assert ticket.state() == Drawn("done", 3, 3)
    assert {there for _, there in seen} == {0, 1, 2, 3}  # they appeared one by one

    before = {file: file.stat().st_mtime_ns for file in ticket.files()}
    assert outcome(easel.place(wall)) == Drawn("done", 3, 3)
    assert {file: file.stat().st_mtime_ns for file in ticket.files()} == before

    # an order that fails leaves the others their turn, in the order in which they came
    other_family = lora_of(str(tiny.make_sd2(tmp_path / "sd2")), tmp_path / "other.safetensors")
    fails = PictureOrder((PROMPT,), (1,), str(wall.run), 4, loras=((str(other_family), 1.0),), look=LOOK)
    tickets = [easel.place(order) for order in (fails, replace(wall, strengths=(1.0, 0.5)), replace(fails, loras=()))]
    failed, *done = [outcome(ticket) for ticket in tickets]
    assert failed.state == "failed"
    assert "other.safetensors" in failed.message
    assert "are no part of a LoRA for this Stable Diffusion 1" in failed.message
    assert failed.fix.startswith("Take a LoRA made for")
    assert done == [Drawn("done", 4, 4), Drawn("done", 1, 1)]
    assert "UserError" in easel.log.read_text(encoding="utf-8")
    newest = [ticket.files()[-1].stat().st_mtime_ns for ticket in tickets[1:]]
    assert newest == sorted(newest)

    # one that is cancelled ends within a step, and what was drawn of it stays
    long = easel.place(replace(wall, seeds=tuple(range(10, 60)), look=Look(steps=25)))
    until(lambda: long.state().done > 0)
    assert long.state().seconds_left is not None
    long.cancel()
    assert long.state().state == "cancelled"
    assert outcome(easel.place(replace(wall, seeds=(2,)))) == Drawn("done", 3, 3)
    told = long.told()
    assert told
    assert told.state == "cancelled"
    assert 0 < told.done < 20
    assert sum(file.is_file() for file in long.files()) == told.done


@pytest.mark.exhaustive  # new processes take half a minute
def test_a_painter_that_was_killed_is_told_and_another_goes_on(easel: Easel, wall: WallOrder):
    order = replace(wall, seeds=tuple(range(40)), look=Look(steps=4))
    ticket, waits = easel.place(order), easel.place(replace(wall, seeds=(99,)))
    until(lambda: ticket.state().done > 1)
    end(easel)
    state = ticket.state()
    assert (state.state, state.message) == ("failed", "the process that draws has ended")
    assert str(easel.log) in state.fix
    assert waits.state().state == "failed"
    there = {file: file.stat().st_mtime_ns for file in ticket.files() if file.is_file()}
    assert there

    again = easel.place(replace(order, seeds=(0, 1)))
    assert outcome(again) == Drawn("done", 6, 6)
    assert outcome(waits).state == "done"  # nobody had begun it
    assert ticket.state().state == "failed"
    assert all(file.stat().st_mtime_ns == before for file, before in there.items())


def test_an_idle_painter_ends_and_the_next_order_starts_another(run: RunFolder, wall: WallOrder):
    easel = Easel(run.path.parent, idle=0)
    assert outcome(easel.place(wall)).state == "done"
    until(lambda: not easel.is_attended())
    assert outcome(easel.place(wall)).state == "done"
    until(lambda: not easel.is_attended())


def test_only_one_process_draws_for_a_folder(run: RunFolder):
    easel = Easel(run.path.parent)
    easel.take_up()
    with pytest.raises(UserError, match="another process draws"):
        Easel(run.path.parent).take_up()
    assert easel.leave()
    assert not easel.is_attended()


def attended(easel: Easel, *orders: Order) -> list[Ticket]:
    """Orders that are left to this process."""
    easel.take_up()
    return [easel.place(order) for order in orders]


def test_a_gpu_is_left_to_a_run_that_is_trained(run: RunFolder, wall: WallOrder):
    easel = Easel(run.path.parent)
    [ticket] = attended(easel, wall)
    other = RunFolder(shutil.copytree(run.path, run.path.parent / "other"))
    other.take_ownership()
    painter = Painter(easel, needs_gpu=lambda: True)
    painter.carry_out(ticket)
    told = ticket.state()
    assert (told.state, told.message) == ("failed", "other is being trained, and needs the memory of the GPU")
    assert told.fix.startswith("Draw when it has ended")
    assert not (run.path / "compare").exists()

    other.give_up_ownership()
    [ticket] = [easel.place(wall)]
    painter.carry_out(ticket)
    assert ticket.state() == Drawn("done", 3, 3)
    easel.leave()


def test_whatever_goes_wrong_is_told_by_its_name(run: RunFolder, wall: WallOrder):
    easel = Easel(run.path.parent)
    tickets = attended(easel, wall, wall)
    (run.path / "compare").write_text("in the way", encoding="utf-8")
    tickets[1].order_file.write_text('{"kind": "wall", "steps": "x"}', encoding="utf-8")
    painter = Painter(easel)
    for ticket in tickets:
        painter.carry_out(ticket)
    in_the_way, torn = [ticket.state() for ticket in tickets]
    assert in_the_way.state == torn.state == "failed"
    assert in_the_way.message.startswith(("FileExistsError", "NotADirectoryError"))
    assert "steps: should be" in torn.message
    assert not easel.next()
    easel.leave()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Drawn]:
    """All that painters of this process tell, as it is written."""
    said: list[Drawn] = []
    tell = Ticket.tell
    monkeypatch.setattr(Ticket, "tell", lambda ticket, drawn: [said.append(drawn), tell(ticket, drawn)])
    return said


SCORED_WITH = ("trg, emoji of owl",)


def test_a_wall_is_scored_with_further_prompts_once(run: RunFolder, wall: WallOrder, told: list[Drawn]):
    easel = Easel(run.path.parent)
    order = replace(wall, scored_with=SCORED_WITH)
    [ticket] = attended(easel, order)
    painter = Painter(easel)
    painter.carry_out(ticket)
    pictures = 2 * 3 + 4  # of two prompts the base and two cells, and what the base makes of four captions
    assert ticket.state() == replace(Drawn("done", pictures, pictures), scored=1.0)
    assert len(list((run.path / "compare").glob("*.png"))) == pictures
    assert list(dict.fromkeys(drawn.state for drawn in told)) == ["loading", "drawing", "scoring", "done"]
    drawing = [drawn for drawn in told if drawn.state == "drawing"]
    assert [(drawn.done, drawn.total) for drawn in drawing] == [(done, pictures) for done in range(pictures + 1)]
    shares = [drawn.scored for drawn in told if drawn.state == "scoring"]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 1)

    choice = read_choice(order.judged())
    assert choice
    assert choice == judge_wall(order.judged(), Studio())
    assert [len(cell.pictures) for cell in choice.cells] == [2, 2]
    assert not choice.is_leak
    assert read_choice(order) is None  # that of one prompt alone is another

    written = choice_file(order.judged()).stat().st_mtime_ns
    [again] = [easel.place(order)]
    painter.carry_out(again)
    assert again.state() == Drawn("done", 3, 3)
    assert choice_file(order.judged()).stat().st_mtime_ns == written
    easel.leave()


def test_without_the_trigger_style_is_a_leak_and_nothing_is_recommended(run: RunFolder, wall: WallOrder):
    easel = Easel(run.path.parent)
    order = replace(wall, steps=(4,), prompts=("emoji of pizza",), scored_with=())
    [ticket] = attended(easel, order)
    Painter(easel).carry_out(ticket)
    choice = read_choice(order.judged())
    assert choice
    assert choice.is_leak
    assert choice.recommended is None
    assert "no prompt holds the trigger" in choice.reason
    easel.leave()


def test_where_the_training_images_are_gone_the_wall_is_drawn_and_the_reason_told(
    run: RunFolder, wall: WallOrder, told: list[Drawn], tmp_path: Path
):
    config = run.read_config()
    gone = run.config.read_text(encoding="utf-8").replace(config.data[0].path, str(tmp_path / "gone"))
    run.config.write_text(gone, encoding="utf-8")
    easel = Easel(run.path.parent)
    [ticket] = attended(easel, replace(wall, scored_with=SCORED_WITH))
    Painter(easel).carry_out(ticket)
    state = ticket.state()
    assert (state.state, state.done, state.total) == ("done", 3, 3)
    assert str(tmp_path / "gone") in state.unscored
    assert state.unscored_fix.startswith("Put them back")
    assert all(drawn.unscored for drawn in told if drawn.state == "drawing")  # it is told before, not after
    assert len(list((run.path / "compare").glob("*.png"))) == 3
    easel.leave()


def test_scoring_can_be_left_and_what_fails_in_it_spoils_no_wall(
    run: RunFolder, wall: WallOrder, monkeypatch: pytest.MonkeyPatch
):
    easel = Easel(run.path.parent)
    order = replace(wall, steps=(4,), scored_with=())
    first, second = attended(easel, order, order)
    tell = Ticket.tell

    def leave(ticket: Ticket, drawn: Drawn) -> None:
        tell(ticket, drawn)
        if drawn.state == "scoring":
            first.cancel()

    monkeypatch.setattr(Ticket, "tell", leave)
    painter = Painter(easel)
    painter.carry_out(first)
    state = first.told()
    assert state
    assert (state.state, state.done) == ("cancelled", 2 + 4)
    assert read_choice(order.judged()) is None

    choice_file(order.judged()).mkdir()  # in the way of what would be written
    painter.carry_out(second)
    assert second.state().state == "done"
    assert second.state().unscored.startswith(("IsADirectoryError", "PermissionError"))
    assert all(file.is_file() for file in second.files())
    easel.leave()


def test_an_order_that_is_cancelled_while_it_waits_is_never_begun(run: RunFolder, wall: WallOrder):
    easel = Easel(run.path.parent)
    first, second = attended(easel, wall, wall)
    first.cancel()
    assert easel.next() == second
    assert first.state() == Drawn("cancelled")
    second.cancel()
    assert easel.next() is None
    assert easel.leave()


def test_what_became_of_an_order_is_forgotten_after_a_day(run: RunFolder, wall: WallOrder):
    easel = Easel(run.path.parent)
    [old] = attended(easel, wall)
    old.tell(Drawn("done", 3, 3))
    day = time.time() - 25 * 3600
    for file in (old.order_file, old.state_file):
        os.utime(file, (day, day))
    new = easel.place(wall)
    assert easel.tickets() == [new]
    assert not old.state_file.exists()
    with pytest.raises(UserError, match="not known any more"):
        old.order()
    easel.leave()
