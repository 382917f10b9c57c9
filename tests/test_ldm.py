"""Whole models in one file: its names against diffusers' converters and the published ones; there and back."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer

from lorasmith.trainer.architectures import ARCHITECTURES
from lorasmith.trainer.bases import POCKET, FamilyName, inspect_base
from lorasmith.trainer.config import AdapterSection
from lorasmith.trainer.errors import BaseModelError, ExportError, UserError
from lorasmith.trainer.fitting import put_on
from lorasmith.trainer.ldm import from_ldm, to_ldm, with_text_model
from lorasmith.trainer.models import FAMILIES, Base, clip_tokenizer, load_base
from lorasmith.trainer.singlefile import COMPONENTS, SingleFile, read_single_file
from lorasmith.trainer.wholemodel import save_checkpoint_file, save_model_folder

from .conftest import unpack
from .tiny import MAKERS

Weights = dict[str, dict[str, Tensor]]


SHAPES = [(family, layers) for family in MAKERS for layers in (1, 2)]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"{shape[0]}-{shape[1]}")
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A tiny model; SDXL's first level has no attention, SD 1's and SD 2's last. No test changes it."""
    family, layers = request.param
    return load_base(inspect_base(str(MAKERS[family](tmp_path_factory.mktemp("base"), layers_per_block=layers))))


@pytest.fixture
def pocket() -> Base:
    return load_base(inspect_base("pocket"), torch.float16)


@pytest.fixture
def pocket_file(pocket: Base, tmp_path: Path) -> Path:
    path = tmp_path / "pocket.safetensors"
    save_checkpoint_file(pocket, path)
    return path


def weights_of(base: Base) -> Weights:
    """By component, in the names that files have."""
    weights = {name: dict(module.state_dict()) for name, module in (*base.components.items(), ("vae", base.vae))}
    return {name: with_text_model(own) if "text" in name else own for name, own in weights.items()}


def convert(base: Base) -> dict[str, Tensor]:
    return to_ldm(base.info.family, weights_of(base), base.unet.config, base.vae.config)


def assert_same(read: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert read.keys() == expected.keys()
    for key, tensor in expected.items():
        assert read[key].dtype == tensor.dtype, key
        assert torch.equal(read[key], tensor), key


def rewrite(path: Path, metadata: dict[str, str]) -> None:
    """The same tensors under another header."""
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    save_file(tensors, path, metadata)


# ---------------------------------------------------------------------------------------------------------------------
# names and shapes


def test_there_and_back_every_bit_is_the_same(base: Base):
    read = from_ldm(base.info.family, convert(base), base.unet.config, base.vae.config)
    expected = weights_of(base)
    assert read.keys() == expected.keys()
    for component, own in expected.items():
        assert_same(read[component], own)


def test_names_of_live_text_encoders_need_no_prefix(base: Base):
    live = {name: dict(module.state_dict()) for name, module in (*base.components.items(), ("vae", base.vae))}
    bare = {key.removeprefix("text_model."): tensor for key, tensor in live["text_encoder"].items()}
    args = base.unet.config, base.vae.config
    assert_same(to_ldm(base.info.family, live | {"text_encoder": bare}, *args), convert(base))


def test_diffusers_reads_the_same_model(base: Base):
    weights, file, config = weights_of(base), convert(base), dict(base.unet.config)
    assert_same(convert_ldm_unet_checkpoint(dict(file), config), weights["unet"])
    assert_same(convert_ldm_vae_checkpoint(dict(file), dict(base.vae.config)), weights["vae"])
    first = base.text_encoders["text_encoder"]
    if base.info.family == "sd2":
        assert_same(convert_open_clip_checkpoint(first, dict(file)), weights["text_encoder"])
    else:
        assert_same(convert_ldm_clip_checkpoint(dict(file)), weights["text_encoder"])
    if base.info.family == "sdxl":
        second, prefix = base.text_encoders["text_encoder_2"], "conditioner.embedders.1.model."
        assert_same(convert_open_clip_checkpoint(second, dict(file), prefix), weights["text_encoder_2"])


@pytest.mark.parametrize("mid", ["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"])
def test_blocks_of_other_numbers_and_kinds(mid: str):
    unet = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=(1, 3, 2),  # pyright: ignore[reportArgumentType]
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=mid,
        block_out_channels=(8, 16, 16),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    pocket = load_base(inspect_base("pocket"))
    weights = weights_of(pocket) | {"unet": dict(unet.state_dict())}
    file = to_ldm("sd1", weights, unet.config, pocket.vae.config)
    assert_same(from_ldm("sd1", file, unet.config, pocket.vae.config)["unet"], weights["unet"])
    assert ("model.diffusion_model.middle_block.2.in_layers.0.weight" in file) == (mid != "UNetMidBlock2D")
    assert "model.diffusion_model.output_blocks.2.2.conv.weight" in file
    assert "model.diffusion_model.output_blocks.6.1.conv.weight" in file


UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, CLIP_XL = "cond_stage_model.transformer.text_model.", "conditioner.embedders.0.transformer.text_model."
OPEN, OPEN_XL = "cond_stage_model.model.", "conditioner.embedders.1.model."
PUBLISHED: dict[str, dict[str, tuple[int, ...]]] = {
    "sd15": {
        UNET + "time_embed.0.weight": (1280, 320),
        UNET + "input_blocks.0.0.weight": (320, 4, 3, 3),
        UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        UNET + "input_blocks.2.1.proj_in.weight": (320, 320, 1, 1),
        UNET + "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        UNET + "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        UNET + "input_blocks.11.0.out_layers.3.bias": (1280,),
        UNET + "middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
        UNET + "middle_block.2.emb_layers.1.weight": (1280, 1280),
        UNET + "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        UNET + "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        UNET + "output_blocks.8.2.conv.weight": (640, 640, 3, 3),
        UNET + "output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        UNET + "output_blocks.11.1.transformer_blocks.0.norm3.weight": (320,),
        UNET + "out.2.weight": (4, 320, 3, 3),
        VAE + "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        VAE + "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        VAE + "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        VAE + "encoder.conv_out.weight": (8, 512, 3, 3),
        VAE + "decoder.mid.attn_1.proj_out.bias": (512,),
        VAE + "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        VAE + "decoder.up.1.upsample.conv.weight": (256, 256, 3, 3),
        VAE + "decoder.up.3.block.0.conv1.weight": (512, 512, 3, 3),
        VAE + "decoder.norm_out.weight": (128,),
        VAE + "post_quant_conv.weight": (4, 4, 1, 1),
        CLIP + "embeddings.position_embedding.weight": (77, 768),
        CLIP + "encoder.layers.0.mlp.fc1.weight": (3072, 768),
        CLIP + "encoder.layers.11.self_attn.out_proj.weight": (768, 768),
        CLIP + "final_layer_norm.bias": (768,),
    },
    "sd21": {
        UNET + "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        UNET + "input_blocks.2.1.proj_in.weight": (320, 320),
        UNET + "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        OPEN + "token_embedding.weight": (49408, 1024),
        OPEN + "positional_embedding": (77, 1024),
        OPEN + "transformer.resblocks.0.attn.in_proj_weight": (3072, 1024),
        OPEN + "transformer.resblocks.0.attn.in_proj_bias": (3072,),
        OPEN + "transformer.resblocks.22.attn.out_proj.weight": (1024, 1024),
        OPEN + "transformer.resblocks.22.mlp.c_proj.weight": (1024, 4096),
        OPEN + "transformer.resblocks.22.ln_2.weight": (1024,),
        OPEN + "ln_final.weight": (1024,),
    },
    "sdxl": {
        UNET + "label_emb.0.0.weight": (1280, 2816),
        UNET + "label_emb.0.2.weight": (1280, 1280),
        UNET + "input_blocks.4.1.transformer_blocks.1.attn2.to_v.weight": (640, 2048),
        UNET + "input_blocks.8.1.transformer_blocks.9.attn1.to_q.weight": (1280, 1280),
        UNET + "output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        UNET + "output_blocks.5.2.conv.weight": (640, 640, 3, 3),
        UNET + "output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        CLIP_XL + "encoder.layers.11.layer_norm2.weight": (768,),
        OPEN_XL + "transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        OPEN_XL + "transformer.resblocks.9.mlp.c_proj.bias": (1280,),
        OPEN_XL + "text_projection": (1280, 1280),
    },
}
# How many tensors the published files hold, without noise schedule, position_ids, logit_scale and, in SD 2, what is
# never read: UNet, VAE, text encoders.
COUNTS = {"sd15": 686 + 248 + 196, "sd21": 686 + 248 + 23 * 12 + 4, "sdxl": 1680 + 248 + 196 + 389}
FAMILY: dict[str, FamilyName] = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_published_models_have_their_published_keys(architecture: str):
    shapes = ARCHITECTURES[architecture]
    with torch.device("meta"):
        parts: dict[str, Any] = {"unet": UNet2DConditionModel(**shapes["unet"]), "vae": AutoencoderKL(**shapes["vae"])}
        for name, text_class in FAMILIES[FAMILY[architecture]].text_encoder_classes.items():
            parts[name] = text_class(CLIPTextConfig(**shapes[name]))
    weights = {name: module.state_dict() for name, module in parts.items()}
    file = to_ldm(FAMILY[architecture], weights, shapes["unet"], shapes["vae"])
    assert len(file) == COUNTS[architecture]
    found = {key: tuple(file[key].shape) if key in file else None for key in PUBLISHED[architecture]}
    assert found == PUBLISHED[architecture]


def test_what_is_no_model_is_left_out_of_real_files(base: Base):
    file, family = convert(base), base.info.family
    extra = ["alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "betas", "model_ema.decay", "denoiser.sigmas"]
    extra += ["posterior_mean_coef1", "cond_stage_model.transformer.text_model.embeddings.position_ids"]
    extra += ["cond_stage_model.model.logit_scale", "conditioner.embedders.1.model.logit_scale"]
    if family == "sd2":
        extra += [f"{OPEN}text_projection", f"{OPEN}transformer.resblocks.23.attn.in_proj_weight"]
    read = from_ldm(family, file | {key: torch.zeros(3) for key in extra}, base.unet.config, base.vae.config)
    for component, own in weights_of(base).items():
        assert_same(read[component], own)


def test_old_files_whose_text_encoder_has_no_prefix(pocket: Base):
    file = {key.replace("transformer.text_model.", "transformer."): tensor for key, tensor in convert(pocket).items()}
    read = from_ldm("sd1", file, pocket.unet.config, pocket.vae.config)
    assert_same(read["text_encoder"], weights_of(pocket)["text_encoder"])


def test_keys_without_a_place_are_named(pocket: Base):
    weights, configs = weights_of(pocket), (pocket.unet.config, pocket.vae.config)
    with pytest.raises(ExportError, match=r"unet\.time_embedding\.cond_proj\.weight: has no place"):
        to_ldm(
            "sd1", weights | {"unet": weights["unet"] | {"time_embedding.cond_proj.weight": torch.ones(1)}}, *configs
        )
    with pytest.raises(ExportError, match="text_encoder_2: sd1 needs"):
        to_ldm("sd1", weights | {"text_encoder_2": {}}, *configs)
    file, key = convert(pocket), UNET + "input_blocks.1.1.transformer_blocks.0.attn3.to_k.weight"
    with pytest.raises(BaseModelError, match=key):
        from_ldm("sd1", file | {key: torch.ones(1)}, *configs)
    with pytest.raises(BaseModelError, match="vae: is missing"):
        from_ldm("sd1", {key: tensor for key, tensor in file.items() if not key.startswith(VAE)}, *configs)
    key = VAE + "encoder.mid.attn_1.q.weight"
    with pytest.raises(BaseModelError, match=rf"{key}: has the odd shape \(\)"):
        from_ldm("sd1", file | {key: torch.tensor(1.0)}, *configs)


@pytest.mark.parametrize(
    "odd", [{"down_block_types": ["AttnDownBlock2D"]}, {"layers_per_block": 10**12}, {"up_block_types": None}]
)
def test_blocks_that_the_layout_does_not_know_are_refused(pocket: Base, odd: dict[str, Any]):
    with pytest.raises(BaseModelError, match="has no place in a checkpoint file"):
        to_ldm("sd1", weights_of(pocket), dict(pocket.unet.config) | odd, pocket.vae.config)


def test_a_text_encoder_deeper_than_clients_read_is_refused():
    odd = {"encoder.layers.23.layer_norm1.weight": torch.ones(3)}
    with pytest.raises(ExportError, match=r"text_encoder\.text_model\.encoder\.layers\.23\.layer_norm1\.weight"):
        to_ldm("sd2", {"unet": {}, "vae": {}, "text_encoder": odd}, ARCHITECTURES["sd21"]["unet"], POCKET_VAE)


POCKET_VAE = json.loads((POCKET / "vae/config.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# files


def draw(pipeline: Any) -> Tensor:
    """Pictures of a fixed seed, (1, 64, 64, 3)."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    drawn = pipeline("emoji of red apple", num_inference_steps=3, generator=generator, output_type="np")
    return torch.from_numpy(drawn.images)


def test_a_file_of_pocket_unpacks_to_the_same_pictures(pocket_file: Path, tmp_path: Path):
    file = unpack(pocket_file, tmp_path / "unpacked")
    assert file.family == "sd1"
    before = draw(load_base(inspect_base("pocket")).pipeline())
    assert torch.equal(draw(StableDiffusionPipeline.from_pretrained(tmp_path / "unpacked")), before)
    for component in ("unet", "vae", "text_encoder"):
        saved, own = (next((root / component).glob("*.safetensors")) for root in (tmp_path / "unpacked", POCKET))
        assert_same(load_file(saved), load_file(own))


def test_diffusers_draws_the_same_from_the_file_itself(pocket_file: Path):
    pipeline = StableDiffusionPipeline.from_single_file(str(pocket_file), config=str(POCKET), local_files_only=True)
    assert torch.equal(draw(pipeline), draw(load_base(inspect_base("pocket")).pipeline()))


def test_the_header_says_what_the_model_is(pocket_file: Path):
    with safe_open(pocket_file, framework="pt") as file:
        header = file.metadata()
        assert {str(file.get_tensor(key).dtype) for key in file.keys()} == {"torch.float16"}  # noqa: SIM118
    assert {key: value for key, value in header.items() if key != COMPONENTS} == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "pocket",
        "modelspec.resolution": "64x64",
        "modelspec.prediction_type": "epsilon",
    }
    assert str(POCKET) not in header[COMPONENTS]
    configs = read_single_file(pocket_file, "base.model").configs
    assert configs["tokenizer"] == {"model_max_length": 24, "pad_token": "<|endoftext|>"}
    assert configs["text_encoder"]["dtype"] == "float32"  # so that a plain `from_pretrained` fits its parts together


def test_folders_and_files_of_every_family_hold_the_same_model(base: Base, tmp_path: Path):
    padded = CLIPTokenizer.from_pretrained(POCKET / "tokenizer", model_max_length=33, pad_token="!")
    base = dataclasses.replace(base, tokenizers=[*base.tokenizers[:-1], padded])
    one, other = tmp_path / "folder", tmp_path / "unpacked"
    save_model_folder(base, one, "fp32")
    save_checkpoint_file(base, tmp_path / "model.safetensors", "fp32")
    unpack(tmp_path / "model.safetensors", other)
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
        assert file.suffix != ".json" or str(tmp_path.parent) not in (one / file).read_text(encoding="utf-8"), file
    read = load_base(inspect_base(str(one)))
    assert (read.info.family, read.info.prediction) == (base.info.family, base.info.prediction)
    for component, own in weights_of(base).items():
        assert_same(weights_of(read)[component], own)
    assert all(map(torch.equal, read.tokenize(["a red apple"]).ids, base.tokenize(["a red apple"]).ids))


def test_a_plain_pipeline_fits_its_parts_together(base: Base, tmp_path: Path):
    save_model_folder(base, tmp_path / "folder", "fp16")
    pipeline = base.family.pipeline_class.from_pretrained(tmp_path / "folder")
    assert {getattr(pipeline, name).dtype for name in (*base.components, "vae")} == {torch.float32}


def test_files_of_text_encoders_are_named_as_older_libraries_read_them(base: Base, tmp_path: Path):
    save_model_folder(base, tmp_path / "folder")
    for name in base.text_encoders:
        keys = load_file(tmp_path / "folder" / name / "model.safetensors").keys()
        assert {key.split(".")[0] for key in keys} <= {"text_model", "text_projection"}
    for name in (path.name for path in (tmp_path / "folder").glob("tokenizer*")):
        files = {path.name for path in (tmp_path / "folder" / name).iterdir()}
        assert {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"} <= files


def test_a_base_of_random_weights_is_saved_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = {"block_out_channels": [32] * 4, "attention_head_dim": 8, "cross_attention_dim": 32}
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    real = ARCHITECTURES["sd15"]
    shapes = {"unet": real["unet"] | small, "vae": real["vae"] | {"block_out_channels": [32] * 4}}
    monkeypatch.setitem(ARCHITECTURES, "sd15", real | shapes | {"text_encoder": real["text_encoder"] | text})
    base = load_base(inspect_base("random:sd15"))
    save_checkpoint_file(base, tmp_path / "model.safetensors", "bf16")
    unpack(tmp_path / "model.safetensors", tmp_path / "folder")
    read = load_base(inspect_base(str(tmp_path / "folder")), torch.bfloat16)
    for component, own in weights_of(base).items():
        bf16 = {
            key: tensor.bfloat16().to(read.vae.dtype if component == "vae" else read.dtype)
            for key, tensor in own.items()
        }
        assert_same(weights_of(read)[component], bf16)


# ---------------------------------------------------------------------------------------------------------------------
# errors


@pytest.mark.parametrize("save", [save_checkpoint_file, save_model_folder])
def test_a_weight_that_is_not_finite_is_named(pocket: Base, save: Any, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    pocket.unet.float().conv_in.weight.data[0, 0, 0, 0] = 1e6
    with pytest.raises(ExportError, match=r"unet\.conv_in\.weight: is beyond the range of fp16"):
        save(pocket, path, "fp16")
    pocket.vae.quant_conv.bias.data[0] = torch.nan
    with pytest.raises(ExportError, match=r"vae\.quant_conv\.bias: holds what is no number"):
        save(pocket, path, "fp32")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("save", [save_checkpoint_file, save_model_folder])
def test_a_model_with_an_adapter_is_refused(pocket: Base, save: Any, tmp_path: Path):
    put_on(pocket, AdapterSection(rank=2, alpha=2.0), seed=0)
    with pytest.raises(ExportError, match="belongs to an adapter"):
        save(pocket, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_is_not_read_back_the_same_gets_no_name(pocket: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def damaged(path: Path) -> dict[str, Tensor]:
        weights = load_file(path)
        key = next(key for key in weights if key.endswith("conv_norm_out.bias") or key.endswith("out.0.bias"))
        return weights | {key: weights[key] + 1}

    monkeypatch.setattr("lorasmith.trainer.wholemodel.load_file", damaged)
    with pytest.raises(ExportError, match=r"unet\.\S+: was not read back as it was written"):
        save_checkpoint_file(pocket, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=r"unet\.conv_norm_out\.bias: was not read back as it was written"):
        save_model_folder(pocket, tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_another_vocabulary_does_not_fit_in_a_file(pocket: Base, tmp_path: Path):
    pocket.tokenizers[0].add_tokens(["<my-word>"])
    with pytest.raises(ExportError, match="tokenizer: is not CLIP's own"):
        save_checkpoint_file(pocket, tmp_path / "model.safetensors")


def test_a_file_is_a_base_as_its_folder_is(base: Base, tmp_path: Path):
    save_checkpoint_file(base, tmp_path / "model.safetensors", "fp32")
    info = inspect_base(str(tmp_path / "model.safetensors"))
    was = base.info
    assert (info.family, info.prediction, info.resolution) == (was.family, was.prediction, was.resolution)
    assert (info.vae_factor, info.bucket_step, info.assumptions) == (was.vae_factor, was.bucket_step, ())
    read = load_base(info)
    for component, own in weights_of(base).items():
        assert_same(weights_of(read)[component], own)
    assert all(map(torch.equal, read.tokenize(["a red apple"]).ids, base.tokenize(["a red apple"]).ids))


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "7", "{", "[" * 100_000, "{}", '{"family": ["sd1"]}', '{"family": "sd9"}', '{"family": "sd1"}'),
        '{"family": "sd1", "unet": {}, "vae": {}, "scheduler": {}, "text_encoder": 3, "tokenizer": {}}',
    ],
)
def test_damaged_configurations_give_one_error(pocket_file: Path, text: str):
    rewrite(pocket_file, {COMPONENTS: text})
    with pytest.raises(BaseModelError, match=r"is damaged: lorasmith\.components in its metadata"):
        read_single_file(pocket_file, "base.model")


def parts_of(found: SingleFile) -> Any:
    """Weights and tokenizer."""
    weights = from_ldm(found.family, found.file.tensors(), found.configs["unet"], found.configs["vae"])
    return weights, clip_tokenizer(found.configs["tokenizer"], "base.model")


@pytest.mark.parametrize(
    ("component", "config", "message"),
    [
        ("unet", {}, "has no place in a checkpoint file"),
        ("tokenizer", {}, "its tokenizer cannot be"),
        ("tokenizer", {"model_max_length": 24, "pad_token": "<unheard>"}, "its tokenizer cannot be"),
    ],
)
def test_configurations_of_no_model_give_one_error(
    pocket_file: Path, tmp_path: Path, component: str, config: Any, message: str
):
    configs = read_single_file(pocket_file, "base.model").configs | {component: config}
    rewrite(pocket_file, {COMPONENTS: json.dumps({"family": "sd1", **configs})})
    found = read_single_file(pocket_file, "base.model")
    with pytest.raises(BaseModelError, match=message):
        parts_of(found)
    with pytest.raises(BaseModelError):
        unpack(pocket_file, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_file_that_is_cut_short_is_refused(pocket_file: Path, tmp_path: Path):
    content = pocket_file.read_bytes()
    pocket_file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        unpack(pocket_file, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_only_a_model_is_replaced(pocket: Base, tmp_path: Path):
    shutil.copytree(POCKET, tmp_path / "model")
    save_model_folder(pocket, tmp_path / "model")
    assert not (tmp_path / "model/concepts.json").exists()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/holiday.png").touch()
    with pytest.raises(UserError, match="holds no model"):
        save_model_folder(pocket, tmp_path / "pictures")
    assert (tmp_path / "pictures/holiday.png").exists()
    with pytest.raises(UserError, match=r"does not end in \.safetensors"):
        save_checkpoint_file(pocket, tmp_path / "model.ckpt")
