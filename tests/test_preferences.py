"""Learning from preferences: the loss is that of the paper, a pair is never parted, and a file of ratings says what it
says."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from typer.testing import CliRunner

from lorasmith.datasets.buckets import Shot
from lorasmith.trainer.adapter import adapter_state
from lorasmith.trainer.choosing.training import training_images
from lorasmith.trainer.cli import app
from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.configfile import merge, validate, write_config
from lorasmith.trainer.errors import ConfigError, DataError, RunError, UserError
from lorasmith.trainer.jobs import RunFolder, create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.noise import add_noise
from lorasmith.trainer.plan import Plan, make_plan
from lorasmith.trainer.preferences.dpo import implicit_reward, margins, preference_loss
from lorasmith.trainer.preferences.rated import Rated
from lorasmith.trainer.preferences.ratings import Neither, Pair, Ratings, Thumb, prompt_in
from lorasmith.trainer.preferences.refining import lessons_of, refined
from lorasmith.trainer.run import resume
from lorasmith.trainer.sharing.bundle import without_paths
from lorasmith.trainer.sharing.facts import Facts

from . import tiny
from .conftest import draw_picture
from .test_resume import assert_same_runs, checkpoint_of, gone_on, told, trained

OWL, CAT = "trg, emoji of an owl", "emoji of a cat"


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of four steps on a tiny base with checkpoints at 2 and 4, and pictures as if it had drawn them."""
    folder = tmp_path_factory.mktemp("parent")
    images = folder / "images"
    images.mkdir()
    for number in range(4):
        draw_picture(number, (32, 32)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"emoji of thing {number}", encoding="utf-8")
    values = {
        "name": "ink",
        "runs": str(folder / "runs"),
        "base": {"model": str(tiny.make_sd1(folder / "base", layers_per_block=1))},
        "data": [{"path": str(images), "trigger": "trg"}],
        "adapter": {"rank": 4, "alpha": 4.0, "dropout": 0.1},
        "budget": {"images": 16, "batch": 4},
        "optimizer": {"lr": 3e-3, "text_encoder_lr": 1e-3},
        "save": {"every": 2},
        "sample": {"every": 0},
        "runtime": {"precision": "fp32", "cache": str(folder / "cache")},
    }
    run, _ = trained(validate(values))
    for number in range(8):
        _draw(run.path / f"samples/step-{number:06d}/00.png", number, OWL if number % 2 else CAT)
    AcceleratorState._reset_state(reset_partial_state=True)
    return run


def _draw(file: Path, number: int, prompt: str | None, size: tuple[int, int] = (32, 32)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = PngInfo()
    if prompt is not None:
        text.add_itxt("positive_prompt", prompt)
    draw_picture(number, size).save(file, pnginfo=text)


def picture(number: int) -> str:
    return f"samples/step-{number:06d}/00.png"


@pytest.fixture
def run(parent: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(parent.path, tmp_path / "runs" / "ink")
    return RunFolder(tmp_path / "runs" / "ink")


def rated(run: RunFolder) -> Ratings:
    """Two pairs with the trigger, one without; a thumb up and one down, of two prompts."""
    ratings = Ratings.of(run)
    for better, worse in ((1, 3), (5, 7), (0, 2)):
        ratings.add(Pair(better=picture(better), worse=picture(worse)))
    ratings.add(Thumb(picture=picture(4), up=True))
    ratings.add(Thumb(picture=picture(1), up=False))
    return ratings


def config_of(run: RunFolder, **over: Any) -> RunConfig:
    settings: dict[str, Any] = {"budget": {"images": 20, "batch": 2}, "save": {"every": 0}}
    settings["optimizer"] = {"warmup": 0.0, "lr": 1e-3, "text_encoder_lr": 1e-3}
    return validate(merge(refined(run, rated(run)), merge(settings, over)))


def trainer_of(config: RunConfig) -> Trainer:
    plan = make_plan(config)
    return Trainer(plan, create_run(plan.config), lambda event: None)


# ---------------------------------------------------------------------------------------------------------------------
# the loss


def by_hand(better: list[float], worse: list[float], beta: float) -> float:
    """-log sigmoid(-beta / 2 ((e_w - r_w) - (e_l - r_l))) of (error, reference error), as the paper's code has it."""
    inside = -0.5 * beta * ((better[0] - better[1]) - (worse[0] - worse[1]))
    return math.log1p(math.exp(-abs(inside))) + max(-inside, 0.0)


@pytest.mark.parametrize("beta", [1.0, 500.0, 5000.0])
def test_the_loss_of_a_pair_is_that_of_the_paper(beta: float):
    pairs = [([0.10, 0.12], [0.31, 0.30]), ([0.5, 0.1], [0.2, 0.9]), ([0.2, 0.2], [0.4, 0.4])]
    columns = torch.tensor([[*better, *worse] for better, worse in pairs], dtype=torch.float64)
    error, before = columns[:, [0, 2]].T.flatten(), columns[:, [1, 3]].T.flatten()
    reward = implicit_reward(error, before, beta)
    found = preference_loss(margins(reward, [1, 1, 1], [0, 1, 2, 0, 1, 2]))
    assert found.tolist() == pytest.approx([by_hand(*pair, beta) for pair in pairs], rel=1e-12)
    assert found[2].item() == pytest.approx(math.log(2), rel=1e-15)


def test_a_thumb_is_compared_with_the_reference_alone():
    reward = torch.tensor([0.7, 0.7, -0.2, 1.5, 0.4], dtype=torch.float64)  # up, down, up, and a pair
    found = margins(reward, [1, -1, 1, 1], [0, 1, 2, 3, 3])
    assert found.tolist() == pytest.approx([0.7, -0.7, -0.2, 1.5 - 0.4])


def test_the_weight_of_a_thumb_is_bounded_and_sinks_as_it_is_learned():
    error = torch.tensor([0.0, 0.01, -0.01, -1.0], dtype=torch.float64, requires_grad=True)
    [gradient] = torch.autograd.grad(preference_loss(implicit_reward(error, torch.zeros(4), 200.0)).sum(), error)
    weight = gradient / 100
    assert weight[0].item() == pytest.approx(0.5)
    assert (weight >= 0).all()
    assert (weight <= 1).all()
    assert weight[1] > weight[0] > weight[2] > weight[3]


def test_a_run_begins_at_the_reference_with_a_loss_of_log_2(run: RunFolder):
    trainer = trainer_of(config_of(run, adapter={"dropout": 0.3}))
    start = checkpoint_of(run, 4).adapter
    assert all(torch.equal(weight, start[name]) for name, weight in adapter_state(trainer.base).items())
    for batch in trainer.plan.order.epoch(0):
        losses = trainer.loss(batch, 0, 0)
        assert losses.tolist() == pytest.approx([math.log(2)] * len(batch), rel=1e-6)


def test_a_trained_loss_is_the_difference_of_errors_of_the_two_pictures_with_one_noise(run: RunFolder):
    trainer = trainer_of(config_of(run, optimizer={"lr": 1e-2, "text_encoder_lr": 1e-2}, preference={"beta": 300.0}))
    before = adapter_state(trainer.base)
    trainer.train(lambda: trainer.state.step == 3)
    now = adapter_state(trainer.base)
    assert any(not torch.equal(before[name], now[name]) for name in now)
    [pair, *_] = [Shot(place, 0) for place in trainer.plan.rated.worse]  # pyright: ignore[reportOptionalMemberAccess]
    better, worse = _errors_of(trainer, pair, now), _errors_of(trainer, pair, before)
    [loss] = trainer.loss([pair], 7, 5).tolist()
    assert loss == pytest.approx(by_hand([better[0], worse[0]], [better[1], worse[1]], 300.0), rel=1e-3)
    assert loss != pytest.approx(math.log(2), rel=1e-3)
    after = adapter_state(trainer.base)
    assert all(torch.equal(after[name], now[name]) for name in now)  # the reference has gone again


@torch.no_grad()
def _errors_of(trainer: Trainer, pair: Shot, weights: dict[str, Tensor]) -> list[float]:
    """Mean squared errors of the better and the worse picture of a pair, with these weights, by the shortest way."""
    from lorasmith.trainer.adapter import load_adapter_state

    kept = adapter_state(trainer.base)
    load_adapter_state(trainer.base, weights)
    rows, units = trainer.plan.rated.with_the_worse([pair])  # pyright: ignore[reportOptionalMemberAccess]
    assert units == [0, 0]
    shown, drawn = trainer._drawn(rows, 7, [5, 5])
    assert torch.equal(drawn.eps[0], drawn.eps[1])
    assert drawn.t[0] == drawn.t[1]
    assert not torch.equal(drawn.x0[0], drawn.x0[1])
    noisy = add_noise(drawn.x0, drawn.eps, drawn.t, trainer.alphas_cumprod)
    text = trainer.base.tokenize([one.caption for one in shown])
    predicted = trainer.denoiser(noisy, drawn.t, text, torch.zeros(2, 6))
    load_adapter_state(trainer.base, kept)
    return (predicted - drawn.eps).square().flatten(1).mean(1).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# a run


def test_a_pair_is_one_unit_of_a_batch_and_its_captions_are_the_prompts(run: RunFolder):
    plan = make_plan(config_of(run))
    assert plan.rated is not None
    assert plan.rated.facts() == {"pairs": 3, "thumbs_up": 1, "thumbs_down": 1}
    assert sorted(shot.image for batch in plan.order.epoch(0) for shot in batch) == [0, 1, 2, 3, 4]
    taken = [plan.taken_by(batch) for batch in plan.order.epoch(0)]
    assert sorted(shot.image for batch in taken for shot in batch) == list(range(8))
    for better, worse in plan.rated.worse.items():
        one, other = plan.examples[better], plan.examples[worse]
        assert one.name == other.name.replace("worse/", "better/")
        assert one.caption == other.caption
        assert any({better, worse} <= {shot.image for shot in batch} for batch in taken)
    assert {example.caption for example in plan.examples} == {OWL, CAT}
    assert (plan.images, plan.steps) == (20, 12)  # five units, of two data tables of one shape: batches of 2, 2 and 1


@pytest.mark.parametrize("over", [{}, {"optimizer": {"ema_decay": 0.9}, "adapter": {"dropout": 0.2}}], ids=["", "ema"])
def test_n_and_n_steps_of_a_refinement_equal_2_n_bit_for_bit(run: RunFolder, over: dict[str, Any]):
    whole, all_steps = trained(config_of(run, name="whole", **over))
    half = len(all_steps) // 2
    broken, _ = trained(config_of(run, name="broken", **over), until=half)
    both = gone_on(broken, half)
    assert_same_runs(checkpoint_of(broken), checkpoint_of(whole))
    assert list(map(told, both)) == list(map(told, all_steps))
    assert all_steps[0].loss == pytest.approx(math.log(2), rel=1e-6)
    assert all_steps[-1].loss != pytest.approx(math.log(2), rel=1e-3)


def test_halved_batches_give_the_same_losses(run: RunFolder):
    trainer = trainer_of(config_of(run))
    trainer.train(lambda: trainer.state.step == 2)
    batch = [Shot(number, 0) for number in range(trainer.plan.rated.shown)]  # pyright: ignore[reportOptionalMemberAccess]
    together = trainer.loss(batch, 9, 0).tolist()
    single = [trainer.loss([shot], 9, place).item() for place, shot in enumerate(batch)]
    assert single == pytest.approx(together, abs=1e-3)  # beta / 2 makes as much of the rounding of an error near 1


def test_a_run_goes_on_with_the_same_reference_and_ratings_only(run: RunFolder):
    broken, _ = trained(config_of(run, name="broken"), until=2)
    with pytest.raises(RunError, match=r"preference\.beta cannot change"):
        resume(broken, ["preference.beta=9"], lambda event: None)
    [data, *_] = [Path(table.path) for table in broken.read_config().data]
    thumb = next(data.parent.rglob("down/*.png"))
    (other := thumb.parent.with_name("up")).mkdir(exist_ok=True)
    for file in (thumb, thumb.with_suffix(".txt")):
        shutil.move(file, other / f"9{file.name}")
    with pytest.raises(RunError, match=r"preference\.rated is"):
        resume(broken, [], lambda event: None)


@pytest.mark.parametrize(
    "over",
    [
        {"adapter": {"init": "pissa"}},
        pytest.param({"adapter": {"kind": "dora"}}, marks=pytest.mark.exhaustive),
        pytest.param({"adapter": {"kind": "loha", "dropout": 0.0}}, marks=pytest.mark.exhaustive),
        {
            "adapter": {
                "kind": "full",
                "rank": 16,
                "alpha": 16.0,
                "dropout": 0.0,
                "train_only": ["unet.mid_block", "text_encoder"],
            }
        },
        {"adapter": {"new_tokens": 1}},
    ],
    ids=["pissa", "dora", "loha", "full", "tokens"],
)
def test_every_kind_is_refined_from_where_it_was(over: dict[str, Any], parent: RunFolder, tmp_path: Path):
    before = merge(parent.read_config().model_dump(), {"name": "other", "runs": str(tmp_path / "runs")})
    run, _ = trained(validate(merge(before, over)))
    for number in range(8):
        _draw(run.path / picture(number), number, OWL if number % 2 else CAT)
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = trainer_of(config_of(run))
    start = checkpoint_of(run, 4).adapter
    assert all(torch.equal(weight, start[name]) for name, weight in adapter_state(trainer.base).items())
    batch = trainer.plan.order.epoch(0)[0]
    assert trainer.loss(batch, 0, 0).tolist() == pytest.approx([math.log(2)] * len(batch), rel=1e-6)
    trainer.train(lambda: trainer.state.step == 2)
    assert any(not torch.equal(weight, start[name]) for name, weight in adapter_state(trainer.base).items())


def test_the_command_trains_exports_and_verifies_a_run_of_its_own(run: RunFolder):
    ratings = rated(run)
    further = ["--name", "inkier", "--step", "2", "--set", "budget.images=4"]
    told = CliRunner().invoke(app, ["refine", str(run.path), "--ratings", str(ratings.file), *further])
    assert told.exit_code == 0, told.output
    assert "preferences: 3 pairs, 1 thumbs up, 1 down" in " ".join(told.output.split())
    new = RunFolder(run.path.parent / "inkier")
    assert new.status().state == "done"
    assert new.read_config().preference.start == str(run.checkpoint(2))
    verified = json.loads((new.exports / "inkier-verified.json").read_text(encoding="utf-8"))
    assert verified
    assert (new.exports / "inkier.safetensors").is_file()
    assert not (run.path.parent / "ink-refined").exists()


def test_nothing_said_and_no_file_are_told_with_what_to_do(run: RunFolder):
    told = CliRunner().invoke(app, ["refine", str(run.path)])
    assert isinstance(told.exception, UserError)
    assert "docs/refine.md" in str(told.exception)
    Ratings.of(run).add(Neither(neither=[picture(1), picture(3)]))
    with pytest.raises(UserError, match="holds no pair and no thumb"):
        refined(run, Ratings.of(run))


# ---------------------------------------------------------------------------------------------------------------------
# configurations and folders that cannot be


@pytest.mark.parametrize(
    ("over", "where"),
    [
        ({"adapter": {"start_from": "a.safetensors"}}, "adapter.start_from"),
        ({"objective": {"loss": "l1"}}, "objective.loss"),
        ({"validation": {"every": 5}}, "validation.every"),
        ({"data": [{"path": "x", "flip": True}]}, "data.0.flip"),
        ({"data": [{"path": "x", "shuffle_caption": True}]}, "data.0.shuffle_caption"),
        ({"data": [{"path": "x", "resolution": [32, 64]}]}, "data.0.resolution"),
    ],
)
def test_what_has_no_place_in_a_refinement_is_an_error(over: dict[str, Any], where: str):
    values = {"name": "x", "data": [{"path": "x"}], "preference": {"start": "runs/ink/checkpoints/step-000004"}}
    assert validate(values).preference.beta == 1000
    with pytest.raises(ConfigError) as caught:
        validate(merge(values, over))
    assert [problem.where for problem in caught.value.problems] == [f"configuration: {where}"]


def test_beta_without_a_start_has_no_effect_and_is_an_error():
    with pytest.raises(ConfigError, match=r"preference\.start is not set"):
        validate({"name": "x", "data": [{"path": "x"}], "preference": {"beta": 100.0}})


def test_another_adapter_than_that_of_the_checkpoint_is_refused_before_training(run: RunFolder):
    with pytest.raises(UserError) as caught:
        make_plan(config_of(run, adapter={"rank": 8}))
    assert [problem.where for problem in caught.value.problems] == ["adapter.rank"]
    assert caught.value.problems[0].fix == "Set it to 4, for its weights are trained further."
    with pytest.raises(UserError, match="is no checkpoint that can be read"):
        make_plan(config_of(run, preference={"start": str(run.path)}))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda folder: shutil.move(folder / "better/00000.png", folder / "00000.png"), "lies in none of better/"),
        (lambda folder: (folder / "worse/00000.png").unlink(), "has no worse/00000.png to be compared with"),
        (lambda folder: (folder / "better/00001.png").unlink(), "has no better/00001.png to be compared with"),
        (lambda folder: (folder / "worse/00000.txt").write_text("another"), "has another prompt"),
        (lambda folder: draw_picture(1, (64, 32)).save(folder / "worse/00000.png"), "has another shape"),
    ],
)
def test_a_folder_of_pairs_that_does_not_fit_is_told_by_file(spoil: Any, problem: str, run: RunFolder):
    config = config_of(run)
    folder = next(Path(data.path) for data in config.data if data.trigger)
    spoil(folder)
    if not (folder / "worse/00000.png").exists() or "better" in problem or "none" in problem:
        for text in folder.rglob("*.txt"):  # a caption without its picture is another problem
            if not text.with_suffix(".png").exists():
                text.unlink()
    with pytest.raises(UserError, match=problem) as caught:
        make_plan(config)
    assert all(problem.where.startswith(str(folder)) for problem in caught.value.problems)


def test_rated_pictures_of_two_folders_are_told_apart(run: RunFolder):
    plan: Plan = make_plan(config_of(run))
    assert len({example.source.path for example in plan.examples}) == 2
    with pytest.raises(DataError):
        Rated.of(plan.examples[:1])


# ---------------------------------------------------------------------------------------------------------------------
# the file


def test_the_last_word_on_a_picture_holds_and_can_be_taken_back(run: RunFolder):
    ratings = Ratings.of(run)
    assert ratings.standing() == []
    ratings.undo()
    assert not ratings.file.exists()
    ratings.add(Pair(better=picture(1), worse=picture(3)))
    ratings.add(Thumb(picture=picture(1), up=True))
    ratings.add(Pair(better=picture(3), worse=picture(1)))
    assert ratings.standing() == [Thumb(picture=picture(1), up=True), Pair(better=picture(3), worse=picture(1))]
    ratings.undo()
    assert ratings.standing() == [Pair(better=picture(1), worse=picture(3)), Thumb(picture=picture(1), up=True)]
    ratings.undo()
    ratings.add(Neither(neither=[picture(3), picture(1)]))
    assert ratings.standing() == [Neither(neither=[picture(3), picture(1)])]
    assert len(ratings.file.read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "is no JSON"),
        ("3", "says neither"),
        ("{}", "says neither"),
        ('{"better": "a.png", "picture": "a.png"}', "says neither"),
        ('{"better": "a.png"}', "worse: field required"),
        ('{"picture": "a.png", "up": "yes"}', "up: "),
        ('{"picture": "a.png", "up": true, "colour": 1}', "colour: "),
        ('{"undo": false}', "undo: "),
        ('{"picture": "/etc/a.png", "up": true}', "is no picture below"),
        ('{"picture": "../a.png", "up": true}', "is no picture below"),
        ('{"picture": "samples/../../a.png", "up": true}', "is no picture below"),
        ('{"picture": "C:/a.png", "up": true}', "is no picture below"),
        ('{"picture": "link/a.png", "up": true}', "is no picture below"),
        ('{"picture": "config.toml", "up": true}', "is no picture below"),
        ('{"better": "a.png", "worse": "a.png"}', "with itself"),
    ],
)
def test_a_line_that_is_wrong_is_told_by_its_number(line: str, problem: str, run: RunFolder, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (run.path / "link").symlink_to(tmp_path / "elsewhere")
    ratings = Ratings.of(run)
    ratings.add(Thumb(picture=picture(1), up=True))
    with ratings.file.open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(UserError, match=problem) as caught:
        ratings.standing()
    assert [problem.where for problem in caught.value.problems] == [f"{ratings.file}:3"]


def test_no_picture_of_elsewhere_can_be_rated(run: RunFolder):
    with pytest.raises(UserError, match="is no picture below"):
        Ratings.of(run).add(Thumb(picture="../other/samples/a.png", up=True))
    assert not Ratings.of(run).file.exists()


@pytest.mark.parametrize("tail", ['{"picture": "samples/st', '{"picture": "samples/step-000003/00.png", "up": true}'])
def test_a_torn_line_takes_nothing_with_it_and_a_whole_one_counts(tail: str, run: RunFolder):
    ratings = Ratings.of(run)
    ratings.add(Thumb(picture=picture(1), up=True))
    with ratings.file.open("a") as file:
        file.write(tail)
    whole = [Thumb(picture=picture(3), up=True)] if tail.endswith("}") else []
    assert ratings.standing() == [Thumb(picture=picture(1), up=True), *whole]
    ratings.add(Thumb(picture=picture(5), up=False))
    assert ratings.standing() == [Thumb(picture=picture(1), up=True), *whole, Thumb(picture=picture(5), up=False)]


def test_thumbs_of_one_prompt_are_pairs_and_a_prompt_is_read_from_the_picture(run: RunFolder):
    ratings = Ratings.of(run)
    for number, up in ((1, True), (3, False), (5, True), (0, False)):
        ratings.add(Thumb(picture=picture(number), up=up))
    ratings.add(Pair(better=picture(2), worse=picture(4), prompt=" typed   anew "))
    told = [(lesson.prompt, lesson.liked, lesson.disliked) for lesson in lessons_of(ratings)]
    path = ratings.path_of
    assert told == [
        ("typed anew", path(picture(2)), path(picture(4))),
        (OWL, path(picture(1)), path(picture(3))),
        (OWL, path(picture(5)), None),
        (CAT, None, path(picture(0))),
    ]


def test_pictures_that_tell_no_prompt_or_another_or_are_gone_are_told(run: RunFolder):
    ratings = Ratings.of(run)
    _draw(run.path / "compare/silent.png", 1, None)
    (run.path / "compare/text.png").write_text("no picture")
    ratings.add(Thumb(picture="compare/silent.png", up=True))
    ratings.add(Pair(better=picture(1), worse=picture(0)))
    ratings.add(Thumb(picture="compare/text.png", up=True))
    ratings.add(Thumb(picture="compare/gone.png", up=True))
    with pytest.raises(UserError) as caught:
        lessons_of(ratings)
    told = [problem.what for problem in caught.value.problems]
    assert [words.partition(",")[0] for words in told] == [
        "does not tell its prompt",
        f"was compared with {picture(0)}",
        "was rated",
        "was rated",
    ]


def test_the_prompt_of_other_programs_is_read_as_well(tmp_path: Path):
    for text, prompt in (
        ("an owl\nNegative prompt: blue\nSteps: 20, Seed: 1", "an owl"),
        ("an owl\nSteps: 20, Seed: 1", "an owl"),
    ):
        info = PngInfo()
        info.add_text("parameters", text)
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
        assert prompt_in(tmp_path / "a.png") == prompt


def test_the_same_ratings_make_the_same_folder_and_others_another(run: RunFolder):
    ratings = rated(run)
    first, again = (refined(run, ratings)["data"] for _ in range(2))
    assert first == again
    ratings.undo()
    assert refined(run, ratings)["data"] != first
    _draw(run.path / picture(1), 99, OWL)  # drawn anew
    [folder, *_] = (Path(table["path"]) for table in first)
    assert (folder / "better/00000.png").read_bytes() != (run.path / picture(1)).read_bytes()


def test_what_is_refined_is_what_was_chosen(run: RunFolder):
    assert refined(run, rated(run))["preference"]["start"] == str(run.checkpoint(4))
    run.choose(2, 0.8)
    assert refined(run, rated(run))["preference"]["start"] == str(run.checkpoint(2))
    assert refined(run, rated(run), step=4)["preference"]["start"] == str(run.checkpoint(4))


def test_a_refinement_is_compared_with_the_images_that_taught_its_style(run: RunFolder):
    config = config_of(run, name="again")
    names = [example.name for example in training_images(create_run(make_plan(config).config)).examples]
    assert names == [f"{number}.png" for number in range(4)]


def test_what_the_refined_run_kept_by_its_validation_is_not_asked_of_a_refinement(run: RunFolder):
    before = run.read_config().model_dump()
    before["validation"] |= {"every": 2, "min_images": 4}
    before["save"]["keep_best"], before["export"]["checkpoint"] = True, "best"
    write_config(validate(before), run.config)
    after = validate(refined(run, rated(run)))
    assert (after.validation.every, after.save.keep_best, after.export.checkpoint) == (0, False, "last")


def test_what_is_shared_does_not_tell_where_the_checkpoint_lies():
    values = {"name": "x", "data": [{"path": "x"}], "preference": {"start": "/home/anna/ink/checkpoints/step-000004"}}
    config = validate(values)
    assert without_paths(config, Facts("x", config=config)).preference.start == "step-000004"


@pytest.mark.exhaustive
def test_a_simulated_rater_moves_what_it_prefers_and_the_style_stays(tmp_path: Path):
    """By a standard deviation of its spread on held-out prompts, and by at most a tenth of the style score."""
    from tools.preferences import measured, parent_run

    last, *_ = measured(parent_run(tmp_path, images=1400), "darkness", prompts=16, pictures=4)
    assert last.step == last.steps
    assert last.shift >= 1, last.row
    assert last.style_kept >= 0.9, last.row
