"""The pocket base before its UNet and text encoder have learned anything, as a diffusers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lorasmith.trainer.architectures import ARCHITECTURES
from lorasmith.trainer.bases import POCKET

WIDTH = 128
"""Of the text encoder, and so of what cross-attention reads."""
TOKENS = 24
"""Longest caption, so that pipelines pad to no more than what the base was trained on."""

UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    # No attention at 16 x 16: half as many steps again in the same time, on a CPU.
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [96, 160, 224],
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,  # the number of heads, by an old mistake in diffusers
    "norm_num_groups": 32,
}
TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "projection_dim": WIDTH,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}


def write_untrained(folder: Path, vae: AutoencoderKL, seed: int) -> None:
    """Write all components; those that will be trained have random weights, always the same for a seed."""
    torch.manual_seed(seed)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        unet=UNet2DConditionModel(**UNET),
        text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)),
        tokenizer=CLIPTokenizer.from_pretrained(POCKET / "tokenizer", model_max_length=TOKENS),
        scheduler=DDIMScheduler(**ARCHITECTURES["sd15"]["scheduler"]),  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
