"""Loss masks: which file belongs to which image, what is wrong with it, and that it decides what is learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lorasmith.datasets.buckets import BucketRules
from lorasmith.datasets.cache import MaskCache
from lorasmith.datasets.dataset import Example, Showing, Source, load_examples, read_mask
from lorasmith.datasets.folder import look, scan
from lorasmith.datasets.views import Augmentation
from lorasmith.trainer.errors import DataError


def picture(path: Path, size: tuple[int, int] = (64, 64), colour: object = (10, 20, 30), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)  # pyright: ignore
    return path


def half_mask(path: Path, size: tuple[int, int] = (64, 64)) -> Path:
    """White on the left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    mask.save(path)
    return path


@pytest.mark.parametrize("place", ["mask/a.png", "masks/a.png", "Mask/a.webp", "a-masklabel.png"])
def test_where_a_mask_may_lie(tmp_path: Path, place: str):
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "b.jpg")
    half_mask(tmp_path / place)
    first, second = scan(tmp_path)
    assert first.mask
    assert first.mask.path == tmp_path / place
    assert second.mask is None


@pytest.mark.parametrize("place", ["mask/deep/a.png", "deep/mask/a.png"])
def test_a_mask_of_an_image_in_a_folder(tmp_path: Path, place: str):
    picture(tmp_path / "deep" / "a.jpg")
    picture(tmp_path / "a.jpg", colour=(1, 1, 1))
    half_mask(tmp_path / place)
    assert [item.mask is not None for item in scan(tmp_path)] == [False, True]


def test_what_is_wrong_with_masks_is_told_all_at_once(tmp_path: Path):
    for name in ("black", "turned", "broken", "twice", "good"):
        picture(tmp_path / f"{name}.png", (80, 64))
    picture(tmp_path / "mask" / "black.png", (80, 64), 0, "L")
    half_mask(tmp_path / "mask" / "turned.png", (64, 80))
    half_mask(tmp_path / "mask" / "orphan.png", (80, 64))
    half_mask(tmp_path / "mask" / "twice.png", (80, 64))
    half_mask(tmp_path / "masks" / "twice.png", (80, 64))
    half_mask(tmp_path / "mask" / "good.png", (160, 128))
    (tmp_path / "mask" / "broken.png").write_bytes(b"no image")
    found = {Path(problem.where).name: problem.what for problem in look(tmp_path).problems}
    assert set(found) == {"black.png", "turned.png", "orphan.png", "twice.png", "broken.png"}
    assert found["black.png"] == "is black everywhere, so its image would teach nothing"
    assert found["turned.png"] == "is 64 x 80, another shape than its image, which is 80 x 64"
    assert found["orphan.png"] == "is a mask without an image"


@pytest.mark.parametrize("setting", ["none", "alpha"])
def test_where_masks_are_not_read_they_are_not_trained_as_pictures_in_silence(tmp_path: Path, setting):
    picture(tmp_path / "a.jpg")
    half_mask(tmp_path / "mask" / "a.png")
    [problem] = look(tmp_path, mask=setting).problems
    assert "holds 1 masks of images, which would be trained as pictures" in problem.what


def test_pictures_of_masks_can_be_trained(tmp_path: Path):
    picture(tmp_path / "masks" / "venice.png")
    picture(tmp_path / "other.png", colour=(9, 9, 9))
    assert len(scan(tmp_path, mask="none")) == 2


# ---------------------------------------------------------------------------------------------------------------------
# what they do


def only(folder: Path, **rules) -> Example:
    [example] = load_examples([Source(folder, (64,), **rules)], BucketRules(16))
    return example


def test_a_mask_is_brought_to_the_latents_as_its_image_is(tmp_path: Path):
    picture(tmp_path / "a.png", (128, 128))
    half_mask(tmp_path / "mask" / "a.png", (128, 128))
    example = only(tmp_path, augmentation=Augmentation(flip=True))
    for view in example.views:
        weights = read_mask(example, view, 4)
        assert weights.shape == (16, 16)
        straight = weights[:, ::-1] if view.flip else weights
        assert (straight[:, :7] > 0.99).all()
        assert (straight[:, 9:] < 0.01).all()


def test_transparency_is_a_mask_where_that_is_asked_for(tmp_path: Path):
    image = Image.new("RGBA", (64, 64), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (32, 0, 64, 64))
    image.save(tmp_path / "a.png")
    example = only(tmp_path, mask="alpha")
    assert example.is_masked
    weights = read_mask(example, example.views[0], 4)
    assert (weights[:, :7] > 0.99).all()
    assert (weights[:, 9:] < 0.01).all()
    assert not only(tmp_path).is_masked


def test_what_is_masked_out_keeps_its_own_weight(tmp_path: Path):
    picture(tmp_path / "a.png")
    half_mask(tmp_path / "mask" / "a.png")
    example = only(tmp_path, unmasked_weight=0.25)
    assert np.unique(read_mask(example, example.views[0], 4).round(3)).tolist() == [0.25, 1.0]


def test_a_black_mask_is_accepted_where_what_it_covers_has_a_weight(tmp_path: Path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "mask" / "a.png", colour=0, mode="L")
    with pytest.raises(DataError, match="is black everywhere"):
        only(tmp_path)
    example = only(tmp_path, unmasked_weight=0.25)
    assert np.unique(read_mask(example, example.views[0], 4)).tolist() == [0.25]


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_an_image_of_which_nothing_is_opaque_is_refused_where_opacity_is_the_mask(tmp_path: Path, weight: float):
    picture(tmp_path / "gone.png", colour=(200, 0, 0, 0), mode="RGBA")
    picture(tmp_path / "faint.png", colour=(200, 0, 0, 9), mode="RGBA")
    with pytest.raises(DataError) as caught:
        load_examples([Source(tmp_path, (64,), mask="alpha", unmasked_weight=weight)], BucketRules(16))
    [problem] = caught.value.problems
    assert problem.where == str(tmp_path / "gone.png")
    assert problem.what == "is transparent everywhere, so it would teach nothing"
    assert len(load_examples([Source(tmp_path, (64,))], BucketRules(16))) == 2


@pytest.mark.parametrize("rules", [{"mask": "alpha"}, {"unmasked_weight": 0.5}], ids=lambda rules: next(iter(rules)))
def test_a_mask_setting_without_effect_is_an_error(tmp_path: Path, rules: dict):
    picture(tmp_path / "a.png")
    with pytest.raises(DataError, match="has no effect"):
        only(tmp_path, **rules)


def test_cached_masks_stand_beside_images_without_one(tmp_path: Path):
    picture(tmp_path / "photos" / "a.png")
    picture(tmp_path / "photos" / "b.png", colour=(5, 5, 5))
    half_mask(tmp_path / "photos" / "mask" / "a.png")
    examples = load_examples([Source(tmp_path / "photos", (64,))], BucketRules(16))
    shown = [Showing(example, example.views[0], "") for example in examples]
    cache = MaskCache(tmp_path / "cache", 4)
    assert cache.fill(examples, lambda *_: None) == 1
    assert cache.fill(examples, lambda *_: None) == 0
    weights = cache.read(shown, torch.Size((2, 4, 16, 16)))
    assert weights is not None
    assert weights.shape == (2, 1, 16, 16)
    assert weights[0].mean() == pytest.approx(0.5)
    assert weights[1].mean() == 1
    assert cache.read(shown[1:], torch.Size((1, 4, 16, 16))) is None
    half_mask(tmp_path / "photos" / "mask" / "a.png", (128, 128))
    again = load_examples([Source(tmp_path / "photos", (64,))], BucketRules(16))
    assert cache.fill(again, lambda *_: None) == 1, "an edited mask is another one"
