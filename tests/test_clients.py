"""What each client makes of a LoRA file is told right: every trap of names and scales, and of files that are none."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor

from lorasmith.trainer.anatomy import skeleton
from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.clients import a1111, comfyui, huggingface, invokeai, sdcpp, sdnext, sdscripts
from lorasmith.trainer.clients.contents import Contents
from lorasmith.trainer.clients.reading import ClientReading, read_by_clients
from lorasmith.trainer.clients.table import CLIENTS, COMPATIBILITY
from lorasmith.trainer.clients.trees import Tree
from lorasmith.trainer.config import AdapterSection
from lorasmith.trainer.delta import Delta, Form
from lorasmith.trainer.export import tensors
from lorasmith.trainer.fitting import put_on
from lorasmith.trainer.keys import Format, base_name
from lorasmith.trainer.lorafile import LoraFile
from lorasmith.trainer.models import Base, load_base

from .tiny import MAKERS

Weights = dict[str, Tensor]
Edit = Callable[[Weights], Weights]
ARCHITECTURES = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}
READERS = (
    *(a1111.read, comfyui.read, comfyui.read_forge, invokeai.read),
    *(huggingface.read, sdscripts.read, sdnext.read, sdcpp.read),
)
RANK, ALPHA = 2, 1.0
# A few layers of each sort; all families have them.
UNET = [
    *(f"up_blocks.1.attentions.0.{part}" for part in ("proj_in", "transformer_blocks.0.attn1.to_q")),
    *(f"up_blocks.1.attentions.0.transformer_blocks.0.{part}" for part in ("attn2.to_k", "ff.net.2")),
    "mid_block.resnets.0.conv1",
]
TEXT = [
    *(f"encoder.layers.0.self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
    *(f"encoder.layers.0.mlp.{part}" for part in ("fc1", "fc2")),
]
EVERY_LAYER = (
    r"\.(?:to_(?:q|k|v|out\.0)|ff\.net\.(?:0\.proj|2)|proj_(?:in|out)|conv[12]|conv_shortcut|time_emb_proj"
    r"|(?:down|up)samplers\.0\.conv|(?:q|k|v|out)_proj|fc[12])$"
)


@cache
def published(family: str) -> Base:
    """The published shapes, without weights."""
    return skeleton(inspect_base(f"random:{ARCHITECTURES[family]}"))


@pytest.fixture(scope="module")
def bases() -> dict[str, Base]:
    return {family: published(family) for family in ARCHITECTURES}


def change(base: Base, component: str, path: str, rank: int = RANK, alpha: float = ALPHA) -> Delta:
    out, *inner = _shape(base, component, path)
    down, up = torch.zeros(rank, *inner), torch.zeros(out, rank, *[1] * (len(inner) - 1))
    return Delta(path, {"lora_down.weight": down.half(), "lora_up.weight": up.half()}, alpha)


def _shape(base: Base, component: str, path: str) -> tuple[int, ...]:
    module: Any = base.components[component]
    path = path if hasattr(module, "text_model") and component != "unet" else path.removeprefix("text_model.")
    prefix = "text_model." if hasattr(module, "text_model") and not path.startswith("text_model.") else ""
    return tuple(module.get_submodule(prefix + path).weight.shape)


def weights(base: Base, format: Format = "kohya", only: str = "") -> Weights:
    """A file of the few layers, or of those components that begin so."""
    changes = {
        component: [change(base, component, path) for path in (UNET if component == "unet" else TEXT)]
        for component in base.components
        if component.startswith(only)
    }
    return tensors(base, changes, format)


def saved(folder: Path, content: Weights, metadata: dict[str, str] | None = None) -> LoraFile:
    path = folder / "style.safetensors"
    save_file({key: tensor.contiguous().clone() for key, tensor in content.items()}, path, metadata)
    return LoraFile.open(path)


def asked(file: LoraFile, base: Base) -> dict[str, ClientReading]:
    """All readings by client; each is in itself as it must be."""
    readings = {reading.client: reading for reading in read_by_clients(file, base)}
    assert tuple(readings) == (CLIENTS if file.is_kohya else (*CLIENTS, "PEFT"))
    for reading in readings.values():
        assert (reading.reading == "same") == (reading.why == ""), reading
        assert reading.why == "" or re.fullmatch(r"[A-Z].{,400}[^.](?:\.| \.\.\.)", reading.why), reading
        assert set(reading.unused) <= file.shapes.keys()
        assert list(reading.unused) == sorted(reading.unused)
        assert 0 <= reading.layers <= reading.of
        if reading.reading == "same":
            assert (reading.unused, reading.layers) == ((), reading.of)
        if reading.reading == "none":
            assert (len(reading.unused), reading.layers) == (len(file.shapes), 0)
    return readings


def told(readings: dict[str, ClientReading]) -> dict[str, str]:
    """The clients by what they do, PEFT left out."""
    found: dict[str, list[str]] = {}
    for client in CLIENTS:
        found.setdefault(readings[client].reading, []).append(client)
    return {reading: ", ".join(clients) for reading, clients in found.items()}


EVERYWHERE = {"same": ", ".join(CLIENTS)}


# ---------------------------------------------------------------------------------------------------------------------
# our own files


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("pattern", [EVERY_LAYER, r"attn.*\.(?:to_(?:q|k|v|out\.0)|(?:q|k|v|out)_proj)$"])
def test_every_client_reads_all_of_a_kohya_file_at_the_right_place(
    bases: dict[str, Base], tmp_path: Path, family: str, pattern: str
):
    base = bases[family]
    paths = {
        component: [path for path, _ in module.named_modules() if re.search(pattern, path)]
        for component, module in base.components.items()
    }
    changes = {component: [change(base, component, p, 1) for p in names] for component, names in paths.items()}
    file = saved(tmp_path, tensors(base, changes, "kohya"))
    readings = asked(file, base)
    assert told(readings) == EVERYWHERE

    contents, tree = Contents.of(file), Tree.of(base)
    right = {
        base_name(base.info.family, component, path, "kohya"): (component, path.removeprefix("text_model."))
        for component, names in paths.items()
        for path in names
    }
    for read in READERS:
        found = {
            key.partition(".")[0]: (one.layer.component, one.layer.path.removeprefix("text_model."))
            for one in read(contents, tree).changes
            for key in one.keys
        }
        assert found == right, read


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_diffusers_file_is_for_diffusers(bases: dict[str, Base], tmp_path: Path, family: str):
    texts = len(bases[family].components) - 1
    readings = asked(saved(tmp_path, weights(bases[family], "diffusers")), bases[family])
    assert told(readings) == {
        "none": "A1111, InvokeAI, sd-scripts",
        "part": "ComfyUI, Forge, SD.Next, stable-diffusion.cpp",
        "same": "diffusers",
    }
    assert readings["PEFT"].reading == "same"
    # Two layers of attention are not found in ComfyUI; text encoders are neither in SD.Next nor stable-diffusion.cpp.
    assert len(readings["ComfyUI"].unused) == len(readings["Forge"].unused) == 4
    assert all(".attn" in key for key in readings["ComfyUI"].unused)
    for client in ("SD.Next", "stable-diffusion.cpp"):
        assert len(readings[client].unused) == 2 * 6 * texts
        assert all(key.startswith("text_encoder") for key in readings[client].unused)


def test_forge_skips_a_diffusers_file_with_much_attention(bases: dict[str, Base], tmp_path: Path):
    base = bases["sd1"]
    paths = [f"{UNET[1].removesuffix('to_q')}to_{which}" for which in ("q", "k", "v", "out.0")]
    paths += [path.replace("attn1", "attn2") for path in paths]
    file = saved(tmp_path, tensors(base, {"unet": [change(base, "unet", path) for path in paths]}, "diffusers"))
    readings = asked(file, base)
    assert told(readings)["none"] == "A1111, ComfyUI, Forge, InvokeAI, sd-scripts"
    assert "16 of the 16 keys" in readings["Forge"].why


def factors(form: Form, shape: tuple[int, ...]) -> Weights:
    """Tensors of a change in another form than LoRA, of rank 1, and LoKr's second factor of two."""
    out, inner = shape[0], torch.Size(shape[1:]).numel()
    made = {
        "loha": {f"hada_w{n}_{side}": (out, 1) if side == "a" else (1, inner) for n in (1, 2) for side in "ab"},
        "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": (out // 2, 1), "lokr_w2_b": (1, inner // 2)},
        "full": {"diff": shape},
        "dora": {"lora_down.weight": (1, *shape[1:]), "lora_up.weight": (out, 1, *[1] * len(shape[2:]))},
    }[form]
    return {leaf: torch.zeros(size, dtype=torch.float16) for leaf, size in made.items()} | (
        {"dora_scale": torch.ones(out, *[1] * len(shape[1:]))} if form == "dora" else {}
    )


@pytest.mark.parametrize("form", ["loha", "lokr", "full", "dora"])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_other_kinds_are_read_as_the_table_says_before_training(
    bases: dict[str, Base], tmp_path: Path, family: str, form: Form
):
    base = bases[family]
    changes = {
        component: [Delta(path, factors(form, _shape(base, component, path)), ALPHA) for path in paths]
        for component in base.components
        for paths in [[p for p in UNET if "conv" not in p] if component == "unet" else TEXT]
    }
    readings = asked(saved(tmp_path, tensors(base, changes, "kohya")), base)
    other = {"diffusers": "other"} if form == "dora" else {}  # diffusers' own format is another file
    assert {client: readings[client].reading for client in CLIENTS} == {**COMPATIBILITY[form], **other}


def test_diffusers_reads_its_own_dora_of_the_unet(bases: dict[str, Base], tmp_path: Path):
    base = bases["sdxl"]
    changes = {"unet": [Delta(path, factors("dora", _shape(base, "unet", path)), 1.0) for path in UNET]}
    content = tensors(base, changes, "diffusers")
    readings = asked(saved(tmp_path, content), base)
    assert (readings["diffusers"].reading, readings["PEFT"].reading) == ("same", "same")
    assert readings["stable-diffusion.cpp"].reading == "other"
    # Of a text encoder, diffusers does not load the lengths.
    fc1 = "encoder.layers.0.mlp.fc1"
    changes = {"text_encoder": [Delta(fc1, factors("dora", _shape(base, "text_encoder", fc1)), 1.0)]}
    attention = {"text_encoder": [change(base, "text_encoder", path) for path in TEXT[:4]]}
    content = tensors(base, changes, "diffusers") | tensors(base, attention, "diffusers")
    reading = asked(saved(tmp_path, content), base)["diffusers"]
    assert (reading.reading, reading.layers) == ("other", 5)
    assert "lengths" in reading.why


def test_a_live_base_with_adapters_has_the_same_layers_as_its_shapes(tmp_path: Path):
    base = load_base(inspect_base(str(MAKERS["sd1"](tmp_path / "base"))))
    plain = Tree.of(base)
    put_on(base, AdapterSection(rank=2, alpha=2.0, targets="all"), seed=1)
    assert Tree.of(base) == plain == Tree.of(skeleton(base.info))


# ---------------------------------------------------------------------------------------------------------------------
# traps of names


def renamed(pattern: str, new: str) -> Edit:
    return lambda content: {re.sub(pattern, new, key): tensor for key, tensor in content.items()}


def without(pattern: str) -> Edit:
    return lambda content: {key: tensor for key, tensor in content.items() if not re.search(pattern, key)}


def only(pattern: str) -> Edit:
    return lambda content: {key: tensor for key, tensor in content.items() if re.search(pattern, key)}


def beside(*names: str, shape: tuple[int, ...] = (RANK,)) -> Edit:
    return lambda content: content | {name: torch.zeros(shape) for name in names}


def with_layers(family: str, *paths: str, names: dict[str, str] | None = None) -> Edit:
    """More layers of the UNet, under diffusers' names or others."""

    def edit(content: Weights) -> Weights:
        base = published(family)
        more: Weights = {}
        for path in paths:
            delta = change(base, "unet", path)
            name = (names or {}).get(path, path).replace(".", "_")
            more |= {f"lora_unet_{name}.{leaf}": tensor for leaf, tensor in delta.tensors.items()}
            more[f"lora_unet_{name}.alpha"] = torch.tensor(ALPHA)
        return content | more

    return edit


# The UNet of SDXL under diffusers' names: `weights` has LDM's.
_DIFFUSERS_NAMES = {
    "lora_unet_output_blocks_3_1_": "lora_unet_up_blocks_1_attentions_0_",
    "lora_unet_middle_block_0_in_layers_2": "lora_unet_mid_block_resnets_0_conv1",
}
_LDM_NAMES = {new: old for old, new in _DIFFUSERS_NAMES.items()}


def in_other_names(names: dict[str, str]) -> Edit:
    def edit(content: Weights) -> Weights:
        for old, new in names.items():
            content = renamed(old, new)(content)
        return content

    return edit


UPSAMPLER, OUTSIDE = "up_blocks.0.upsamplers.0.conv", ("conv_in", "conv_out", "time_embedding.linear_1")
ADDED = "add_embedding.linear_1"
LDM_ADDED = {ADDED: "label_emb.0.0"}

TRAPS: dict[str, tuple[str, Edit, dict[str, str]]] = {
    "nothing is wrong": ("sd2", dict, EVERYWHERE),
    "text encoders have lost text_model": (
        "sd1",
        renamed("text_model_", ""),
        {
            "same": "diffusers",  # whose live modules have lost it as well
            "none": "Forge",  # of 18 keys too many
            "part": "A1111, ComfyUI, InvokeAI, sd-scripts, SD.Next, stable-diffusion.cpp",
        },
    ),
    "both text encoders of SDXL have": (
        "sdxl",
        renamed("text_model_", ""),
        {
            "none": "Forge, diffusers",
            "part": "A1111, ComfyUI, InvokeAI, sd-scripts, SD.Next, stable-diffusion.cpp",
        },
    ),
    "SD 1's text encoder is numbered": (
        "sd1",
        renamed("lora_te_", "lora_te1_"),
        {
            "same": "A1111, ComfyUI, Forge, diffusers, stable-diffusion.cpp",
            "part": "InvokeAI, sd-scripts, SD.Next",
        },
    ),
    "SD 2's text encoder is numbered": (
        "sd2",
        renamed("lora_te_", "lora_te1_"),
        {
            "same": "ComfyUI, Forge, diffusers, stable-diffusion.cpp",
            "part": "A1111, InvokeAI, sd-scripts, SD.Next",
        },
    ),
    "SDXL's first text encoder has no number": (
        "sdxl",
        renamed("lora_te1_", "lora_te_"),
        {
            "same": "ComfyUI, Forge, diffusers, stable-diffusion.cpp",
            "part": "A1111, sd-scripts, SD.Next",
            "none": "InvokeAI",
        },
    ),
    "SDXL's UNet has diffusers' names": ("sdxl", in_other_names(_DIFFUSERS_NAMES), EVERYWHERE),
    "and its upsampler too": (
        "sdxl",
        lambda content: with_layers("sdxl", UPSAMPLER)(in_other_names(_DIFFUSERS_NAMES)(content)),
        {"same": ", ".join(CLIENTS[1:]), "part": "A1111"},
    ),
    "SD 1's upsampler is the second part of its block": (
        "sd1",
        with_layers("sd1", UPSAMPLER, names={UPSAMPLER: "output_blocks.2.1.conv"}),
        {
            "same": "A1111, ComfyUI, Forge, stable-diffusion.cpp",
            "part": "InvokeAI, diffusers, sd-scripts, SD.Next",
        },
    ),
    "and not the third": (
        "sd1",
        with_layers("sd1", UPSAMPLER, names={UPSAMPLER: "output_blocks.2.2.conv"}),
        {"part": ", ".join(CLIENTS)},
    ),
    "one diffusers name among LDM's": (
        "sdxl",
        with_layers("sdxl", "mid_block.resnets.1.conv1"),
        {
            "same": "A1111, ComfyUI, Forge, sd-scripts, SD.Next, stable-diffusion.cpp",
            "none": "InvokeAI",
            "part": "diffusers",
        },
    ),
    "SD 1's UNet has LDM's names": (
        "sd1",
        in_other_names(_LDM_NAMES),
        {
            "same": "A1111, ComfyUI, Forge, SD.Next, stable-diffusion.cpp",
            "part": "InvokeAI, sd-scripts",
            "none": "diffusers",
        },
    ),
    "layers outside of the blocks": (
        "sd1",
        with_layers("sd1", *OUTSIDE),
        {"same": "A1111, ComfyUI, Forge, InvokeAI, diffusers, SD.Next", "part": "sd-scripts, stable-diffusion.cpp"},
    ),
    "SDXL's added embedding": (
        "sdxl",
        with_layers("sdxl", ADDED, names=LDM_ADDED),
        {
            "same": "A1111, ComfyUI, Forge, InvokeAI, diffusers, SD.Next",
            "part": "sd-scripts, stable-diffusion.cpp",
        },
    ),
    "and under its diffusers name": (
        "sdxl",
        lambda content: with_layers("sdxl", ADDED)(in_other_names(_DIFFUSERS_NAMES)(content)),
        {"same": "ComfyUI, Forge, InvokeAI, SD.Next", "part": "A1111, diffusers, sd-scripts, stable-diffusion.cpp"},
    ),
    "a dot is left in a layer's name": (
        "sd1",
        renamed("mid_block_resnets_0", "mid_block.resnets.0"),
        {
            "part": "A1111, ComfyUI, Forge, sd-scripts, SD.Next",
            "none": "InvokeAI, diffusers",
            "same": "stable-diffusion.cpp",
        },
    ),
    "a wrapper is left in all names": (
        "sd1",
        renamed("lora_(unet|te)_", r"lora_\1__orig_mod_"),
        {"none": ", ".join(CLIENTS)},
    ),
    "attention of an OpenCLIP text encoder without k and out": (
        "sdxl",
        without(r"lora_te2.*self_attn_(?:k|out)_proj"),
        {"same": ", ".join(CLIENTS[1:4]) + ", sd-scripts, SD.Next, stable-diffusion.cpp", "part": "A1111, diffusers"},
    ),
    "a layer of another SD": (
        "sd1",
        beside("lora_unet_joint_blocks_0_mlp.lora_down.weight", "lora_unet_joint_blocks_0_mlp.lora_up.weight"),
        {"part": ", ".join(CLIENTS)},
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_traps_of_names_show(bases: dict[str, Base], tmp_path: Path, trap: str):
    family, edit, expected = TRAPS[trap]
    content = edit(weights(bases[family]))
    assert told(asked(saved(tmp_path, content), bases[family])) == expected


def test_what_is_left_out_is_counted_and_named(bases: dict[str, Base], tmp_path: Path):
    readings = asked(saved(tmp_path, renamed("text_model_", "")(weights(bases["sd1"]))), bases["sd1"])
    a1111 = readings["A1111"]
    assert (a1111.layers, a1111.of, len(a1111.unused)) == (5, 11, 18)
    assert all(key.startswith("lora_te_encoder_layers_0_") for key in a1111.unused)
    assert "18 of the 33 keys" in a1111.why
    assert a1111.unused[0] in a1111.why
    assert "18 of the 33 keys, more than the 12" in readings["Forge"].why

    mixed = with_layers("sdxl", "mid_block.resnets.1.conv1")(weights(bases["sdxl"]))
    reading = asked(saved(tmp_path, mixed), bases["sdxl"])["diffusers"]
    assert (reading.layers, len(reading.unused)) == (13, 15)
    assert "drops all LDM names" in reading.why

    lonely = without(r"lora_te2.*self_attn_(?:k|out)_proj")(weights(bases["sdxl"]))
    reading = asked(saved(tmp_path, lonely), bases["sdxl"])["A1111"]
    assert {key.partition(".")[0].rpartition("attn_")[2] for key in reading.unused} == {"q_proj", "v_proj"}
    assert "q, k, v and out" in reading.why


def test_a_name_of_an_adapter_left_in_is_read_by_few(bases: dict[str, Base], tmp_path: Path):
    content = renamed(r"\.lora_([AB])\.", r".lora_\1.default.")(weights(bases["sd1"], "diffusers"))
    readings = asked(saved(tmp_path, content), bases["sd1"])
    assert told(readings) == {
        "none": "A1111, Forge, InvokeAI, diffusers, sd-scripts, SD.Next",
        "part": "ComfyUI, stable-diffusion.cpp",
    }


def test_a_file_for_another_family_is_none_of_this_base(bases: dict[str, Base], tmp_path: Path):
    file = saved(tmp_path, weights(bases["sd1"]))
    readings = asked(file, bases["sdxl"])
    assert readings["InvokeAI"].reading == readings["diffusers"].reading == "none"
    assert "Stable Diffusion 1" in readings["InvokeAI"].why
    assert "shapes of the layer's own" in readings["diffusers"].why
    # ComfyUI says of what does not fit that it is an error, and goes on.
    assert readings["ComfyUI"].reading == "part"
    assert readings["ComfyUI"].layers < readings["ComfyUI"].of


@pytest.mark.parametrize(
    ("family", "pattern", "why"),
    [
        ("sd1", "time_emb_proj", "takes the file for one of SDXL"),
        ("sdxl", "lora_te", "does not find out"),
        ("sdxl", "lora_te2_", "does not find out"),
    ],
)
def test_invokeai_takes_some_files_for_those_of_another_base(
    bases: dict[str, Base], tmp_path: Path, family: str, pattern: str, why: str
):
    content = with_layers(family, "mid_block.resnets.0.time_emb_proj")(weights(bases[family]))
    readings = asked(saved(tmp_path, only(pattern)(content)), bases[family])
    assert told(readings) == {"same": ", ".join(c for c in CLIENTS if c != "InvokeAI"), "none": "InvokeAI"}
    assert why in readings["InvokeAI"].why


# ---------------------------------------------------------------------------------------------------------------------
# traps of scales and shapes


def alphas(value: Tensor | None, pattern: str = "") -> Edit:
    """Those of the keys that match, or none at all."""

    def edit(content: Weights) -> Weights:
        chosen = [key for key in content if key.endswith(".alpha") and re.search(pattern, key)]
        assert chosen
        if value is None:
            return {key: tensor for key, tensor in content.items() if key not in chosen}
        return content | dict.fromkeys(chosen, value)

    return edit


def flat(content: Weights) -> Weights:
    return {key: t.flatten(1) if "proj_in" in key and t.dim() > 1 else t for key, t in content.items()}


SCALES: dict[str, tuple[str, Edit, dict[str, str], str]] = {
    "no alpha": ("sd1", alphas(None), EVERYWHERE, ""),
    "alpha of one element": ("sd1", alphas(torch.tensor([1.0])), EVERYWHERE, ""),
    "alpha in bf16": ("sd1", alphas(torch.tensor(1.0, dtype=torch.bfloat16)), EVERYWHERE, ""),
    "another alpha in attention": (
        "sd1",
        alphas(torch.tensor(4.0), "attn1"),
        {"same": ", ".join(c for c in CLIENTS if c != "diffusers"), "other": "diffusers"},
        "scale 0.5 instead of 2: it applies the most common alpha",
    ),
    "another alpha in a convolution": ("sd1", alphas(torch.tensor(4.0), "resnets"), EVERYWHERE, ""),
    "another alpha in the MLP of a text encoder": (
        "sd1",
        alphas(torch.tensor(4.0), "fc1"),
        {"same": ", ".join(c for c in CLIENTS if c != "diffusers"), "other": "diffusers"},
        "most common alpha",
    ),
    "of SDXL's second, whose modules have text_model": ("sdxl", alphas(torch.tensor(4.0), "te2.*fc1"), EVERYWHERE, ""),
    "one component without": ("sd1", alphas(None, "lora_te_"), EVERYWHERE, ""),
    "one layer without": (
        "sd1",
        alphas(None, "resnets"),
        {"same": ", ".join(c for c in CLIENTS if c != "diffusers"), "other": "diffusers"},
        "scale 0.5 instead of 1",
    ),
    "alpha is a whole number": (
        "sd1",
        alphas(torch.tensor(1), "resnets"),
        {"same": ", ".join(CLIENTS[:-1]), "none": "stable-diffusion.cpp"},
        "whole number",
    ),
    "alpha is 0": (
        "sd1",
        alphas(torch.tensor(0.0)),
        {"same": ", ".join(c for c in CLIENTS if c != "sd-scripts"), "other": "sd-scripts"},
        "alpha of 0 for the rank",
    ),
    "alpha has two elements": (
        "sd1",
        alphas(torch.ones(2), "resnets"),
        {"none": ", ".join(CLIENTS[:-1]), "other": "stable-diffusion.cpp"},
        "not one number",
    ),
    "alpha is NaN": ("sd1", alphas(torch.tensor(torch.nan)), {"other": ", ".join(CLIENTS)}, "not a finite number"),
    "a 1x1 convolution as a matrix": (
        "sd1",
        flat,
        {"same": "A1111, ComfyUI, Forge, InvokeAI, SD.Next, stable-diffusion.cpp", "none": "diffusers, sd-scripts"},
        "shapes of the layer's own",
    ),
    "a layer without up": (
        "sd1",
        without(r"resnets_0_conv1\.lora_up"),
        {
            "none": "A1111, InvokeAI, diffusers",
            "part": "ComfyUI, Forge, sd-scripts, SD.Next, stable-diffusion.cpp",
        },
        "",
    ),
    "a layer without down": (
        "sd1",
        without(r"resnets_0_conv1\.lora_down"),
        {"none": "A1111, ComfyUI, Forge, InvokeAI, diffusers", "part": "sd-scripts, SD.Next, stable-diffusion.cpp"},
        "",
    ),
}


@pytest.mark.parametrize("trap", SCALES)
def test_traps_of_scales_show(bases: dict[str, Base], tmp_path: Path, trap: str):
    family, edit, expected, why = SCALES[trap]
    readings = asked(saved(tmp_path, edit(weights(bases[family]))), bases[family])
    assert told(readings) == expected
    deviating = [readings[c].why for c in CLIENTS if readings[c].reading not in ("same", "part")]
    assert not deviating or any(why in said for said in deviating)


@pytest.mark.parametrize(
    ("said", "scale"),
    [({"lora_alpha": 1.0}, 0.5), ({"lora_alpha": 2.0}, 1.0), ({"lora_alpha": 2.0, "use_rslora": True}, 2**0.5)],
)
def test_a_scale_in_the_header_is_read_by_diffusers_alone(
    bases: dict[str, Base], tmp_path: Path, said: dict[str, Any], scale: float
):
    about = {
        f"{component}.{name}": value
        for component in ("unet", "text_encoder")
        for name, value in ({"r": RANK} | said).items()
    }
    header = {"lora_adapter_metadata": json.dumps(about)}
    readings = asked(saved(tmp_path, weights(bases["sd1"], "diffusers"), header), bases["sd1"])
    assert readings["diffusers"].reading == readings["PEFT"].reading == "same"
    others = ("ComfyUI", "Forge", "SD.Next", "stable-diffusion.cpp")
    assert {readings[client].reading for client in others} == {"part" if scale == 1.0 else "other"}
    assert all(("does not read the header" in readings[client].why) == (scale != 1.0) for client in others)


@pytest.mark.parametrize(
    "said",
    [
        "{",
        "[]",
        pytest.param("[" * 99999, id="deep"),
        '"r"',
        '{"unet.r": 3}',
        '{"unet.r": "many"}',
        '{"unet.alpha_pattern": {"(": 2}}',
    ],
)
def test_a_header_that_says_nonsense_is_no_crash(bases: dict[str, Base], tmp_path: Path, said: str):
    file = saved(tmp_path, weights(bases["sd1"], "diffusers", "unet"), {"lora_adapter_metadata": said})
    assert asked(file, bases["sd1"])["diffusers"].reading == "none"


def test_diffusers_takes_no_alphas_beside_its_own_header(bases: dict[str, Base], tmp_path: Path):
    header = {"lora_adapter_metadata": json.dumps({"unet.r": RANK, "unet.lora_alpha": ALPHA})}
    readings = asked(saved(tmp_path, weights(bases["sd1"]), header), bases["sd1"])
    assert told(readings) == {"same": ", ".join(c for c in CLIENTS if c != "diffusers"), "none": "diffusers"}
    assert "lora_adapter_metadata" in readings["diffusers"].why


# ---------------------------------------------------------------------------------------------------------------------
# traps of kinds


def test_dora_by_columns_is_what_most_clients_mean(bases: dict[str, Base], tmp_path: Path):
    content = weights(bases["sd1"], only="unet")
    for key in [key for key in content if key.endswith("lora_down.weight")]:
        lengths = torch.ones(1, *content[key].shape[1:])
        content[key.replace("lora_down.weight", "dora_scale")] = (
            lengths if lengths.dim() == 2 else lengths[:, :, :1, :1]
        )
    readings = asked(saved(tmp_path, content), bases["sd1"])
    assert told(readings) == {
        "same": "A1111, ComfyUI, Forge, InvokeAI, SD.Next",
        "other": "diffusers, sd-scripts, stable-diffusion.cpp",
    }
    assert all("dora_scale" in key for key in readings["diffusers"].unused)
    assert "lengths" in readings["diffusers"].why


def test_no_client_scales_a_lokr_of_two_whole_factors(bases: dict[str, Base], tmp_path: Path):
    base, path = bases["sd1"], UNET[2]
    out, inner = _shape(base, "unet", path)
    own = {"lokr_w1": torch.zeros(2, 2), "lokr_w2": torch.zeros(out // 2, inner // 2)}
    file = saved(tmp_path, tensors(base, {"unet": [Delta(path, own, 7.0)]}, "kohya"))
    assert told(asked(file, base)) == {
        "same": "A1111, ComfyUI, Forge, InvokeAI, SD.Next, stable-diffusion.cpp",
        "none": "diffusers, sd-scripts",
    }
    contents = Contents.of(file)
    assert [one.scale for one in a1111.read(contents, Tree.of(base)).changes] == [1.0]
    assert [meant.scale for meant in contents.meant.values()] == [1.0]


def test_rarer_kinds_are_known_to_the_clients_that_have_them(bases: dict[str, Base], tmp_path: Path):
    layer = "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_ff_net_2"
    kinds = {
        "glora": [f"{layer}.{part}.weight" for part in ("a1", "a2", "b1", "b2")],
        "oft": [f"{layer}.oft_blocks"],
        "ia3": [f"{layer}.weight", f"{layer}.on_input"],
        "norm": [f"{layer.replace('ff_net_2', 'norm1')}.w_norm", f"{layer.replace('ff_net_2', 'norm1')}.b_norm"],
    }
    readers = {
        "glora": "A1111, ComfyUI, Forge, SD.Next",
        "oft": "A1111, ComfyUI, SD.Next",
        "ia3": "A1111, InvokeAI, SD.Next",
        "norm": "A1111, ComfyUI, Forge, InvokeAI, SD.Next",
    }
    attention = only("attn2")(weights(bases["sd1"], only="unet"))
    for kind, keys in kinds.items():
        readings = asked(saved(tmp_path, beside(*keys)(attention)), bases["sd1"])
        assert told(readings)["same"] == readers[kind], kind
        assert {reading.of for reading in readings.values()} == {2}


@pytest.mark.parametrize(("words", "forge"), [(6, "part"), (7, "none")])
def test_bundled_embeddings_are_taken_by_few_and_can_cost_the_file(
    bases: dict[str, Base], tmp_path: Path, words: int, forge: str
):
    names = [f"bundle_emb.word{i}.{which}" for i in range(words) for which in ("clip_l", "clip_g")]
    readings = asked(saved(tmp_path, beside(*names)(weights(bases["sdxl"]))), bases["sdxl"])
    assert {client: readings[client].reading for client in CLIENTS} == {
        "A1111": "same",
        "ComfyUI": "part",
        "Forge": forge,
        "InvokeAI": "part",
        "diffusers": "none",
        "sd-scripts": "part",
        "SD.Next": "same",
        "stable-diffusion.cpp": "part",
    }
    assert readings["InvokeAI"].unused == tuple(sorted(names))
    assert "embeddings" in readings["InvokeAI"].why
    assert "lora in it" in readings["diffusers"].why


# ---------------------------------------------------------------------------------------------------------------------
# files that are no LoRA


@pytest.mark.parametrize(
    "said",
    [
        "[" * 200_000,
        '{"unet.r": ' + "9" * 5000 + "}",
        json.dumps({"unet.r": 1, "unet.lora_alpha": 1, "unet.a_new_field": 1}),
        json.dumps({"unet.alpha_pattern": {"(" * 3000 + ")" * 3000: 1}}),
    ],
    ids=["nested", "a long number", "a setting of a newer PEFT", "a deep pattern"],
)
def test_a_header_that_peft_cannot_use_is_no_reason_to_fail(bases: dict[str, Base], tmp_path: Path, said: str):
    file = saved(tmp_path, weights(bases["sd1"], "diffusers"), {"lora_adapter_metadata": said})
    assert asked(file, bases["sd1"])["diffusers"].reading != "same"


GARBAGE: dict[str, Weights] = {
    "nothing": {},
    "a word": {"hello": torch.zeros(1)},
    "an alpha alone": {"alpha": torch.zeros(3), ".alpha": torch.zeros(()), "lora_unet_conv_in.alpha": torch.zeros(0)},
    "names without ends": {"lora_unet_": torch.zeros(1), ".": torch.zeros(1), "..lora_A.weight": torch.zeros(1)},
    "numbers without shape": {f"lora_unet_conv_in.lora_{side}.weight": torch.zeros(()) for side in ("up", "down")},
    "numbers of no number": {f"lora_unet_conv_in.lora_{side}.weight": torch.zeros(0) for side in ("up", "down")},
    "rank 0": {
        "lora_unet_conv_in.lora_down.weight": torch.zeros(0, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.zeros(320, 0, 1, 1),
        "lora_unet_conv_in.alpha": torch.ones(()),
    },
    "rank 0, as PEFT has it": {
        "unet.conv_in.lora_A.weight": torch.zeros(0, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.zeros(320, 0, 1, 1),
    },
    "half a LoKr": {"lora_unet_conv_in.lokr_w1": torch.zeros(1), "lora_unet_conv_out.lokr_w2_a": torch.zeros(2, 2)},
    "a LoHa of alphas": {f"lora_unet_conv_in.hada_w{n}_{side}": torch.zeros(()) for n in (1, 2) for side in "ab"},
    "names of many lines": {"lora_unet_\n" * 80 + ".lora_down.weight": torch.zeros(1), "\n": torch.zeros(1)},
    "an embedding": {"emb_params": torch.zeros(2, 768)},
    "embeddings in a bundle": {"bundle_emb.word.clip_l": torch.zeros(2, 768), "bundle_emb": torch.zeros(1)},
    "a whole model": {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4),
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": torch.zeros(4),
        "alphas_cumprod": torch.zeros(9),
    },
    "a LoRA of a diffusion transformer": {
        f"transformer.transformer_blocks.0.attn.to_q.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"
    },
    "one in kohya's names": {
        f"lora_unet_double_blocks_0_img_mlp_0.lora_{side}.weight": torch.zeros(4, 4) for side in ("down", "up")
    },
}


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("what", GARBAGE)
def test_no_client_does_anything_with_what_is_no_lora(bases: dict[str, Base], tmp_path: Path, family: str, what: str):
    assert told(asked(saved(tmp_path, GARBAGE[what]), bases[family])) == {"none": ", ".join(CLIENTS)}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_in_a_lora_is_never_the_same(bases: dict[str, Base], tmp_path: Path, what: str):
    content = weights(bases["sd1"]) | GARBAGE[what]
    readings = asked(saved(tmp_path, content), bases["sd1"])
    assert ("same" in told(readings)) == (what == "nothing")


# ---------------------------------------------------------------------------------------------------------------------
# diffusers itself


def in_first_spelling(content: Weights) -> Weights:
    """As diffusers named the tensors before it used PEFT."""
    spelling = {
        r"\.(attn\d)\.to_(q|k|v)\.lora": r".\1.processor.to_\2_lora",
        r"\.self_attn\.(q|k|v|out)_proj\.lora": r".self_attn.to_\1_lora",
        r"(text_encoder.+mlp\.fc\d)\.lora": r"\1.lora_linear_layer",
        "_A.weight": ".down.weight",
        "_B.weight": ".up.weight",
    }
    return in_other_names(spelling)(content)


def test_the_first_spelling_of_diffusers_is_read_by_those_of_its_time(bases: dict[str, Base], tmp_path: Path):
    readings = asked(saved(tmp_path, in_first_spelling(weights(bases["sd1"], "diffusers"))), bases["sd1"])
    assert told(readings) == {
        "same": "diffusers",
        "part": "ComfyUI, Forge, stable-diffusion.cpp",
        "none": "A1111, InvokeAI, sd-scripts, SD.Next",
    }
    assert all(".self_attn." in key for key in readings["ComfyUI"].unused)


LIVE: dict[str, tuple[str, Format, Edit]] = {
    "mixed alphas": ("sd1", "kohya", alphas(torch.tensor(4.0), "attn1|fc1")),
    "mixed alphas of SDXL": ("sdxl", "kohya", alphas(torch.tensor(4.0), "attn1|fc1")),
    "alphas in part": ("sd1", "kohya", alphas(None, "resnets|_q_proj")),
    "no text_model": ("sd1", "kohya", renamed("text_model_", "")),
    "no text_model in SDXL": ("sdxl", "kohya", renamed("text_model_", "")),
    "text encoders without out": ("sd1", "kohya", without("out_proj")),
    "q and v alone": ("sd1", "kohya", without("out_proj|fc|k_proj")),
    "LDM's names in SD 1": ("sd1", "kohya", in_other_names(_LDM_NAMES)),
    "one name of another kind": ("sdxl", "kohya", renamed("middle_block_0_in_layers_2", "mid_block_resnets_0_conv1")),
    "its own": ("sdxl", "diffusers", dict),
    "its own in its first spelling": ("sd1", "diffusers", in_first_spelling),
    "its own without attention": ("sd1", "diffusers", without("self_attn")),
    "a stray key": ("sd1", "kohya", beside("lora_unet_nothing.alpha", shape=())),
    "a matrix for a convolution": ("sd1", "kohya", flat),
}


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys")  # PEFT sees what the alphas of diffusers miss
@pytest.mark.parametrize("case", LIVE)
def test_diffusers_does_what_is_said_of_it(tiny: Callable[[str], tuple[Base, Any]], tmp_path: Path, case: str):
    family, format, edit = LIVE[case]
    base, pipeline = tiny(family)
    content = edit({key: torch.randn_like(t) if t.dim() > 1 else t for key, t in weights(base, format).items()})
    file = saved(tmp_path, content)
    said = huggingface.read(Contents.of(file), Tree.of(base))
    if said.refusal:
        with pytest.raises((ValueError, RuntimeError, KeyError, IndexError)):
            pipeline.load_lora_weights(str(tmp_path), weight_name=file.path.name)
        return
    pipeline.load_lora_weights(str(tmp_path), weight_name=file.path.name, adapter_name="style")
    applied = {
        (component, name.removeprefix("text_model.")): pytest.approx(layer.scaling["style"])
        for component in base.components
        for name, layer in _adapted(getattr(pipeline, component))
    }
    assert {(c.layer.component, c.layer.path.removeprefix("text_model.")): c.scale for c in said.changes} == applied


def _adapted(component: Any) -> list[tuple[str, Any]]:
    return [(name, layer) for name, layer in component.named_modules() if isinstance(layer, BaseTunerLayer)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Base, Any]]:
    """A tiny base of a family, and a plain pipeline of it."""
    bases: dict[str, Base] = {}

    def make(family: str) -> tuple[Base, Any]:
        if family not in bases:
            bases[family] = load_base(inspect_base(str(MAKERS[family](tmp_path_factory.mktemp(family)))))
        kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
        return bases[family], kind.from_pretrained(bases[family].info.source)

    return make
