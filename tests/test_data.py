"""The data side as a run sees it: each image its number of times with its own caption and mask; no input breaks it."""

from __future__ import annotations

import random
import struct
import zlib
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from PIL import Image
from torch import Tensor

from lorasmith.datasets.buckets import BatchOrder, BucketRules, Shot
from lorasmith.datasets.dataset import Example, load_examples, showing
from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.config import DataSection, RunConfig
from lorasmith.trainer.configfile import validate
from lorasmith.trainer.errors import DataError, UserError
from lorasmith.trainer.jobs import create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.plan import make_plan, source_of


def picture(path: Path, size: tuple[int, int], colour: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)  # pyright: ignore
    return path


def config_of(*data: dict[str, Any], **over: Any) -> RunConfig:
    return validate({"name": "x", "data": list(data), "budget": {"images": 8, "batch": 2}, **over})


def examples_of(config: RunConfig) -> list[Example]:
    base = inspect_base("pocket")
    return load_examples([source_of(data, config, base) for data in config.data], BucketRules(16), config.seed)


# ---------------------------------------------------------------------------------------------------------------------
# the order

SHAPES = [(64, 64), (96, 48), (40, 100), (200, 20)]
FOLDERS = some.lists(
    some.tuples(some.sampled_from(SHAPES), some.integers(1, 3), some.booleans()), min_size=1, max_size=12
)
"""Of each image its size, its repeats, and whether it has a mask."""


@settings(max_examples=25)
@given(
    FOLDERS,
    some.integers(1, 5),
    some.sampled_from([64, [64, 96], [48]]),
    some.booleans(),
    some.sampled_from([0.5, 1.0, 2.0]),
    some.integers(0, 3),
)
def test_each_image_comes_exactly_its_number_of_times_with_its_own_caption_and_mask(
    tmp_path_factory, images, batch: int, resolution, flip: bool, weight: float, seed: int
):
    folder = tmp_path_factory.mktemp("photos")
    expected: dict[str, tuple[float, bool]] = {}
    for number, (size, repeats, masked) in enumerate(images):
        name = f"{repeats}_set/{number}.png"
        picture(folder / name, size, (number, 7, 7))
        (folder / name).with_suffix(".txt").write_text(f"thing {number}, red, green, blue", encoding="utf-8")
        if masked:
            picture(folder / f"{repeats}_set/mask/{number}.png", size, (255 - number,) * 3)
        expected[name] = (repeats * weight, masked)
    config = config_of(
        {"path": str(folder), "resolution": resolution, "flip": flip, "weight": weight, "shuffle_caption": True},
        seed=seed,
    )
    examples = examples_of(config)
    order = BatchOrder([example.entry for example in examples], batch, seed)

    epochs = [order.epoch(number) for number in range(4)]
    counts = Counter(examples[shot.image].name for epoch in epochs for group in epoch for shot in group)
    assert counts == {name: round(4 * shows) for name, (shows, _) in expected.items()}
    for group in (group for epoch in epochs for group in epoch):
        shown = [showing(examples, shot) for shot in group]
        assert 1 <= len(group) <= batch
        assert len({one.view.fit.bucket for one in shown}) == 1
        for one in shown:
            number = Path(one.example.name).stem
            assert sorted(one.caption.split(", ")) == ["blue", "green", "red", f"thing {number}"]
            assert one.example.is_masked == expected[one.example.name][1]
            assert not one.example.item.mask or one.example.item.mask.path.stem == number

    again = BatchOrder([example.entry for example in examples_of(config)], batch, seed)
    whole = list(islice(order, 40))
    assert list(islice(again, 40)) == whole
    assert list(islice(again, 13, 40)) == whole[13:]
    captions = [showing(examples, shot).caption for group in whole for shot in group]
    assert (
        captions == [showing(examples_of(config), shot).caption for group in whole for shot in group][: len(captions)]
    )


def test_the_views_of_an_image_come_in_turn(tmp_path: Path):
    picture(tmp_path / "a.png", (64, 64), (1, 2, 3))
    examples = examples_of(config_of({"path": str(tmp_path), "resolution": [64, 96], "flip": True}))
    views = [showing(examples, Shot(0, number)).view for number in range(8)]
    assert views[:4] == views[4:]
    assert len({(view.fit.bucket, view.flip) for view in views}) == 4


def test_sets_keep_their_own_trigger_weight_and_resolution(tmp_path: Path):
    for name in ("style", "reg"):
        picture(tmp_path / name / "a.png", (64, 64), (len(name), 2, 3))
    config = config_of(
        {"path": str(tmp_path / "style"), "trigger": "sks", "weight": 3.0},
        {"path": str(tmp_path / "reg"), "resolution": 96, "regularization": True, "prior_loss_weight": 0.5},
        runtime={"cache": str(tmp_path / "cache")},
    )
    plan = make_plan(config)
    style, reg = plan.examples
    assert (style.captions, reg.captions) == (("sks",), ("",))
    assert (style.entry.shows, reg.entry.shows) == (3, 1)
    assert (style.fit.bucket, reg.fit.bucket) == ((64, 64), (96, 96))
    facts = plan.facts()["data"]
    assert [one["share"] for one in facts] == [0.75, 0.25]
    assert facts[1] == facts[1] | {"regularization": True, "loss_weight": 0.5}


# ---------------------------------------------------------------------------------------------------------------------
# the loss


def losses_of(config: RunConfig, cache: Path) -> tuple[Trainer, Tensor]:
    """The loss of each image of the plan in one batch, always with the same noise."""
    plan = make_plan(config.model_copy(update={"runtime": config.runtime.model_copy(update={"cache": str(cache)})}))
    trainer = Trainer(plan, create_run(plan.config), lambda event: None)
    with torch.no_grad():
        return trainer, trainer.loss([Shot(number, 0) for number in range(len(plan.examples))], 0, 0)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    for number, name in enumerate(("a", "b")):
        picture(tmp_path / "photos" / f"{name}.png", (64, 64), (60 * number, 90, 200))
        (tmp_path / "photos" / f"{name}.txt").write_text(f"emoji of thing {name}", encoding="utf-8")
    return tmp_path / "photos"


def losses(tmp_path: Path, number: int, data: list[dict[str, Any]]) -> Tensor:
    config = config_of(*data, runs=str(tmp_path / "runs"), sample={"every": 0})
    return losses_of(config.model_copy(update={"name": f"run{number}"}), tmp_path / "cache")[1]


def test_regularisation_images_count_by_prior_loss_weight(tmp_path: Path, two: Path):
    picture(tmp_path / "reg" / "c.png", (64, 64), (9, 9, 9))
    style, reg = {"path": str(two), "caption_dropout": 0.0}, {"path": str(tmp_path / "reg"), "regularization": True}
    full = losses(tmp_path, 0, [style, reg])
    part = losses(tmp_path, 1, [style, reg | {"prior_loss_weight": 0.25}])
    torch.testing.assert_close(part, full * torch.tensor([1, 1, 0.25]))


def test_a_mask_takes_its_share_of_the_loss_and_of_nothing_else(tmp_path: Path, two: Path):
    data = {"path": str(two), "caption_dropout": 0.0}
    whole = losses(tmp_path, 0, [data])
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 64, 16))
    (two / "mask").mkdir()
    mask.save(two / "mask" / "a.png")
    masked = losses(tmp_path, 1, [data])
    rest = losses(tmp_path, 2, [data | {"unmasked_weight": 1.0}])
    assert masked[1] == pytest.approx(whole[1].item())
    assert 0 < masked[0] < 0.6 * whole[0]
    torch.testing.assert_close(rest, whole)


@pytest.mark.parametrize("frozen", [True, False], ids=["cached embeddings", "trained text encoder"])
def test_shuffled_captions_reach_training_either_way(tmp_path: Path, two: Path, frozen: bool):
    """With frozen text encoders the variants come from the cache, else from the text encoder: the same losses."""
    (two / "a.txt").write_text("emoji of cat, red, green, blue, large, small", encoding="utf-8")
    data = {"path": str(two), "caption_dropout": 0.0, "shuffle_caption": True, "keep_tokens": 1}
    adapter = {"adapter": {"text_encoder": not frozen}, "optimizer": {"text_encoder_lr": 0.0} if frozen else {}}
    config = config_of(data, runs=str(tmp_path / "runs"), sample={"every": 0}, **adapter)
    trainer, _ = losses_of(config, tmp_path / "cache")
    assert len(set(trainer.plan.examples[0].captions)) > 3
    captions = [showing(trainer.plan.examples, Shot(0, number)).caption for number in range(6)]
    assert len(set(captions)) > 1
    with torch.no_grad():
        found = [trainer.loss([Shot(0, number)], 0, 0).item() for number in range(6)]
        fresh = {caption: trainer.base.encode([caption]) for caption in captions}
        noisy = torch.randn(1, 4, 16, 16)
        predictions = {
            caption: trainer.base.family.predict(
                trainer.base.unet, noisy, torch.tensor([500]), text, torch.zeros(1, 6)
            ).sum().item()
            for caption, text in fresh.items()
        }  # fmt: skip
    assert len(set(found)) == len(set(predictions.values())) == len(set(captions))


# ---------------------------------------------------------------------------------------------------------------------
# settings without effect


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("prior_loss_weight", 0.5),
        ("caption_separator", ";"),
        ("keep_tokens", 1),
        ("keep_tokens_separator", "|||"),
        ("caption_variants", 3),
        ("augmentations", 2),
    ],
)
def test_a_setting_that_waits_for_another_is_an_error_that_names_both(setting: str, value: object):
    with pytest.raises(UserError) as caught:
        config_of({"path": "photos", setting: value})
    [problem] = caught.value.problems
    assert f"data.0.{setting}" in problem.where
    assert "has no effect" in problem.what
    assert "data." in problem.fix


@pytest.mark.parametrize(
    ("rule", "caption"),
    [
        ({"wildcards": True}, "a cat"),
        ({"shuffle_caption": True, "keep_tokens_separator": "|||"}, "a, cat"),
        ({"machine_weight": 0.5}, "a cat"),
        ({"machine_caption_dropout": 0.5}, "a cat"),
        ({}, "a cat in [trigger] style"),
    ],
    ids=lambda value: str(next(iter(value), "trigger")) if isinstance(value, dict) else "",
)
def test_a_rule_that_meets_nothing_is_an_error(tmp_path: Path, rule: dict, caption: str):
    picture(tmp_path / "a.png", (64, 64), (1, 2, 3))
    (tmp_path / "a.txt").write_text(caption, encoding="utf-8")
    with pytest.raises(DataError, match=r"no effect|no trigger"):
        examples_of(config_of({"path": str(tmp_path), **rule}))


def test_only_regularisation_images_are_an_error():
    with pytest.raises(UserError, match="no style would be learned"):
        config_of({"path": "photos", "regularization": True})


@pytest.mark.parametrize("given", [-1, 5000, [], [0], [512, 512], "512", [512, "768"], True, 512.0])
def test_a_resolution_that_is_none(given: object):
    with pytest.raises(UserError, match=r"data\.0\.resolution|data.resolution"):
        config_of({"path": "photos", "resolution": given})


@pytest.mark.parametrize(
    ("buckets", "named"),
    [({"step": 24}, "buckets.step"), ({"max_edge": 32}, "buckets.max_edge"), ({"min_edge": 80}, "buckets.min_edge")],
)
def test_buckets_that_this_base_cannot_have_are_refused_by_the_plan(tmp_path: Path, buckets: dict, named: str):
    picture(tmp_path / "photos" / "a.png", (64, 64), (1, 2, 3))
    with pytest.raises(UserError) as caught:
        make_plan(
            config_of({"path": str(tmp_path / "photos")}, buckets=buckets, runtime={"cache": str(tmp_path / "c")})
        )
    assert named in str(caught.value)


def test_the_plan_says_which_setting_would_crop_less(tmp_path: Path):
    picture(tmp_path / "photos" / "wide.png", (480, 64), (1, 2, 3))
    data = {"path": str(tmp_path / "photos"), "trigger": "x", "resolution": 256}
    runtime = {"cache": str(tmp_path / "cache")}
    narrow = make_plan(config_of(data, runtime=runtime))
    warning = next(warning for warning in narrow.warnings() if "crop" in warning)
    assert "1 image loses over 25% of its area" in warning
    assert "With buckets.max_ratio = 8 " in warning
    wide = make_plan(config_of(data, buckets={"max_ratio": 8.0}, runtime=runtime))
    assert wide.examples[0].fit.cropped_share < 0.1
    assert not any("crop" in warning for warning in wide.warnings())
    assert narrow.facts()["placed"][0] == narrow.facts()["placed"][0] | {"image": "wide.png", "buckets": ["512x128"]}


@pytest.mark.parametrize("augmentation", [{}, {"crop_jitter": 1.0, "augmentations": 8}, {"crop": "random"}])
def test_the_plan_judges_images_as_they_are_at_each_resolution_whatever_is_drawn(tmp_path: Path, augmentation: dict):
    """An image of 100 pixels is enlarged 2.6 times for 256; enlarging by chance is no loss that a setting mends."""
    picture(tmp_path / "photos" / "square.png", (100, 100), (1, 2, 3))
    picture(tmp_path / "photos" / "wide.png", (2400, 320), (1, 2, 4))
    data = {"path": str(tmp_path / "photos"), "trigger": "x", "resolution": [128, 256]} | augmentation
    soft, cut = make_plan(config_of(data, runtime={"cache": str(tmp_path / "cache")})).warnings()
    assert soft == "1 image will be soft, enlarged over 1.5 times: square.png."
    assert cut.startswith("1 image loses over 25% of its area to the crop: wide.png. With buckets.max_ratio = 8 ")


def test_the_plan_warns_of_wildcards_that_are_switched_off(tmp_path: Path):
    picture(tmp_path / "photos" / "a.png", (64, 64), (1, 2, 3))
    (tmp_path / "photos" / "a.txt").write_text("a {red|blue} cat", encoding="utf-8")
    data, runtime = {"path": str(tmp_path / "photos")}, {"cache": str(tmp_path / "cache")}
    assert any("data.wildcards = true" in warning for warning in make_plan(config_of(data, runtime=runtime)).warnings())
    expanded = make_plan(config_of(data | {"wildcards": True}, runtime=runtime))
    assert not any("wildcards" in warning for warning in expanded.warnings())


def test_previews_are_of_the_style_and_not_of_regularisation_images(tmp_path: Path):
    for name in ("style", "reg"):
        picture(tmp_path / name / "a.png", (64, 64), (len(name), 2, 3))
        (tmp_path / name / "a.txt").write_text(f"of {name}", encoding="utf-8")
    reg = {"path": str(tmp_path / "reg"), "regularization": True}
    config = config_of({"path": str(tmp_path / "style")}, reg, runtime={"cache": str(tmp_path / "cache")})
    plan = make_plan(config)
    assert plan.config.sample.prompts == ["of style"]
    assert [folder[0] for folder in plan.dataset_facts()["folders"]] == ["style"]
    assert list(plan.dataset_facts()["tag_frequency"]) == ["style"]


def test_every_default_of_a_data_table_is_without_effect_on_the_others():
    """A complete file spells out every default, and must be valid."""
    complete = DataSection(path="photos").model_dump()
    assert config_of(complete).data[0].model_dump() == complete


# ---------------------------------------------------------------------------------------------------------------------
# hostile input


def png(width: int, height: int) -> bytes:
    """A PNG header that promises so many pixels, and holds none."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


HOSTILE: dict[str, bytes] = {
    "zero.png": b"",
    "text.jpg": b"this is no image",
    "html.webp": b"<html></html>",
    "enormous.png": png(60_000, 60_000),
    "promises.png": png(64, 64),
    "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n",
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_a_file_that_is_no_image_is_named_before_training(tmp_path: Path, name: str):
    picture(tmp_path / "photos" / "good.png", (64, 64), (1, 2, 3))
    (tmp_path / "photos" / name).write_bytes(HOSTILE[name])
    with pytest.raises(UserError) as caught:
        make_plan(config_of({"path": str(tmp_path / "photos")}, runtime={"cache": str(tmp_path / "cache")}))
    [problem] = caught.value.problems
    assert problem.where == str(tmp_path / "photos" / name)
    assert problem.fix


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1), (15, 400), (16, 300)])
def test_an_image_of_an_impossible_shape_is_named_before_training(tmp_path: Path, size: tuple[int, int]):
    picture(tmp_path / "photos" / "odd.png", size, (1, 2, 3))
    with pytest.raises(UserError, match=r"odd\.png: is (only )?\d+ x \d+ pixels"):
        make_plan(config_of({"path": str(tmp_path / "photos")}, runtime={"cache": str(tmp_path / "cache")}))


@settings(max_examples=60)
@given(some.sampled_from(["png", "jpeg", "webp", "gif", "bmp", "tiff"]), some.randoms(use_true_random=False))
def test_a_damaged_image_is_refused_or_read_to_the_end_and_nothing_else(
    tmp_path_factory, kind: str, draw: random.Random
):
    folder = tmp_path_factory.mktemp("photos")
    file = folder / f"a.{kind}"
    noise = Image.effect_noise((48, 40), 90).convert("RGB")
    noise.save(file, kind)
    data = bytearray(file.read_bytes())
    for _ in range(draw.randint(1, 12)):
        data[draw.randrange(len(data))] = draw.randrange(256)
    file.write_bytes(bytes(data[: draw.randint(1, len(data))] if draw.random() < 0.4 else data))
    problems, examples = [], []
    try:
        examples = examples_of(config_of({"path": str(folder)}))
    except DataError as error:
        problems = error.problems
    assert bool(problems) != bool(examples)
    assert all(problem.where.startswith(str(folder)) and problem.fix for problem in problems)


@pytest.mark.parametrize(
    "name", ["a\nb.png", "a\tb.png", "'; rm -rf.png", "$(x).png", "%s%n.png", "[bold]x[/].png", "‮gnp.png", "con .png"]
)
def test_hostile_names_are_trained_and_told_as_they_are(tmp_path: Path, name: str):
    picture(tmp_path / "photos" / name, (64, 64), (1, 2, 3))
    (tmp_path / "photos" / name).with_suffix(".txt").write_text("its caption", encoding="utf-8")
    [example] = examples_of(config_of({"path": str(tmp_path / "photos")}))
    assert (example.name, example.caption) == (name, "its caption")
