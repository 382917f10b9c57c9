"""Base models: load them, encode text, predict. All differences between SD 1, SD 2 and SDXL live in `Family`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .architectures import ARCHITECTURES
from .bases import POCKET, BaseInfo, FamilyName
from .errors import BaseModelError


@dataclass
class Conditions:
    """Encoded captions."""

    hidden: Tensor
    """(batch, tokens, width): what cross-attention reads."""
    pooled: Tensor | None = None
    """(batch, width): SDXL's sentence embedding; None for SD 1 and SD 2."""

    def to(self, *args: Any, **kwargs: Any) -> Conditions:
        pooled = None if self.pooled is None else self.pooled.to(*args, **kwargs)
        return Conditions(self.hidden.to(*args, **kwargs), pooled)


# ---------------------------------------------------------------------------------------------------------------------
# families


class Family:
    """SD 1 and SD 2: one text encoder whose last hidden state conditions the UNet."""

    pipeline_class: ClassVar[Any] = StableDiffusionPipeline
    text_encoder_classes: ClassVar[dict[str, Any]] = {"text_encoder": CLIPTextModel}

    def unread_layers(self, component: str, module: Any) -> str | None:
        """A pattern of the layers whose output is never read, so that an adapter there could not learn; None: none."""
        del component, module
        return None

    def encode(self, text_encoders: Sequence[nn.Module], ids: Sequence[Tensor]) -> Conditions:
        """Token ids (batch, tokens), one tensor per text encoder, to conditions."""
        return Conditions(text_encoders[0](ids[0])[0])

    def predict(self, unet: nn.Module, noisy: Tensor, t: Tensor, conditions: Conditions, sizes: Tensor) -> Tensor:
        """The UNet's prediction, (batch, 4, h, w), for noisy latents at time-steps t, (batch,).

        `sizes` (batch, 6) holds original height and width, crop top and left, target height and width, in pixels.
        """
        del sizes  # only SDXL is told about sizes
        return unet(noisy, t, conditions.hidden, return_dict=False)[0]


class FamilyXL(Family):
    """SDXL: two text encoders' penultimate layers side by side, a pooled embedding, and sizes (Podell et al. 2023)."""

    pipeline_class = StableDiffusionXLPipeline
    text_encoder_classes: ClassVar[dict[str, Any]] = {
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }

    def unread_layers(self, component: str, module: Any) -> str | None:
        """The first text encoder's last layer: only the layer before it is read."""
        if component != "text_encoder":
            return None
        return rf".*encoder\.layers\.{module.config.num_hidden_layers - 1}\..*"

    def encode(self, text_encoders: Sequence[nn.Module], ids: Sequence[Tensor]) -> Conditions:
        outputs = [encoder(i, output_hidden_states=True) for encoder, i in zip(text_encoders, ids, strict=True)]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return Conditions(hidden, outputs[-1][0])

    def predict(self, unet: nn.Module, noisy: Tensor, t: Tensor, conditions: Conditions, sizes: Tensor) -> Tensor:
        added = {"text_embeds": conditions.pooled, "time_ids": sizes}
        return unet(noisy, t, conditions.hidden, added_cond_kwargs=added, return_dict=False)[0]


FAMILIES: dict[FamilyName, Family] = {"sd1": Family(), "sd2": Family(), "sdxl": FamilyXL()}


# ---------------------------------------------------------------------------------------------------------------------
# a loaded base


@dataclass
class Base:
    """A base model in memory, frozen and in evaluation mode."""

    info: BaseInfo
    tokenizers: list[CLIPTokenizer]
    text_encoders: dict[str, Any]
    """By component name: `text_encoder`, and for SDXL `text_encoder_2`."""
    vae: Any
    """`AutoencoderKL`, always fp32: the SDXL VAE overflows in fp16."""
    unet: Any
    """`UNet2DConditionModel`."""
    scheduler: DDIMScheduler

    @property
    def family(self) -> Family:
        return FAMILIES[self.info.family]

    @property
    def components(self) -> dict[str, Any]:
        """What can carry an adapter, by the names diffusers gives them."""
        return {"unet": self.unet, **self.text_encoders}

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def scaling_factor(self) -> float:
        """Latents are multiplied by it to about unit variance."""
        return float(self.vae.config["scaling_factor"])

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (batch, 4, h, w) to pictures (batch, 3, H, W) in about -1 to 1, fp32."""
        return self.vae.decode(latents.float() / self.scaling_factor, return_dict=False)[0]

    def tokenize(self, captions: Sequence[str]) -> list[Tensor]:
        """Captions to token ids (batch, tokens), one tensor per text encoder; too long ones are cut."""
        return [
            tokenizer(
                list(captions),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer in self.tokenizers
        ]

    def encode(self, captions: Sequence[str]) -> Conditions:
        """Captions to conditions, on the base's device."""
        ids = [tensor.to(self.device) for tensor in self.tokenize(captions)]
        return self.family.encode(list(self.text_encoders.values()), ids)

    def is_cut(self, caption: str) -> bool:
        """Whether a caption has more tokens than the text encoder reads."""
        tokenizer = self.tokenizers[0]
        return len(tokenizer(caption).input_ids) > tokenizer.model_max_length

    def pipeline(self) -> Any:
        """A diffusers pipeline over these very components, for previews."""
        names = [f"tokenizer{suffix}" for suffix in ("", "_2")]
        extra: dict[str, Any] = dict(zip(names, self.tokenizers, strict=False)) | self.text_encoders
        if self.info.family != "sdxl":
            extra |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = self.family.pipeline_class(vae=self.vae, unet=self.unet, scheduler=self.scheduler, **extra)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @cached_property
    def vae_fingerprint(self) -> str:
        """A hash of the VAE's weights: latents of another VAE are other latents."""
        return fingerprint(self.vae)

    @property
    def fingerprint(self) -> str:
        """Tells this base from any other; of the UNet, the largest part, a sketch is enough."""
        return f"{sketch(self.unet)}-{self.vae_fingerprint}-{self.text_fingerprint}"

    @cached_property
    def text_fingerprint(self) -> str:
        """A hash of the text encoders' weights and their token limit."""
        hashes = [fingerprint(encoder) for encoder in self.text_encoders.values()]
        return "-".join([*hashes, *(str(tokenizer.model_max_length) for tokenizer in self.tokenizers)])


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over a module's parameter names, types and bytes, lower-case hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sketch(module: nn.Module) -> str:
    """SHA-256 over every parameter's name, shape and a few of its values; much faster than `fingerprint`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().flatten()
        few = flat[:: max(1, len(flat) // 64)].float().cpu().numpy().tobytes()
        digest.update(f"{name}:{tuple(tensor.shape)}".encode() + few)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# loading


def load_base(info: BaseInfo, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Base:
    """Load all components: UNet and text encoders in `dtype`, the VAE in fp32.

    Raises:
        BaseModelError: if weights are missing or broken.
    """
    _quiet_libraries()
    pipeline = _random_pipeline(info) if info.source.startswith("random:") else _load_pipeline(info, dtype)
    names = FAMILIES[info.family].text_encoder_classes
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type=info.prediction)
    base = Base(
        info=info,
        tokenizers=[getattr(pipeline, name.replace("text_encoder", "tokenizer")) for name in names],
        text_encoders={name: getattr(pipeline, name) for name in names},
        vae=pipeline.vae,
        unet=pipeline.unet,
        scheduler=cast(DDIMScheduler, scheduler),
    )
    for module in base.components.values():
        module.requires_grad_(False).eval().to(device=device, dtype=dtype)
    base.vae.requires_grad_(False).eval().to(device=device, dtype=torch.float32)
    return base


def _load_pipeline(info: BaseInfo, dtype: torch.dtype) -> Any:
    extra = {} if info.family == "sdxl" else {"safety_checker": None, "requires_safety_checker": False}
    pipeline_class = FAMILIES[info.family].pipeline_class
    try:
        return pipeline_class.from_pretrained(info.source, dtype=dtype, use_safetensors=True, **extra)
    except (OSError, ValueError, RuntimeError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BaseModelError(
            f"the weights of {info.model} cannot be loaded: {first_line}",
            "base.model",
            "The folder needs model_index.json and .safetensors weights of every component.",
        ) from error


def _random_pipeline(info: BaseInfo) -> Any:
    """The real architecture with random weights, the same ones each time; the tokenizer is CLIP's own."""
    parts = ARCHITECTURES[info.source.removeprefix("random:")]
    family = FAMILIES[info.family]
    components: dict[str, Any] = {"scheduler": DDIMScheduler(**parts["scheduler"])}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        components["unet"] = UNet2DConditionModel(**parts["unet"])
        components["vae"] = AutoencoderKL(**parts["vae"])
        for name, text_class in family.text_encoder_classes.items():
            components[name] = text_class(CLIPTextConfig(**parts[name]))
            tokenizer = name.replace("text_encoder", "tokenizer")
            components[tokenizer] = CLIPTokenizer.from_pretrained(POCKET / "tokenizer", model_max_length=77)
    if info.family != "sdxl":
        components |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return family.pipeline_class(**components)


def _quiet_libraries() -> None:
    """Keep other libraries' bars out of our output."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
