"""A whole model in one file, as community sites share it: what it is, told by its header, without torch.

Names and shapes give most of a model's configurations. What they do not tell are facts of the published models: SD 1
has 8 attention heads everywhere, SD 2 and SDXL heads of 64 channels, as all text encoders; CLIP's activation is
quick_gelu, OpenCLIP's gelu; groups of a norm are 32. Files of `save_checkpoint_file` say all of it themselves.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from .architectures import FAMILY_TITLES, SCHEDULER, Configs, FamilyName
from .weightfile import WeightFile

Prediction = Literal["epsilon", "v_prediction"]

COMPONENTS = "lorasmith.components"
"""The key in a file's metadata under which our own files keep the configurations of their parts."""

SCALING_FACTOR: dict[FamilyName, float] = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
TEXT_ENCODERS: dict[FamilyName, dict[str, str]] = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
"""By family and component, what its keys begin with; OpenCLIP's end in `model.`."""
UNET, VAE = "model.diffusion_model.", "first_stage_model."

_GROUPS = 32  # of every norm
_HEAD = 64  # channels of an attention head
_SD1_HEADS = 8
_VOCABULARY = 49408
_TIME_WIDTH = 256  # of each of SDXL's six sizes
_LATENT_CHANNELS = 4
PUBLISHED_VAE = [128, 256, 512, 512]
_PUBLISHED_UNETS = [[320, 640, 1280, 1280], [320, 640, 1280]]

_OTHER_BASE = "Name a checkpoint of SD 1, SD 2 or SDXL."


@dataclass(frozen=True)
class SingleFile:
    """A whole model of one file, before its weights are read."""

    file: WeightFile
    family: FamilyName
    configs: Configs
    prediction_stated: bool = True
    """Whether the file says what its UNet predicts."""
    assumptions: tuple[str, ...] = ()
    """What nothing in the file says, in sentences."""


def read_single_file(path: Path, where: str) -> SingleFile:
    """Recognise a model by its header; `where` is the setting that names it.

    Raises:
        BaseModelError: if it is not a whole file, or not a whole text-to-image model of the Stable Diffusion family.
    """
    file = WeightFile.open(path, where)
    if COMPONENTS in file.metadata:
        return _as_it_says(file)
    _refuse_what_is_no_base(file)
    family = _family_of(file)
    prediction, stated, zero_terminal_snr, assumptions = _prediction_of(file, family)
    configs = _text_configs(file, family)
    vae: dict[str, Any] = vae_config(_Part(file, VAE)) | {"scaling_factor": SCALING_FACTOR[family]}
    unet = _unet_config(_Part(file, UNET), family, configs)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    resolution = _resolution(file, family, prediction, factor * 2 ** (len(unet["block_out_channels"]) - 1))
    if unet["block_out_channels"] not in _PUBLISHED_UNETS or vae["block_out_channels"] != PUBLISHED_VAE:
        assumptions += (
            f"{path.name} is of another size than {FAMILY_TITLES[family]}, and its shapes do not tell everything; "
            f"its attention heads, groups of norms and latent scale are assumed to be as there.",
        )
    schedule = {"prediction_type": prediction, "rescale_betas_zero_snr": zero_terminal_snr}
    configs |= {
        "unet": unet | {"sample_size": resolution // factor},
        "vae": vae | {"sample_size": resolution},
        "scheduler": {"_class_name": "DDIMScheduler"} | SCHEDULER | schedule,
    }
    return SingleFile(file, family, configs, stated, assumptions)


def read_vae_file(path: Path, where: str) -> tuple[WeightFile, dict[str, Any]]:
    """A file with a VAE, alone or in a whole model, in LDM's or diffusers' names, and the VAE's configuration.

    Raises:
        BaseModelError: if it holds no VAE, or one of another shape.
    """
    file = WeightFile.open(path, where)
    return file, vae_config(_Part(file, VAE if any(key.startswith(VAE) for key in file.shapes) else ""))


def says_v(name: str) -> bool:
    """Whether a model's name claims v-prediction, as in noobaiXL-vpred-1.0."""
    return re.search(r"v[-_ ]?pred", name, re.IGNORECASE) is not None


def _as_it_says(file: WeightFile) -> SingleFile:
    """A file that holds the configurations of its parts."""
    try:
        configs = json.loads(file.metadata[COMPONENTS])
        family = configs.pop("family")
        tokenizers = {name.replace("text_encoder", "tokenizer") for name in TEXT_ENCODERS[family]}
        lacking = {"unet", "vae", "scheduler", *TEXT_ENCODERS[family], *tokenizers} ^ configs.keys()
        if lacking or not all(isinstance(config, dict) for config in configs.values()):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise file.refusal(f"is damaged: {COMPONENTS} in its metadata", "Copy or download it again.") from None
    return SingleFile(file, family, configs)


# ---------------------------------------------------------------------------------------------------------------------
# what it is


# What is no base, by a pattern of any of its keys, with what to do about it.
_NO_BASES: dict[str, tuple[str, str]] = {
    r"lora_.+|.*[._]lora_(?:down|up|A|B)\b.*|.*\.(?:hada_w1_a|lokr_w1|lokr_w1_a|oft_blocks)": (
        "is a LoRA, not a base",
        "Name the checkpoint it was made for; adapter.start_from goes on from a LoRA, base.merge puts one into a base.",
    ),
    r"(?:model\.diffusion_model\.)?(?:double_blocks|joint_blocks|single_transformer_blocks|transformer_blocks)\..+": (
        "is a Flux, SD 3 or other diffusion transformer",
        _OTHER_BASE,
    ),
    r"edm_(?:mean|std|vpred\..+)": ("was trained with another noise schedule (EDM)", _OTHER_BASE),
    r"conditioner\.embedders\.0\.model\..+": ("is the SDXL refiner", "Name the SDXL base model."),
    r"(?:control_model|controlnet_\w+)\..+": ("is a ControlNet", _OTHER_BASE),
    r"(?:unet\.)?down_blocks\..+": (
        "holds a UNet alone, in diffusers' names",
        "Name a whole checkpoint, or the diffusers folder it belongs to.",
    ),
    r"emb_params|string_to_param|clip_[lg]": ("is a textual inversion embedding", _OTHER_BASE),
}


def _refuse_what_is_no_base(file: WeightFile) -> None:
    for pattern, (what, fix) in _NO_BASES.items():
        if any(re.fullmatch(pattern, key) for key in file.shapes):
            raise file.refusal(what, fix)
    if not any(key.startswith(UNET) for key in file.shapes):
        if any(key.startswith((VAE, "encoder.")) for key in file.shapes):
            raise file.refusal("holds a VAE alone", "Name it as base.vae, and a whole checkpoint as base.model.")
        raise file.refusal("is not a checkpoint of the Stable Diffusion family", _OTHER_BASE)


def _family_of(file: WeightFile) -> FamilyName:
    """Its text encoders tell: CLIP alone in SD 1, OpenCLIP alone in SD 2, both in SDXL."""
    for family, encoders in TEXT_ENCODERS.items():
        if all(any(key.startswith(prefix) for key in file.shapes) for prefix in encoders.values()):
            return family
    raise file.refusal("lacks text encoders", "Name a whole checkpoint: UNet, VAE and text encoders in one file.")


def _prediction_of(file: WeightFile, family: FamilyName) -> tuple[Prediction, bool, bool, tuple[str, ...]]:
    """What the UNet predicts, whether the file says so, whether its noise ends in zero SNR, and what was assumed."""
    name, title, said = file.path.name, FAMILY_TITLES[family], _predictions_said(file)
    end = file.metadata.get("ss_zero_terminal_snr", "True" if "ztsnr" in file.shapes else "").lower()
    told = () if end or family == "sd2" else (_OPEN_END.format(name=name),)
    if "v_prediction" in said:
        return "v_prediction", True, end == "true", ((_AT_ODDS.format(name=name),) if "epsilon" in said else ()) + told
    if "epsilon" in said:
        return "epsilon", True, False, ()
    if family == "sd2" and (spread := file.spread(_SIGN_OF_V)) is not None:
        return ("v_prediction" if spread > _SPREAD_OF_V else "epsilon"), True, False, ()
    if says_v(file.path.stem):
        return "v_prediction", False, False, (BY_NAME.format(name=name), *told)
    return "epsilon", False, False, (_ASSUMED.format(name=name, title=title),)


# ComfyUI tells SD 2's two kinds apart so (`model_type` of SD20 in comfy/supported_models.py).
_SIGN_OF_V, _SPREAD_OF_V = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09

_ASSUMED = (
    "{name} does not say what its UNet predicts; epsilon is assumed, as in most {title} models. If pictures come out "
    'wrong, set objective.prediction = "v_prediction", and objective.zero_terminal_snr if its page says so.'
)
BY_NAME = (
    "{name} claims v-prediction by its name alone, and is taken at its word. If pictures come out wrong, set "
    'objective.prediction = "epsilon".'
)
_AT_ODDS = (
    "{name} is marked as a model that predicts v, and its metadata says epsilon; v is assumed. If pictures come out "
    'wrong, set objective.prediction = "epsilon".'
)
_OPEN_END = (
    "{name} does not say whether its noise ends in zero SNR; it is assumed not to. If its page says that it does, set "
    'objective.zero_terminal_snr = "on".'
)


def _predictions_said(file: WeightFile) -> set[Prediction]:
    """By ModelSpec, by kohya's keys, and by the marks that ComfyUI and Forge go by; they may be at odds."""
    said: set[Prediction] = {"v_prediction"} if {"v_pred", "ztsnr"} & file.shapes.keys() else set()
    for key, (of_v, of_epsilon) in _SAYINGS.items():
        value = file.metadata.get(key, "").lower()
        said |= {"v_prediction"} if value in of_v else {"epsilon"} if value in of_epsilon else set()
    return said


# By key of the metadata, the values that say v and those that say epsilon.
_SAYINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "modelspec.prediction_type": (("v", "v_prediction", "v-prediction"), ("epsilon", "eps")),
    "modelspec.architecture": (("stable-diffusion-v2-768-v",), ("stable-diffusion-v2-512",)),
    "ss_base_model_version": (("sd_v2_v", "sd_v2_768_v"), ()),
    "ss_v_parameterization": (("true",), ("false",)),
    "v_parameterization": (("true",), ("false",)),
    "ss_zero_terminal_snr": (("true",), ()),
}


def _resolution(file: WeightFile, family: FamilyName, prediction: Prediction, step: int) -> int:
    """What ModelSpec says, if it is the side of a square that the model can work at; else what was published."""
    said = re.fullmatch(r"(\d{2,4})x\1", file.metadata.get("modelspec.resolution", ""))
    if said and int(said[1]) >= step and int(said[1]) % step == 0:
        return int(said[1])
    return {"sd1": 512, "sd2": 768 if prediction == "v_prediction" else 512, "sdxl": 1024}[family]


# ---------------------------------------------------------------------------------------------------------------------
# what its parts are like


@dataclass(frozen=True)
class _Part:
    """The keys that share a prefix, without it."""

    file: WeightFile
    prefix: str

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            key.removeprefix(self.prefix): shape
            for key, shape in self.file.shapes.items()
            if key.startswith(self.prefix)
        }

    def shape(self, key: str, dimensions: int) -> tuple[int, ...]:
        """The shape of one tensor.

        Raises:
            BaseModelError: if there is no such tensor, or it has another number of dimensions.
        """
        shape = self.shapes.get(key)
        if shape is None or len(shape) != dimensions:
            found = "is missing" if shape is None else f"has the odd shape {shape}"
            raise self.file.refusal(f"is no whole model: {self.prefix}{key} {found}", "Copy or download it again.")
        return shape

    def count(self, pattern: str) -> int:
        """How many different numbers stand at the start of keys, where the pattern has its group."""
        return len({found[1] for key in self.shapes if (found := re.match(pattern, key))})


def _unet_config(part: _Part, family: FamilyName, text: Configs) -> dict[str, Any]:
    """The UNet of LDM: `input_blocks` down to `middle_block`, and as `output_blocks` up again."""
    _refuse_special_unets(part, family)
    levels = _unet_levels(part)
    channels = [width for width, _, _ in levels]
    depths = [depth for _, depth, _ in levels]
    _, width = part.shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)
    given = sum(config["hidden_size"] for name, config in text.items() if name in TEXT_ENCODERS[family])
    if width != given:
        what = f"is no whole model: its UNet reads text of width {width}, and its text encoders give {given}"
        raise part.file.refusal(what, _OTHER_BASE)
    if family != "sd1" and any(width % _HEAD for width, depth, _ in levels if depth):
        raise part.file.refusal(f"has attention that is not made of heads of {_HEAD} channels", _OTHER_BASE)
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": _LATENT_CHANNELS,
        "out_channels": part.shape("out.2.weight", 4)[0],
        "layers_per_block": levels[0][2],
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "transformer_layers_per_block": [*(depth or 1 for depth in depths[:-1]), _depth(part, "middle_block.1.")],
        # diffusers' name for what is the number of heads
        "attention_head_dim": _SD1_HEADS if family == "sd1" else [max(1, width // _HEAD) for width in channels],
        "cross_attention_dim": width,
        "use_linear_projection": len(part.shapes.get("middle_block.1.proj_in.weight", ())) == 2,
    }
    if family == "sdxl":
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": _TIME_WIDTH,
            "projection_class_embeddings_input_dim": part.shape("label_emb.0.0.weight", 2)[1],
        }
    return config


def _refuse_special_unets(part: _Part, family: FamilyName) -> None:
    channels = part.shape("input_blocks.0.0.weight", 4)[1]
    if channels != _LATENT_CHANNELS:
        kinds = {9: "an inpainting", 8: "an image-editing", 7: "an upscaling", 5: "a depth"}
        what = f"is {kinds.get(channels, 'a special')} model: its UNet reads {channels} channels, not 4"
        raise part.file.refusal(what, "Name the text-to-image model that it was made from.")
    if any(key.startswith("label_emb.") for key in part.shapes) != (family == "sdxl"):
        what = f"is a special kind of {FAMILY_TITLES[family]}, whose UNet is told other things than the text"
        raise part.file.refusal(what, _OTHER_BASE)


def _unet_levels(part: _Part) -> list[tuple[int, int, int]]:
    """(channels, depth of attention, residual layers) of each size of picture, from the largest down.

    Raises:
        BaseModelError: if it is uneven, as models are that were pruned (SSD-1B, Segmind Vega): LDM's layout has a place
            for that, and diffusers' configuration has none.
    """
    levels: list[list[tuple[int, int]]] = [[]]
    for number in range(1, part.count(r"input_blocks\.(\d+)\.")):
        block = f"input_blocks.{number}."
        if f"{block}0.op.weight" in part.shapes:
            levels.append([])
        else:
            levels[-1].append((part.shape(f"{block}0.out_layers.3.weight", 4)[0], _depth(part, f"{block}1.")))
    layers = len(levels[0])
    up = [depth for level in reversed(levels) for _, depth in [*level, *level[:1]]]
    found = [_depth(part, f"output_blocks.{number}.1.") for number in range(part.count(r"output_blocks\.(\d+)\."))]
    mid, last = _depth(part, "middle_block.1."), levels[-1][0][1] if levels[-1] else 0
    even = all(len(set(level)) == 1 and len(level) == layers for level in levels)
    if not even or found != up or not mid or last not in (0, mid):
        raise part.file.refusal("has blocks of uneven depth, as SSD-1B and other pruned models have", _OTHER_BASE)
    if any(channels % _GROUPS for (channels, _), *_ in levels):
        raise part.file.refusal(f"has layers whose channels are no multiple of {_GROUPS}", _OTHER_BASE)
    return [(*level[0], layers) for level in levels]


def _depth(part: _Part, attention: str) -> int:
    """How many transformer blocks an attention layer has; 0 if there is none."""
    return part.count(re.escape(attention) + r"transformer_blocks\.(\d+)\.")


def vae_config(part: _Part) -> dict[str, Any]:
    """The VAE, in LDM's names or in diffusers'; how it scales latents, no shape tells.

    Raises:
        BaseModelError: if there is none, or not one of four latent channels.
    """
    down, block = ("down_blocks", "resnets") if part.count(r"encoder\.down_blocks\.(\d+)\.") else ("down", "block")
    sizes = part.count(rf"encoder\.{down}\.(\d+)\.")
    if not sizes:
        raise part.file.refusal("holds no VAE", "Name a file that holds one.")
    if "quant_conv.weight" not in part.shapes:
        raise part.file.refusal("holds the VAE of another family", "Name one of SD 1, SD 2 or SDXL.")
    latents = part.shape("quant_conv.weight", 4)[0] // 2
    if latents != _LATENT_CHANNELS:
        what = f"holds a VAE of {latents} latent channels, not {_LATENT_CHANNELS}"
        raise part.file.refusal(what, "Name one of SD 1, SD 2 or SDXL.")
    channels = [part.shape(f"encoder.{down}.{size}.{block}.0.conv1.weight", 4)[0] for size in range(sizes)]
    if any(width % _GROUPS for width in channels):
        raise part.file.refusal(f"holds a VAE whose channels are no multiple of {_GROUPS}", "Name another.")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": part.shape("encoder.conv_in.weight", 4)[1],
        "out_channels": part.shape("decoder.conv_out.weight", 4)[0],
        "latent_channels": latents,
        "layers_per_block": part.count(rf"encoder\.{down}\.0\.{block}\.(\d+)\."),
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * sizes,
        "up_block_types": ["UpDecoderBlock2D"] * sizes,
    }


def _text_configs(file: WeightFile, family: FamilyName) -> Configs:
    """Configurations of text encoders and their tokenizers."""
    configs: Configs = {}
    for name, prefix in TEXT_ENCODERS[family].items():
        open_clip = prefix.endswith("model.")
        config = _open_clip_config(_Part(file, prefix)) if open_clip else _clip_config(_clip_part(file, prefix))
        if config["vocab_size"] != _VOCABULARY:
            what = f"reads text in a vocabulary of {config['vocab_size']} words, and CLIP's has {_VOCABULARY}"
            raise file.refusal(what, _OTHER_BASE)
        pad = "!" if open_clip else "<|endoftext|>"
        configs[name.replace("text_encoder", "tokenizer")] = {
            "model_max_length": config["max_position_embeddings"],
            "pad_token": pad,
        }
        projects = name == "text_encoder_2"
        configs[name] = config | {
            "architectures": ["CLIPTextModelWithProjection" if projects else "CLIPTextModel"],
            "model_type": "clip_text_model",
            "dtype": "float32",
            "bos_token_id": _VOCABULARY - 2,
            "eos_token_id": _VOCABULARY - 1,
            "pad_token_id": 0 if open_clip else _VOCABULARY - 1,
            "num_attention_heads": config["hidden_size"] // _HEAD,
        }
        if config["hidden_size"] % _HEAD:
            raise file.refusal(f"has a text encoder that is not made of heads of {_HEAD} channels", _OTHER_BASE)
    return configs


def _clip_part(file: WeightFile, prefix: str) -> _Part:
    """Old files have no `text_model.`."""
    inner = f"{prefix}text_model."
    return _Part(file, inner if any(key.startswith(inner) for key in file.shapes) else prefix)


def _clip_config(part: _Part) -> dict[str, Any]:
    vocabulary, width = part.shape("embeddings.token_embedding.weight", 2)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": part.shape("embeddings.position_embedding.weight", 2)[0],
        "intermediate_size": part.shape("encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": part.count(r"encoder\.layers\.(\d+)\."),
        "projection_dim": width,
        "hidden_act": "quick_gelu",
    }


def _open_clip_config(part: _Part) -> dict[str, Any]:
    """SD 2 reads the last layer but one of 24, so its last is left out; of SDXL's 32 all are there."""
    vocabulary, width = part.shape("token_embedding.weight", 2)
    unread = part.prefix == TEXT_ENCODERS["sd2"]["text_encoder"]
    layers = r"transformer\.resblocks\.((?!23\.)\d+)\." if unread else r"transformer\.resblocks\.(\d+)\."
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": part.shape("positional_embedding", 2)[0],
        "intermediate_size": part.shape("transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "num_hidden_layers": part.count(layers),
        "projection_dim": part.shapes.get("text_projection", (width, width))[-1],
        "hidden_act": "gelu",
    }
