"""Strengths by block: the search goes where the scores lead it, and its outcome is a file that does what was chosen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorasmith.trainer.adapter import deltas, trained_layers
from lorasmith.trainer.anatomy import skeleton
from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.choosing.choice import (
    Choice,
    JudgedCell,
    JudgedPicture,
    Recommended,
    Scores,
    choice_file,
    write_choice,
)
from lorasmith.trainer.choosing.mixing import Mixer, share_of
from lorasmith.trainer.choosing.mixture import Mixture
from lorasmith.trainer.choosing.recommendation import best_of, is_clearly_better
from lorasmith.trainer.choosing.search import Layers, descend
from lorasmith.trainer.choosing.tuned import Tried, decided
from lorasmith.trainer.choosing.tuning import Tuning, task_of
from lorasmith.trainer.errors import RunError, UserError
from lorasmith.trainer.jobs import create_run
from lorasmith.trainer.loraread import read_lora
from lorasmith.trainer.painting.orders import Cell
from lorasmith.trainer.painting.studio import Studio
from lorasmith.trainer.painting.wall import wall_order
from lorasmith.trainer.plan import make_plan
from lorasmith.trainer.run import load_run
from lorasmith.trainer.soups import interpolate_run
from lorasmith.trainer.strengths import Strengths

from .command import lorasmith
from .conftest import trained_run

DOWN, MID, UP = "unet.down_blocks", "unet.mid_block", "unet.up_blocks"
LAYERS = Layers(
    [
        ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"),
        ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"),
        ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"),
        ("unet", "mid_block.resnets.0.conv1"),
        ("unet", "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"),
        ("text_encoder", "text_model.encoder.layers.0.mlp.fc1"),
        ("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1"),
    ]
)


def tried(strengths: Strengths, style: float, prompt: float, copying: float = 0.0) -> Tried:
    scores = Scores(style, prompt, copying)
    pictures = tuple(JudgedPicture("a cat", seed, scores, "a.png") for seed in range(4))
    return Tried(Mixture((4,), strengths), 1.0, scores, pictures)


# ---------------------------------------------------------------------------------------------------------------------
# blocks


def test_blocks_are_places_then_kinds_of_layers_in_them_and_two_text_encoders_are_one():
    kinds = [f"{DOWN}.*.attn1", f"{DOWN}.*.attn2", f"{MID}.*.attn1", f"{MID}.resnets"]
    assert LAYERS.blocks == ["text_encoder*", DOWN, MID, UP, *kinds]


def test_a_move_takes_its_whole_block_along_and_is_written_shortly():
    half = LAYERS.moved(Strengths(0.7), f"{DOWN}.*.attn2", 0.5)
    assert LAYERS.effect(half) == (0.7, 0.5, 0.7, 0.7, 0.7, 0.7, 0.7)
    assert LAYERS.moved(half, DOWN, 0.0) == Strengths(0.7, ((DOWN, 0.0),))
    assert LAYERS.moved(half, f"{DOWN}.*.attn2", 0.7) == Strengths(0.7)
    both = LAYERS.moved(LAYERS.moved(Strengths(1.0), DOWN, 0.0), f"{DOWN}.*.attn1", 1.0)
    assert LAYERS.effect(both)[:2] == (1.0, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# the search, on scores that a formula gives


def searched(score: Callable[[tuple[float, ...]], Scores], most: int = 999) -> list[Tried]:
    found: list[Tried] = []

    def judged(strengths: Strengths) -> Tried:
        scores = score(LAYERS.effect(strengths))
        found.append(tried(strengths, scores.style, scores.prompt, scores.copying))
        return found[-1]

    descend(judged(Strengths(1.0)), LAYERS, lambda strengths: judged(strengths) if len(found) < most else None)
    return found


def test_the_search_finds_the_blocks_that_cost_prompts_and_bring_no_style():
    """The way down costs prompts, the text encoders copy, and convolutions in the middle cost prompts as well."""

    def score(at: tuple[float, ...]) -> Scores:
        style = 0.5 * at[4] + 0.3 * at[2] + 0.2 * at[5]
        return Scores(style, 0.9 - 0.15 * (at[0] + at[1]) - 0.3 * at[3], 0.9 * at[5])

    found = searched(score)
    best = best_of(found)
    assert best is not None
    assert LAYERS.effect(best.strengths) == (0.0, 0.0, 1.0, 0.0, 1.0, 0.5, 0.5)
    assert dict(best.strengths.blocks).keys() == {"text_encoder*", DOWN, f"{MID}.resnets"}
    effects = [LAYERS.effect(one.strengths) for one in found]
    assert len(set(effects)) == len(effects)
    assert all(map(any, effects))  # the base alone is no candidate


def test_many_small_losses_of_style_do_not_add_up():
    """Each block that is left out costs 0.08 of the style, which alone counts for nothing, and brings prompts."""
    found = searched(lambda at: Scores(0.08 * sum(at) + 0.3, 1 - 0.05 * sum(at), 0))
    best = best_of(found)
    assert best is not None
    assert best.scores.style >= max(one.scores.style for one in found) - 0.1


def test_a_search_ends_where_it_may_try_no_more_and_where_nothing_gets_better():
    assert len(searched(lambda at: Scores(0.5, 0.5, 0), most=5)) == 5
    flat = searched(lambda at: Scores(0.5, 0.5, 0))
    assert best_of(flat) is flat[0]
    assert len(flat) == 1 + 2 * len(LAYERS.blocks)


# ---------------------------------------------------------------------------------------------------------------------
# the verdict


def test_what_looked_best_has_to_be_so_with_other_noise():
    start, other = tried(Strengths(1.0), 0.8, 0.6), tried(Strengths(1.0, ((DOWN, 0.0),)), 0.78, 0.75)
    better = decided([start, other], lambda best: (start, best))
    assert better.best is other
    assert better.reason == (
        "Step 4 at strength 1, 0 in unet.down_blocks is better than step 4 at strength 1 (style 0.80 to 0.78, prompt "
        "0.60 to 0.75), with other noise too (style 0.80 to 0.78, prompt 0.60 to 0.75)."
    )
    same = decided([start, other], lambda best: (start, replace(best, scores=replace(best.scores, prompt=0.64))))
    assert same.best is start
    assert same.reason.endswith(
        "but not clearly with other noise (style 0.80 to 0.78, prompt 0.60 to 0.64), so step 4 at strength 1 stands."
    )


def test_where_nothing_is_clearly_better_the_start_stands_and_nothing_more_is_drawn():
    start, other = tried(Strengths(1.0), 0.8, 0.6), tried(Strengths(0.5), 0.85, 0.63)

    def never(best: Tried) -> tuple[Tried, Tried]:
        raise AssertionError

    verdict = decided([start, other], never)
    assert best_of([start, other]) is other  # but for no more than the scores are fine
    assert verdict.best is start
    assert verdict.reason == "Of 1 other that were tried none is clearly better, so step 4 at strength 1 stands."
    most_style = tried(Strengths(1.0, ((UP, 1.2),)), 0.89, 0.64)  # the best by the rule, but by too little
    clearly = tried(Strengths(1.0, ((DOWN, 0.0),)), 0.82, 0.68)
    assert best_of([start, most_style, clearly]) is most_style
    assert decided([start, most_style, clearly], lambda best: (start, best)).best is clearly
    all_copy = decided([tried(Strengths(1.0), 1, 0.5, 2), tried(Strengths(0.5), 1, 0.5, 1)], never)
    assert all_copy.reason.startswith("All that were tried draw training images")


def test_better_is_what_the_rule_prefers_by_more_than_it_takes_for_equal():
    one = tried(Strengths(1.0), 0.7, 0.6)
    assert is_clearly_better(tried(Strengths(1.0), 0.65, 0.66), one)
    assert is_clearly_better(tried(Strengths(1.0), 0.85, 0.5), one)
    assert not is_clearly_better(tried(Strengths(1.0), 0.5, 0.9), one)
    assert not is_clearly_better(tried(Strengths(1.0), 0.9, 0.1), one)  # its prompts are lost
    assert is_clearly_better(one, tried(Strengths(1.0), 1.0, 0.6, 0.8))
    assert not is_clearly_better(tried(Strengths(1.0), 1.0, 0.6, 0.8), one)


# ---------------------------------------------------------------------------------------------------------------------
# mixtures


def test_a_command_says_all_that_makes_the_file():
    strengths = Strengths(0.7, ((DOWN, 0.5), (f"{UP}.*.attn2", 0.0)))
    run = Path("runs/my run")
    assert Mixture((4,), strengths).command(run, 8) == (
        "lorasmith export 'runs/my run' --step 4 --bake 8 --strength 0.7 --block unet.down_blocks=0.5 "
        "--block 'unet.up_blocks.*.attn2=0'"
    )
    assert Mixture((2, 4), Strengths()).command(Path("r")) == "lorasmith interpolate r --steps 2,4 --strength 1"


def test_a_share_of_the_change_is_of_all_layers_together():
    sizes = {("unet", "down_blocks.0.a"): 3.0, ("unet", "up_blocks.0.a"): 4.0}
    assert share_of(sizes, Strengths(1.0), sizes) == 1
    assert share_of(sizes, Strengths(1.0, ((DOWN, 0.0),)), sizes) == pytest.approx(0.8)
    assert share_of(sizes, Strengths(0.5), sizes) == pytest.approx(0.5)


@pytest.fixture
def settings() -> dict[str, object]:
    prompts = ["trg emoji of owl", "trg emoji of red apple"]
    return {
        "budget": {"images": 8},
        "save": {"every": 1},
        "sample": {"every": 9, "prompts": prompts, "steps": 1},
        "adapter": {"targets": "attention"},
        "optimizer": {"lr": 3e-2, "text_encoder_lr": 1e-3},
    }


def test_a_mean_acts_at_strengths_by_block_and_then_as_it_was(short_run, settings, tmp_path: Path):
    run = trained_run(short_run(**settings)).run
    mean = interpolate_run(run.path, [1, 2])
    base, strengths = mean.trained.base, Strengths(0.5, ((DOWN, 0.0), (UP, 1.0)))
    assert mean.changes is not None
    before = {name: weight.clone() for name, weight in base.unet.named_parameters()}
    original = load_run(run.path, 2).base
    with torch.no_grad(), mean.at(strengths) as acting:
        for delta in mean.changes["unet"]:
            layer, untouched = acting.unet.get_submodule(delta.name), original.unet.get_submodule(delta.name)
            change = layer.weight - untouched.weight
            wanted = strengths.of("unet", delta.name) * delta.of(untouched.weight)
            torch.testing.assert_close(change, wanted, atol=1e-6, rtol=1e-4)
    assert all(torch.equal(before[name], weight) for name, weight in base.unet.named_parameters())

    mixer = Mixer(wall_order(run), Studio(), rank=0)
    for steps in ((1, 2), (2,)):
        out = tmp_path / f"{len(steps)}.safetensors"
        mixer.write(Mixture(steps, strengths), out)
        _require_strengths(out, run.path, list(steps), strengths)


# ---------------------------------------------------------------------------------------------------------------------
# the command


def test_tune_strength_ends_in_a_file_that_holds_the_strengths_it_has_chosen(short_run, settings, tmp_path: Path):
    run = trained_run(short_run(**settings)).run
    saved = run.saved_steps()
    out = tmp_path / "tuned.safetensors"
    done = lorasmith(tmp_path, "tune-strength", run.path, "--pictures", "45", "--out", out, "--json")
    told = json.loads(done.stdout)
    assert "At most 45 pictures are drawn" in done.stderr
    assert told["drawn"] <= 45
    assert told["notes"] == ["Not all could be tried with 45 pictures: --pictures allows more."]
    first, *others = told["tried"]
    assert first["mixture"] == {"steps": saved[-1:], "strengths": {"everywhere": 1.0, "blocks": []}}
    assert others[0]["mixture"]["strengths"]["blocks"] == [["text_encoder", 0.0]]
    assert others[-1]["mixture"]["steps"] == saved[-3:]
    assert first["change"] == pytest.approx(1)
    assert 0 < others[0]["change"] < 1
    assert json.loads(Path(told["file"]).read_text(encoding="utf-8"))["verdict"] == told["verdict"]
    assert Path(told["sheet"]).is_file()

    best = told["verdict"]["best"]["mixture"]
    strengths = Strengths(best["strengths"]["everywhere"], tuple(map(tuple, best["strengths"]["blocks"])))
    _require_strengths(out, run.path, best["steps"], strengths)

    pictures = {file: file.stat().st_mtime_ns for file in (run.path / "compare").glob("mixed-*.png")}
    assert len(pictures) >= 2 * (len(others) - 1)
    again = lorasmith(tmp_path, "tune-strength", run.path, "--pictures", "45", "--out", out, code=2)
    assert "exists already" in again.stderr
    resumed = json.loads(lorasmith(tmp_path, "tune-strength", run.path, "--pictures", "45", "--json").stdout)
    assert len(resumed["tried"]) > len(told["tried"])  # what is there costs nothing
    assert {file: file.stat().st_mtime_ns for file in pictures} == pictures


def _require_strengths(file: Path, run: Path, steps: list[int], strengths: Strengths) -> None:
    """The change of every layer, read from the file, is that of the checkpoint or of the mean, times its strength."""
    trained = load_run(run, steps[-1]).base
    mean = interpolate_run(run, steps).changes if len(steps) > 1 else None
    shape = skeleton(trained.info)
    written = {
        (part, delta.name): delta for part, own in read_lora(file, shape.components, "sd1").items() for delta in own
    }
    for part, module in trained.components.items():
        for delta in mean[part] if mean else deltas(module):
            factor = strengths.of(part, delta.name)
            assert ((part, delta.name) in written) == (factor != 0)
            if factor:
                wanted = factor * delta.of(torch.zeros(_shape(delta)))
                found = written[part, delta.name].of(torch.zeros(_shape(delta)))
                assert (found - wanted).norm() <= 2e-3 * wanted.norm(), (part, delta.name)


def _shape(delta) -> tuple[int, int]:
    return delta.up.shape[0], math.prod(delta.down.shape[1:])


def test_a_search_starts_where_the_wall_recommends_or_as_asked(short_run, settings):
    run = trained_run(short_run(**settings)).run
    newest = run.saved_steps()[-1]
    assert task_of(run).start == Mixture((newest,), Strengths(1.0))
    assert task_of(run, step=2).means == [(1, 2)]
    assert task_of(run, step=1).why_no_means.startswith("No mean of checkpoints was tried: there is one alone")
    assert task_of(run, step=2, strength=0.5).start == Mixture((2,), Strengths(0.5))
    assert set(task_of(run, seeds=[1, 2**63 - 1]).others.seeds).isdisjoint({1, 2**63 - 1})

    order = wall_order(run, prompts=run.read_config().sample.prompts)
    scores = Scores(0.5, 0.5, 0.0)
    cell = JudgedCell(2, 0.7, scores, (JudgedPicture("a", 1, scores, "a.png"),))
    write_choice(Choice((cell,), Recommended(2, 0.7), "It is.", False, 3, 5, 9), choice_file(order))
    found = task_of(run)
    assert found.start == Mixture((2,), Strengths(0.7))
    plain = found.start.files(found.order, found.cells)
    assert plain == found.order.files()  # the wall has drawn it
    assert plain[Cell(2, 0.7, order.prompts[0], order.seeds[0])].is_file() is False


def test_what_cannot_be_tuned_is_told(short_run, settings):
    run = trained_run(short_run(**settings)).run
    with pytest.raises(UserError, match="--strength: 0 is the base alone"):
        task_of(run, strength=0.0)
    with pytest.raises(RunError, match="step 99"):
        task_of(run, step=99)
    few = task_of(run, most=20)
    with pytest.raises(UserError, match=r"20 pictures are too few to try anything\. Give \d\d at least"):
        Tuning(few, Studio())
    with pytest.raises(UserError, match="no prompt holds the run's trigger"):
        Tuning(task_of(run, ["emoji of owl"]), Studio())


WHOLE = {"kind": "full", "rank": 16, "alpha": 16.0}


@pytest.mark.parametrize(
    ("adapter", "rank", "said"),
    [({"kind": "dora"}, 0, r"--bake: a DoRA has no half.*--bake RANK"), (WHOLE, 4, "--bake: has no effect")],
    ids=["dora", "full"],
)
def test_a_kind_without_halves_needs_a_rank_and_a_whole_model_has_none(short_run, adapter, rank: int, said: str):
    run = create_run(make_plan(short_run(adapter=adapter, sample={"prompts": ["trg owl"], "every": 9})).config)
    with pytest.raises(UserError, match=said):
        task_of(run, rank=rank)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("adapter", "bake"), [({"kind": "dora"}, 32), ({"kind": "loha"}, 0), (WHOLE, 0)], ids=["dora", "loha", "full"]
)
def test_other_kinds_are_tuned_as_well(short_run, settings, adapter, bake: int, tmp_path: Path):
    run = trained_run(short_run(**settings | {"adapter": adapter})).run
    out = tmp_path / "tuned.safetensors"
    arguments = ["--bake", str(bake)] if bake else []
    done = lorasmith(tmp_path, "tune-strength", run.path, "--pictures", "45", "--out", out, "--json", *arguments)
    told = json.loads(done.stdout)
    means = [one for one in told["tried"] if len(one["mixture"]["steps"]) > 1]
    assert bool(means) == (adapter["kind"] != "loha")
    assert bool(means) != any("rank --bake gives" in note for note in told["notes"])
    assert 0 < told["tried"][1]["change"] < told["tried"][0]["change"] == pytest.approx(1)
    assert out.is_file()


def test_the_blocks_of_a_base_are_those_of_what_was_trained(short_run):
    base = skeleton(inspect_base("pocket"))
    base.unet.requires_grad_(True)
    blocks = Layers(list(trained_layers(base))).blocks
    assert blocks[:3] == [DOWN, MID, UP]
    assert f"{DOWN}.*.resnets" in blocks
    assert f"{MID}.resnets" in blocks
