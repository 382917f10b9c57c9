"""What is released of a run, and the zip of it: whole, the same each time, right for the Hub, and nothing private."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomlkit
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.configfile import merge, validate
from lorasmith.trainer.errors import UserError
from lorasmith.trainer.events import EventLog
from lorasmith.trainer.fitting import put_on
from lorasmith.trainer.jobs import create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.lorafile import LoraFile
from lorasmith.trainer.loraread import read_lora
from lorasmith.trainer.models import load_base
from lorasmith.trainer.plan import make_plan
from lorasmith.trainer.release import Trained, facts_of, release, suffix_of
from lorasmith.trainer.sample import Drawing, save_picture
from lorasmith.trainer.sharing.bundle import bundle
from lorasmith.trainer.sharing.pictures import data_uri, read_thumbnail
from lorasmith.trainer.strengths import Strengths
from lorasmith.trainer.verify import live_changes

from . import tiny
from .conftest import draw_picture

SECRETS = ("anna", "schmidt", "kitchen")
PROMPTS = ["trg, a lighthouse", "a boat, trg"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run on a tiny SD 1 of a person who has named everything after herself, with two previews."""
    top = tmp_path_factory.mktemp("home") / "anna"
    images = top / "ink"
    images.mkdir(parents=True)
    for number in range(4):
        draw_picture(number, (64, 64)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"house, anna schmidt in her kitchen {number}", encoding="utf-8")
    config = validate(
        {
            "name": "short",
            "runs": str(top / "runs"),
            "base": {"model": str(tiny.make_sd1(top / "tiny base"))},
            "data": [{"path": str(images), "trigger": "trg"}],
            "adapter": {"rank": 2, "alpha": 2.0},
            "budget": {"images": 8, "batch": 4},
            "optimizer": {"lr": 1e-3, "text_encoder_lr": 1e-3},
            "save": {"every": 0},
            "sample": {"every": 100, "steps": 1, "prompts": PROMPTS, "negative_prompt": "blurry"},
            "runtime": {"cache": str(top / "cache")},
        }
    )
    plan = make_plan(config)
    run = create_run(plan.config)
    trainer = Trainer(plan, run, EventLog(run.events).append)
    assert trainer.train(lambda: False) == "finished"
    return Trained(run, trainer.config, trainer.base, trainer.state.step, trainer.state.images)


def saying(trained: Trained, **export: Any) -> Trained:
    """The same run with other settings of its export."""
    config = trained.config.model_copy(deep=True)
    config.export = config.export.model_copy(update=export)
    return replace(trained, config=config)


def unzipped(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def png_text(content: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(content)) as picture:
        picture.load()
        return {str(name): value for name, value in picture.info.items()}


INSIDE = [
    "README.md",
    "LICENSE.md",
    "SHA256SUMS",
    "config.toml",
    "images/00.png",
    "images/01.png",
    "short-diffusers.safetensors",
    "short-grid.png",
    "short-verified.json",
    "short.json",
    "short.png",
    "short.safetensors",
]


def test_a_bundle_is_all_that_is_released_and_the_same_each_time(trained: Trained, tmp_path: Path):
    files = release(saying(trained, license="cc-by-4.0"), "short", tmp_path, bundle=True)
    beside = [".safetensors", "-diffusers.safetensors", ".md", ".json", ".png", "-verified.json", "-grid.png", ".zip"]
    assert [file.name for file in files] == [f"short{ending}" for ending in beside]
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in files}

    inside = unzipped(files[-1])
    assert list(inside) == INSIDE
    for file in files[:-1]:
        if file.suffix != ".md":
            assert inside[file.name] == file.read_bytes(), file.name
    sums = dict(line.split("  ")[::-1] for line in inside["SHA256SUMS"].decode().splitlines())
    assert sums == {
        name: hashlib.sha256(content).hexdigest()
        for name, content in inside.items()
        if name not in ("README.md", "SHA256SUMS")
    }
    facts = facts_of(saying(trained, license="cc-by-4.0"), "short")
    again = bundle(files[:-1], facts, trained.base.info, tmp_path / "again.zip")
    assert again.read_bytes() == files[-1].read_bytes()


def test_the_card_of_a_bundle_names_what_is_in_it(trained: Trained, tmp_path: Path):
    inside = unzipped(release(saying(trained, license="Ask me"), "short", tmp_path, ["kohya"], bundle=True)[-1])
    card = ModelCard(inside["README.md"].decode())
    data: dict[str, Any] = card.data.to_dict()
    assert [(entry["text"], entry["output"]["url"]) for entry in data["widget"]] == [
        (prompt, f"images/{number:02d}.png") for number, prompt in enumerate(PROMPTS)
    ]
    named = [entry["output"]["url"] for entry in data["widget"]] + [data["license_link"], "short-grid.png"]
    assert set(named) <= set(inside)
    assert "short-grid.png" in card.text
    assert "weight_name='short.safetensors'" in card.text
    assert "Ask me" in inside["LICENSE.md"].decode()


def test_pictures_say_how_they_are_drawn_again(trained: Trained, tmp_path: Path):
    inside = unzipped(release(trained, "short", tmp_path, ["kohya"], bundle=True)[-1])
    autov3 = hashlib.sha256(raw_after_header(inside["short.safetensors"])).hexdigest()[:12]
    assert png_text(inside["images/01.png"])["parameters"] == (
        f"a boat, trg <lora:short:1>\nNegative prompt: blurry\nSteps: 1, Sampler: DDIM, CFG scale: 7.0, Seed: 1235, "
        f'Size: 32x32, Model: tiny base, Lora hashes: "short: {autov3}"'
    )
    grid = png_text(inside["short-grid.png"])
    assert grid["parameters"].startswith("trg, a lighthouse\nNegative prompt: blurry\n")
    assert [picture["prompt"] for picture in json.loads(grid["lorasmith"])["pictures"]] == PROMPTS
    for name in ("images/00.png", "short.png", "short-grid.png"):
        assert not {"prompt", "workflow"} & set(png_text(inside[name]))


def raw_after_header(raw: bytes) -> bytes:
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def test_the_configuration_of_a_bundle_gives_the_same_again_once_it_has_images(trained: Trained, tmp_path: Path):
    inside = unzipped(release(trained, "short", tmp_path, ["kohya"], bundle=True)[-1])
    values = tomlkit.parse(inside["config.toml"].decode()).unwrap()
    assert (values["data"][0]["path"], values["base"]["model"], values["runs"]) == ("ink", "tiny base", "runs")
    assert (values["runtime"]["cache"], values["sample"]["prompts"]) == ("", PROMPTS)
    own = trained.config
    values["data"][0]["path"], values["base"]["model"] = own.data[0].path, own.base.model
    values = merge(values, {"runs": own.runs, "runtime": {"cache": own.runtime.cache}})
    assert validate(values) == own


@pytest.mark.parametrize("metadata", ["safe", "none", "all"])
def test_a_bundle_tells_of_a_person_only_if_all_is_asked_for(trained: Trained, tmp_path: Path, metadata: Any):
    """Prompts that are captions among them."""
    config = saying(trained, metadata=metadata)
    facts = facts_of(config, "short")
    caption = "trg, house, anna schmidt in her kitchen 0"
    drawn = replace(facts.previews[0], prompt=caption)
    facts = replace(facts, previews=(drawn, facts.previews[1]))
    assert facts.config
    facts.config.sample.prompts = [caption, PROMPTS[1]]
    files = release(config, "short", tmp_path, ["kohya"])
    inside = unzipped(bundle([files[0]], facts, trained.base.info, tmp_path / "short.zip"))
    told = {name for name, raw in inside.items() if any(secret in raw.lower().decode("latin-1") for secret in SECRETS)}
    assert told == ({"README.md", "config.toml", "images/00.png", "short.safetensors"} if metadata == "all" else set())
    assert ("config.toml" in inside) == (metadata != "none")
    card: dict[str, Any] = ModelCard(inside["README.md"].decode()).data.to_dict()
    texts = {"safe": ["-", PROMPTS[1]], "none": ["-", "-"], "all": [caption, PROMPTS[1]]}[metadata]
    assert [entry["text"] for entry in card["widget"]] == texts
    if metadata == "safe":
        assert tomlkit.parse(inside["config.toml"].decode()).unwrap()["sample"]["prompts"] == [PROMPTS[1]]
        assert png_text(inside["images/00.png"])["parameters"].startswith("<lora:short:1>\nNegative prompt: blurry\n")


def test_what_the_run_says_of_its_export_is_done(trained: Trained, tmp_path: Path):
    wanted = saying(trained, formats=["diffusers"], precision="fp32", bundle=True, title="Ink")
    files = release(wanted, "short", tmp_path)
    assert (files[0].name, files[-1].name) == ("short-diffusers.safetensors", "short.zip")
    file = LoraFile.open(files[0])
    assert set(file.dtypes.values()) == {"F32"}
    assert file.metadata["modelspec.title"] == "Ink"
    assert "short-diffusers.md" not in unzipped(files[-1])
    given = release(wanted, "short", tmp_path, ["kohya"], "bf16")  # what is asked for here comes first
    assert "BF16" in LoraFile.open(given[0]).dtypes.values()


# ---------------------------------------------------------------------------------------------------------------------
# the picture that stands for it


def gallery_of(inside: dict[str, bytes]) -> dict[str, str]:
    """The pictures that the card names, in order, with what it says below each."""
    data: dict[str, Any] = ModelCard(inside["README.md"].decode()).data.to_dict()
    return {entry["output"]["url"]: entry["text"] for entry in data["widget"]}


def pixels(content: bytes) -> bytes:
    with Image.open(io.BytesIO(content)) as picture:
        return picture.convert("RGB").tobytes()


def test_a_preview_that_was_chosen_stands_for_the_file(trained: Trained, tmp_path: Path):
    previews = trained.run.samples(trained.step)
    chosen = read_thumbnail(previews / "01.png", previews)
    files = release(trained, "short", tmp_path, ["kohya"], bundle=True, thumbnail=chosen)
    inside = unzipped(files[-1])
    assert pixels(inside["short.png"]) == pixels((previews / "01.png").read_bytes())
    assert png_text(inside["short.png"])["parameters"].startswith(f"{PROMPTS[1]}\nNegative prompt: blurry\n")
    assert LoraFile.open(files[0]).metadata["modelspec.thumbnail"] == data_uri(chosen.picture)
    assert list(gallery_of(inside).items()) == [("images/01.png", PROMPTS[1]), ("images/00.png", PROMPTS[0])]
    assert "none of the previews" not in inside["README.md"].decode()


CAPTION = "trg, house, anna schmidt in her kitchen 0"


def wall_cell(folder: Path, prompt: str) -> Path:
    """A picture as the wall has it, which says what it was drawn from."""
    file = folder / "0123456789abcdef.png"
    save_picture(file, draw_picture(3, (64, 64)), prompt, Drawing("blurry", 7, 3, 5.0, 64), "tiny base", "short at 0.7")
    return file


@pytest.mark.parametrize(
    ("metadata", "prompt", "told"),
    [
        *[("safe", CAPTION, "-"), ("none", CAPTION, "-"), ("all", CAPTION, CAPTION)],
        *[("safe", "a castle", "a castle"), ("none", "a castle", "-")],
    ],
)
def test_the_prompt_of_a_wall_cell_is_told_as_any_prompt(
    trained: Trained, tmp_path: Path, metadata: Any, prompt: str, told: str
):
    cell = wall_cell(tmp_path, prompt)
    chosen = read_thumbnail(cell, trained.run.samples(trained.step))
    config = saying(trained, metadata=metadata)
    files = release(config, "short", tmp_path / "out", ["kohya"], bundle=True, thumbnail=chosen)
    inside = unzipped(files[-1])
    assert next(iter(gallery_of(inside).items())) == ("short.png", told)
    assert pixels(inside["short.png"]) == pixels(cell.read_bytes())
    assert "parameters" not in png_text(inside["short.png"])  # it was not drawn as the previews were
    assert "The first picture is none of the previews" in inside["README.md"].decode()
    beside = ModelCard((tmp_path / "out/short.md").read_text(encoding="utf-8")).data.to_dict()
    assert [entry["text"] for entry in beside["widget"]] == [told]
    if metadata != "all":
        assert not any(secret in raw.lower().decode("latin-1") for raw in inside.values() for secret in SECRETS)


def test_a_photograph_of_ones_own_tells_nothing_of_its_camera(trained: Trained, tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112], exif[0x013B] = 6, "Anna Schmidt"  # lies on its side; the artist
    draw_picture(1, (80, 40)).save(tmp_path / "own.jpg", exif=exif)
    chosen = read_thumbnail(tmp_path / "own.jpg", trained.run.samples(trained.step))
    assert (chosen.picture.size, chosen.prompt, chosen.number) == ((40, 80), "", None)
    files = release(trained, "short", tmp_path / "out", ["kohya"], thumbnail=chosen)
    assert b"Anna Schmidt" not in b"".join(file.read_bytes() for file in files)


@pytest.mark.parametrize(("name", "content"), [("gone.png", None), ("notes.png", b"no picture"), ("empty.png", b"")])
def test_what_is_no_picture_stands_for_nothing(tmp_path: Path, name: str, content: bytes | None):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as caught:
        read_thumbnail(tmp_path / name, tmp_path)
    assert "Name a picture" in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# at other strengths


def test_a_file_holds_what_was_trained_at_the_strengths_asked_for(trained: Trained, tmp_path: Path):
    strengths = Strengths(0.5, (("unet.up_blocks", 2.0), ("text_encoder", 0.0)))
    file, *others = release(trained, "short", tmp_path, ["kohya"], "fp32", strengths=strengths, bundle=True)
    assert file.name == "short-strength0.5-unet.up_blocks2-text_encoder0.safetensors"
    assert not any("grid" in other.name for other in others)  # the previews show something else
    found = read_lora(file, load_base(trained.base.info).components, "sd1")
    assert set(found) == {"unet"}
    live = {delta.name: delta for delta in live_changes(trained.base)["unet"]}
    assert {delta.name for delta in found["unet"]} == set(live)
    for delta in found["unet"]:
        weight = torch.empty(delta.up.shape[0], delta.down.shape[1], *delta.down.shape[2:])
        factor = 2.0 if delta.name.startswith("up_blocks") else 0.5
        torch.testing.assert_close(delta.of(weight), factor * live[delta.name].of(weight), rtol=1e-4, atol=1e-7)
    header = LoraFile.open(file).metadata
    assert header["lorasmith_strength"] == "0.5, 2 in unet.up_blocks, 0 in text_encoder"
    inside = unzipped(others[-1])
    assert f"| strength of what was trained | {strengths} |" in inside["README.md"].decode()
    assert "parameters" not in png_text(inside["images/00.png"])


def test_strengths_that_leave_nothing_or_name_nothing_are_refused(trained: Trained, tmp_path: Path):
    for strengths in (Strengths(0.0), Strengths(1.0, (("unet.nothing", 0.5),))):
        with pytest.raises(UserError):
            release(trained, "short", tmp_path, strengths=strengths)
    assert list(tmp_path.iterdir()) == []


def test_a_dora_is_baked_before_it_has_another_strength(trained: Trained, tmp_path: Path):
    values = merge(trained.config.model_dump(), {"adapter": {"kind": "dora", "text_encoder": False}})
    config = validate(merge(values, {"optimizer": {"text_encoder_lr": 0.0}}))
    base = load_base(inspect_base(config.base.model))
    put_on(base, config.adapter, seed=1)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in base.unet.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    dora = Trained(trained.run, config, base, trained.step, trained.images)
    with pytest.raises(UserError, match="--bake"):
        release(dora, "short", tmp_path, strengths=Strengths(0.5))
    file, *_ = release(dora, "short", tmp_path, ["kohya"], bake_to=4, strengths=Strengths(0.5))
    assert file.name == "short-baked4-strength0.5.safetensors"
    assert not any(key.endswith("dora_scale") for key in load_file(file))


def test_a_loha_at_another_strength_is_still_a_loha(trained: Trained, tmp_path: Path):
    """diffusers reads no LoHa, so that only kohya's names are written."""
    base = load_base(inspect_base(trained.config.base.model))
    config = validate(merge(trained.config.model_dump(), {"adapter": {"kind": "loha"}}))
    put_on(base, config.adapter, seed=1)
    generator = torch.Generator().manual_seed(1)
    for module in base.components.values():
        for name, parameter in module.named_parameters():
            if "hada_" in name:
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    loha = Trained(trained.run, config, base, trained.step, trained.images)
    files = release(loha, "short", tmp_path, strengths=Strengths(0.5))
    assert [file.name for file in files if file.suffix == ".safetensors"] == ["short-strength0.5.safetensors"]
    assert any(key.endswith("hada_w1_a") for key in load_file(files[0]))
    report = json.loads((tmp_path / "short-strength0.5-verified.json").read_text(encoding="utf-8"))
    readings = {client["client"]: client["reading"] for client in report["files"][0]["clients"]}
    assert (readings["ComfyUI"], readings["diffusers"]) == ("same", "none")


def test_pictures_of_others_beside_the_previews_are_left_out(trained: Trained, tmp_path: Path):
    folder = trained.run.samples(trained.step)
    foreign = [folder / "grid.png", folder / "._00.png", folder / "99.png"]
    try:
        for file in foreign:
            draw_picture(1, (64, 64)).save(file)
        foreign[1].write_bytes(b"no picture")
        assert [preview.prompt for preview in facts_of(trained, "short").previews] == PROMPTS
    finally:
        for file in foreign:
            file.unlink()


def test_names_of_strengths_are_short_and_differ():
    many = tuple((f"unet.up_blocks.{number}.attentions", 0.5) for number in range(9))
    names = [suffix_of(strengths) for strengths in (Strengths(0.8), Strengths(0.8, many), Strengths(0.7, many))]
    assert names[0] == "-strength0.8"
    assert len(set(names)) == 3
    assert max(map(len, names)) <= len("-strength") + 60
    assert suffix_of(Strengths(1.0, (("unet.*.attn2", 0.5),))) == "-strength1-unet._.attn20.5"


def test_a_whole_model_is_released_between_the_base_and_what_was_trained(trained: Trained, tmp_path: Path):
    adapter = {"kind": "full", "train_only": ["unet.mid_block"], "text_encoder": False}
    values = merge(trained.config.model_dump(exclude={"adapter"}), {"optimizer": {"text_encoder_lr": 0.0}})
    config = validate(values | {"adapter": adapter})
    base = load_base(inspect_base(config.base.model))
    put_on(base, config.adapter, seed=1)
    weight = base.unet.mid_block.resnets[0].conv1.weight
    original = weight.detach().clone()
    weight.data += 1.0
    model = Trained(trained.run, config, base, trained.step, trained.images)
    file, *others = release(model, "short", tmp_path, ["ldm"], "fp32", strengths=Strengths(0.25), bundle=True)
    assert file.name == "short-strength0.25.safetensors"
    written = load_file(file)["model.diffusion_model.middle_block.0.in_layers.2.weight"]
    torch.testing.assert_close(written, original + 0.25)
    torch.testing.assert_close(weight, original + 1.0)
    inside = unzipped(others[-1])
    assert file.name in inside
    data: dict[str, Any] = ModelCard(inside["README.md"].decode()).data.to_dict()
    assert "lora" not in data["tags"]
