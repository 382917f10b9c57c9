"""Which checkpoint, which strength: the three scores tell what they say they tell, and the rule follows them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from torch import Tensor

from lorasmith.datasets.folder import scan
from lorasmith.trainer.bases import POCKET
from lorasmith.trainer.choosing.choice import (
    CAPTIONS,
    Choice,
    JudgedCell,
    JudgedPicture,
    Recommended,
    Scores,
    choice_file,
    read_choice,
    write_choice,
)
from lorasmith.trainer.choosing.content import ContentScale
from lorasmith.trainer.choosing.features import Features, features_of_true, gram, self_similarity
from lorasmith.trainer.choosing.likeness import LikenessScale
from lorasmith.trainer.choosing.page import notes_of, page_of
from lorasmith.trainer.choosing.recommendation import LIMIT, contenders, recommend
from lorasmith.trainer.choosing.style import StyleScale
from lorasmith.trainer.choosing.training import training_images
from lorasmith.trainer.demo import _true, read_held_out
from lorasmith.trainer.encoder import to_tensor
from lorasmith.trainer.example import EXAMPLES, STYLE
from lorasmith.trainer.painting.wall import wall_order

from .command import lorasmith
from .conftest import trained_run

# ---------------------------------------------------------------------------------------------------------------------
# features


def test_a_gram_matrix_is_blind_to_places_and_a_layout_to_a_change_of_ink():
    draw = torch.Generator().manual_seed(0)
    stage = torch.randn(2, 5, 8, 8, generator=draw)
    moved = stage.roll((3, 2), (2, 3))
    torch.testing.assert_close(gram(moved), gram(stage))
    assert not torch.allclose(self_similarity(moved), self_similarity(stage), atol=0.1)

    turned = torch.linalg.qr(torch.randn(5, 5, generator=draw)).Q
    other_ink = 3 * torch.einsum("ij,njhw->nihw", turned, stage) + 7
    torch.testing.assert_close(self_similarity(other_ink), self_similarity(stage), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(gram(other_ink), gram(stage), atol=0.1)


def test_large_pictures_are_looked_at_in_few_places():
    assert self_similarity(torch.randn(1, 3, 64, 64)).shape == (1, 256 * 255 // 2)
    assert self_similarity(torch.randn(1, 3, 4, 4)).shape == (1, 16 * 15 // 2)


# ---------------------------------------------------------------------------------------------------------------------
# scores, on true pictures: as if a LoRA had drawn them


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(POCKET / "vae").float().eval()


@pytest.fixture(scope="module")
def held_out() -> dict[str, Tensor]:
    """Twelve concepts that are not trained on, in the base's style and in the target style."""
    files = [file for _, file in read_held_out()][:12]
    return {style: _true(style, files) for style in ("base", "target")}


@pytest.fixture(scope="module")
def training(vae: AutoencoderKL) -> Features:
    files = [item.path for item in scan(EXAMPLES / STYLE)]
    return features_of_true(vae, to_tensor([Image.open(file).resize((64, 64)) for file in files]))


@pytest.fixture(scope="module")
def scales(vae: AutoencoderKL, training: Features, held_out: dict[str, Tensor]) -> tuple[StyleScale, ContentScale]:
    """From pictures of the base of other concepts."""
    measured = dict(read_held_out()).values()
    files = [file.name for file in sorted((EXAMPLES / "measure/base").glob("*.webp")) if file.name not in measured]
    base = features_of_true(vae, _true("base", files[::6]))
    return StyleScale.fit(features_of_true(vae, held_out["base"]), training), ContentScale.fit(base, training)


@pytest.fixture(scope="module")
def drawn(vae: AutoencoderKL, held_out: dict[str, Tensor], training: Features) -> dict[str, Features]:
    """What LoRAs of several kinds would have drawn for the held-out prompts."""
    base, target = held_out["base"], held_out["target"]
    return {
        "untrained": features_of_true(vae, base),
        "undertrained": features_of_true(vae, 0.7 * base + 0.3 * target),
        "well trained": features_of_true(vae, target),
        "deaf to prompts": features_of_true(vae, target.roll(1, 0)),
        "overfitted": training[range(12)],
    }


def test_style_rises_from_base_to_training_images(scales, drawn: dict[str, Features], training: Features):
    style, _ = scales
    assert style.is_known
    gained = {name: style.gained(pictures, drawn["untrained"]).mean().item() for name, pictures in drawn.items()}
    assert gained["untrained"] == pytest.approx(0, abs=1e-5)
    assert gained["untrained"] < gained["undertrained"] < gained["well trained"]
    assert gained["well trained"] > 0.75
    assert gained["overfitted"] > 0.75  # to copy is to have the style: another score tells


def test_a_prompt_is_kept_in_another_style_and_lost_by_the_deaf_and_the_overfitted(scales, drawn: dict[str, Features]):
    _, content = scales
    kept = {name: content.kept(pictures, drawn["untrained"]).mean().item() for name, pictures in drawn.items()}
    assert kept["untrained"] == pytest.approx(1, abs=1e-5)
    assert kept["undertrained"] > kept["well trained"]
    assert kept["well trained"] > kept["deaf to prompts"] + 0.1
    assert kept["well trained"] > kept["overfitted"] + 0.1


def test_only_training_images_are_called_copies(scales, drawn: dict[str, Features]):
    _, content = scales
    copying = {name: content.copying(pictures) for name, pictures in drawn.items()}
    for name in ("untrained", "undertrained", "well trained", "deaf to prompts"):
        assert copying[name].mean() < LIMIT, name
    assert copying["overfitted"].mean() > 1
    assert content.nearest(drawn["overfitted"]) == list(range(12))


def test_a_base_that_draws_the_style_already_has_none_to_gain(training: Features):
    assert not StyleScale.fit(training, training).is_known


def test_of_a_single_training_image_a_copy_is_told(vae: AutoencoderKL, drawn: dict[str, Features], training: Features):
    one = training[[3]]
    content = ContentScale.fit(drawn["untrained"], one)
    assert content.copying(one).item() > LIMIT
    base = drawn["untrained"][[0]]
    assert StyleScale.fit(base, one).gained(one, base).item() == pytest.approx(1)


def test_where_every_picture_was_asked_for_the_only_image_there_still_is_a_limit(training: Features):
    content = ContentScale.fit(training[[0, 1]], training[[3]], torch.ones(2, 1, dtype=torch.bool))
    assert 0 <= content.usual < content.limit < 1


def test_an_image_that_a_picture_was_asked_for_is_no_sign_of_copies(drawn: dict[str, Features]):
    """The base draws an owl where an owl was trained: its limit must not rise by that."""
    base = drawn["untrained"]
    strict = ContentScale.fit(base, base, torch.eye(12, dtype=torch.bool))
    lax = ContentScale.fit(base, base)
    assert strict.usual < lax.usual
    assert strict.copying(base).mean() > lax.copying(base).mean()


# ---------------------------------------------------------------------------------------------------------------------
# the rule


def cell(step: int, strength: float, style: float, prompt: float, copying: float = 0.0) -> JudgedCell:
    scores = Scores(style, prompt, copying)
    return JudgedCell(step, strength, scores, (JudgedPicture("a cat", 7, scores, "a.png"),))


def test_of_cells_with_the_style_the_one_that_keeps_most_of_its_prompts_is_recommended():
    cells = [cell(2, 1, 0.5, 0.9), cell(4, 0.7, 0.92, 0.8), cell(4, 1, 1.0, 0.7), cell(4, 1.2, 1.3, 0.6)]
    verdict = recommend(cells)
    assert verdict.cell is cells[1]
    assert verdict.reason == (
        "Step 4 at strength 0.7 is recommended: it has gained 0.92 of the style, and of the 3 cells with about as "
        "much none keeps clearly more of its prompts (0.80)."
    )


def test_of_cells_that_are_equal_but_for_noise_the_one_with_most_style_is_recommended():
    cells = [cell(2, 1, 0.58, 0.78), cell(4, 1, 0.63, 0.76), cell(4, 0.7, 0.1, 0.95)]
    assert recommend(cells).cell is cells[1]


def test_copies_are_left_out_and_the_run_is_called_overfitted():
    cells = [cell(2, 0.7, 0.6, 0.8), cell(2, 1, 0.8, 0.7, 0.5), cell(4, 0.7, 1, 0.6, 1.1), cell(4, 1, 1, 0.3, 3)]
    verdict = recommend(cells)
    assert verdict.cell is cells[1]
    assert verdict.is_overfitted
    assert verdict.reason.endswith("while step 4 at strength 1 draws training images (copying 3.00): it is overfitted.")


def test_images_that_are_known_by_heart_are_no_gain_and_what_was_trained_shorter_is_recommended():
    cells = [looked_at(2, 1.1, 0.35, 0.9, 0.91, 0.9, 0.9), looked_at(4, 1.1, 0.45, 0.99, 0.98, 0.99, 0.98)]
    cells += [looked_at(8, 1, 0.4, 0.99, 0.99, 0.99, 0.99), looked_at(8, 1.1, 0.48, 0.99, 0.99, 0.98, 0.99)]
    verdict = recommend(cells)
    assert verdict.is_overfitted
    assert verdict.cell is cells[1]
    assert verdict.reason == (
        "Step 4 at strength 1.1 is recommended: its pictures of training captions come 0.98 of the way to the images "
        "that have them, as near as any, and of 3 such cells none was trained shorter and has about as much as its "
        "0.45 of the style on other prompts, while step 8 at strength 1 knows the training images by heart (0.99 of "
        "the way) and has 0.40 of the style elsewhere: it is overfitted."
    )
    shown = replace(cells[2], scores=replace(cells[2].scores, style=0.9))
    assert not recommend([*cells[:2], shown]).is_overfitted


def test_cells_that_lost_their_prompts_are_left_out():
    cells = [cell(2, 1, 0.8, 0.9), cell(4, 1, 1.0, 0.2)]
    assert recommend(cells).cell is cells[0]


def test_an_undertrained_run_is_told_to_train_longer():
    verdict = recommend([cell(2, 1, 0.05, 0.99), cell(4, 1, 0.18, 0.98)])
    assert "which is little, so train longer" in verdict.reason


def test_nothing_is_recommended_where_everything_copies_or_there_is_no_style_to_gain():
    cells = [cell(2, 1, 0.9, 0.5, 2), cell(4, 1, 1.0, 0.4, 4)]
    assert recommend(cells).cell is None
    assert (
        "all of them draw training images (copying is 2.00 at the least, step 2 at strength 1"
        in recommend(cells).reason
    )
    leaks = recommend([cell(2, 1, 0.1, 0.9), cell(4, 1, 0.6, 0.8, 2)], is_leak=True)
    assert (leaks.cell, leaks.is_overfitted) == (None, True)
    assert leaks.reason.endswith("has leaked, from 0.10 of it at step 2 at strength 1 to 0.60 at step 4 at strength 1.")
    known = recommend([cell(2, 1, 0.9, 0.9)], knows_style=False)
    assert known.cell is None
    assert "no gain can be told" in known.reason


def looked_at(step: int, strength: float, style: float, *likeness: float) -> JudgedCell:
    return replace(cell(step, strength, style, 0.6), likeness=likeness)


def test_of_cells_that_have_learned_as_well_the_one_with_most_style_on_other_prompts_is_recommended():
    early = looked_at(2, 1, 0.95, 0.5, 0.6, 0.5, 0.6)  # a style that shows, and is not the one that was trained
    cells = [early, looked_at(4, 1, 0.7, 0.88, 0.92, 0.9, 0.9), looked_at(4, 1.1, 0.8, 0.87, 0.91, 0.895, 0.895)]
    verdict = recommend(cells)
    assert verdict.cell is cells[2]
    assert verdict.reason == (
        "Step 4 at strength 1.1 is recommended: its pictures of training captions come 0.89 of the way to the images "
        "that have them, as near as any, and of 2 such cells it has 0.80 of the style on other prompts."
    )
    far = replace(cells[2], likeness=(0.78, 0.82, 0.8, 0.8))
    assert recommend([*cells[:2], far]).cell is cells[1]
    uncertain = replace(far, likeness=(0.5, 1.2, 0.4, 1.4))
    assert recommend([*cells[:2], uncertain]).cell is uncertain


def test_a_copy_is_left_out_however_near_it_comes():
    copy = replace(cell(4, 1, 1.0, 0.6, copying=2), likeness=(1.0,) * 4)
    assert recommend([looked_at(2, 1, 0.6, 0.5, 0.6, 0.5, 0.6), copy]).cell != copy


def test_those_with_most_style_are_looked_at():
    cells = [cell(step, 1, step / 10, 0.8) for step in range(1, 11)]
    assert [one.step for one in contenders([*cells, cell(11, 1, 1.0, 0.8, 3), cell(12, 1, 1.0, 0.1)])] == [
        *range(10, 2, -1)
    ]


def test_likeness_is_0_of_the_base_and_1_of_the_images_themselves(vae: AutoencoderKL, training: Features):
    captions = [f"thing {number}" for number in range(len(training))]
    base = training[[*range(1, len(training)), 0]]  # of other things
    scale = LikenessScale.fit(base, captions, training, captions)
    assert scale is not None
    assert len(scale.captions) <= CAPTIONS
    rows = [captions.index(caption) for caption in scale.captions]
    assert fmean(scale.reached(base[rows])) == pytest.approx(0, abs=1e-5)
    assert scale.reached(training[rows]) == pytest.approx([1] * len(rows))


def test_captions_of_several_images_or_without_a_word_tell_no_likeness(training: Features):
    some = training[range(6)]
    assert LikenessScale.fit(some, ["", "a", "b", "c"], some, ["", "a", "b", "c", "a", "d"]) is None
    scale = LikenessScale.fit(some, ["", "a", "b", "c", "d", "e"], some, ["", "a", "b", "c", "d", "e"])
    assert scale is not None
    assert scale.captions == ("a", "b", "c", "d", "e")


# ---------------------------------------------------------------------------------------------------------------------
# the command, and what it writes


@pytest.fixture(scope="module")
def settings() -> dict[str, object]:
    prompts = ["trg emoji of owl", "trg emoji of red apple"]
    return {"save": {"every": 2}, "sample": {"every": 9, "prompts": prompts, "steps": 1}}


def test_compare_scores_the_wall_and_recommends_a_cell(short_run, settings, tmp_path: Path):
    run = trained_run(short_run(**settings)).run
    arguments = ["compare", run.path, "--steps", "2,4", "--strengths", "0,1"]
    told = json.loads(lorasmith(tmp_path, *arguments, "--json").stdout)
    choice = told["choice"]
    assert [(one["step"], one["strength"]) for one in choice["cells"]] == [(2, 1.0), (4, 1.0)]
    assert [(one["prompt"], one["seed"]) for one in choice["cells"][0]["pictures"]] == [
        (prompt, 1234) for prompt in settings["sample"]["prompts"]
    ]
    assert choice["images"] == choice["images_of"] == 7
    assert choice["base_pictures"] == 2 + 7
    assert choice["cells"][0]["pictures"][0]["nearest"].startswith("picture ")

    order = wall_order(run, (2, 4), (0, 1), settings["sample"]["prompts"])
    kept = read_choice(order)
    assert kept is not None
    assert json.loads(choice_file(order).read_text(encoding="utf-8")) == choice
    assert told["wall"] == str(order.sheet())

    page = order.sheet().with_suffix(".html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 2 * 2 * 2
    assert "src=" not in page.replace('src="data:', "")
    assert "http" not in page
    assert kept.reason.split("'")[0] in page
    with Image.open(order.sheet()) as sheet:
        assert sheet.height > 4 * 128

    drawn = {file: file.stat().st_mtime_ns for file in order.sheet().parent.glob("*.png") if file != order.sheet()}
    again = lorasmith(tmp_path, *arguments)
    assert again.stdout.strip().endswith(kept.reason)
    assert again.stderr == ""
    assert {file: file.stat().st_mtime_ns for file in drawn} == drawn

    shutil.rmtree(tmp_path / "pictures")
    done = lorasmith(tmp_path, *arguments, code=2)
    assert "the images that it was trained on cannot be read" in done.stderr
    assert "--no-scores" in done.stderr
    done = lorasmith(tmp_path, "compare", run.path, "--strengths", "0", code=2)
    assert "0 alone shows nothing of what was trained" in done.stderr


def test_a_file_counts_once_and_regularisation_images_not_at_all(short_run, pictures: Path, tmp_path: Path):
    from lorasmith.trainer.jobs import create_run
    from lorasmith.trainer.plan import make_plan

    shutil.copy(pictures / "picture 0.png", pictures / "twin.png")
    others = tmp_path / "others"
    others.mkdir()
    Image.new("RGB", (64, 64), "red").save(others / "red.png")
    data = [{"path": str(pictures), "trigger": "trg"}, {"path": str(others), "regularization": True}]
    found = training_images(create_run(make_plan(short_run(data=data)).config))
    assert found.of == len(found.examples) == 7
    assert found.pictures([0, 3], 48).shape == (2, 3, 48, 48)


def test_a_choice_is_read_back_as_it_was_written_and_damage_is_none(short_run, settings, tmp_path: Path):
    run = trained_run(short_run(**settings)).run
    order = wall_order(run, (2, 4), (1,))
    choice = Choice((cell(2, 1.0, 0.5, 0.5),), Recommended(2, 1.0), "It is.", False, 3, 5, 9)
    assert read_choice(order) is None
    write_choice(choice, choice_file(order))
    assert read_choice(order) == choice
    choice_file(order).write_text('{"cells": 3}', encoding="utf-8")
    assert read_choice(order) is None


def test_what_a_page_shows_is_text(short_run, settings, tmp_path: Path):
    run = trained_run(short_run(**settings)).run
    order = wall_order(run, (2,), (1,), ["<script>alert(1)</script>"])
    scores = Scores(0.5, 0.6, 1.5)
    judged = JudgedCell(2, 1.0, scores, (JudgedPicture(order.prompts[0], order.seeds[0], scores, '"><b>'),))
    choice = Choice((judged,), None, "Because <i>.", False, 3, 5, 9)
    Image.new("RGB", (64, 64)).save(_made(order.file(order.cells()[0])))
    page = page_of(order, "<run>", choice)
    assert not [text for text in ("<script", "<i>", '"><b>', "<run>") if text in page]
    assert '<span class="above">copying 1.50</span>' in page
    assert "3 of the 5 training images" in page
    assert notes_of(replace(choice, recommended=Recommended(2, 1.0))).marked == (2, 1.0)


def _made(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


# ---------------------------------------------------------------------------------------------------------------------
# real runs


@pytest.mark.exhaustive
def test_a_run_on_four_images_is_called_overfitted_and_less_of_it_is_recommended(tmp_path: Path):
    """Four images, 5,000 seen."""
    from tools.choosing import judged, overfitted_config, trained

    choice = judged(trained(overfitted_config(tmp_path)))
    first, last = choice.cells[0].step, choice.cells[-1].step
    early, late = choice.cell(first, 0.5).scores, choice.cell(last, 1.0).scores
    assert choice.is_overfitted
    assert "by heart" in choice.reason
    assert late.prompt < early.prompt
    best = choice.recommended
    assert best is not None
    assert best.step < last or best.strength < 1


@pytest.mark.exhaustive
def test_a_run_that_has_hardly_begun_has_little_style(tmp_path: Path):
    from tools.choosing import judged, run_config, trained

    choice = judged(trained(run_config(STYLE, 0, 80, tmp_path)))
    assert choice.cells[-1].scores.style < 0.5
    assert not choice.is_overfitted
