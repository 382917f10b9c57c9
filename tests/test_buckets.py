"""Buckets cover every image, and the batch order drops none."""

from __future__ import annotations

import math
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

from lorasmith.datasets.buckets import BatchOrder, BucketRules, Entry, Shot, bucket_sizes, fit, images_by_step
from lorasmith.datasets.dataset import Source, load_examples, read_pixels

BASES = [(512, 64), (768, 64), (1024, 32), (64, 16), (500, 64), (64, 64)]
BASE_IDS = [f"{resolution} px, step {step}" for resolution, step in BASES]
IMAGES = [
    (512, 512),
    (4000, 3000),
    (3000, 4000),
    (1920, 1080),
    (1081, 1923),
    (37, 41),
    (1, 1),
    (5000, 100),
    (100, 5000),
    (999, 1000),
    (511, 777),
]


# ---------------------------------------------------------------------------------------------------------------------
# sizes


@pytest.mark.parametrize(("resolution", "step"), BASES, ids=BASE_IDS)
def test_bucket_sides_are_multiples_of_the_step_and_the_area_is_never_above_the_resolution_squared(
    resolution: int, step: int
):
    for width, height in bucket_sizes(resolution, BucketRules(step)):
        assert width % step == 0
        assert height % step == 0
        assert width >= step
        assert height >= step
        assert width * height <= resolution**2
        assert max(width, height) <= 4 * min(width, height)


@pytest.mark.parametrize(("resolution", "step"), BASES, ids=BASE_IDS)
def test_each_bucket_has_its_turned_twin_and_the_square_is_there(resolution: int, step: int):
    sizes = set(bucket_sizes(resolution, BucketRules(step)))
    assert {(height, width) for width, height in sizes} == sizes
    assert (resolution // step * step,) * 2 in sizes


def test_the_buckets_of_64_pixels_are_these():
    assert bucket_sizes(64, BucketRules(16)) == (
        (32, 96),
        (32, 112),
        (32, 128),
        (48, 80),
        (64, 64),
        (80, 48),
        (96, 32),
        (112, 32),
        (128, 32),
    )


# ---------------------------------------------------------------------------------------------------------------------
# fitting


@pytest.mark.parametrize(("resolution", "step"), BASES, ids=BASE_IDS)
@pytest.mark.parametrize(("width", "height"), IMAGES, ids=[f"{w}x{h}" for w, h in IMAGES])
def test_a_fitted_image_covers_its_bucket_and_is_cropped_at_the_centre(
    width: int, height: int, resolution: int, step: int
):
    found = fit(width, height, resolution, BucketRules(step))
    (resized_width, resized_height), (bucket_width, bucket_height) = found.resized, found.bucket
    assert found.bucket in bucket_sizes(resolution, BucketRules(step))
    assert found.original == (width, height)
    assert resized_width >= bucket_width
    assert resized_height >= bucket_height
    assert resized_width == bucket_width or resized_height == bucket_height
    spare = resized_width - bucket_width, resized_height - bucket_height
    assert (found.crop_left, found.crop_top) == (spare[0] // 2, spare[1] // 2)
    assert 0 <= found.cropped_share < 1


@pytest.mark.parametrize(("width", "height"), [(4000, 3000), (1920, 1080), (999, 1000), (511, 777)])
def test_an_image_keeps_its_shape_to_a_pixel(width: int, height: int):
    resized_width, resized_height = fit(width, height, 512, BucketRules(64)).resized
    assert abs(resized_width - resized_height * width / height) <= 1.5


@pytest.mark.parametrize(("width", "height"), IMAGES, ids=[f"{w}x{h}" for w, h in IMAGES])
def test_the_bucket_is_the_one_of_the_nearest_aspect_ratio(width: int, height: int):
    def distance(size: tuple[int, int]) -> float:
        return abs(math.log(size[0] / size[1]) - math.log(width / height))

    best = min(distance(size) for size in bucket_sizes(512, BucketRules(64)))
    assert distance(fit(width, height, 512, BucketRules(64)).bucket) == pytest.approx(best)


@pytest.mark.parametrize(
    ("size", "resized", "bucket", "crop"),
    [
        ((128, 128), (64, 64), (64, 64), (0, 0)),
        ((64, 64), (64, 64), (64, 64), (0, 0)),
        ((100, 80), (80, 64), (64, 64), (8, 0)),
        ((160, 96), (80, 48), (80, 48), (0, 0)),
        ((96, 160), (48, 80), (48, 80), (0, 0)),
        ((1000, 100), (320, 32), (128, 32), (96, 0)),
        ((2, 2), (64, 64), (64, 64), (0, 0)),
    ],
    ids=["halved", "as it is", "cropped", "wide", "tall", "panorama", "enlarged"],
)
def test_golden_fits_of_the_pocket_base(
    size: tuple[int, int], resized: tuple[int, int], bucket: tuple[int, int], crop: tuple[int, int]
):
    found = fit(*size, 64, BucketRules(16))
    assert (found.resized, found.bucket, (found.crop_left, found.crop_top)) == (resized, bucket, crop)


def test_cropped_share_and_enlargement_are_what_they_say():
    wide, small = fit(1000, 100, 64, BucketRules(16)), fit(16, 16, 64, BucketRules(16))
    assert wide.cropped_share == pytest.approx(1 - 128 / 320)
    assert wide.enlargement == pytest.approx(0.32)
    assert (small.cropped_share, small.enlargement) == (0, 4)


@pytest.mark.parametrize("size", [(50, 40), (40, 50), (200, 31), (17, 64), (64, 64)])
def test_no_pixel_of_the_picture_read_for_training_is_uncovered(tmp_path: Path, size: tuple[int, int]):
    Image.new("RGB", size, (200, 100, 50)).save(tmp_path / "a.png")
    [example] = load_examples([Source(tmp_path, (64,))], BucketRules(16))
    found = read_pixels(example, example.views[0])
    width, height = example.fit.bucket
    assert found.shape == (height, width, 3)
    assert (found == (200, 100, 50)).all()


def test_sizes_for_sdxl_are_height_and_width_crop_top_and_left_target_height_and_width(tmp_path: Path):
    Image.new("RGB", (1000, 100)).save(tmp_path / "a.png")
    [example] = load_examples([Source(tmp_path, (64,))], BucketRules(16))
    assert example.views[0].sizes == (100, 1000, 0, 96, 32, 128)


# ---------------------------------------------------------------------------------------------------------------------
# order


def entries(*shows: float, buckets: int = 3) -> list[Entry]:
    return [Entry(((64, 16 * (index % buckets + 1)),), share) for index, share in enumerate(shows)]


@pytest.mark.parametrize("batch", [1, 2, 4, 7, 100])
def test_every_image_comes_once_in_each_epoch(batch: int):
    order = BatchOrder(entries(*[1.0] * 23), batch, seed=1)
    for number in range(4):
        assert sorted(shot.image for group in order.epoch(number) for shot in group) == list(range(23))


@pytest.mark.parametrize("shows", [0.1, 0.5, 1, 1.5, 2.5, 3, 10.25])
def test_an_image_comes_as_often_as_its_shows_say(shows: float):
    order = BatchOrder(entries(*[shows] * 7, 1.0), 4, seed=1)
    epochs = 40
    counts = Counter(shot.image for number in range(epochs) for group in order.epoch(number) for shot in group)
    assert {index: counts[index] for index in range(7)} == dict.fromkeys(range(7), round(shows * epochs))
    assert counts[7] == epochs


def test_half_shown_images_are_spread_over_both_epochs():
    order = BatchOrder(entries(*[0.5] * 10), 4, seed=1)
    first, second = ({shot.image for group in order.epoch(number) for shot in group} for number in (0, 1))
    assert (len(first), len(second)) == (5, 5)
    assert first | second == set(range(10))


def test_an_epoch_without_any_image_is_passed_over():
    order = BatchOrder([Entry(((64, 64),), 0.25)], 4, seed=1)
    assert list(islice(order, 3)) == [[Shot(0, 0)], [Shot(0, 1)], [Shot(0, 2)]]


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_a_batch_never_mixes_buckets_and_is_never_empty_or_too_large(batch: int):
    listed = entries(*[1.0] * 17, 2.5, 0.5)
    for group in islice(BatchOrder(listed, batch, seed=3), 60):
        assert 1 <= len(group) <= batch
        assert len({listed[shot.image].buckets for shot in group}) == 1


def test_the_last_batch_of_a_bucket_is_smaller_and_not_dropped():
    order = BatchOrder([Entry(((64, 64),), 1)] * 5 + [Entry(((80, 48),), 1)] * 3, 2, seed=0)
    assert sorted(len(group) for group in order.epoch(0)) == [1, 1, 2, 2, 2]


def test_the_order_is_the_same_for_a_seed_and_another_for_another():
    listed = entries(*[1.0] * 20)
    first = list(islice(BatchOrder(listed, 3, seed=5), 50))
    assert list(islice(BatchOrder(listed, 3, seed=5), 50)) == first
    assert list(islice(BatchOrder(listed, 3, seed=6), 50)) != first


def test_the_order_is_golden():
    """Another order would change what a resumed run sees."""
    epoch = BatchOrder(entries(*[1.0] * 6), 2, seed=42).epoch(0)
    assert [[shot.image for shot in batch] for batch in epoch] == GOLDEN_EPOCH


GOLDEN_EPOCH = [[0, 3], [5, 2], [1, 4]]


def test_epochs_differ():
    order = BatchOrder(entries(*[1.0] * 20), 3, seed=5)
    assert len({str(order.epoch(number)) for number in range(5)}) == 5


def test_batches_of_one_bucket_are_mixed_anew_in_each_epoch():
    order = BatchOrder([Entry(((64, 64),), 1)] * 8, 2, seed=5)
    pairs = [{frozenset(shot.image for shot in group) for group in order.epoch(number)} for number in range(4)]
    assert len({frozenset(pair) for pair in pairs}) > 1


def test_steps_group_the_same_sequence():
    order = BatchOrder(entries(*[1.0] * 7), 2, seed=5)
    steps = list(islice(order.steps(3), 4))
    assert [len(step) for step in steps] == [3, 3, 3, 3]
    assert [group for step in steps for group in step] == list(islice(order, 12))


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="no images"):
        BatchOrder([], 1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# length


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(1, [4]), (4, [4]), (5, [4, 8]), (16, [4, 8, 12, 16]), (17, [4, 8, 12, 16, 20])],
)
def test_the_run_ends_with_the_first_step_that_reaches_the_budget(budget: int, expected: list[int]):
    order = BatchOrder([Entry(((64, 64),), 1)] * 8, 4, seed=0)
    assert images_by_step(order, 1, budget) == expected


def test_ragged_batches_count_by_their_images():
    order = BatchOrder([Entry(((64, 64),), 1)] * 3, 2, seed=0)
    seen = images_by_step(order, 1, 9)
    sizes = [len(group) for group in islice(order, len(seen))]
    assert seen == [sum(sizes[: step + 1]) for step in range(len(sizes))]
    assert (len(seen), seen[-1]) == (6, 9)


def test_accumulated_batches_count_together():
    order = BatchOrder([Entry(((64, 64),), 1)] * 8, 2, seed=0)
    assert images_by_step(order, 3, 12) == [6, 12]
