"""The families, and the published shapes of SD 1.5, SD 2.1 and SDXL.

`random:` bases are these with random weights, to measure speed and memory, and to test, with no download. Values are
those of the models' own config files (runwayml/stable-diffusion-v1-5, stabilityai/stable-diffusion-2-1,
stabilityai/stable-diffusion-xl-base-1.0).
"""

from __future__ import annotations

from typing import Any, Literal

FamilyName = Literal["sd1", "sd2", "sdxl"]
FAMILY_TITLES: dict[FamilyName, str] = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sdxl": "SDXL"}
PUBLISHED: dict[FamilyName, str] = {"sd1": "random:sd15", "sd2": "random:sd21", "sdxl": "random:sdxl"}
"""By family, the base of the published shape."""
Configs = dict[str, dict[str, Any]]
"""Configurations by component; those of tokenizers are `model_max_length` and `pad_token`."""

_CROSS_ATTENTION_UNET: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}

_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}

SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

_CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "eos_token_id": 2,
    "vocab_size": 49408,
}

ARCHITECTURES: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "unet": _CROSS_ATTENTION_UNET | {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": _VAE | {"sample_size": 512, "scaling_factor": 0.18215},
        "text_encoder": _CLIP_L,
        "scheduler": SCHEDULER | {"prediction_type": "epsilon"},
    },
    "sd21": {
        "unet": _CROSS_ATTENTION_UNET
        | {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        "vae": _VAE | {"sample_size": 768, "scaling_factor": 0.18215},
        "text_encoder": _CLIP_L
        | {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "projection_dim": 512,
            "hidden_act": "gelu",
        },
        "scheduler": SCHEDULER | {"prediction_type": "v_prediction"},
    },
    "sdxl": {
        "unet": {
            "in_channels": 4,
            "out_channels": 4,
            "sample_size": 128,
            "layers_per_block": 2,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": _VAE | {"sample_size": 1024, "scaling_factor": 0.13025},
        "text_encoder": _CLIP_L,
        "text_encoder_2": _CLIP_L
        | {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "projection_dim": 1280,
            "hidden_act": "gelu",
        },
        "scheduler": SCHEDULER | {"prediction_type": "epsilon"},
    },
}
