"""Models with all the layers of the published ones, but narrow: the same key sets, in a hundredth of the time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer

from lorasmith.trainer.architectures import ARCHITECTURES, FamilyName
from lorasmith.trainer.bases import POCKET, inspect_base
from lorasmith.trainer.models import FAMILIES, Base
from lorasmith.trainer.wholemodel import save_model_folder

ARCHITECTURE: dict[FamilyName, str] = {"sd1": "sd15", "sdxl": "sdxl"}
SIDE = 16  # latents, so that the lowest level still has several, and attention between them
TOKENS = 77
_CLIP_L = {"hidden_size": 48, "intermediate_size": 192, "projection_dim": 48}
_OPEN_CLIP = {"hidden_size": 80, "intermediate_size": 320, "projection_dim": 80}
_VAE = {"block_out_channels": [32] * 4}
_NARROW: dict[FamilyName, dict[str, dict[str, Any]]] = {
    "sd1": {
        "unet": {"block_out_channels": [32, 64, 128, 128], "cross_attention_dim": 48},
        "vae": _VAE,
        "text_encoder": _CLIP_L,
    },
    "sdxl": {
        "unet": {
            "block_out_channels": [32, 64, 128],
            "attention_head_dim": [4, 8, 16],
            "cross_attention_dim": 48 + 80,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80 + 6 * 8,
        },
        "vae": _VAE,
        "text_encoder": _CLIP_L,
        "text_encoder_2": _OPEN_CLIP,
    },
}
"""Widths that differ from the published ones; types, numbers and depths of blocks do not."""


@dataclass(frozen=True)
class Subject:
    """A base on disk, and what is asked of it."""

    family: FamilyName
    base: Path
    """A diffusers folder."""
    given: Path
    """Inputs for all its parts; see `runners/asking.py`."""
    threads: int
    """How many work on it: layers as narrow as these lose time to a second one, and much on a busy computer."""


def make_subject(family: FamilyName, folder: Path, full: bool = False) -> Subject:
    """Write a base with random weights, narrow or as wide as the published one, and its inputs; once."""
    threads = torch.get_num_threads() if full else 1
    subject = Subject(family, folder / "base", folder / "given.safetensors", threads)
    if not subject.given.is_file():
        base = _random_base(family, full)
        save_model_folder(base, subject.base, "fp16" if full else "fp32")
        save_file(_inputs(base), subject.given)
    return subject


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Within the block torch works in so many threads."""
    kept = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(kept)


def _random_base(family: FamilyName, full: bool) -> Base:
    shapes = ARCHITECTURES[ARCHITECTURE[family]]
    if not full:
        shapes = {name: shape | _NARROW[family].get(name, {}) for name, shape in shapes.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**shapes["unet"])
        vae = AutoencoderKL(**shapes["vae"])
        classes = FAMILIES[family].text_encoder_classes
        encoders = {name: kind(CLIPTextConfig(**shapes[name])) for name, kind in classes.items()}
    tokenizer = CLIPTokenizer.from_pretrained(POCKET / "tokenizer", model_max_length=TOKENS)
    info = replace(inspect_base(f"random:{ARCHITECTURE[family]}"), model="random")
    scheduler = DDIMScheduler(**shapes["scheduler"])
    base = Base(info, [tokenizer] * len(encoders), encoders, vae=vae, unet=unet, scheduler=scheduler)
    for module in (*base.components.values(), vae):
        module.requires_grad_(False).eval()
    return base


def _inputs(base: Base) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    words = torch.randint(0, 49406, (1, TOKENS), generator=random)
    words[0, 0], words[0, -1] = 49406, 49407  # start and end
    given = {
        "latents": torch.randn(1, 4, SIDE, SIDE, generator=random),
        "timestep": torch.tensor([500]),
        "hidden": torch.randn(1, TOKENS, base.unet.config["cross_attention_dim"], generator=random),
        "ids": words,
    }
    if second := base.text_encoders.get("text_encoder_2"):
        given["pooled"] = torch.randn(1, second.config.projection_dim, generator=random)
        given["sizes"] = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]])
    return given
