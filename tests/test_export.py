"""An exported file is the trained model: same names in every client, same scale, same pictures; or it is refused."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig
from typer.testing import CliRunner

from lorasmith.trainer.adapter import ADAPTER, base_weight, deltas, strength
from lorasmith.trainer.anatomy import skeleton
from lorasmith.trainer.architectures import ARCHITECTURES
from lorasmith.trainer.baking import bake
from lorasmith.trainer.bases import FAMILY_TITLES, FamilyName, inspect_base
from lorasmith.trainer.cli import app
from lorasmith.trainer.clients.table import FORM_OF, unread_by
from lorasmith.trainer.config import AdapterSection, RunConfig
from lorasmith.trainer.delta import lora
from lorasmith.trainer.diagnosis.inspection import inspect
from lorasmith.trainer.errors import ExportError, UserError
from lorasmith.trainer.export import castable, export, save, tensors, write
from lorasmith.trainer.fitting import put_on
from lorasmith.trainer.full import trained_weights
from lorasmith.trainer.jobs import RunFolder, create_run
from lorasmith.trainer.keys import Format, diffusers_name, grammar, kohya_name
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.lorafile import LoraFile
from lorasmith.trainer.loraread import merge, read_lora
from lorasmith.trainer.models import FAMILIES, Base, load_base
from lorasmith.trainer.pivotal import token_embeddings
from lorasmith.trainer.plan import make_plan
from lorasmith.trainer.release import formats_of, write_embedding
from lorasmith.trainer.run import load_run
from lorasmith.trainer.sharing.metadata import Facts
from lorasmith.trainer.verify import (
    EFFECT_TOLERANCE,
    WEIGHT_TOLERANCE,
    client_deviations,
    live_changes,
    named_layers,
    verify,
)

from .tiny import MAKERS

FORMATS: list[Format] = ["kohya", "diffusers"]
NAMES: list[FamilyName] = ["sd1", "sd2", "sdxl"]
# Of the adapter's own effect on the picture. fp16 rounding gives 0.0005 to 0.004; these untrained networks amplify it.
PICTURE_TOLERANCE = 0.01


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny diffusers folder of each family; `sdxl-small` has one layer a block, so another sgm numbering."""
    place = tmp_path_factory.mktemp("bases")
    made = {name: make(place / name) for name, make in MAKERS.items()}
    return made | {"sdxl-small": MAKERS["sdxl"](place / "sdxl-small", layers_per_block=1)}


def trained(folder: Path, scale: float = 0.5, **settings: Any) -> Base:
    """A base with an adapter whose weights are not zero."""
    base = load_base(inspect_base(str(folder)))
    put_on(base, AdapterSection(**({"rank": 4, "alpha": 4.0} | settings)), seed=1)
    generator = torch.Generator().manual_seed(5)
    for component in base.components.values():
        for delta in deltas(component):
            delta.up.copy_(torch.randn(delta.up.shape, generator=generator) * scale)
    return base


def mix(base: Base) -> Base:
    """Other ranks and alphas in every third layer, rank-stabilised scaling in every fifth."""
    generator = torch.Generator().manual_seed(6)
    for component in base.components.values():
        layers: list[Any] = [layer for layer in component.modules() if ADAPTER in getattr(layer, "scaling", {})]
        for i, layer in enumerate(layers):
            if i % 3 == 0:
                down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
                down.weight = nn.Parameter(torch.randn(2, *down.weight.shape[1:], generator=generator) * 0.1)
                up.weight = nn.Parameter(torch.randn(len(up.weight), 2, *up.weight.shape[2:], generator=generator))
                layer.r[ADAPTER], layer.lora_alpha[ADAPTER] = 2, 3.0
            layer.use_rslora[ADAPTER] = i % 5 == 0
            rank = layer.r[ADAPTER]
            layer.scaling[ADAPTER] = layer.lora_alpha[ADAPTER] / (rank**0.5 if i % 5 == 0 else rank)
    return base


def freshly(base: Base) -> Base:
    return load_base(base.info)


def plain_pipeline(folder: Path, family: str) -> Any:
    """As a user of diffusers gets it."""
    if family.startswith("sdxl"):
        pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(pipeline: Any) -> np.ndarray:
    """One picture, (height, width, 3) in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    prompt = "emoji of a red apple"
    return pipeline(prompt, num_inference_steps=3, guidance_scale=3.0, generator=generator, output_type="np").images[0]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(((a - b) ** 2).mean()))


CASES: dict[str, dict[str, Any]] = {
    "alpha is rank": {},
    "alpha is not rank": {"alpha": 6.0},
    "all layers": {"targets": "all", "alpha": 2.0},
    "mixed": {"targets": "attention+ff", "alpha": 2.0},
}


@pytest.mark.parametrize(
    ("family", "format", "case"), [*itertools.product(NAMES, FORMATS, CASES), ("sdxl-small", "kohya", "all layers")]
)
def test_a_plain_pipeline_draws_the_same_picture(
    folders: dict[str, Path], tmp_path: Path, family: str, format: Format, case: str
):
    base = trained(folders[family], **CASES[case])
    if case == "mixed":
        mix(base)
    exported = export(base, tmp_path / "style.safetensors", Facts("style"), lambda: freshly(base), format)

    pipeline = plain_pipeline(folders[family], family)
    before = picture(pipeline)
    pipeline.load_lora_weights(str(tmp_path), weight_name="style.safetensors")
    live, loaded = picture(base.pipeline()), picture(pipeline)
    assert distance(live, before) > 0.01  # one hundredth of the whole range: clearly another picture
    assert distance(live, loaded) < PICTURE_TOLERANCE * distance(live, before)

    found = exported.verification
    assert found is not None
    assert found.weight_error < WEIGHT_TOLERANCE[torch.float16] / 2
    assert set(found.answers) == set(base.components)
    assert all(answer.error < EFFECT_TOLERANCE[torch.float16] / 2 for answer in found.answers.values())
    leaves = 3 if format == "kohya" else 2
    assert exported.keys == {name: leaves * count for name, count in found.modules.items()}


@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-6), ("fp16", 1e-3), ("bf16", 8e-3)])
def test_each_precision_keeps_its_promise(folders: dict[str, Path], tmp_path: Path, precision: Any, error: float):
    base = trained(folders["sd1"], alpha=1.0)
    exported = export(base, tmp_path / "a.safetensors", Facts("a"), lambda: freshly(base), "kohya", precision)
    assert exported.verification is not None
    assert exported.verification.weight_error < error
    sizes = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
    dtypes = LoraFile.open(exported.path).dtypes
    assert {dtype for key, dtype in dtypes.items() if key.endswith(".weight")} == {sizes[precision]}
    assert {dtype for key, dtype in dtypes.items() if key.endswith(".alpha")} == {"F32"}


def test_an_adapter_after_one_step_survives_fp16(folders: dict[str, Path], tmp_path: Path):
    base = trained(folders["sd2"], scale=1e-6)
    found = export(base, tmp_path / "young.safetensors", Facts("young"), lambda: freshly(base)).verification
    assert found is not None
    assert found.weight_error < 1e-3
    assert all(answer.strength > 1 for answer in found.answers.values())


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_one_component_alone(folders: dict[str, Path], tmp_path: Path, part: str):
    other = {"unet": "text_encoder", "text_encoder": "unet"}[part]
    base = trained(folders["sd1"], **{other: False})
    found = export(base, tmp_path / "part.safetensors", Facts("part"), lambda: freshly(base)).verification
    assert found is not None
    assert set(found.modules) == set(found.answers) == {part}


# ---------------------------------------------------------------------------------------------------------------------
# what is refused


def spoil(base: Base, path: Path, change: Any, format: Format = "kohya") -> None:
    """Write a good file, then change its tensors; the header stays that of a file with these tensors."""
    write(base, path, format, Facts("spoilt"))
    weights, header = load_file(path), {"ss_v2": "False"}
    change(weights)
    save_file(weights, path, header)


def double_alpha(weights: dict[str, Any]) -> None:
    for key in weights:
        if key.startswith("lora_te_") and key.endswith(".alpha"):
            weights[key] = weights[key] * 2


def alpha_is_rank(weights: dict[str, Any]) -> None:
    for key in weights:
        if key.endswith(".alpha"):
            weights[key] = torch.tensor(4.0)


def mixed_alphas(weights: dict[str, Any]) -> None:
    """The right change in each layer, but diffusers would apply one alpha to all."""
    name = next(key for key in weights if key.endswith("attn1_to_q.alpha")).removesuffix(".alpha")
    weights[f"{name}.alpha"] *= 2
    weights[f"{name}.lora_up.weight"] /= 2


def integer_alpha(weights: dict[str, Any]) -> None:
    key = next(key for key in weights if key.endswith(".alpha"))
    weights[key] = weights[key].to(torch.int64)


def drop_a_layer(weights: dict[str, Any]) -> None:
    for key in [key for key in weights if key.startswith("lora_te_text_model_encoder_layers_1_self_attn_k")]:
        del weights[key]


def drop_text_model(weights: dict[str, Any]) -> None:
    for key in [key for key in weights if "text_model_" in key]:
        weights[key.replace("text_model_", "")] = weights.pop(key)


def te1_on_sd1(weights: dict[str, Any]) -> None:
    for key in [key for key in weights if key.startswith("lora_te_")]:
        weights[key.replace("lora_te_", "lora_te1_")] = weights.pop(key)


def add_a_key(weights: dict[str, Any]) -> None:
    weights["bundle_emb.style.string_to_param.*"] = torch.zeros(1)


def put_nan(weights: dict[str, Any]) -> None:
    next(tensor for key, tensor in weights.items() if key.endswith("up.weight"))[0, 0] = float("nan")


def still_component(weights: dict[str, Any]) -> None:
    for key, tensor in weights.items():
        if key.startswith("lora_te_") and key.endswith("up.weight"):
            tensor.zero_()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (double_alpha, "lora_te_text_model.*off by 100.00%.*alpha 4 at rank 4, live 2 at 4"),
        (alpha_is_rank, "off by 100.00%"),
        (mixed_alphas, "unet has several alphas"),
        (integer_alpha, "not a single fp32 number"),
        (drop_a_layer, "layers_1_self_attn_k_proj.* was trained, but is missing"),
        (drop_text_model, "lora_te_encoder_layers_0.* is not a name that clients read"),
        (te1_on_sd1, "lora_te1_.* is not a name that clients read"),
        (add_a_key, r"bundle_emb.* is not a name"),
        (put_nan, "NaN"),
        (still_component, "text_encoder was trained, but all its changes are zero"),
    ],
)
def test_a_file_that_differs_is_rejected(folders: dict[str, Path], tmp_path: Path, change: Any, says: str):
    base, path = trained(folders["sd1"], alpha=2.0), tmp_path / "bad.safetensors"
    spoil(base, path, change)
    with pytest.raises(ExportError, match=re.compile(says, re.DOTALL)) as caught:
        verify(path, base, lambda: freshly(base))
    assert not path.exists()
    assert (tmp_path / "bad.safetensors.rejected").exists()
    assert "bad.safetensors.rejected" in str(caught.value)
    assert len(caught.value.problems) <= 6


def test_a_diffusers_file_without_text_model_is_rejected(folders: dict[str, Path], tmp_path: Path):
    def drop(weights: dict[str, Any]) -> None:
        for key in [key for key in weights if ".text_model." in key]:
            weights[key.replace(".text_model.", ".")] = weights.pop(key)

    base, path = trained(folders["sd1"]), tmp_path / "bad.safetensors"
    spoil(base, path, drop, "diffusers")
    plain_pipeline(folders["sd1"], "sd1").load_lora_weights(str(tmp_path), weight_name=path.name)  # diffusers takes it
    with pytest.raises(ExportError, match="is not a name that clients read"):
        verify(path, base, lambda: freshly(base))


def test_one_diffusers_name_among_sgm_names_is_rejected(folders: dict[str, Path], tmp_path: Path):
    def rename(weights: dict[str, Any]) -> None:
        for key in [key for key in weights if key.startswith("lora_unet_middle_block_1_proj_in")]:
            weights[key.replace("middle_block_1", "mid_block_attentions_0")] = weights.pop(key)

    base, path = trained(folders["sdxl"], targets="attention+ff"), tmp_path / "bad.safetensors"
    spoil(base, path, rename)
    with pytest.raises(ExportError, match=r"lora_unet_mid_block_attentions_0_proj_in.* is not a name"):
        verify(path, base, lambda: freshly(base))


def test_metadata_that_breaks_diffusers_or_lies_is_rejected(folders: dict[str, Path], tmp_path: Path):
    base, path = trained(folders["sd1"]), tmp_path / "bad.safetensors"
    for header, says in (({"lora_adapter_metadata": "{}"}, "diffusers refuse"), ({"sshs_model_hash": "0"}, "hash")):
        write(base, path, "kohya", Facts("bad"))
        save_file(load_file(path), path, header)
        with pytest.raises(ExportError, match=says):
            verify(path, base, lambda: freshly(base))


def test_a_cut_file_is_rejected(folders: dict[str, Path], tmp_path: Path):
    base, path = trained(folders["sd1"]), tmp_path / "bad.safetensors"
    write(base, path, "kohya", Facts("bad"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ExportError, match="not a whole safetensors file"):
        verify(path, base, lambda: freshly(base))


def test_a_pipeline_that_answers_otherwise_is_rejected(folders: dict[str, Path], tmp_path: Path):
    base, path = trained(folders["sd1"]), tmp_path / "bad.safetensors"
    write(base, path, "kohya", Facts("bad"))

    def other_base() -> Base:
        fresh = freshly(base)
        fresh.unet.conv_in.weight.data *= 1.05
        return fresh

    with pytest.raises(ExportError, match="output of unet in a fresh pipeline is off"):
        verify(path, base, other_base)


def live_nan(base: Base) -> None:
    next(deltas(base.unet)).up[0, 0] = float("nan")


def live_too_large(base: Base) -> None:
    next(deltas(base.unet)).up[0, 0] = 1e6


def live_zero(base: Base) -> None:
    for delta in deltas(base.text_encoders["text_encoder"]):
        delta.up.zero_()


def live_merged(base: Base) -> None:
    layer: Any = next(layer for layer in base.unet.modules() if ADAPTER in getattr(layer, "scaling", {}))
    layer.merge()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (live_nan, r"unet.*lora_up.weight: holds NaN"),
        (live_too_large, "beyond the range of float16"),
        (live_zero, "text_encoder: was trained, but all its changes are zero"),
        (live_merged, "merged"),
    ],
)
def test_a_live_model_that_cannot_be_written_is_refused(
    folders: dict[str, Path], tmp_path: Path, change: Any, says: str
):
    base = trained(folders["sd1"])
    change(base)
    with pytest.raises(ExportError, match=says):
        export(base, tmp_path / "bad.safetensors", Facts("bad"), lambda: freshly(base))
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_hardly_changes_is_no_reason_to_reject(folders: dict[str, Path], tmp_path: Path):
    """As of self-attention over one pixel: its change is so small that fp16 keeps only some of its bits."""
    base = trained(folders["sd1"])
    next(deltas(base.unet)).up.mul_(1e-11)
    export(base, tmp_path / "still.safetensors", Facts("still"), lambda: freshly(base))


def test_only_the_trained_strength_is_exported(folders: dict[str, Path]):
    base = trained(folders["sd1"])
    with strength(base, 0.5), pytest.raises(ExportError, match=r"strength 0.5, not 1"):
        castable(base, None, "kohya", torch.float16)
    with pytest.raises(ExportError, match="carries no adapter"):
        castable(load_base(inspect_base(str(folders["sd1"]))), None, "kohya", torch.float16)


# ---------------------------------------------------------------------------------------------------------------------
# other forms than LoRA

KINDS: dict[str, dict[str, Any]] = {
    "dora": {"kind": "dora", "targets": "all"},
    "loha": {"kind": "loha", "targets": "all"},
    "lokr": {"kind": "lokr", "targets": "all"},
    "lokr of two whole factors": {"kind": "lokr", "rank": 512, "alpha": 256.0},
    "oft": {"kind": "oft", "block_size": 4, "targets": "all-linear"},
    "boft": {"kind": "boft", "block_size": 4, "targets": "all"},
    "pissa": {"init": "pissa", "targets": "all"},
    "olora": {"init": "olora"},
}


def of_kind(folder: Path, kind: str, scale: float = 0.05, **settings: Any) -> Base:
    """A base with an adapter of that kind, none of whose weights is where it began."""
    base = load_base(inspect_base(str(folder)))
    put_on(base, AdapterSection(**({"rank": 4, "alpha": 6.0} | KINDS[kind] | settings)), seed=1)
    torch.manual_seed(8)
    for parameter in trained_weights(base).values():
        parameter.data.add_(scale * torch.randn_like(parameter))
    return base


@pytest.mark.parametrize("scale", [0.05, 1e-5])
@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_written_and_verified(
    folders: dict[str, Path], tmp_path: Path, kind: str, family: FamilyName, scale: float
):
    base = of_kind(folders[family], kind, scale)
    exported = export(base, tmp_path / "style.safetensors", Facts("style"), lambda: freshly(base))
    assert exported.verification is not None
    assert set(exported.verification.answers) == set(base.components)

    changes = read_lora(exported.path, freshly(base).components, family)
    assert {delta.form for own in changes.values() for delta in own} == {FORM_OF[base_kind(kind)]}
    if scale == 0.05:
        fresh = freshly(base)
        before, live = picture(fresh.pipeline()), picture(base.pipeline())
        merge(fresh.components, changes)
        assert distance(picture(fresh.pipeline()), live) < PICTURE_TOLERANCE * distance(live, before)


def base_kind(kind: str) -> Any:
    return KINDS[kind].get("kind", "lora")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_verified_on_a_base_of_half_precision(
    folders: dict[str, Path], tmp_path: Path, kind: str, dtype: torch.dtype
):
    base = of_kind(folders["sd1"], kind)
    for module in base.components.values():
        for name, parameter in module.named_parameters():
            if "lora_" not in name and not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    export(base, tmp_path / "style.safetensors", Facts("style"), lambda: load_base(base.info, dtype))


@pytest.mark.parametrize("family", NAMES)
def test_diffusers_loads_the_dora_of_a_unet(folders: dict[str, Path], tmp_path: Path, family: FamilyName):
    base = of_kind(folders[family], "dora", text_encoder=False)
    export(base, tmp_path / "style.safetensors", Facts("style"), lambda: freshly(base), "diffusers")
    pipeline = plain_pipeline(folders[family], family)
    before = picture(pipeline)
    pipeline.load_lora_weights(str(tmp_path), weight_name="style.safetensors")
    live = picture(base.pipeline())
    assert distance(live, picture(pipeline)) < PICTURE_TOLERANCE * distance(live, before)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("dora", "text_encoder: diffusers does not load the lengths"),
        ("loha", "diffusers has no format for what is a loha"),
        ("lokr", "diffusers has no format for what is a lokr"),
        ("oft", "diffusers has no format for what is a full"),
    ],
)
def test_what_diffusers_does_not_load_is_not_written_for_it(
    folders: dict[str, Path], tmp_path: Path, kind: str, says: str
):
    base = of_kind(folders["sd1"], kind)
    with pytest.raises(ExportError, match=says):
        export(base, tmp_path / "style.safetensors", Facts("style"), lambda: freshly(base), "diffusers")
    assert list(tmp_path.iterdir()) == []


def first(weights: dict[str, Any], ending: str) -> str:
    return next(key for key in weights if key.startswith("lora_unet") and key.endswith(ending))


def scaled(ending: str) -> Any:
    def change(weights: dict[str, Any]) -> None:
        for key in weights:
            if key.startswith("lora_unet") and key.endswith(ending):
                weights[key] = weights[key] * 1.5

    return change


def dropped(ending: str) -> Any:
    def change(weights: dict[str, Any]) -> None:
        del weights[first(weights, ending)]

    return change


def as_columns(weights: dict[str, Any]) -> None:
    key = first(weights, "to_q.dora_scale")
    weights[key] = weights[key].T.contiguous()


def nothing(ending: str) -> Any:
    def change(weights: dict[str, Any]) -> None:
        for key in weights:
            if key.startswith("lora_te") and key.endswith(ending):
                weights[key].zero_()

    return change


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("dora", scaled(".dora_scale"), "its change is off by"),
        ("dora", dropped(".dora_scale"), "dora_scale was trained, but is missing"),
        ("dora", as_columns, "has other shapes"),
        ("loha", scaled(".alpha"), r"off by 50.00% in the file \(allowed 0.20%; alpha 9 at rank 4, live 6 at 4\)"),
        ("loha", scaled(".hada_w2_b"), "its change is off by 50.00%"),
        ("loha", dropped(".hada_w1_a"), "hada_w1_a was trained, but is missing"),
        ("lokr", scaled(".lokr_w1"), "its change is off by 50.00%"),
        ("lokr of two whole factors", scaled(".lokr_w2"), r"off by 50.0\d% in the file \(allowed 0.20%\)"),
        ("loha", nothing(".hada_w2_a"), "text_encoder was trained, but all its changes are zero"),
        ("oft", scaled(".diff"), "its change is off by 50.00%"),
        ("oft", dropped(".diff"), "diff was trained, but is missing"),
        ("pissa", scaled(".lora_up.weight"), "its change is off by 50.00%"),
    ],
)
def test_a_file_of_any_kind_that_differs_is_rejected(
    folders: dict[str, Path], tmp_path: Path, kind: str, change: Any, says: str
):
    base, path = of_kind(folders["sd1"], kind), tmp_path / "bad.safetensors"
    spoil(base, path, change)
    with pytest.raises(ExportError, match=re.compile(says, re.DOTALL)):
        verify(path, base, lambda: freshly(base))
    assert (tmp_path / "bad.safetensors.rejected").exists()


def test_clients_that_ignore_alpha_beside_two_whole_factors_make_the_same_change(
    folders: dict[str, Path], tmp_path: Path
):
    base = of_kind(folders["sd1"], "lokr of two whole factors")
    weights = load_file(write(base, tmp_path / "x.safetensors", "kohya", Facts("x"), "fp32").path)
    assert {float(tensor) for key, tensor in weights.items() if key.endswith(".alpha")} == {1.0}
    for delta in deltas(base.unet):
        name = kohya_name("sd1", "unet", delta.name)
        change = torch.kron(weights[f"{name}.lokr_w1"], weights[f"{name}.lokr_w2"])
        torch.testing.assert_close(change, base.unet.get_submodule(delta.name).get_delta_weight(ADAPTER))


@pytest.mark.parametrize("kind", ["dora", "loha", "oft", "pissa"])
def test_no_kind_is_exported_at_another_strength(folders: dict[str, Path], kind: str):
    base = of_kind(folders["sd1"], kind)
    with strength(base, 0.5), pytest.raises(ExportError, match=r"strength 0.5, not 1|merged or switched off"):
        castable(base, None, "kohya", torch.float16)


@pytest.mark.parametrize(
    ("kind", "module", "arguments"),
    [
        ("dora", "lycoris.kohya", {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}),
        ("loha", "lycoris.kohya", {"algo": "loha"}),
        ("lokr", "lycoris.kohya", {"algo": "lokr"}),
        ("oft", "lycoris.kohya", {"algo": "full"}),
        ("pissa", "networks.lora", {"conv_dim": "Dynamic", "conv_alpha": "6.0"}),
    ],
)
def test_the_header_names_the_network(
    folders: dict[str, Path], tmp_path: Path, kind: str, module: str, arguments: dict[str, str]
):
    base = of_kind(folders["sd1"], kind)
    header = LoraFile.open(write(base, tmp_path / "x.safetensors", "kohya", Facts("x")).path).metadata
    assert header["ss_network_module"] == module
    assert json.loads(header["ss_network_args"]).items() >= (arguments if module != "networks.lora" else {}).items()
    assert ("ss_network_dim" in header) == (kind != "oft")
    found = inspect(tmp_path / "x.safetensors")
    assert (found["format"], found["other_keys"]) == ("kohya", [])
    assert list(found["components"]["unet"]["forms"]) == [FORM_OF[base_kind(kind)]]


def test_what_clients_do_not_read_is_told_before_training():
    assert unread_by("lora") == []
    assert unread_by("loha") == [
        "loha: diffusers and sd-scripts do not read it; lorasmith resize writes a plain LoRA of it."
    ]
    for form in ("dora", "lokr", "full"):
        assert all(sentence.startswith(f"{form}: ") for sentence in unread_by(form))
        assert any("lorasmith resize" in sentence for sentence in unread_by(form))
    assert "ComfyUI" in unread_by("dora")[0]


# ---------------------------------------------------------------------------------------------------------------------
# baking


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_baked_lora_of_full_rank_draws_what_was_trained(
    folders: dict[str, Path], tmp_path: Path, kind: str, family: FamilyName
):
    base = of_kind(folders[family], kind)
    changes, facts = bake(base, live_changes(base), 512)
    assert all(lost < 1e-5 for lost in facts.lost.values())
    assert facts.lost.keys() == base.components.keys()
    file = tmp_path / "plain.safetensors"
    export(base, file, Facts("plain", baked=facts), lambda: freshly(base), "kohya", "fp16", changes)
    pipeline = plain_pipeline(folders[family], family)
    before, live = picture(pipeline), picture(base.pipeline())
    pipeline.load_lora_weights(str(tmp_path), weight_name=file.name)
    assert distance(live, picture(pipeline)) < PICTURE_TOLERANCE * distance(live, before)


def test_a_baked_lora_of_low_rank_says_what_it_lost(folders: dict[str, Path], tmp_path: Path):
    base = of_kind(folders["sd1"], "loha")
    changes, facts = bake(base, live_changes(base), 2)
    before, after = 0.0, 0.0
    for delta in deltas(base.unet):
        values = torch.linalg.svdvals(delta.of(base_weight(base.unet, delta.name)).flatten(1).double())
        before, after = before + float((values**2).sum()), after + float((values[2:] ** 2).sum())
    assert facts.lost["unet"] == pytest.approx((after / before) ** 0.5, rel=1e-4)
    assert 0.1 < facts.lost["unet"] < 1

    exported = export(base, tmp_path / "x.safetensors", Facts("x", baked=facts), lambda: freshly(base), changes=changes)
    header = LoraFile.open(exported.path).metadata
    assert header["lorasmith_baked_rank"] == header["ss_network_dim"] == "2"
    assert json.loads(header["lorasmith_baked_lost"])["unet"] == pytest.approx(facts.lost["unet"], abs=1e-6)
    assert header["ss_network_module"] == "networks.lora"


def test_a_damaged_baked_file_is_rejected(folders: dict[str, Path], tmp_path: Path):
    base, path = of_kind(folders["sd1"], "loha"), tmp_path / "x.safetensors"
    changes, facts = bake(base, live_changes(base), 2)
    write(base, path, "kohya", Facts("x", baked=facts), changes=changes)
    weights = load_file(path)
    double_alpha(weights)
    save_file(weights, path)
    with pytest.raises(ExportError, match=r"off by 100\.00%"):
        verify(path, base, lambda: freshly(base), changes)


# ---------------------------------------------------------------------------------------------------------------------
# by the command


@pytest.fixture
def finished(folders: dict[str, Path], short_run: Any, request: pytest.FixtureRequest) -> RunFolder:
    """The folder of a trained run, by family and adapter."""
    family, adapter = request.param
    settings = {"rank": 4, "alpha": 4.0} | adapter
    rates = {"text_encoder_lr": 1e-3 if adapter.get("text_encoder", True) else 0.0}
    config = short_run(base={"model": str(folders[family])}, adapter=settings, optimizer=rates, budget={"images": 4})
    plan = make_plan(config)
    trainer = Trainer(plan, create_run(plan.config), lambda event: None)
    assert trainer.train(lambda: False) == "finished"
    return trainer.run


def command(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("finished", [("sd1", {"kind": "loha"})], indirect=True)
def test_a_run_and_its_file_are_baked_by_the_command(finished: RunFolder, folders: dict[str, Path], tmp_path: Path):
    told = command("export", finished.path, "--out", tmp_path)
    files, said = told.splitlines()[:4], told.splitlines()[4:]
    endings = (".safetensors", ".md", ".json", "-verified.json")
    assert files == [str(tmp_path / f"short{ending}") for ending in endings]
    assert said[0].startswith("short.safetensors does what was trained in ")
    assert [line.partition(".")[0] for line in said[-2:]] == ["  diffusers: none", "  sd-scripts: none"]
    card = (tmp_path / "short.md").read_text(encoding="utf-8")
    assert "The file is a loha" in card
    assert "lorasmith resize short.safetensors" in card
    assert "load_lora_weights" not in card
    assert "diffusers" not in card.split("---")[1]
    with pytest.raises(UserError, match=r"no format 'diffusers' of this run.*--bake RANK"):
        command("export", finished.path, "--format", "diffusers", "--out", tmp_path)

    told = command("export", finished.path, "--bake", 2, "--out", tmp_path)
    assert re.search(r"unet: \d+\.\d\d% of the change is lost\ntext_encoder: ", told)
    for name in ("short-baked2", "short-baked2-diffusers"):
        assert inspect(tmp_path / f"{name}.safetensors")["components"]["unet"]["forms"].keys() == {"lora"}
    card = (tmp_path / "short-baked2.md").read_text(encoding="utf-8")
    assert "| baked to rank | 2 |" in card
    assert "weight_name='short-baked2.safetensors'" in card

    arguments = ("resize", tmp_path / "short.safetensors", "--rank", 2, "--base", folders["sd1"])
    assert "of the change is lost" in command(*arguments, "--out", tmp_path / "again.safetensors")
    with pytest.raises(UserError, match="exists already"):
        command(*arguments, "--out", tmp_path / "again.safetensors")


@pytest.mark.parametrize(
    "finished", [(family, {"new_tokens": 2, "text_encoder": False}) for family in ("sd1", "sdxl")], indirect=True
)
def test_embeddings_of_new_tokens_are_a_file_that_diffusers_loads(
    finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told = command("export", finished.path, "--precision", "fp32", "--out", tmp_path)
    file = tmp_path / "short-embedding" / "trg.safetensors"
    assert str(file) in told
    assert (
        "It needs the embedding trg.safetensors"
        in LoraFile.open(tmp_path / "short.safetensors").metadata["modelspec.usage_hint"]
    )
    base = load_run(finished.path, None).base
    vectors, family = load_file(file), base.info.family
    names = {"sd1": {"emb_params": 32}, "sdxl": {"clip_l": 32, "clip_g": 48}}[family]
    assert {name: tuple(vector.shape) for name, vector in vectors.items()} == {n: (2, w) for n, w in names.items()}

    pipeline = plain_pipeline(Path(base.info.source), family)
    card = (tmp_path / "short.md").read_text(encoding="utf-8")
    loading = re.findall(r"^(?:import safetensors|vectors = |pipeline\.load_).*$", card, re.MULTILINE)
    assert len(loading) == {"sd1": 2, "sdxl": 5}[family]
    monkeypatch.chdir(tmp_path)
    exec("\n".join(loading), {"pipeline": pipeline})
    theirs = pipeline.encode_prompt(
        "a trg house", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0]
    torch.testing.assert_close(theirs, base.encode(["a trg house"]).hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("finished", [("sd1", {"new_tokens": 1})], indirect=True)
def test_embeddings_that_hold_nan_are_refused(finished: RunFolder, tmp_path: Path):
    trained_run = load_run(finished.path, None)
    next(iter(token_embeddings(trained_run.base).values()))[0, 0] = torch.nan
    with pytest.raises(ExportError, match="embeddings of the new tokens hold NaN"):
        write_embedding(trained_run.base, tmp_path / "trg.safetensors")
    assert list(tmp_path.glob("trg*")) == []


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "full"])
@pytest.mark.parametrize("text_encoder", [True, False])
def test_formats_follow_from_what_is_trained(kind: Any, text_encoder: bool):
    adapter = {"kind": kind, "text_encoder": text_encoder}
    config = RunConfig.model_validate({"name": "x", "data": [{"path": "photos"}], "adapter": adapter})
    expected = {"full": ("ldm", "diffusers"), "loha": ("kohya",)}.get(kind, ("kohya", "diffusers"))
    assert formats_of(config) == (("kohya",) if kind == "dora" and text_encoder else expected)
    assert formats_of(config, baked=True) == ("kohya", "diffusers")


# ---------------------------------------------------------------------------------------------------------------------
# names


def full_size(architecture: str) -> Base:
    """The published shapes on the meta device: names without weights."""
    parts, info = ARCHITECTURES[architecture], inspect_base(f"random:{architecture}")
    with torch.device("meta"):
        unet = UNet2DConditionModel(**parts["unet"])
        classes = FAMILIES[info.family].text_encoder_classes
        encoders = {name: kind(CLIPTextConfig(**parts[name])) for name, kind in classes.items()}
    nothing: Any = None
    return Base(info, [], encoders, nothing, unet, nothing)


@pytest.mark.parametrize(
    ("architecture", "modules"),
    [
        ("sd15", {"unet": 192, "text_encoder": 72}),
        ("sd21", {"unet": 192, "text_encoder": 138}),
        ("sdxl", {"unet": 722, "text_encoder": 72, "text_encoder_2": 192}),
    ],
)
def test_the_full_size_models_have_the_names_all_clients_know(architecture: str, modules: dict[str, int]):
    base = full_size(architecture)
    family = base.info.family
    for component, module in base.components.items():
        paths = adaptable(component, module)
        kohya = [kohya_name(family, component, path) for path in paths]
        plain = [diffusers_name(component, path) for path in paths]
        linear = [path for path in paths if not re.search("conv|time_emb", path)]
        assert len(linear) == modules[component]
        assert len(set(kohya)) == len(set(plain)) == len(paths)
        for name in kohya:
            assert grammar(family, "kohya").fullmatch(f"{name}.lora_up.weight"), name
            assert name.count("text_model_") == (component != "unet")
        for name in plain:
            assert grammar(family, "diffusers").fullmatch(f"{name}.lora_B.weight"), name
            assert name.count("text_model.") == (component != "unet")


def adaptable(component: str, module: nn.Module) -> list[str]:
    """Every layer that the widest targets reach, and the last text layer too."""
    known = (
        r"to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)|proj_(in|out)|conv[12]|conv_shortcut|time_emb_proj"
        r"|(down|up)samplers\.0\.conv"
        if component == "unet"
        else r"(q|k|v|out)_proj|fc[12]"
    )
    return [path for path, _ in module.named_modules() if re.search(rf"\.({known})$", path)]


@pytest.mark.parametrize("small", [False, True])
def test_diffusers_maps_every_sdxl_name_back_to_its_layer(folders: dict[str, Path], small: bool):
    unet = load_base(inspect_base(str(folders["sdxl-small"]))).unet if small else full_size("sdxl").unet
    paths = adaptable("unet", unet)
    per_block = unet.config["layers_per_block"]
    numbered = {kohya_name("sdxl", "unet", path, per_block): i for i, path in enumerate(paths)}
    file = {f"{name}.lora_down.weight": torch.tensor(i) for name, i in numbered.items()}
    file |= {f"{name}.lora_up.weight": torch.tensor(i) for name, i in numbered.items()}
    read: Any = StableDiffusionXLPipeline.lora_state_dict(file, unet_config=unet.config)
    for key, number in read[0].items():
        path = paths[int(number)]
        words = re.sub(r"\.processor|_lora|\.lora", "", key.removeprefix("unet.")).replace("to_out", "to_out.0")
        assert words.removesuffix(".down.weight").removesuffix(".up.weight") == path
    assert len(read[0]) == 2 * len(paths)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (
            "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0",
            "input_blocks_4_1_transformer_blocks_1_attn2_to_out_0",
        ),
        ("down_blocks.2.resnets.1.conv_shortcut", "input_blocks_8_0_skip_connection"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks_3_0_op"),
        ("mid_block.attentions.0.proj_in", "middle_block_1_proj_in"),
        ("mid_block.resnets.1.time_emb_proj", "middle_block_2_emb_layers_1"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks_2_2_conv"),
        ("up_blocks.1.attentions.2.proj_out", "output_blocks_5_1_proj_out"),
        ("up_blocks.2.resnets.0.conv1", "output_blocks_6_0_in_layers_2"),
    ],
)
def test_sgm_names_are_those_of_the_table(path: str, name: str):
    assert kohya_name("sdxl", "unet", path) == f"lora_unet_{name}"
    assert kohya_name("sd1", "unet", path) == f"lora_unet_{path.replace('.', '_')}"


@pytest.mark.parametrize(("projections", "is_read"), [("qkv", False), (("q", "k", "v", "out"), True)])
def test_what_a_client_would_leave_out_is_not_exported(tmp_path: Path, projections: Iterable[str], is_read: bool):
    """A1111 takes the attention of OpenCLIP's text encoder whole or not at all."""
    base = skeleton(inspect_base("random:sdxl"))
    paths = [f"text_model.encoder.layers.3.self_attn.{which}_proj" for which in projections]
    deltas = [lora(path, torch.randn(1, 1280), torch.randn(1280, 1), 1.0) for path in paths]
    file, changes = tmp_path / "x.safetensors", {"text_encoder_2": deltas}
    save(file, tensors(base, changes, "kohya"), lambda writer: {}, "kohya", "fp32")
    if is_read:
        layers = named_layers(base, changes, "kohya")
        assert not list(client_deviations(LoraFile.open(file), base, layers, "kohya"))
    else:
        with pytest.raises(ExportError, match=r"A1111 would not do what was trained: .*q, k, v and out are all there"):
            verify(file, base, lambda: pytest.fail("it is refused before"), changes)


def test_wrappers_leave_no_trace_in_names():
    path = "encoder.layers.0.self_attn.q_proj"
    for written in (path, f"text_model.{path}", f"module._orig_mod.text_model.{path}", f"base_model.model.{path}"):
        assert kohya_name("sd1", "text_encoder", written) == f"lora_te_text_model_{path.replace('.', '_')}"
        assert diffusers_name("text_encoder_2", written) == f"text_encoder_2.text_model.{path}"
    assert kohya_name("sdxl", "text_encoder", path).startswith("lora_te1_text_model_")
    assert kohya_name("sdxl", "text_encoder_2", path).startswith("lora_te2_text_model_")


@pytest.mark.parametrize("path", ["conv_in", "time_embedding.linear_1", "add_embedding.linear_1", "mid_block.norm"])
def test_a_layer_that_some_clients_drop_has_no_name(path: str):
    for name in NAMES:
        with pytest.raises(ExportError, match=re.escape(path)):
            kohya_name(name, "unet", path)
    with pytest.raises(ExportError, match="no component 'text_encoder_2'"):
        kohya_name("sd1", "text_encoder_2", "encoder.layers.0.mlp.fc1")


# ---------------------------------------------------------------------------------------------------------------------
# what is in a file


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", NAMES)
def test_inspect_says_what_is_in_a_file(folders: dict[str, Path], tmp_path: Path, family: str, format: Format):
    base, path = trained(folders[family], alpha=2.0), tmp_path / "x.safetensors"
    write(base, path, format, Facts("x", tag_frequency={"photos": {"house": 3}}))
    found = json.loads(json.dumps(inspect(path), allow_nan=False))
    assert (found["format"], found["family"], found["other_keys"]) == (format, family, [])
    assert FAMILY_TITLES[found["family"]]
    assert set(found["components"]) == set(base.components)
    unet = found["components"]["unet"]
    assert unet["ranks"] == {"4": unet["modules"]}
    assert unet["alphas"] == {"2" if format == "kohya" else "4": unet["modules"]}
    assert found["metadata"]["ss_tag_frequency"]["photos"]["house"] == 3


def test_inspect_recognises_full_size_files_by_their_shapes(tmp_path: Path):
    for width, family in ((768, "sd1"), (1024, "sd2"), (2048, "sdxl")):
        name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
        weights = {f"{name}.lora_down.weight": torch.zeros(4, width), f"{name}.lora_up.weight": torch.zeros(9, 4)}
        save_file(weights, tmp_path / "bare.safetensors")
        assert inspect(tmp_path / "bare.safetensors")["family"] == family


def test_inspect_reads_any_safetensors_file_and_refuses_others(tmp_path: Path):
    save_file({"model.weight": torch.zeros(2), "alpha": torch.zeros(0)}, tmp_path / "other.safetensors")
    found = inspect(tmp_path / "other.safetensors")
    assert (found["format"], found["family"], found["components"]) == ("unknown", "unknown", {})
    assert found["other_keys"] == ["alpha", "model.weight"]
    (tmp_path / "short").write_bytes(b"abc")
    with pytest.raises(UserError, match="not a whole safetensors file") as caught:
        inspect(tmp_path / "short")
    assert str(tmp_path / "short") in str(caught.value)


def test_a_file_must_be_named_as_what_it_is(folders: dict[str, Path], tmp_path: Path):
    with pytest.raises(UserError, match=re.escape("does not end in .safetensors")):
        write(trained(folders["sd1"]), tmp_path / "style.bin", "kohya", Facts("style"))
