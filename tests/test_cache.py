"""Caches: an entry is right or absent, never stale. The pocket base and real files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from lorasmith.datasets import cache as caches
from lorasmith.datasets.buckets import BucketRules
from lorasmith.datasets.cache import LatentCache, TextCache, _pixels_of, encode
from lorasmith.datasets.captions import CaptionRules
from lorasmith.datasets.dataset import Example, Showing, Source, load_examples, read_pixels
from lorasmith.datasets.views import Augmentation, Colours, View
from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.configfile import validate
from lorasmith.trainer.errors import DataError, UserError
from lorasmith.trainer.files import sha256_of
from lorasmith.trainer.models import Base, load_base
from lorasmith.trainer.plan import Plan, make_plan


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(inspect_base("pocket"))


def shown(examples: Sequence[Example]) -> list[Showing]:
    """Each example as it is shown first."""
    return [Showing(example, example.views[0], example.caption) for example in examples]


def quiet(done: int, total: int) -> None:
    """No progress is shown."""


def noise(path: Path, seed: int, size: tuple[int, int] = (64, 64)) -> Path:
    """A picture that differs for each seed."""
    pixels = torch.randint(256, (*size[::-1], 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).save(path)
    return path


def examples_of(folder: Path, resolution: int = 64, trigger: str = "") -> list[Example]:
    return load_examples([Source(folder, (resolution,), CaptionRules(trigger))], BucketRules(16))


def fresh_mean(base: Base, example: Example) -> torch.Tensor:
    """The latents' mean by diffusers alone."""
    pixels = torch.from_numpy(read_pixels(example, example.views[0]).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        return base.vae.encode(pixels).latent_dist.mean[0]


def tree(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number, name in enumerate(["a", "b", "c"]):
        noise(tmp_path / "photos" / f"{name}.png", number)
    return tmp_path / "photos"


@pytest.fixture
def cache(tmp_path: Path, base: Base) -> LatentCache:
    return LatentCache(tmp_path / "cache", base.vae_fingerprint)


# ---------------------------------------------------------------------------------------------------------------------
# latents


def test_what_is_read_back_is_a_fresh_encode_of_each_image(base: Base, cache: LatentCache, photos: Path):
    examples = examples_of(photos)
    assert cache.fill(base, examples, quiet) == 3
    mean, std = cache.read(shown(examples))
    assert mean.shape == std.shape == (3, 4, 16, 16)
    assert mean.dtype == std.dtype == torch.float32
    assert bool((std > 0).all())
    for row, example in enumerate(examples):
        torch.testing.assert_close(mean[row], fresh_mean(base, example), atol=1e-4, rtol=1e-4)


def test_reading_keeps_the_order_that_is_asked_for(base: Base, cache: LatentCache, photos: Path):
    examples = examples_of(photos)
    cache.fill(base, examples, quiet)
    forward, backward = cache.read(shown(examples))[0], cache.read(shown(examples[::-1]))[0]
    assert torch.equal(forward, backward.flip(0))
    assert not torch.equal(forward[0], forward[1])


def test_a_second_fill_encodes_nothing_and_touches_no_file(
    base: Base, cache: LatentCache, photos: Path, tmp_path: Path
):
    cache.fill(base, examples_of(photos), quiet)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*")}
    assert cache.fill(base, examples_of(photos), quiet) == 0
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*")} == before


def test_progress_counts_from_0_to_all(base: Base, cache: LatentCache, photos: Path):
    seen: list[tuple[int, int]] = []
    cache.fill(base, examples_of(photos), lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_an_edited_image_is_encoded_again(base: Base, cache: LatentCache, photos: Path):
    cache.fill(base, examples_of(photos), quiet)
    before = (photos / "b.png").stat()
    noise(photos / "b.png", 99)
    os.utime(photos / "b.png", ns=(before.st_atime_ns, before.st_mtime_ns))  # its date tells nothing
    edited = examples_of(photos)
    assert cache.fill(base, edited, quiet) == 1
    mean, _ = cache.read(shown(edited))
    torch.testing.assert_close(mean[1], fresh_mean(base, edited[1]))


def test_a_file_with_many_views_is_checked_once_and_again_if_it_is_written_to(
    base: Base, cache: LatentCache, photos: Path, monkeypatch: pytest.MonkeyPatch
):
    source = Source(photos, (64,), augmentation=Augmentation(flip=True, crop="random", count=2))
    examples = load_examples([source], BucketRules(16))
    read: list[str] = []
    monkeypatch.setattr(caches, "sha256_of", lambda file: read.append(file.name) or sha256_of(file))
    assert cache.fill(base, examples, quiet) == 12
    assert sorted(read) == ["a.png", "b.png", "c.png"]

    def edit(done: int, total: int) -> None:
        if done == total - 1:
            noise(photos / "c.png", 99)

    shutil.rmtree(cache.cache.folder)
    with pytest.raises(DataError, match=r"c\.png: has changed since it was scanned"):
        cache.fill(base, examples, edit)


def test_a_renamed_moved_or_copied_image_is_not_encoded_again(base: Base, cache: LatentCache, photos: Path):
    before = examples_of(photos)
    cache.fill(base, before, quiet)
    (photos / "a.png").rename(photos / "z ü.png")
    (photos / "deep").mkdir()
    (photos / "b.png").rename(photos / "deep" / "b.png")
    shutil.copy(photos / "c.png", photos / "c2.png")
    after = examples_of(photos)
    assert [example.name for example in after] == ["c.png", "c2.png", "deep/b.png", "z ü.png"]
    assert cache.fill(base, after, quiet) == 0
    expected = cache.read(shown([before[2], before[2], before[1], before[0]]))[0]
    assert torch.equal(cache.read(shown(after))[0], expected)


def test_another_caption_does_not_encode_the_image_again(base: Base, cache: LatentCache, photos: Path):
    cache.fill(base, examples_of(photos), quiet)
    (photos / "a.txt").write_text("a caption", encoding="utf-8")
    assert cache.fill(base, examples_of(photos, trigger="sks"), quiet) == 0


def test_another_resolution_is_encoded_again(base: Base, cache: LatentCache, photos: Path):
    cache.fill(base, examples_of(photos), quiet)
    larger = examples_of(photos, resolution=96)
    assert cache.fill(base, larger, quiet) == 3
    assert cache.read(shown(larger))[0].shape == (3, 4, 24, 24)
    assert cache.read(shown(examples_of(photos)))[0].shape == (3, 4, 16, 16)


@pytest.mark.parametrize(
    "change",
    [
        {"crop_left": 3},
        {"crop_top": 3},
        {"resized": (90, 90)},
        {"bucket": (48, 64)},
        {"flip": True},
        {"colours": Colours(hue=0.1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_crop_is_another_entry(base: Base, cache: LatentCache, tmp_path: Path, change: dict):
    noise(tmp_path / "photos" / "a.png", 1, (100, 100))
    [example] = examples_of(tmp_path / "photos")
    view = View(replace(example.fit, resized=(80, 80), crop_left=8, crop_top=8))
    example = replace(example, views=(view,))
    changed = replace(view, **change) if {"flip", "colours"} & change.keys() else View(replace(view.fit, **change))
    other = replace(example, views=(changed,))
    assert cache.path(example, example.views[0]) != cache.path(other, other.views[0])
    assert cache.fill(base, [example], quiet) == 1
    assert cache.fill(base, [other], quiet) == 1


def test_another_vae_is_encoded_again(base: Base, cache: LatentCache, photos: Path, tmp_path: Path):
    cache.fill(base, examples_of(photos), quiet)
    assert load_base(inspect_base("pocket")).vae_fingerprint == base.vae_fingerprint
    other = load_base(inspect_base("pocket"))
    with torch.no_grad():
        other.vae.encoder.conv_in.bias[0] += 0.5
    assert other.vae_fingerprint != base.vae_fingerprint
    theirs = LatentCache(tmp_path / "cache", other.vae_fingerprint)
    examples = examples_of(photos)
    assert theirs.fill(other, examples, quiet) == 3
    assert not torch.equal(theirs.read(shown(examples))[0], cache.read(shown(examples))[0])
    assert cache.fill(base, examples, quiet) == 0


def test_nothing_is_written_inside_the_dataset_folder(base: Base, cache: LatentCache, photos: Path, tmp_path: Path):
    before = tree(photos)
    examples = examples_of(photos, trigger="sks")
    cache.fill(base, examples, quiet)
    TextCache(tmp_path / "cache", base.text_fingerprint).fill(base, [e.caption for e in examples], quiet)
    assert tree(photos) == before
    assert {file.suffix for file in (tmp_path / "cache").rglob("*") if file.is_file()} == {".safetensors"}


@pytest.mark.parametrize("inside", ["", "deep/cache", "../photos/cache"], ids=["itself", "below", "roundabout"])
def test_a_cache_inside_the_dataset_folder_is_refused_at_plan(photos: Path, tmp_path: Path, inside: str):
    values = {
        "name": "x",
        "runs": str(tmp_path / "runs"),
        "data": [{"path": str(photos)}],
        "runtime": {"cache": str(photos / inside)},
    }
    with pytest.raises(UserError) as caught:
        make_plan(validate(values))
    assert [problem.where for problem in caught.value.problems] == ["runtime.cache"]


@pytest.mark.parametrize("damage", ["empty", "cut", "garbage"])
def test_a_damaged_entry_is_made_anew(base: Base, cache: LatentCache, photos: Path, damage: str):
    examples = examples_of(photos)
    cache.fill(base, examples, quiet)
    good = cache.read(shown(examples))[0].clone()
    file = cache.path(examples[1], examples[1].views[0])
    content = file.read_bytes()
    file.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "garbage": b"x" * len(content)}[damage])
    assert cache.fill(base, examples, quiet) == 1
    assert torch.equal(cache.read(shown(examples))[0], good)


def test_an_entry_that_has_gone_is_an_error_that_names_the_image(base: Base, cache: LatentCache, photos: Path):
    examples = examples_of(photos)
    cache.fill(base, examples, quiet)
    cache.path(examples[1], examples[1].views[0]).unlink()
    with pytest.raises(DataError) as caught:
        cache.read(shown(examples))
    assert [problem.where for problem in caught.value.problems] == [str(photos / "b.png")]


def test_latents_that_are_not_finite_are_an_error_and_are_not_kept(cache: LatentCache, photos: Path):
    broken = load_base(inspect_base("pocket"))
    with torch.no_grad():
        broken.vae.encoder.conv_in.bias[0] = float("nan")
    examples = examples_of(photos)
    with pytest.raises(DataError, match="its latents are not finite") as caught:
        cache.fill(broken, examples, quiet)
    assert caught.value.problems[0].where == str(photos / "a.png")
    assert not cache.path(examples[0], examples[0].views[0]).exists()


def test_an_image_edited_between_the_scan_and_the_encode_leaves_no_stale_entry(
    base: Base, cache: LatentCache, photos: Path
):
    """The key is the hash of the bytes that were scanned; the pixels must be of those bytes."""
    examples = examples_of(photos)
    original = (photos / "a.png").read_bytes()
    expected = fresh_mean(base, examples[0])
    noise(photos / "a.png", 99)
    with suppress(DataError):  # refusing is as good
        cache.fill(base, examples, quiet)
    (photos / "a.png").write_bytes(original)
    again = examples_of(photos)
    cache.fill(base, again, quiet)
    torch.testing.assert_close(cache.read(shown(again))[0][0], expected, rtol=1e-5, atol=1e-5)  # encoded beside others


def test_the_cache_folder_may_be_deleted_at_any_time(base: Base, cache: LatentCache, photos: Path, tmp_path: Path):
    examples = examples_of(photos)
    cache.fill(base, examples, quiet)
    shutil.rmtree(tmp_path / "cache")
    assert cache.fill(base, examples, quiet) == 3


def test_encoding_twice_gives_the_same_bits(base: Base, photos: Path):
    example = examples_of(photos)[0]
    first, second = (encode(base, [pair], _pixels_of([pair]))[0] for pair in [(example, example.views[0])] * 2)
    assert torch.equal(first["mean"], second["mean"])
    assert torch.equal(first["std"], second["std"])


# ---------------------------------------------------------------------------------------------------------------------
# text


def captions_agree(base: Base, cache: TextCache, examples: Sequence[Example], expected: dict[str, str]) -> None:
    """Each image has its own caption, and what the cache gives for it is a fresh encode of that caption."""
    assert {example.name: example.caption for example in examples} == expected
    for example in examples:
        read = cache.read([example.caption]).hidden[0]
        with torch.no_grad():
            fresh = base.encode([expected[example.name]]).hidden[0]
        assert torch.equal(read, fresh)


def test_captions_stay_with_their_image_when_files_are_added_removed_and_reordered(base: Base, tmp_path: Path):
    photos = tmp_path / "photos"
    for number, name in enumerate(["b", "c", "d"]):
        noise(photos / f"{name}.png", number)
        (photos / f"{name}.txt").write_text(f"caption of {name}", encoding="utf-8")
    cache = TextCache(tmp_path / "cache", base.text_fingerprint)

    def fill() -> tuple[list[Example], int]:
        examples = examples_of(photos)
        return examples, cache.fill(base, [example.caption for example in examples], quiet)

    examples, encoded = fill()
    assert encoded == 3
    captions_agree(base, cache, examples, {f"{name}.png": f"caption of {name}" for name in "bcd"})

    noise(photos / "a.png", 10)  # now the first in the order
    (photos / "a.txt").write_text("caption of a", encoding="utf-8")
    examples, encoded = fill()
    assert encoded == 1
    captions_agree(base, cache, examples, {f"{name}.png": f"caption of {name}" for name in "abcd"})

    (photos / "b.png").unlink()
    (photos / "b.txt").unlink()
    (photos / "c.png").rename(photos / "z.png")  # another place in the order
    (photos / "c.txt").rename(photos / "z.txt")
    (photos / "d.txt").write_text("new caption of d", encoding="utf-8")
    examples, encoded = fill()
    assert encoded == 1
    expected = {"a.png": "caption of a", "d.png": "new caption of d", "z.png": "caption of c"}
    captions_agree(base, cache, examples, expected)


def plan_of(photos: Path, tmp_path: Path) -> Plan:
    values = {
        "name": "x",
        "runs": str(tmp_path / "runs"),
        "data": [{"path": str(photos), "trigger": "sks", "caption_dropout": 0.0}],
        "adapter": {"text_encoder": False},
        "budget": {"images": 12, "batch": 2},
        "runtime": {"cache": str(tmp_path / "cache")},
    }
    return make_plan(validate(values))


def test_in_the_batches_of_a_plan_each_image_meets_its_own_caption(base: Base, tmp_path: Path):
    photos = tmp_path / "photos"
    expected = {}
    for number, name in enumerate(["a", "b", "c", "d", "e"]):
        noise(photos / f"{name}.png", number, (64, 64) if number % 2 else (80, 48))
        (photos / f"{name}.txt").write_text(f"picture {name}", encoding="utf-8")
        expected[f"{name}.png"] = f"sks, picture {name}"
    for change in ("as it is", "one more in front"):
        if change == "one more in front":
            noise(photos / "Z.png", 50)
            (photos / "Z.txt").write_text("sks picture Z", encoding="utf-8")
            expected["Z.png"] = "sks picture Z"
        plan = plan_of(photos, tmp_path)
        latents, texts = LatentCache(plan.cache, base.vae_fingerprint), TextCache(plan.cache, base.text_fingerprint)
        latents.fill(base, plan.examples, quiet)
        texts.fill(base, [example.caption for example in plan.examples], quiet)
        seen = set()
        for batches in islice(plan.order.steps(plan.batches_per_step), plan.steps):
            for batch in batches:
                chosen = [plan.examples[shot.image] for shot in batch]
                mean, hidden = (
                    latents.read(shown(chosen))[0],
                    texts.read([example.caption for example in chosen]).hidden,
                )
                for row, example in enumerate(chosen):
                    name = example.item.path.name
                    seen.add(name)
                    torch.testing.assert_close(mean[row], fresh_mean(base, example), atol=1e-4, rtol=1e-4)
                    with torch.no_grad():
                        assert torch.equal(hidden[row], base.encode([expected[name]]).hidden[0])
        assert seen == set(expected)


def test_equal_captions_are_encoded_once_and_the_empty_one_is_an_entry(base: Base, tmp_path: Path):
    cache = TextCache(tmp_path, base.text_fingerprint)
    assert cache.fill(base, ["", "a cat", "a cat", ""], quiet) == 2
    assert cache.fill(base, ["a cat", ""], quiet) == 0
    read = cache.read(["a cat", ""])
    assert read.pooled is None
    assert not torch.equal(read.hidden[0], read.hidden[1])


def test_another_text_encoder_is_encoded_again(base: Base, tmp_path: Path):
    TextCache(tmp_path, base.text_fingerprint).fill(base, ["a cat"], quiet)
    other = load_base(inspect_base("pocket"))
    with torch.no_grad():
        next(other.text_encoders["text_encoder"].parameters()).mul_(1.5)
    assert other.text_fingerprint != base.text_fingerprint
    theirs = TextCache(tmp_path, other.text_fingerprint)
    assert theirs.fill(other, ["a cat"], quiet) == 1
    ours = TextCache(tmp_path, base.text_fingerprint)
    assert not torch.equal(theirs.read(["a cat"]).hidden, ours.read(["a cat"]).hidden)


def test_a_text_encoder_that_reads_more_tokens_is_another_one(base: Base):
    assert load_base(inspect_base("pocket")).text_fingerprint == base.text_fingerprint
    other = load_base(inspect_base("pocket"))
    other.tokenizers[0].model_max_length -= 1
    assert other.text_fingerprint != base.text_fingerprint


def test_an_embedding_that_has_gone_is_an_error_that_names_the_caption(base: Base, tmp_path: Path):
    with pytest.raises(DataError) as caught:
        TextCache(tmp_path, base.text_fingerprint).read(["a cat"])
    assert [problem.where for problem in caught.value.problems] == ["'a cat'"]


def test_a_damaged_embedding_is_made_anew(base: Base, tmp_path: Path):
    cache = TextCache(tmp_path, base.text_fingerprint)
    cache.fill(base, ["a cat"], quiet)
    good = cache.read(["a cat"]).hidden.clone()
    cache.path("a cat").write_bytes(b"damaged")
    assert cache.fill(base, ["a cat"], quiet) == 1
    assert torch.equal(cache.read(["a cat"]).hidden, good)


def test_keys_do_not_depend_on_the_day_or_the_process(tmp_path: Path):
    """A key that changed by itself would encode everything again at each start."""
    cache = TextCache(tmp_path, "fingerprint")
    assert cache.path("a cat").name == GOLDEN_KEY
    assert cache.path("a cat").parent.name == GOLDEN_KEY[:2]


GOLDEN_KEY = "0380b27f72792c487fc82717e9b853664a5043f13c2db64b2941bd6cfa58320d.safetensors"
