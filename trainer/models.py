"""Base models: load them, encode text, predict. All differences between SD 1, SD 2 and SDXL live in `Family`."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..datasets.chunks import COMMA, chunks_of, framed
from .architectures import ARCHITECTURES
from .bases import NO_MODEL, POCKET, BaseInfo, FamilyName, require_modest
from .errors import BaseModelError, first_line
from .jsonfile import LARGEST
from .ldm import from_ldm, vae_from_file
from .loraread import merge, read_lora
from .shelf import Resting
from .singlefile import read_single_file, read_vae_file

Encoder = Literal["VAE", "text encoders"]
"""What works for a while only: on pictures, on captions."""


@dataclass
class Conditions:
    """Encoded captions."""

    hidden: Tensor
    """(batch, tokens, width): what cross-attention reads."""
    pooled: Tensor | None = None
    """(batch, width): SDXL's sentence embedding; None for SD 1 and SD 2."""

    def __getitem__(self, rows: slice) -> Conditions:
        return Conditions(self.hidden[rows], None if self.pooled is None else self.pooled[rows])

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


@dataclass(frozen=True)
class NewTokens:
    """A word that is not read as CLIP reads it, but as tokens of its own."""

    word: str
    ids: list[int]

    def split(self, caption: str) -> list[str]:
        """What stands between the word, wherever it stands as a whole word, in whichever case."""
        return re.split(rf"(?i)(?<!\w){re.escape(self.word)}(?!\w)", caption)


@dataclass
class Base:
    """A base model in memory, frozen and in evaluation mode."""

    info: BaseInfo
    tokenizers: list[CLIPTokenizer]
    text_encoders: dict[str, Any]
    """By component name: `text_encoder`, and for SDXL `text_encoder_2`."""
    vae: Any
    """`AutoencoderKL`, fp32 unless another precision was asked for: the SDXL VAE overflows in fp16."""
    unet: Any
    """`UNet2DConditionModel`."""
    scheduler: DDIMScheduler
    new_tokens: NewTokens | None = None
    resting: dict[Encoder, Resting] = field(default_factory=dict)
    """Of what is not trained and only now and then at work: where it rests meanwhile. Empty: all is ready at any time.
    """

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

    def at_work(self, encoder: Encoder) -> AbstractContextManager[None]:
        """Within the block the VAE, or the text encoders, can be called, and stay at work from one call to the next."""
        return self.resting[encoder].at_work() if encoder in self.resting else nullcontext()

    def to(self, device: str | torch.device) -> None:
        """Move all components."""
        for module in (*self.components.values(), self.vae):
            module.to(device)

    def places(self) -> list[tuple[Any, torch.device]]:
        """Each component, and where it is."""
        return [(module, module.device) for module in (*self.components.values(), self.vae)]

    def put_back(self, places: Sequence[tuple[Any, torch.device]]) -> None:
        """Move each component where it was."""
        for module, device in places:
            module.to(device)

    @property
    def scaling_factor(self) -> float:
        """Latents are multiplied by it to about unit variance."""
        return float(self.vae.config["scaling_factor"])

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (batch, 4, h, w) to pictures (batch, 3, H, W) in about -1 to 1, fp32."""
        return self._through_vae(lambda given: self.vae.decode(given).sample, latents.float() / self.scaling_factor)

    def posterior(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (batch, 3, H, W) in -1 to 1 to mean and standard deviation of their latents, each (batch, 4, h, w),
        fp32, before the scaling factor."""
        moments = self._through_vae(lambda given: self.vae.encode(given).latent_dist.parameters, pictures)
        found = DiagonalGaussianDistribution(moments)
        return found.mean, found.std

    def _through_vae(self, run: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        """What the VAE makes of a batch, fp32; what is not finite in half precision is run again in fp32."""
        with self.at_work("VAE"):
            batch = batch.to(self.vae.device)
            made = run(batch.to(self.vae.dtype)).float()
            failed = ~made.isfinite().flatten(1).all(1)
            if self.vae.dtype != torch.float32 and failed.any():
                with _in_fp32(self.vae):
                    made[failed] = run(batch[failed].float())
        return made

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Captions to token ids, in as many chunks as they need."""
        pieces = [[self._chunks(tokenizer, caption) for caption in captions] for tokenizer in self.tokenizers]
        ids = [torch.tensor([chunk for chunks in caption_pieces for chunk in chunks]) for caption_pieces in pieces]
        return Tokens(ids, [len(chunks) for chunks in pieces[0]])

    def _chunks(self, tokenizer: CLIPTokenizer, caption: str) -> list[list[int]]:
        """The framed chunks of one caption."""
        first, *others = self.new_tokens.split(caption) if self.new_tokens else [caption]
        ids = _token_ids(tokenizer, first)
        for piece in others:
            ids += [*cast(NewTokens, self.new_tokens).ids, *_token_ids(tokenizer, piece)]
        length, comma = tokenizer.model_max_length - 2, tokenizer.convert_tokens_to_ids(COMMA)
        start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        return [framed(chunk, length, start, end, pad) for chunk in chunks_of(ids, length, comma)]  # pyright: ignore

    def encode(self, captions: Sequence[str]) -> Conditions:
        """Captions to conditions, where the UNet is."""
        with self.at_work("text encoders"):
            tokens = self.tokenize(captions).to(self.text_device)
            return self.family.encode(list(self.text_encoders.values()), tokens).to(self.device)

    @property
    def text_device(self) -> torch.device:
        return next(iter(self.text_encoders.values())).device

    def pipeline(self) -> Any:
        """A diffusers pipeline over these very components."""
        names = [f"tokenizer{suffix}" for suffix in ("", "_2")]
        return self._pipeline(vae=self.vae, **dict(zip(names, self.tokenizers, strict=False)), **self.text_encoders)

    def denoising(self) -> Any:
        """A diffusers pipeline over the UNet alone: from encoded prompts to latents, wherever encoders and VAE are."""
        pipeline = self._pipeline(vae=None, tokenizer=None, tokenizer_2=None, **dict.fromkeys(self.text_encoders))
        pipeline.vae_scale_factor = self.info.vae_factor
        return pipeline

    def _pipeline(self, **components: Any) -> Any:
        if self.info.family != "sdxl":
            components |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            components.pop("tokenizer_2", None)
        pipeline = self.family.pipeline_class(unet=self.unet, scheduler=self.scheduler, **components)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @cached_property
    def vae_fingerprint(self) -> str:
        """A hash of the VAE's weights and precision: latents of another VAE are other latents."""
        return fingerprint(self.vae)

    @cached_property
    def text_fingerprint(self) -> str:
        """A hash of the text encoders' weights, their token limit, and the tokens that frame and fill a caption."""
        hashes = [fingerprint(encoder) for encoder in self.text_encoders.values()]
        frames = [(t.model_max_length, t.bos_token_id, t.eos_token_id, t.pad_token_id) for t in self.tokenizers]
        return "-".join([*hashes, *(str(number) for frame in frames for number in frame)])


def _token_ids(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids  # pyright: ignore[reportReturnType]


def most_chunks(base: Base, captions: Iterable[str]) -> int:
    """The most chunks of tokens that a caption takes."""
    return max(base.tokenize(sorted(captions, key=len)[-_LONGEST_CAPTIONS:]).chunks)


_LONGEST_CAPTIONS = 20
"""So many are cut into tokens, to find the one that has most."""


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over a module's parameter names, types and bytes, lower-case hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# loading


def noise_schedule(info: BaseInfo, config: Mapping[str, Any]) -> DDIMScheduler:
    """Whatever sampler the base came with: its noise schedule, and DDIM's own way of using it."""
    settings: dict[str, Any] = {"prediction_type": info.prediction, "clip_sample": False, "thresholding": False}
    settings |= {"rescale_betas_zero_snr": info.zero_terminal_snr, "set_alpha_to_one": False}
    settings |= {"timestep_spacing": "trailing"} if info.zero_terminal_snr else {}
    return cast(DDIMScheduler, DDIMScheduler.from_config(dict(config), **settings))


def load_base(
    info: BaseInfo,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    vae_dtype: torch.dtype = torch.float32,
) -> Base:
    """Load all components: UNet and text encoders in `dtype`, the VAE in `vae_dtype`.

    With zero terminal SNR the schedule is rescaled so that its last time-step is pure noise, and pictures are drawn
    from that step on (Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed").

    LoRA files that belong to the base are merged into its weights.

    Raises:
        BaseModelError: if weights are missing or broken.
        UserError: if such a LoRA file does not fit.
    """
    _quiet_libraries()
    if info.source.startswith("random:"):
        parts = _random_parts(info, dtype)
    else:
        parts = _file_parts(info, dtype) if Path(info.source).is_file() else _saved_parts(info, dtype)
    if info.vae:
        parts["vae"] = _other_vae(info)
    names = FAMILIES[info.family].text_encoder_classes
    base = Base(
        info=info,
        tokenizers=[parts[name.replace("text_encoder", "tokenizer")] for name in names],
        text_encoders={name: parts[name] for name in names},
        vae=parts["vae"],
        unet=parts["unet"],
        scheduler=noise_schedule(info, parts["scheduler"]),
    )
    for module in base.components.values():
        module.requires_grad_(False).eval().to(device=device, dtype=dtype)
    base.vae.requires_grad_(False).eval().to(device=device, dtype=vae_dtype)
    for file, strength in info.merges:
        merge(base.components, read_lora(Path(file), base.components, info.family), strength)
    return base


def _saved_parts(info: BaseInfo, dtype: torch.dtype) -> dict[str, Any]:
    """Components of a diffusers folder or a Hub model, by the names diffusers gives them."""
    place = info.source, info.revision
    parts: dict[str, Any] = {
        "unet": _load(*place, "unet", UNet2DConditionModel, dtype, f"base.model: {info.model}, unet"),
        "vae": _load(*place, "vae", AutoencoderKL, torch.float32, f"base.model: {info.model}, vae"),
    }
    try:
        revision = info.revision or None
        parts["scheduler"] = DDIMScheduler.load_config(info.source, subfolder="scheduler", revision=revision)
        for name, text_class in FAMILIES[info.family].text_encoder_classes.items():
            tokenizer = name.replace("text_encoder", "tokenizer")
            parts[tokenizer] = saved_tokenizer(info, tokenizer)
            parts[name] = _load(*place, name, text_class, dtype, f"base.model: {info.model}, {name}")
    except (OSError, *NO_MODEL) as error:
        raise BaseModelError(f"{info.model} cannot be loaded: {first_line(error)}", "base.model", _COMPLETE) from error
    return parts


def saved_tokenizer(info: BaseInfo, name: str) -> CLIPTokenizer:
    """The tokenizer of a diffusers folder or a Hub model. Without files, transformers makes one that knows no words.

    Raises:
        BaseModelError: if it is such a one.
    """
    place: dict[str, Any] = {"subfolder": name, "revision": info.revision or None}
    where = f"base.model: {info.model}, {name}"
    for file in Path(info.source, name).glob("*"):
        if file.stat().st_size > LARGEST:
            raise BaseModelError(f"{file.name} has more than {LARGEST >> 20} MiB", where, _WHOLE_TOKENIZERS)
    try:
        found = CLIPTokenizer.from_pretrained(info.source, **place)
    except Exception as error:  # of files that are damaged, tokenizers raises this very class
        what = f"its tokenizer cannot be read: {first_line(error)}"
        raise BaseModelError(what, where, _WHOLE_TOKENIZERS) from error
    if len(found.get_vocab()) <= len(set(found.all_special_tokens)):
        what = "holds no words: vocab.json and merges.txt, or tokenizer.json, are missing"
        raise BaseModelError(what, where, _WHOLE_TOKENIZERS)
    marks = (found.bos_token_id, found.eos_token_id, found.pad_token_id)
    length: Any = found.model_max_length
    if not isinstance(length, int) or not 2 < length <= _MOST_TOKENS or not all(isinstance(m, int) for m in marks):
        what = f"its model_max_length is {str(length)[:20]}, and its tokens to begin, end and fill a text are {marks}"
        raise BaseModelError(what, where, _WHOLE_TOKENIZERS)
    return found


_MOST_TOKENS = 1000  # at once; CLIP's text encoders have 77 places
_WHOLE_TOKENIZERS = "Download the model again, with its tokenizers."


def _load(source: str, revision: str, subfolder: str, model_class: Any, dtype: torch.dtype, where: str) -> Any:
    """One component; a weight that is not in its files is an error, where the libraries would put random numbers."""
    failures = []
    for variant in (None, "fp16"):  # some models are on the Hub in half precision only
        options = {"subfolder": subfolder or None, "dtype": dtype, "use_safetensors": True, "variant": variant}
        options["revision"] = revision or None
        try:
            model, report = model_class.from_pretrained(source, output_loading_info=True, **options)
        except (OSError, *NO_MODEL, SafetensorError) as error:
            failures.append(error)
            continue
        lacking = sorted(str(name) for name in [*report["missing_keys"], *report["mismatched_keys"]])
        if lacking:
            raise BaseModelError(_lacks(lacking), where, _COMPLETE)
        return model
    what = f"its weights cannot be loaded: {first_line(failures[0])}"
    raise BaseModelError(what, where, _COMPLETE) from failures[0]


def _lacks(names: Sequence[str]) -> str:
    return f"{len(names)} weights are missing or of another shape, such as {names[0]}"


_COMPLETE = "A base needs model_index.json, and .safetensors weights of every component."


def _file_parts(info: BaseInfo, dtype: torch.dtype) -> dict[str, Any]:
    """Components of a single file. Its weights are mapped into memory and copied one by one, so that no more than the
    model is held, and the file may change afterwards."""
    file = read_single_file(Path(info.source), "base.model")
    configs, text_classes = file.configs, FAMILIES[info.family].text_encoder_classes
    weights = from_ldm(info.family, file.file.tensors(), configs["unet"], configs["vae"])
    parts: dict[str, Any] = {"scheduler": configs["scheduler"]}
    for name, kind in {"unet": UNet2DConditionModel, "vae": AutoencoderKL, **text_classes}.items():
        kept, where = torch.float32 if name == "vae" else dtype, f"base.model: {info.model}, {name}"
        parts[name] = _assembled(kind, configs[name], weights.pop(name), kept, where)
    for name in text_classes:
        tokenizer = name.replace("text_encoder", "tokenizer")
        parts[tokenizer] = clip_tokenizer(configs[tokenizer], f"base.model: {info.model}, {tokenizer}")
    return parts


def _other_vae(info: BaseInfo) -> Any:
    """The VAE that stands in for the base's own, fp32."""
    where, dtype = f"base.vae: {info.vae}", torch.float32
    if Path(info.vae).is_file():
        file, config = read_vae_file(Path(info.vae), "base.vae")
        weights = vae_from_file(file.tensors(), config)
        vae = _assembled(AutoencoderKL, config, weights, dtype, where)
    else:
        vae = _load(info.vae, info.vae_revision, info.vae_subfolder, AutoencoderKL, dtype, where)
    vae.register_to_config(scaling_factor=info.scaling_factor)
    return vae


def _assembled(kind: Any, config: dict[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype, where: str) -> Any:
    """A module with weights by diffusers' names, each in memory of its own.

    Raises:
        BaseModelError: if the configuration makes no module, or weights are missing, left over or of another shape.
    """
    try:
        require_modest(config)
        with init_empty_weights():  # buffers are made, because no file holds them
            is_text = kind in (CLIPTextModel, CLIPTextModelWithProjection)
            module = kind(CLIPTextConfig.from_dict(config)) if is_text else kind.from_config(config)
    except NO_MODEL as error:
        what = f"its configuration makes no model: {first_line(error)}"
        raise BaseModelError(what, where, "Copy or download the file again.") from error
    needed = {name: tensor.shape for name, tensor in module.state_dict().items()}
    if isinstance(module, CLIPTextModel) and not any(name.startswith("text_model.") for name in needed):
        weights = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    odd = [n for n in sorted({*needed, *weights}) if n not in weights or weights[n].shape != needed.get(n)]
    if odd:
        raise BaseModelError(_lacks(odd), where, "Copy or download the file again.")
    module.load_state_dict({name: weights[name].to(dtype, copy=True) for name in needed}, assign=True)
    return module


def clip_tokenizer(settings: Mapping[str, Any], where: str) -> CLIPTokenizer:
    """CLIP's own tokenizer. How it pads matters: OpenCLIP's text encoders were trained on `!` there.

    Raises:
        BaseModelError: if it cannot be made as `model_max_length` and `pad_token` say.
    """
    length, pad = settings.get("model_max_length"), settings.get("pad_token")
    plain = CLIPTokenizer.from_pretrained(POCKET / "tokenizer")
    if not isinstance(length, int) or length < 1 or not isinstance(pad, str) or pad not in plain.get_vocab():
        what = f"its tokenizer cannot be {dict(settings)}"
        raise BaseModelError(what, where, "Copy or download the file again.")
    return CLIPTokenizer.from_pretrained(POCKET / "tokenizer", model_max_length=length, pad_token=pad)


def _random_parts(info: BaseInfo, dtype: torch.dtype) -> dict[str, Any]:
    """The real architecture with random weights, the same ones each time; the tokenizer is CLIP's own."""
    shapes = ARCHITECTURES[info.source.removeprefix("random:")]
    parts: dict[str, Any] = {"scheduler": shapes["scheduler"]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts["unet"] = _random_unet(shapes["unet"], dtype)
        parts["vae"] = AutoencoderKL(**shapes["vae"])
        for name, text_class in FAMILIES[info.family].text_encoder_classes.items():
            parts[name] = text_class(CLIPTextConfig(**shapes[name]))
            tokenizer = name.replace("text_encoder", "tokenizer")
            parts[tokenizer] = CLIPTokenizer.from_pretrained(POCKET / "tokenizer", model_max_length=77)
    return parts


def _random_unet(config: Mapping[str, Any], dtype: torch.dtype) -> UNet2DConditionModel:
    """A UNet as its layers begin, made layer by layer: in fp32 as a whole it would take twice what it takes in half."""
    with init_empty_weights():
        unet = UNet2DConditionModel(**config)
    for layer in unet.modules():
        if any(True for _ in layer.parameters(recurse=False)):
            layer.to_empty(device="cpu", recurse=False)
            cast(Any, layer).reset_parameters()
            layer.to(dtype)
    return unet


@contextmanager
def _in_fp32(module: Any) -> Iterator[None]:
    """Within the block a module of half precision computes in fp32; its weights lose nothing on the way back."""
    dtype = module.dtype
    try:
        module.float()
        yield
    finally:
        module.to(dtype)


def _quiet_libraries() -> None:
    """Keep other libraries' bars out of our output."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
