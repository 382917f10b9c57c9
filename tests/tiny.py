"""Tiny real pipelines with the shape of SD 1, SD 2 and SDXL, saved as diffusers folders; the same weights each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lorasmith.trainer.bases import POCKET

SIDE = 16  # latents; the pictures are twice as large


def make_sd1(folder: Path, layers_per_block: int = 2) -> Path:
    """Convolutions project into the attention blocks; predicts epsilon."""
    torch.manual_seed(1)
    unet = _unet(layers_per_block, cross_attention_dim=32, **_CROSS)
    return _save_sd(folder, unet, _text_encoder(32), "epsilon")


def make_sd2(folder: Path, layers_per_block: int = 2) -> Path:
    """Linear layers project into the attention blocks; predicts v."""
    torch.manual_seed(2)
    unet = _unet(layers_per_block, cross_attention_dim=48, use_linear_projection=True, **_CROSS)
    return _save_sd(folder, unet, _text_encoder(48, hidden_act="gelu"), "v_prediction")


def make_sdxl(folder: Path, layers_per_block: int = 2) -> Path:
    """Two text encoders, and no attention at the full size."""
    torch.manual_seed(3)
    unet = _unet(
        layers_per_block,
        cross_attention_dim=32 + 48,
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16, 16),
        transformer_layers_per_block=(1, 1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(32),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(48, hidden_act="gelu", projection_dim=24)).eval(),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=unet,
        scheduler=_scheduler("epsilon"),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


MAKERS = {"sd1": make_sd1, "sd2": make_sd2, "sdxl": make_sdxl}

_CROSS: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (8, 16),
}


def _unet(layers_per_block: int, **extra: Any) -> UNet2DConditionModel:
    shape: dict[str, Any] = {
        "sample_size": SIDE,
        "layers_per_block": layers_per_block,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(shape | extra)).eval()


def _vae() -> AutoencoderKL:
    shape: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": SIDE * 2,
    }
    return AutoencoderKL(**shape).eval()


def _text_config(width: int, **extra: Any) -> CLIPTextConfig:
    shape: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "projection_dim": width,
        "vocab_size": 49408,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407,
    }
    return CLIPTextConfig(**(shape | extra))


def _text_encoder(width: int, **extra: Any) -> CLIPTextModel:
    return CLIPTextModel(_text_config(width, **extra)).eval()


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(POCKET / "tokenizer")


def _scheduler(prediction: Any) -> Any:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )


def _save_sd(folder: Path, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, prediction: str) -> Path:
    none: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=text_encoder,
        tokenizer=_tokenizer(),
        unet=unet,
        scheduler=_scheduler(prediction),
        **none,
    ).save_pretrained(folder)
    return folder
