"""Views: which part of an image is shown, mirrored or not, in which colours; and what SDXL is told of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from PIL import Image

from lorasmith.datasets.buckets import BucketRules, bucket_sizes, fit
from lorasmith.datasets.dataset import Source, load_examples, read_pixels
from lorasmith.datasets.views import AS_THEY_ARE, Augmentation, Colours, View, recolour, show, views_of

RULES = some.builds(
    BucketRules,
    step=some.sampled_from([16, 32, 64]),
    min_edge=some.sampled_from([0, 48]),
    max_edge=some.sampled_from([0, 256]),
    max_ratio=some.sampled_from([1.0, 2.0, 4.0, 8.0]),
    upscale=some.booleans(),
)
SIDES = some.integers(16, 900)


@given(SIDES, SIDES, some.sampled_from([64, 128, 200, 256]), RULES)
def test_every_fit_covers_a_bucket_that_the_rules_allow(width: int, height: int, resolution: int, rules: BucketRules):
    found = fit(width, height, resolution, rules)
    (bucket_width, bucket_height), (left, top, right, bottom) = found.bucket, found.box
    square = max(rules.step, resolution // rules.step * rules.step)
    assert bucket_width % rules.step == bucket_height % rules.step == 0
    assert bucket_width * bucket_height <= square * square
    assert max(found.bucket) <= rules.max_ratio * min(found.bucket)
    assert (
        found.bucket == (square, square) or not rules.max_edge or max(found.bucket) <= max(rules.max_edge, rules.step)
    )
    assert 0 <= left < right <= width + 1e-6
    assert 0 <= top < bottom <= height + 1e-6
    if (
        not rules.upscale
        and min(width, height) >= rules.step
        and max(width, height) <= rules.max_ratio * min(width, height)
    ):
        assert found.enlargement <= 1 + 1e-6
    if rules.upscale:
        assert found.bucket in bucket_sizes(resolution, rules)


def test_images_are_enlarged_unless_that_is_switched_off():
    assert fit(100, 80, 512, BucketRules(64)).bucket == (576, 448)
    small = fit(100, 80, 512, BucketRules(16, upscale=False))
    assert (small.bucket, small.resized) == ((96, 80), (100, 80))


@given(
    SIDES,
    SIDES,
    some.lists(some.sampled_from([64, 96, 128]), min_size=1, max_size=2, unique=True),
    some.builds(
        Augmentation,
        flip=some.booleans(),
        crop=some.sampled_from(["center", "random"]),
        crop_jitter=some.sampled_from([0.0, 0.3]),
        colour_jitter=some.sampled_from([0.0, 0.2]),
        count=some.integers(1, 4),
    ),
)
def test_views_are_the_same_for_a_seed_and_as_many_as_asked_for(
    width: int, height: int, resolutions: list[int], augmentation: Augmentation
):
    views = views_of(width, height, resolutions, BucketRules(16), augmentation, "seed")
    assert views == views_of(width, height, resolutions, BucketRules(16), augmentation, "seed")
    drawn = augmentation.count if augmentation.is_random else 1
    assert len(views) == len(resolutions) * drawn * (2 if augmentation.flip else 1)
    picture = Image.new("RGB", (width, height), (200, 100, 50))
    for view in views:
        (left, top, right, bottom), (bucket_width, bucket_height) = view.fit.box, view.fit.bucket
        assert 0 <= left < right <= width + 1e-6
        assert 0 <= top < bottom <= height + 1e-6
        assert show(picture, view).size == view.fit.bucket
        original_height, original_width, crop_top, crop_left, target_height, target_width = view.sizes
        assert (original_width, original_height, target_width, target_height) == (
            width,
            height,
            bucket_width,
            bucket_height,
        )
        assert 0 <= crop_left <= view.fit.resized[0] - bucket_width
        assert 0 <= crop_top <= view.fit.resized[1] - bucket_height


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 60)], axis=-1).round().astype(np.uint8))


def test_the_box_shows_what_resizing_and_then_cropping_would_show():
    picture = gradient(300, 200)
    found = fit(300, 200, 128, BucketRules(16))
    left, top, (width, height) = found.crop_left, found.crop_top, found.bucket
    cropped = picture.resize(found.resized, Image.Resampling.LANCZOS).crop((left, top, left + width, top + height))
    difference = np.abs(np.asarray(show(picture, View(found)), int) - np.asarray(cropped, int))
    assert difference.max() <= 1


def test_a_mirrored_view_is_the_mirror_of_the_straight_one_and_so_is_its_crop():
    found = fit(300, 100, 64, BucketRules(16, max_ratio=2))
    shifted = View(found.__class__(found.original, found.resized, found.bucket, 5, 0))
    mirrored = View(shifted.fit, flip=True)
    picture = gradient(300, 100)
    assert np.array_equal(np.asarray(show(picture, shifted))[:, ::-1], np.asarray(show(picture, mirrored)))
    assert mirrored.sizes[3] == found.resized[0] - found.bucket[0] - 5
    assert shifted.sizes[3] == 5


def test_random_crops_and_colours_differ_and_the_plain_view_does_nothing_to_colours():
    augmentation = Augmentation(crop="random", crop_jitter=0.2, colour_jitter=0.3, count=6)
    views = views_of(300, 200, [64], BucketRules(16), augmentation, "x")
    assert len({view.fit for view in views}) > 3
    assert len({view.colours for view in views}) == 6
    assert all(view.colours == AS_THEY_ARE for view in views_of(300, 200, [64], BucketRules(16), Augmentation(), "x"))


def test_colours_change_as_they_are_named():
    grey, red = Image.new("RGB", (4, 4), (100, 100, 100)), Image.new("RGB", (4, 4), (200, 50, 50))
    assert recolour(grey, Colours(brightness=1.5)).getpixel((0, 0)) == (150, 150, 150)
    assert recolour(red, Colours(saturation=0)).getpixel((0, 0)) == (95, 95, 95)
    red_turned = recolour(red, Colours(hue=1 / 3)).getpixel((0, 0))
    assert isinstance(red_turned, tuple)
    assert red_turned[1] > 190
    assert red_turned[0] < 60
    assert recolour(red, AS_THEY_ARE) is red


@pytest.mark.parametrize("flip", [False, True])
def test_what_is_trained_is_what_the_view_says(tmp_path: Path, flip: bool):
    gradient(160, 96).save(tmp_path / "a.png")
    [example] = load_examples([Source(tmp_path, (64,), augmentation=Augmentation(flip=flip))], BucketRules(16))
    assert {view.flip for view in example.views} == ({False, True} if flip else {False})
    for view in example.views:
        pixels = read_pixels(example, view).astype(int)
        assert pixels.shape == (48, 80, 3)
        assert (pixels[:, 0, 0].mean() > pixels[:, -1, 0].mean()) == view.flip


def test_an_epoch_shows_straight_and_mirrored_images_side_by_side(tmp_path: Path):
    for number in range(24):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / f"{number}.png")
    examples = load_examples([Source(tmp_path, (64,), augmentation=Augmentation(flip=True))], BucketRules(16))
    assert 4 <= sum(example.views[0].flip for example in examples) <= 20
