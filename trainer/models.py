"""Base models: load them, encode text, predict. All differences between SD 1, SD 2 and SDXL live in `Family`."""

from __future__ import annotations

import hashlib
import math
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
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..datasets.chunks import COMMA, chunks_of, framed
from .architectures import ARCHITECTURES
from .bases import POCKET, BaseInfo, FamilyName
from .errors import BaseModelError, first_line


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


@dataclass
class Tokens:
    """Captions as token ids; a long one takes several chunks (`datasets/chunks.py`)."""

    ids: list[Tensor]
    """One tensor for each text encoder, (all chunks, tokens)."""
    chunks: list[int]
    """How many chunks each caption has, in order."""

    def to(self, device: torch.device) -> Tokens:
        return Tokens([ids.to(device) for ids in self.ids], self.chunks)

    def side_by_side(self, encoded: Tensor) -> Tensor:
        """Encoded chunks (all chunks, tokens, width) to captions (batch, tokens of the longest, width)."""
        return same_length([chunks.flatten(0, 1) for chunks in encoded.split(self.chunks)])

    def first_of_each(self, encoded: Tensor) -> Tensor:
        """Of (all chunks, width) the rows of each caption's first chunk: what clients take for the whole."""
        return torch.stack([chunks[0] for chunks in encoded.split(self.chunks)])


def same_length(captions: Sequence[Tensor]) -> Tensor:
    """Stack captions (tokens, width) of different lengths, repeating each as a whole until all are equally long.

    Cross-attention is a weighted mean over tokens, and does not change when all of them come equally often; so a
    caption is read as if it were alone, whatever stands beside it in a batch (ComfyUI does the same).
    """
    longest = math.lcm(*(len(caption) for caption in captions))
    return torch.stack([caption.repeat(longest // len(caption), 1) for caption in captions])


# ---------------------------------------------------------------------------------------------------------------------
# families


class Family:
    """SD 1 and SD 2: one text encoder whose last hidden state conditions the UNet."""

    pipeline_class: ClassVar[Any] = StableDiffusionPipeline
    text_encoder_classes: ClassVar[dict[str, Any]] = {"text_encoder": CLIPTextModel}

    def unread_layers(self, component: str, module: Any) -> str | None:
        """A pattern of the layers and weights whose output is never read, so that they could not learn; None: none."""
        del component, module
        return None

    def encode(self, text_encoders: Sequence[nn.Module], tokens: Tokens) -> Conditions:
        """Captions to conditions, each chunk encoded on its own."""
        return Conditions(tokens.side_by_side(text_encoders[0](tokens.ids[0])[0]))

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
        """The first text encoder's last layer and norm: only the layer before them is read."""
        if component != "text_encoder":
            return None
        return rf".*(encoder\.layers\.{module.config.num_hidden_layers - 1}\.|final_layer_norm\.).*"

    def encode(self, text_encoders: Sequence[nn.Module], tokens: Tokens) -> Conditions:
        outputs = [
            encoder(ids, output_hidden_states=True) for encoder, ids in zip(text_encoders, tokens.ids, strict=True)
        ]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return Conditions(tokens.side_by_side(hidden), tokens.first_of_each(outputs[-1][0]))

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
        """What can be trained, by the names diffusers gives them."""
        return {"unet": self.unet, **self.text_encoders}

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def to(self, device: str | torch.device) -> None:
        """Move all components."""
        for module in (*self.components.values(), self.vae):
            module.to(device)

    @property
    def scaling_factor(self) -> float:
        """Latents are multiplied by it to about unit variance."""
        return float(self.vae.config["scaling_factor"])

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (batch, 4, h, w) to pictures (batch, 3, H, W) in about -1 to 1, fp32."""
        return self.vae.decode(latents.float() / self.scaling_factor, return_dict=False)[0]

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Captions to token ids, in as many chunks as they need."""
        pieces = [[_chunks(tokenizer, caption) for caption in captions] for tokenizer in self.tokenizers]
        ids = [torch.tensor([chunk for chunks in caption_pieces for chunk in chunks]) for caption_pieces in pieces]
        return Tokens(ids, [len(chunks) for chunks in pieces[0]])

    def encode(self, captions: Sequence[str]) -> Conditions:
        """Captions to conditions, on the base's device."""
        return self.family.encode(list(self.text_encoders.values()), self.tokenize(captions).to(self.device))

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

    @cached_property
    def text_fingerprint(self) -> str:
        """A hash of the text encoders' weights, their token limit, and the tokens that frame and fill a caption."""
        hashes = [fingerprint(encoder) for encoder in self.text_encoders.values()]
        frames = [(t.model_max_length, t.bos_token_id, t.eos_token_id, t.pad_token_id) for t in self.tokenizers]
        return "-".join([*hashes, *(str(number) for frame in frames for number in frame)])


def _chunks(tokenizer: CLIPTokenizer, caption: str) -> list[list[int]]:
    """The framed chunks of one caption."""
    ids = tokenizer(caption, add_special_tokens=False, verbose=False).input_ids
    length, comma = tokenizer.model_max_length - 2, tokenizer.convert_tokens_to_ids(COMMA)
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return [framed(chunk, length, start, end, pad) for chunk in chunks_of(ids, length, comma)]  # pyright: ignore


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over a module's parameter names, types and bytes, lower-case hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# loading


def load_base(info: BaseInfo, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Base:
    """Load all components: UNet and text encoders in `dtype`, the VAE in fp32.

    Raises:
        BaseModelError: if weights are missing or broken.
    """
    _quiet_libraries()
    parts = _random_parts(info) if info.source.startswith("random:") else _saved_parts(info, dtype)
    names = FAMILIES[info.family].text_encoder_classes
    # Whatever sampler the base came with: its noise schedule, and DDIM's own way of using it.
    settings = {"prediction_type": info.prediction, "clip_sample": False, "thresholding": False}
    scheduler = DDIMScheduler.from_config(parts["scheduler"], set_alpha_to_one=False, **settings)
    base = Base(
        info=info,
        tokenizers=[parts[name.replace("text_encoder", "tokenizer")] for name in names],
        text_encoders={name: parts[name] for name in names},
        vae=parts["vae"],
        unet=parts["unet"],
        scheduler=cast(DDIMScheduler, scheduler),
    )
    for module in base.components.values():
        module.requires_grad_(False).eval().to(device=device, dtype=dtype)
    base.vae.requires_grad_(False).eval().to(device=device, dtype=torch.float32)
    return base


def _saved_parts(info: BaseInfo, dtype: torch.dtype) -> dict[str, Any]:
    """Components of a diffusers folder or a Hub model, by the names diffusers gives them."""
    parts: dict[str, Any] = {
        "unet": _load(info, "unet", UNet2DConditionModel, dtype),
        "vae": _load(info, "vae", AutoencoderKL, torch.float32),
    }
    try:
        parts["scheduler"] = DDIMScheduler.load_config(info.source, subfolder="scheduler")
        for name, text_class in FAMILIES[info.family].text_encoder_classes.items():
            tokenizer = name.replace("text_encoder", "tokenizer")
            parts[tokenizer] = CLIPTokenizer.from_pretrained(info.source, subfolder=tokenizer)
            parts[name] = _load(info, name, text_class, dtype)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{info.model} cannot be loaded: {first_line(error)}", "base.model", _COMPLETE) from error
    return parts


def _load(info: BaseInfo, component: str, model_class: Any, dtype: torch.dtype) -> Any:
    """One component; a weight that is not in its files is an error, where the libraries would put random numbers."""
    where, failures = f"base.model: {info.model}, {component}", []
    for variant in (None, "fp16"):  # some models are on the Hub in half precision only
        options = {"subfolder": component, "dtype": dtype, "use_safetensors": True, "variant": variant}
        options["revision"] = info.revision or None
        try:
            model, report = model_class.from_pretrained(info.source, output_loading_info=True, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            failures.append(error)
            continue
        lacking = sorted(str(name) for name in [*report["missing_keys"], *report["mismatched_keys"]])
        if lacking:
            what = f"{len(lacking)} weights are missing or of another shape, such as {lacking[0]}"
            raise BaseModelError(what, where, _COMPLETE)
        return model
    what = f"its weights cannot be loaded: {first_line(failures[0])}"
    raise BaseModelError(what, where, _COMPLETE) from failures[0]


_COMPLETE = "A base needs model_index.json, and .safetensors weights of every component."


def _random_parts(info: BaseInfo) -> dict[str, Any]:
    """The real architecture with random weights, the same ones each time; the tokenizer is CLIP's own."""
    shapes = ARCHITECTURES[info.source.removeprefix("random:")]
    parts: dict[str, Any] = {"scheduler": shapes["scheduler"]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts["unet"] = UNet2DConditionModel(**shapes["unet"])
        parts["vae"] = AutoencoderKL(**shapes["vae"])
        for name, text_class in FAMILIES[info.family].text_encoder_classes.items():
            parts[name] = text_class(CLIPTextConfig(**shapes[name]))
            tokenizer = name.replace("text_encoder", "tokenizer")
            parts[tokenizer] = CLIPTokenizer.from_pretrained(POCKET / "tokenizer", model_max_length=77)
    return parts


def _quiet_libraries() -> None:
    """Keep other libraries' bars out of our output."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
