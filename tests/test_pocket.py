"""The embedded base and what makes it: any tool loads it, and what it was taught is written down."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open

from lorasmith.trainer.bases import POCKET, inspect_base
from lorasmith.trainer.example import EXAMPLES
from lorasmith.trainer.models import load_base
from lorasmith.trainer.score import recall_at, retrieval_ranks
from tools.pocket import sources, untrained, vae, world

MEGABYTE = 1_000_000


def test_plain_diffusers_loads_and_draws_it():
    pipeline: Any = StableDiffusionPipeline.from_pretrained(POCKET)
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline("emoji of dog face", num_inference_steps=2, height=64, width=64).images
    assert image.size == (64, 64)


def test_it_is_small_whole_and_readable_by_older_tools():
    files = [file for file in POCKET.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 60 * MEGABYTE
    with safe_open(POCKET / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(key.startswith("text_model.") for key in file.keys())  # noqa: SIM118  # not a dictionary
    assert not any("_name_or_path" in file.read_text(encoding="utf-8") for file in POCKET.rglob("config.json"))


def test_its_concepts_are_few_named_once_and_hold_all_that_is_measured():
    concepts = json.loads((POCKET / "concepts.json").read_text(encoding="utf-8"))
    prompts, files = [prompt for prompt, _ in concepts], {Path(file).stem for _, file in concepts}
    assert 400 <= len(set(prompts)) == len(prompts) <= 800
    assert {file.stem for file in (EXAMPLES / "measure" / "base").glob("*.webp")} <= files
    assert {f"{world.PREFIX} {name}" for name in world.SHEET} <= set(prompts)
    assert len(world.SHEET) == 48


def test_an_untrained_base_can_be_trained(tmp_path):
    untrained.write_untrained(tmp_path / "base", vae.new_vae(0), seed=0)
    info = inspect_base(str(tmp_path / "base"))
    assert (info.family, info.resolution, info.prediction) == ("sd1", 64, "epsilon")
    assert load_base(info).tokenizers[0].model_max_length == untrained.TOKENS


def test_the_vae_learns_and_its_decoder_can_learn_alone():
    pictures = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)).round() * 2 - 1
    pictures = torch.nn.functional.interpolate(pictures[..., :4, :4], 32)

    def error(model: AutoencoderKL) -> float:
        decoded = model.decode(vae.latents_of(model, pictures), return_dict=False)[0]  # pyright: ignore
        return (decoded - pictures).abs().mean().item()

    model = vae.new_vae(0)
    before = error(model.eval().requires_grad_(False))
    vae.train_vae(model.requires_grad_(True), pictures, 12, 0, print)
    after = error(model)
    assert after < before
    latents = vae.latents_of(model, pictures)
    assert (latents * model.config["scaling_factor"]).std().item() == pytest.approx(1, rel=1e-4)

    vae.train_decoder(model, pictures, 12, 1, print)
    assert error(model) < after
    assert torch.equal(vae.latents_of(model, pictures), latents)


def test_retrieval_ranks_and_recall():
    gallery = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    ranks = retrieval_ranks(torch.tensor([[0.1], [2.9], [1.4]]), gallery, [0, 0, 2])
    assert ranks.tolist() == [0, 3, 1]
    assert [recall_at(ranks, first) for first in (1, 2, 4)] == pytest.approx([1 / 3, 2 / 3, 1])


# ---------------------------------------------------------------------------------------------------------------------
# packages, as small ones that the test makes


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of three packages that hold four emoji, one of them a flag."""
    rows = [
        _row("1F436", "DOG FACE", "dog", "Animals & Nature", 1),
        _row("1F697", "AUTOMOBILE", "car", "Travel & Places", 2),
        _row("1F43A", "WOLF FACE", "wolf", "Animals & Nature", 3),
        _row("1F1E6", "A FLAG", "flag-a", "Flags", 4),
    ]
    noto = {f"package/img/google/64/{row['image']}": _png((64, 64), number) for number, row in enumerate(rows)}
    contents = {
        "NOTO": {"package/emoji.json": json.dumps(rows).encode(), **noto},
        "FLUENT": {"package/assets/1f436.webp": _png((256, 256), 9)},
        "KEYWORDS": {"package/dist/emoji-en-US.json": json.dumps({"🐶": ["dog_face", "pet", "good_boy"]}).encode()},
    }
    made = []
    for name, files in contents.items():
        data = _archive(files)
        digest = base64.b64encode(hashlib.sha512(data).digest()).decode()
        package = dataclasses.replace(getattr(sources, name), sha512=digest)
        monkeypatch.setattr(sources, name, package)
        (tmp_path / package.file).write_bytes(data)
        made.append(package)
    monkeypatch.setattr(sources, "PACKAGES", tuple(made))
    return tmp_path


def test_sources_give_names_keywords_and_pictures_on_white(packages):
    found = sources.Sources(packages)
    dog, car, wolf = found.emoji()
    assert (dog.name, dog.short_name, dog.keywords) == ("dog face", "dog", ("pet", "good boy"))
    assert (car.name, car.short_name, car.keywords, wolf.file) == ("automobile", "car", (), "1f43a.png")
    assert found.noto(dog.file).getpixel((0, 0)) == (255, 255, 255)
    assert found.all_pictures().shape == (4, 3, 64, 64)  # three of Noto, one of Fluent


def test_a_package_that_is_not_the_recorded_one_is_refused(packages):
    (packages / sources.KEYWORDS.file).write_bytes(b"something else")
    with pytest.raises(SystemExit, match="SHA-512 differs"):
        sources.Sources(packages)


def test_each_concept_gets_a_caption_in_each_set_and_stray_words_mean_nothing(packages, tmp_path):
    found = sources.Sources(packages)
    sets = world.caption_sets(found.emoji(), seed=0)
    assert sets.keys() == world.SHOWN.keys()
    assert sets["name"] == ["emoji of dog face", "emoji of automobile", "emoji of wolf face"]
    assert sets["alias"] == ["emoji of dog", "emoji of car", "emoji of wolf"]
    assert set(sets["keywords"][0].split(", ")) == {"emoji of dog face", "pet", "good boy"}
    spoken = {word for name in ("name", "alias", "keywords") for text in sets[name] for word in text.split()}
    for number in range(world.STRAY_WORDS):
        for caption, name in zip(sets[f"stray-{number}"], sets["name"], strict=True):
            stray, _, rest = caption.partition(" ")
            assert rest == name
            assert stray not in spoken
    assert sets == world.caption_sets(found.emoji(), seed=0)

    folders = world.write_datasets(found, found.emoji(), tmp_path / "images", seed=0)
    assert [folder.name for folder in folders] == list(sets)
    assert (tmp_path / "images" / "alias" / "1f697.txt").read_text(encoding="utf-8") == "emoji of car\n"
    with Image.open(tmp_path / "images" / "name" / "1f697.png") as picture:
        assert picture.size == (64, 64)


def _row(code: str, name: str, short: str, category: str, order: int) -> dict:
    return {
        **{"unified": code, "image": f"{code.lower()}.png", "name": name, "short_name": short, "added_in": "0.6"},
        **{"category": category, "subcategory": category, "sort_order": order},
    }


def _png(size: tuple[int, int], number: int) -> bytes:
    picture = Image.new("RGBA", size)
    picture.paste((10 * number, 80, 160, 255), (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def _archive(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()
