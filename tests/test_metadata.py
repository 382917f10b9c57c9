"""What a file says about itself and what lies beside it: what clients look for, true hashes, and nothing private."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from lorasmith.trainer.bases import BaseInfo, FamilyName
from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.configfile import merge, validate
from lorasmith.trainer.lorafile import LoraFile
from lorasmith.trainer.sample import Drawing
from lorasmith.trainer.sharing.card import model_card, sidecar_of, write_beside
from lorasmith.trainer.sharing.facts import BakedFacts, Facts, FolderFacts, Preview, last_part
from lorasmith.trainer.sharing.licenses import license_note, license_of
from lorasmith.trainer.sharing.metadata import Shape, build
from lorasmith.trainer.sharing.usage import usage_hint
from lorasmith.trainer.strengths import Strengths
from lorasmith.trainer.tensorfile import tensor_writer

SD1 = BaseInfo("runwayml/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5", "sd1", "epsilon", 512, 8, 64)
BASES: dict[FamilyName, BaseInfo] = {
    "sd1": SD1,
    "sd2": replace(SD1, model="/x/sd2", source="/x/sd2", family="sd2", prediction="v_prediction", resolution=768),
    "sdxl": replace(SD1, model="/x/sdxl", source="/x/sdxl", family="sdxl", resolution=1024),
}
SHAPE = Shape((4, 4), (2.0, 2.0), convolutions=False)
CAPTION = "a photo of anna schmidt in her kitchen"


def config_of(**over: Any) -> RunConfig:
    given = {
        "name": "my-style",
        "data": [{"path": "/home/anna/photos", "trigger": "mystyle"}],
        "adapter": {"alpha": 2.0},
    }
    return validate(merge(given, over))


def previews_of(*prompts: str, negative: str = "blurry") -> tuple[Preview, ...]:
    drawing = Drawing(negative, 7, 25, 6.5, 64)
    picture = Image.new("RGBA", (600, 300), (255, 0, 0, 128))
    return tuple(Preview(picture, prompt, number, drawing, "base") for number, prompt in enumerate(prompts))


def facts_of(**over: Any) -> Facts:
    """All that can be known, of a person who thought of nothing."""
    return Facts(
        name="my-style",
        config=config_of(**over),
        folders=(FolderFacts("/home/anna/photos", 12, 2, "mystyle"), FolderFacts("D:\\anna\\photos", 3)),
        buckets={(32, 32): 10, (24, 40): 5},
        tag_frequency={
            "/home/anna/photos": {"mystyle": 12, "house": 5, "ein häuschen": 3, "red": 2, CAPTION: 1},
            "D:\\anna\\photos": {"anna": 1},
        },
        steps=500,
        planned_steps=600,
        images_seen=2000,
        epochs=74.1,
        started=1_700_000_000.0,
        finished=1_700_000_600.0,
        loss=0.123,
        previews=previews_of("mystyle, a lighthouse", f"mystyle, {CAPTION}"),
    )


def header_of(facts: Facts, info: BaseInfo, folder: Path, size: int = 4, shape: Shape = SHAPE) -> dict[str, Any]:
    """The header of a file with tensors of about so many numbers, as it is on disk."""
    with tensor_writer(folder) as writer:
        writer.add("lora_unet_a.lora_up.weight", torch.arange(size, dtype=torch.float16).reshape(1, size))
        writer.add("lora_unet_a.alpha", torch.tensor(2.0))
        writer.write(folder / "my-style.safetensors", build(facts, info, shape, writer))
    raw = (folder / "my-style.safetensors").read_bytes()
    assert raw[8:10] == b'{"'
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]


# ---------------------------------------------------------------------------------------------------------------------
# the header


@pytest.mark.parametrize("family", BASES)
def test_the_header_tells_what_clients_look_for(tmp_path: Path, family: FamilyName):
    header = header_of(facts_of(), BASES[family], tmp_path)
    assert all(type(key) is type(value) is str for key, value in header.items())
    assert "lora_adapter_metadata" not in header
    assert "None" not in header.values()

    structured = {key for key, value in header.items() if value[0] in "{["}
    assert structured >= {"ss_tag_frequency", "ss_dataset_dirs", "ss_bucket_info", "ss_datasets", "lorasmith_preview"}
    for key in structured:
        json.loads(header[key], parse_constant=pytest.fail)
    for key in ("ss_tag_frequency", "ss_dataset_dirs", "ss_bucket_info"):  # A1111 reads these, as tables
        assert header[key].startswith("{")
    assert json.loads(header["ss_dataset_dirs"]) == {
        "photos": {"n_repeats": 2, "img_count": 12},
        "photos_2": {"n_repeats": 1, "img_count": 3},
    }
    assert json.loads(header["ss_tag_frequency"]) == {"photos": {"mystyle": 12, "house": 5, "ein häuschen": 3}}
    assert json.loads(header["ss_bucket_info"])["buckets"]["1"] == {"resolution": [24, 40], "count": 5}
    assert json.loads(header["ss_datasets"])[0]["subsets"] == [{"class_tokens": "mystyle"}]

    v = {"sd1": "epsilon", "sd2": "v", "sdxl": "epsilon"}[family]
    side = BASES[family].resolution
    expected = {
        "ss_base_model_version": {"sd1": "sd_v1", "sd2": "sd_v2_v", "sdxl": "sdxl_base_v1-0"}[family],
        "ss_v2": str(family == "sd2"),
        "ss_output_name": "my-style",
        "ss_sd_model_name": {"sd1": "stable-diffusion-v1-5", "sd2": "sd2", "sdxl": "sdxl"}[family],
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
        "ss_clip_skip": None if family == "sdxl" else "1",
        "ss_resolution": f"({side}, {side})",
        "ss_num_train_images": "27",
        "ss_epoch": "75",
        "ss_steps": "500",
        "ss_max_train_steps": "600",
        "ss_training_started_at": "1700000000.0",
        "ss_optimizer": "torch.optim.adamw.AdamW",
        "ss_learning_rate": "0.0001",
        "ss_seed": "42",
        "ss_loss_type": "l2",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": {
            "sd1": "stable-diffusion-v1/lora",
            "sd2": "stable-diffusion-v2-768-v/lora",
            "sdxl": "stable-diffusion-xl-v1-base/lora",
        }[family],
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models"
        if family == "sdxl"
        else "diffusers",
        "modelspec.title": "my-style",
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": v,
        "modelspec.encoder_layer": "2" if family == "sdxl" else "1",
        "modelspec.date": "2023-11-14T22:23:20+00:00",
        "modelspec.license": "creativeml-openrail-m" if family == "sd1" else "openrail++",
        "modelspec.trigger_phrase": "mystyle",
    }
    assert {key: header.get(key) for key in expected} == expected
    assert header["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")


def test_what_is_not_known_is_left_out(tmp_path: Path):
    header = header_of(Facts("x"), SD1, tmp_path)
    unknown = {"ss_tag_frequency", "ss_dataset_dirs", "ss_seed", "ss_steps", "ss_training_started_at", "modelspec.date"}
    assert not (unknown | {"lorasmith_preview", "modelspec.author", "modelspec.thumbnail"}) & set(header)


def test_what_the_author_says_and_what_is_unusual_is_told(tmp_path: Path):
    facts = facts_of(
        export={"title": "Ink", "author": "A. Uthor", "description": "{blue} ink", "license": "CC-BY-4.0"}
        | {"tags": ["ink", "blue"], "strength": 0.8},
        objective={"min_timestep": 100, "max_timestep": 899},
        adapter={"start_from": "/home/anna/first.safetensors"},
        data=[{"path": "a", "trigger": "ink", "resolution": [512, 640]}, {"path": "b", "regularization": True}],
    )
    header = header_of(facts, replace(SD1, zero_terminal_snr=True), tmp_path)
    expected = {
        "modelspec.title": "Ink",
        "modelspec.author": "A. Uthor",
        "modelspec.description": "{blue} ink",
        "modelspec.license": "cc-by-4.0",
        "modelspec.tags": "ink, blue",
        "modelspec.merged_from": "first",
        "modelspec.timestep_range": "100,899",
        "modelspec.resolution": "640x640",
        "ss_training_comment": "{blue} ink",
        "ss_min_timestep": "100",
        "ss_max_timestep": "899",
        "ss_zero_terminal_snr": "True",
        "lorasmith_preferred_weight": "0.8",
    }
    assert {key: header.get(key) for key in expected} == expected
    assert "Use it at strength 0.8." in header["modelspec.usage_hint"]


def test_the_recipe_of_the_previews_is_told_to_the_letter(tmp_path: Path):
    facts = facts_of()
    recipe = {"sampler": "DDIM", "steps": 25, "guidance": 6.5, "seed": 7, "size": "64x64", "negative_prompt": "blurry"}
    header = header_of(facts, SD1, tmp_path)
    assert json.loads(header["lorasmith_preview"]) == recipe | {"strength": 1.0}
    for text in (header["modelspec.usage_hint"], sidecar_of(facts, SD1)["notes"]):
        assert "sampler DDIM, 25 steps, guidance 6.5, 64x64, strength 1, seed 7" in text
        assert "negative prompt: blurry" in text
    for other in (replace(facts, baked=BakedFacts(4, {})), replace(facts, strengths=Strengths(0.5))):
        assert "lorasmith_preview" not in header_of(other, SD1, tmp_path)  # they show something else
        assert "sampler" not in usage_hint(other, SD1)


@pytest.mark.parametrize("size", [4, 700_000], ids=["small", "over a MiB"])
@pytest.mark.parametrize("metadata", ["safe", "none"])
def test_the_hashes_are_those_that_others_compute(tmp_path: Path, size: int, metadata: str):
    header = header_of(facts_of(export={"metadata": metadata}), SD1, tmp_path, size)
    path = tmp_path / "my-style.safetensors"
    raw = path.read_bytes()
    after = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    assert header["sshs_model_hash"] == after
    assert header["modelspec.hash_sha256"] == f"0x{after}"
    found = LoraFile.open(path).hashes
    assert (found.autov3, found.tensors) == (after[:12], after)
    assert (found.autov2, found.sha256) == (hashlib.sha256(raw).hexdigest()[:10], hashlib.sha256(raw).hexdigest())
    assert found.autov1 == hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8]

    bare = tmp_path / "bare.safetensors"  # as sd-scripts takes it, and the library writes it
    save_file(load_file(path), bare, {key: value for key, value in header.items() if key.startswith("ss_")})
    legacy = hashlib.sha256(bare.read_bytes()[0x100000:0x110000]).hexdigest()[:8]
    assert header["sshs_legacy_hash"] == legacy
    assert (legacy == hashlib.sha256(b"").hexdigest()[:8]) == (size < 100)


def test_hashes_of_a_file_made_by_hand(tmp_path: Path):
    """Worked out with `sha256sum` on the bytes."""
    head = b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}   '
    (tmp_path / "a.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + b"abc")
    found = LoraFile.open(tmp_path / "a.safetensors").hashes
    assert found.tensors == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, "abc"
    assert found.autov3 == "ba7816bf8f01"
    assert found.autov1 == "e3b0c442"  # of nothing: the file ends before 1 MiB


def test_a_base_of_one_file_is_named_by_its_hashes(tmp_path: Path):
    content = bytes(range(256)) * 0x1200
    (tmp_path / "base.safetensors").write_bytes(content)
    info = replace(SD1, model=str(tmp_path / "base.safetensors"), source=str(tmp_path / "base.safetensors"))
    header = header_of(facts_of(), info, tmp_path)
    assert header["ss_sd_model_name"] == "base.safetensors"
    assert header["ss_sd_model_hash"] == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    assert header["ss_new_sd_model_hash"] == hashlib.sha256(content).hexdigest()
    assert not {"ss_sd_model_hash", "ss_new_sd_model_hash"} & set(header_of(facts_of(), SD1, tmp_path))


def test_a_file_at_another_strength_says_so(tmp_path: Path):
    facts = replace(facts_of(export={"strength": 0.8, "title": "Ink"}), strengths=Strengths(0.5, (("unet.a", 0.0),)))
    header = header_of(facts, SD1, tmp_path)
    assert header["lorasmith_strength"] == "0.5, 0 in unet.a"
    assert header["modelspec.title"] == "Ink (at strength 0.5, 0 in unet.a)"
    assert header["lorasmith_preferred_weight"] == "1.6"  # half of it is in the file already
    assert sidecar_of(facts, SD1)["preferred weight"] == 1.6


def test_a_lora_for_a_merged_base_says_what_it_goes_with():
    info = replace(BASES["sdxl"], merges=(("/home/anna/detail.safetensors", 0.6),))
    hint = "Use it at strength 1. It was trained with detail.safetensors at 0.6 on: load that beside it."
    assert usage_hint(Facts("x"), info) == hint


# ---------------------------------------------------------------------------------------------------------------------
# nothing private


HOSTILE: dict[str, Any] = {
    "runs": "/home/anna/runs",
    "base": {"model": "C:\\Users\\anna\\models\\v1.safetensors", "vae": "/home/anna/vae"},
    "data": [{"path": "/home/anna", "trigger": "ohwx"}, {"path": "C:\\Users\\anna\\", "trigger": "ohwx"}],
    "adapter": {"start_from": "/home/anna/start.safetensors"},
    "sample": {"prompts": ["ohwx in /home/anna/pictures", CAPTION]},
    "runtime": {"cache": "/Users/anna/cache"},
}
SECRETS = ("anna", "schmidt", "kitchen", "C:\\", "/home", "example.org")


def hostile(**export: Any) -> tuple[Facts, BaseInfo]:
    """A person's name in everything that can hold one."""
    tags = {CAPTION: 9, "anna": 2, "c:\\users\\anna\\x.png": 9, "anna@example.org": 9, "~/anna": 9, "house": 9}
    facts = Facts(
        "my-style",
        config=config_of(**HOSTILE, export=export),
        folders=(FolderFacts("/home/anna", 9, 1, "ohwx"), FolderFacts("C:\\Users\\anna\\", 9), FolderFacts("~anna", 9)),
        tag_frequency={"/home/anna": tags},
        previews=previews_of("ohwx in /home/anna/pictures", CAPTION, "a portrait, anna", "anna, house"),
    )
    model = HOSTILE["base"]["model"]
    merged = (("/home/anna/detail.safetensors", 1.0),)
    return facts, replace(SD1, model=model, source=model, vae="/home/anna/vae", merges=merged)


@pytest.mark.parametrize("metadata", ["safe", "none"])
def test_nothing_private_is_in_a_header_or_beside_a_file(tmp_path: Path, metadata: str):
    facts, info = hostile(metadata=metadata)
    header = header_of(facts, info, tmp_path)
    write_beside(tmp_path / "my-style.safetensors", facts, info)
    texts = [json.dumps(header), *((tmp_path / f"my-style.{kind}").read_text("utf-8") for kind in ("md", "json"))]
    with Image.open(tmp_path / "my-style.png") as picture:
        texts.append(str(picture.info))
    assert [(secret, text) for secret in SECRETS for text in texts if secret.lower() in text.lower()] == []
    if metadata == "safe":
        assert json.loads(header["ss_tag_frequency"]) == {"images": {"house": 9}}
        assert list(json.loads(header["ss_dataset_dirs"])) == ["images", "images_2", "images_3"]
        assert header["ss_sd_model_name"] == "v1.safetensors"


def test_none_is_what_clients_need_and_no_more(tmp_path: Path):
    assert set(header_of(facts_of(export={"metadata": "none"}), SD1, tmp_path)) == {
        *("ss_base_model_version", "ss_v2", "ss_network_module", "ss_network_dim", "ss_network_alpha"),
        *("sshs_model_hash", "sshs_legacy_hash"),
        *(f"modelspec.{key}" for key in ("sai_model_spec", "architecture", "implementation", "title", "resolution")),
        *(f"modelspec.{key}" for key in ("prediction_type", "encoder_layer", "hash_sha256")),
    }


def test_all_is_everything_that_is_known(tmp_path: Path):
    facts, info = hostile(metadata="all")
    header = header_of(facts, info, tmp_path)
    assert json.loads(header["ss_tag_frequency"])["images"] == dict(facts.tag_frequency["/home/anna"])
    assert json.loads(header["lorasmith_prompts"]) == [preview.prompt for preview in facts.previews]
    assert RunConfig.model_validate(json.loads(header["lorasmith_config"])) == facts.config


@pytest.mark.parametrize(
    ("tag", "count", "threshold", "told"),
    [
        ("house", 3, 3, True),
        ("house", 2, 3, False),
        ("house", 1, 1, True),
        ("mystyle", 1, 3, True),  # the trigger: without it nobody can use the file
        ("hand on own hip", 9, 3, True),
        (r"saber \(fate\)", 9, 3, True),
        ("a dog on a sofa", 9, 3, False),
        ("a_dog_on_a_sofa", 9, 3, False),
        ("x" * 41, 9, 3, False),
        ("c:/users/me/a.png", 9, 3, False),
        ("me@home.org", 9, 3, False),
        ("https://me.org", 9, 3, False),
    ],
)
def test_a_tag_is_told_if_many_images_have_it_and_it_is_no_sentence(tag: str, count: int, threshold: int, told: bool):
    facts = replace(facts_of(export={"tag_threshold": threshold}), tag_frequency={"a": {tag: count}})
    assert facts.told_tags == ({"a": {tag: count}} if told else {})
    everything = replace(facts_of(export={"metadata": "all"}), tag_frequency={"a": {tag: count}})
    assert everything.told_tags == {"a": {tag: count}}


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("mystyle, a lighthouse", True),
        ("mystyle", True),
        ("a lighthouse, house", True),  # the second tag is told anyway
        ("a lighthouse, red", False),  # this one is not
        (f"mystyle, {CAPTION}", False),
        (CAPTION.upper(), False),
        ("mystyle, house, ein häuschen", False),  # may be a caption: all of its tags are of captions
        ("a lighthouse in /home/me/pictures", False),
    ],
)
def test_a_prompt_is_told_unless_it_may_be_a_caption(prompt: str, told: bool):
    assert facts_of().told_prompt(prompt) == (prompt if told else "")
    assert facts_of(export={"metadata": "all"}).told_prompt(prompt) == prompt
    assert facts_of(export={"metadata": "none"}).told_prompt(prompt) == ""
    assert replace(facts_of(), tag_frequency={}).told_prompt(prompt) == ""  # then nobody can tell


@pytest.mark.parametrize(
    ("path", "last"),
    [
        ("/home/me/photos/", "photos"),
        ("D:\\me\\photos", "photos"),
        ("owner/name", "name"),
        ("hf:owner/name", "name"),
        ("..", "images"),
        ("/home/me", "images"),
        ("C:\\Users\\me\\", "images"),
        ("/Users/me", "images"),
        ("~", "images"),
        ("", "images"),
    ],
)
def test_of_a_path_the_last_part_is_told_unless_it_is_a_home(path: str, last: str):
    assert last_part(path) == last


def test_the_name_of_this_computers_user_is_never_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/data/anna"))
    assert last_part("/mnt/anna") == "images"


# ---------------------------------------------------------------------------------------------------------------------
# what lies beside the file


@pytest.mark.parametrize("family", BASES)
def test_card_sidecar_and_picture_stand_beside_the_file(tmp_path: Path, family: FamilyName):
    facts, info = facts_of(), BASES[family]
    written = write_beside(tmp_path / "v1.5 style.safetensors", facts, info)
    assert {path.name for path in written} == {path.name for path in tmp_path.iterdir()}
    assert [path.name for path in written] == [f"v1.5 style{ending}" for ending in (".md", ".json", ".png")]
    sidecar = json.loads((tmp_path / "v1.5 style.json").read_text(encoding="utf-8"))
    assert sidecar["sd version"] == {"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL"}[family]
    assert (sidecar["activation text"], sidecar["preferred weight"]) == ("mystyle", 1.0)
    assert sidecar["negative text"] == "blurry"
    with Image.open(tmp_path / "v1.5 style.png") as shown:
        assert (shown.size, shown.mode) == ((600, 300), "RGB")
        assert shown.info["parameters"].startswith("mystyle, a lighthouse\nNegative prompt: blurry\nSteps: 25, Sampler")
        assert not {"prompt", "workflow"} & set(shown.info)  # ComfyUI would take them for graphs


def card_of(facts: Facts, info: BaseInfo = SD1, pictures: dict[str, str] | None = None, grid: str = "") -> ModelCard:
    return ModelCard(model_card(facts, info, "my-style.safetensors", pictures or {}, grid))


def test_the_card_is_what_the_hub_reads():
    card = card_of(facts_of(), pictures={"images/00.png": "mystyle, a lighthouse"}, grid="grid.png")
    data = card.data.to_dict()
    assert data["base_model"] == "runwayml/stable-diffusion-v1-5"
    assert data["base_model_relation"] == "adapter"
    assert data["instance_prompt"] == "mystyle"
    assert data["license"] == "creativeml-openrail-m"
    assert data["library_name"] == "diffusers"
    assert {"lora", "text-to-image", "template:sd-lora", "stable-diffusion"} <= set(data["tags"])
    assert data["widget"] == [{"text": "mystyle, a lighthouse", "output": {"url": "images/00.png"}}]
    first, *_ = card.text.split("\n\n```python")
    for needed in ("# my-style", "<Gallery />", "`my-style.safetensors`", "`mystyle`", "**Strength:** 1", SD1.model):
        assert needed in first
    assert "![" in card.text
    assert "grid.png" in card.text
    for family in ("sd2", "sdxl"):  # of folders on this computer
        assert "base_model" not in card_of(facts_of(), BASES[family]).data.to_dict()


def test_a_card_takes_whatever_a_person_calls_their_style():
    title, text = "--- a: 'b' \"c\" | # d\u2028\x85\x7f💡", "A | text\n\nwith --- lines"
    facts = facts_of(
        export={"title": title, "description": text, "tags": ["a: b", "💡"], "license": "My own: 'license'"},
        data=[{"path": "x", "trigger": "tr: '|\u2029💡"}],
    )
    card = card_of(replace(facts, folders=()), pictures={"a.png": "-"})
    data = card.data.to_dict()
    assert data["instance_prompt"] == "tr: '|\u2029💡"
    assert data["tags"][-2:] == ["a: b", "💡"]
    assert (data["license"], data["license_name"]) == ("other", "my-own-license")
    assert data["license_link"] == "LICENSE.md"
    assert f"# {' '.join(title.split())}" in card.text
    assert text in card.text


def test_a_card_of_what_was_made_from_a_training_says_so():
    baked = replace(facts_of(), baked=BakedFacts(2, {"unet": 0.25}), strengths=Strengths(0.5))
    card = card_of(baked, pictures={"a.png": "-"})
    assert "| baked to rank | 2 |" in card.text
    assert "| change lost in that | 25.00% of unet |" in card.text
    assert "| strength of what was trained | 0.5 |" in card.text
    assert "The pictures show what was trained" in card.text
    assert "**Previews.**" not in card.text


def test_a_card_without_metadata_has_no_word_of_the_training():
    card = card_of(facts_of(export={"metadata": "none"}))
    assert "| training |" not in card.text
    assert "**Trigger:** `mystyle`" in card.text


def test_the_card_of_a_kind_that_some_clients_do_not_read_names_the_way_out():
    card = card_of(facts_of(adapter={"kind": "loha"}))
    assert "`lorasmith resize my-style.safetensors --rank 32 --out FILE`" in card.text
    assert "load_lora_weights" not in card.text


@pytest.mark.parametrize(
    ("given", "info", "expected", "said"),
    [
        ("", SD1, "creativeml-openrail-m", "is published under the license of the base it was made from"),
        ("", BASES["sdxl"], "openrail++", "stable-diffusion-xl-base-1.0"),
        ("", replace(SD1, model="pocket"), "apache-2.0", "It is under [Apache License 2.0]"),
        ("CC-BY-NC-SA-4.0", SD1, "cc-by-nc-sa-4.0", "https://creativecommons.org/licenses/by-nc-sa/4.0/"),
        ("mit", SD1, "mit", "by A. Uthor under [MIT License]"),
        ("Ask me", SD1, "other", "by A. Uthor under Ask me."),
    ],
)
def test_the_license_is_the_one_given_or_that_of_the_base(given: str, info: BaseInfo, expected: str, said: str):
    facts = facts_of(export={"license": given, "author": "A. Uthor"})
    license = license_of(facts, info)
    assert license
    assert license.id == expected
    assert said in license_note(facts, info, "base")


def test_of_random_weights_there_is_no_license():
    info = replace(SD1, model="random:sd15", source="random:sd15")
    assert license_of(facts_of(), info) is None
    assert license_note(facts_of(), info, "base") == ""
    assert "license" not in card_of(facts_of(), info).data.to_dict()
