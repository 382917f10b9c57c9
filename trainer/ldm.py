"""A whole model in the names of the original code (LDM), which A1111, Forge, ComfyUI and InvokeAI read as a checkpoint.

All names stand in tables from diffusers' to LDM's, laid out for the blocks that a configuration names; the way back is
the same table turned round. So a key that is in no table has no place in the other layout, and is an error: dropped
without a word, it would make another model. Three things differ in more than their names: the VAE's attention is made
of 1x1 convolutions, OpenCLIP keeps q, k and v in one matrix, and its text projection is transposed.

The layout is that of `UNetModel`, `Encoder` and `Decoder` (`modules/diffusionmodules`) in CompVis/stable-diffusion and
Stability-AI/generative-models, and of the text tower in mlfoundations/open_clip.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .architectures import FamilyName
from .errors import BaseModelError, ExportError
from .singlefile import TEXT_ENCODERS, UNET, VAE

_PREFIXES: dict[FamilyName, dict[str, str]] = {
    family: {"unet": UNET, "vae": VAE, **encoders} for family, encoders in TEXT_ENCODERS.items()
}
_OPEN_CLIP = tuple(prefix for own in TEXT_ENCODERS.values() for prefix in own.values() if prefix.endswith(".model."))

DROPPED: dict[str, str] = {
    r"(?:.+\.)?position_ids": "a buffer that counts 0, 1, 2, ...",
    r"(?:.+\.)?logit_scale": "only CLIP's own training reads it",
    r"(?:betas|lvlb_weights|logvar|denoiser\.sigmas|posterior_\w+|(?:\w+_)?alphas_cumprod(?:_prev)?)": (
        "the noise schedule, which the scheduler computes"
    ),
    r"v_pred|ztsnr": "marks of SDXL models that predict v, by which some clients know them",
    r"model_ema\..+": "running averages of the weights; the weights themselves are read",
    r"first_stage_model\.(?:loss|model_ema)\..+": "what the VAE was trained with",
    r"cond_stage_model\.model\.transformer\.resblocks\.23\..+": "SD 2 reads the layer before this one",
    r"cond_stage_model\.(?:model\.|transformer\.)?text_projection(?:\.weight)?": "SD 1 and 2 read no pooled text",
    r"conditioner\.embedders\.0\.(?:transformer\.)?text_projection(?:\.weight)?": "SDXL pools its other text encoder",
}
"""What real files hold besides a model, as patterns of whole keys, and why it is not read."""
_DROPPED = re.compile("|".join(DROPPED))

_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TRANSFORMER = ("norm", "proj_in", "proj_out")
_TRANSFORMER_BLOCK = (
    *("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"),
    *(f"attn{number}.{name}" for number in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")),
)
_VAE_HALF = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
_VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_TEXT = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final"}
_TEXT_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_PARAMETERS = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_projection.weight": "text_projection",
}
_LEAVES = ("weight", "bias")

# Whether a block of this type attends to the text.
_BLOCK_TYPES = {
    **{"DownBlock2D": False, "CrossAttnDownBlock2D": True, "UpBlock2D": False, "CrossAttnUpBlock2D": True},
    **{"DownEncoderBlock2D": False, "UpDecoderBlock2D": False},
}
_MOST_LAYERS = 64  # of a block; a configuration may come out of a stranger's file

_VAE_CONVOLUTION = re.compile(r"first_stage_model\.\w+\.mid\.attn_1\.(?:q|k|v|proj_out)\.weight")
_QKV_KEY = re.compile(r"(.+\.self_attn\.)[qkv]_proj\.(weight|bias)")
_FUSED_KEY = re.compile(r"(.+\.self_attn\.)in_proj_(weight|bias)")
_BARE_CLIP = re.compile(r"((?:cond_stage_model|conditioner\.embedders\.0)\.transformer\.)(?!text_model\.)")


def to_ldm(
    family: FamilyName,
    components: Mapping[str, Mapping[str, Tensor]],
    unet_config: Mapping[str, Any],
    vae_config: Mapping[str, Any],
) -> dict[str, Tensor]:
    """The weights of a model, by component and diffusers' names, under LDM's names; tensors are not copied.

    Raises:
        ExportError: for a weight or component without a place in the layout, or one that is missing.
        BaseModelError: if a configuration is not one of Stable Diffusion.
    """
    named = {c: with_text_model(own) if c.startswith("text_encoder") else own for c, own in components.items()}
    return {
        key: ldm_tensor(key, [named[component][name] for component, name in parts])
        for key, parts in ldm_parts(family, named, unet_config, vae_config).items()
    }


def ldm_parts(
    family: FamilyName,
    names: Mapping[str, Iterable[str]],
    unet_config: Mapping[str, Any],
    vae_config: Mapping[str, Any],
) -> dict[str, list[tuple[str, str]]]:
    """What each key of a checkpoint file is made of: one weight, or OpenCLIP's q, k and v in this order, each as
    (component, diffusers' name). `names` are those of all weights, by component; text encoders' begin with
    `text_model.`.

    Raises:
        ExportError: for a weight or component without a place in the layout, or one that is missing.
        BaseModelError: if a configuration is not one of Stable Diffusion.
    """
    prefixes = _PREFIXES[family]
    if odd := sorted(names.keys() ^ prefixes.keys()):
        raise ExportError(f"{family} needs {', '.join(prefixes)}", odd[0], "Give exactly these components.")
    parts: dict[str, list[tuple[str, str]]] = {}
    for component, prefix in prefixes.items():
        own = [name for name in names[component] if not name.endswith("position_ids")]
        table = _table(component, prefix, own, unet_config, vae_config)
        for name, made_of in (_fused(component, own) if prefix in _OPEN_CLIP else {n: [n] for n in own}).items():
            key = table.get(name)
            if not key or _DROPPED.fullmatch(key):  # no client would read it
                raise ExportError("has no place in a checkpoint file", f"{component}.{name}", _AS_FOLDER)
            parts[key] = [(component, part) for part in made_of]
    return parts


def ldm_tensor(key: str, parts: Sequence[Tensor]) -> Tensor:
    """What stands under a key of a checkpoint file, of the weights that `ldm_parts` names for it; a single one is not
    copied, apart from OpenCLIP's projection."""
    return _reshape(key, parts[0] if len(parts) == 1 else torch.cat(list(parts)), to_ldm=True)


def from_ldm(
    family: FamilyName, weights: Mapping[str, Tensor], unet_config: Mapping[str, Any], vae_config: Mapping[str, Any]
) -> dict[str, dict[str, Tensor]]:
    """The weights of a checkpoint file by component and diffusers' names; text encoders' begin with `text_model.`.

    What `DROPPED` names is left out. Tensors are not copied, apart from OpenCLIP's projection: those of a mapped file
    stay on the disk until they are used.

    Raises:
        BaseModelError: for a key that is no part of the model, a component that is not there, or a configuration that
            is not one of Stable Diffusion.
    """
    tables = {
        component: _table(component, prefix, weights, unet_config, vae_config)
        for component, prefix in _PREFIXES[family].items()
    }
    components = _placed(weights, tables, f"a {family} model")
    for component, own in components.items():
        if not own:
            raise BaseModelError("is missing", component, "The file must hold UNet, VAE and text encoders.")
    return components


def vae_from_file(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A VAE's weights by diffusers' names, from a file of the VAE alone or of a whole model, in either's names.

    Raises:
        BaseModelError: for a key that is no part of the VAE.
    """
    own = {name.removeprefix(VAE): tensor for name, tensor in weights.items() if name.startswith(VAE)} or weights
    if any(name.startswith("encoder.down_blocks.") for name in own):
        return {_OLD_VAE_ATTENTION.sub(lambda found: _RENAMED[found[0]], name): own[name] for name in own}
    own = {VAE + name: tensor for name, tensor in own.items() if not _DROPPED.fullmatch(name)}
    return _placed(own, {"vae": _table("vae", VAE, (), {}, config)}, "a VAE")["vae"]


_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # in diffusers until 0.12
_OLD_VAE_ATTENTION = re.compile(r"(?<=\.attentions\.0\.)(?:query|key|value|proj_attn)(?=\.)")


def _placed(
    weights: Mapping[str, Tensor], tables: Mapping[str, Mapping[str, str]], whole: str
) -> dict[str, dict[str, Tensor]]:
    """Weights by component and diffusers' names, by tables from those to LDM's; `whole` is what they should make."""
    places = {name: (component, key) for component, table in tables.items() for key, name in table.items()}
    components: dict[str, dict[str, Tensor]] = {component: {} for component in tables}
    for name, tensor in weights.items():
        if _DROPPED.fullmatch(name):
            continue
        place = _BARE_CLIP.sub(r"\1text_model.", name)  # old files have no `text_model.`
        if place not in places:
            raise BaseModelError(f"is no part of {whole} of this shape", name, _OTHER_FILE)
        component, key = places[place]
        try:
            components[component] |= _split(key, _reshape(place, tensor, to_ldm=False))
        except (IndexError, RuntimeError, ValueError):
            raise BaseModelError(f"has the odd shape {tuple(tensor.shape)}", name, _OTHER_FILE) from None
    return components


_AS_FOLDER = "Save it as a diffusers folder."
_OTHER_FILE = "Inpainting, refiner and other special models cannot be read."


def with_text_model(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's weights as its file names them: since transformers 5.6 some state dicts lack `text_model.`."""
    return {text_name(key): tensor for key, tensor in weights.items()}


def text_name(name: str) -> str:
    """The name of a text encoder's weight in files, of that or the live one."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


# ---------------------------------------------------------------------------------------------------------------------
# tables


def _table(
    component: str, prefix: str, keys: Iterable[str], unet: Mapping[str, Any], vae: Mapping[str, Any]
) -> dict[str, str]:
    """Every diffusers key that the component may have, to its LDM key; how deep it is, the present keys tell."""
    if component == "unet":
        table = _leaves(_unet_modules(unet, _numbers("transformer_blocks", keys)))
    elif component == "vae":
        table = _leaves(_vae_modules(vae))
    else:
        layers = _numbers("(?:layers|resblocks)", keys)
        table = _open_clip_keys(layers) if prefix in _OPEN_CLIP else _clip_keys(layers)
    return {old: prefix + new for old, new in table.items()}


def _unet_modules(config: Mapping[str, Any], depths: set[str]) -> dict[str, str]:
    """All layers of one side are numbered in a row, a downsampler as one more; an upsampler is part of its last layer.

    Parts of a layer: 0 the residual layer, 1 the attention; the upsampler is next, so 1 where nothing attends.
    """
    inside = [*_TRANSFORMER, *(f"transformer_blocks.{i}.{name}" for i in depths for name in _TRANSFORMER_BLOCK)]
    attention = {name: name for name in inside}
    modules = _UNET | _under("mid_block.attentions.0.", "middle_block.1.", attention)
    for resnet, part in ((0, 0), (1, 2)):
        modules |= _under(f"mid_block.resnets.{resnet}.", f"middle_block.{part}.", _UNET_RESNET)
    for side, row, number in (("down", "input_blocks", 0), ("up", "output_blocks", -1)):
        levels = _levels(config, side)
        for block, (attends, layers) in enumerate(levels):
            old = f"{side}_blocks.{block}."
            for layer in range(layers):
                number += 1
                modules |= _under(f"{old}resnets.{layer}.", f"{row}.{number}.0.", _UNET_RESNET)
                if attends:
                    modules |= _under(f"{old}attentions.{layer}.", f"{row}.{number}.1.", attention)
            if block < len(levels) - 1 and side == "down":
                number += 1
                modules[f"{old}downsamplers.0.conv"] = f"{row}.{number}.0.op"
            elif block < len(levels) - 1:
                modules[f"{old}upsamplers.0.conv"] = f"{row}.{number}.{1 + attends}.conv"
    return modules


def _vae_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """LDM numbers the decoder's blocks as the encoder's, by size: the last one on the way up is `up.0`."""
    modules = {name: name for name in ("quant_conv", "post_quant_conv")}
    for half, side in (("encoder", "down"), ("decoder", "up")):
        modules |= _under(f"{half}.", f"{half}.", _VAE_HALF)
        modules |= _under(f"{half}.mid_block.attentions.0.", f"{half}.mid.attn_1.", _VAE_ATTENTION)
        for resnet in (0, 1):
            modules |= _under(f"{half}.mid_block.resnets.{resnet}.", f"{half}.mid.block_{resnet + 1}.", _VAE_RESNET)
        levels = _levels(config, side)
        for block, (_, layers) in enumerate(levels):
            size = block if side == "down" else len(levels) - 1 - block
            old, new = f"{half}.{side}_blocks.{block}.", f"{half}.{side}.{size}."
            for layer in range(layers):
                modules |= _under(f"{old}resnets.{layer}.", f"{new}block.{layer}.", _VAE_RESNET)
            if block < len(levels) - 1:
                modules[f"{old}{side}samplers.0.conv"] = f"{new}{side}sample.conv"
    return modules


def _clip_keys(layers: set[str]) -> dict[str, str]:
    """CLIP's names are the same in both layouts."""
    inner = (*_TEXT_LAYER, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    names = [*_TEXT, "embeddings.position_embedding", *(f"encoder.layers.{i}.{name}" for i in layers for name in inner)]
    return _leaves({f"text_model.{name}": f"text_model.{name}" for name in names})


def _open_clip_keys(layers: set[str]) -> dict[str, str]:
    modules, fused = _under("text_model.", "", _TEXT), {}
    for layer in layers:
        old, new = f"text_model.encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        modules |= _under(old, new, _TEXT_LAYER)
        fused |= {f"{old}self_attn.in_proj_{leaf}": f"{new}attn.in_proj_{leaf}" for leaf in _LEAVES}
    return _OPEN_CLIP_PARAMETERS | _leaves(modules) | fused


def _leaves(modules: Mapping[str, str]) -> dict[str, str]:
    return {f"{old}.{leaf}": f"{new}.{leaf}" for old, new in modules.items() for leaf in _LEAVES}


def _under(old: str, new: str, names: Mapping[str, str]) -> dict[str, str]:
    return {old + inner: new + other for inner, other in names.items()}


def _numbers(word: str, keys: Iterable[str]) -> set[str]:
    """The numbers that follow a word in the keys."""
    return {number for key in keys for number in re.findall(rf"\.{word}\.(\d+)\.", key)}


def _levels(config: Mapping[str, Any], side: str) -> list[tuple[bool, int]]:
    """(attends to text, residual layers) of the blocks of one side; on the way up each has one layer more."""
    types, layers = config.get(f"{side}_block_types"), config.get("layers_per_block")
    kinds: list[Any] = list(types) if isinstance(types, list | tuple) else []
    numbers: list[Any] = list(layers) if isinstance(layers, list | tuple) else [layers] * len(kinds)
    known = all(str(kind) in _BLOCK_TYPES for kind in kinds) and len(kinds) == len(numbers) > 0
    if not known or not all(isinstance(number, int) and 0 < number <= _MOST_LAYERS for number in numbers):
        what = f"a model with {side}_block_types {types} of {layers} layers has no place in a checkpoint file"
        raise BaseModelError(what, "", _AS_FOLDER)
    if side == "up":
        numbers = [number + 1 for number in reversed(numbers)]
    return [(_BLOCK_TYPES[kind], number) for kind, number in zip(kinds, numbers, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# shapes


def _reshape(name: str, tensor: Tensor, to_ldm: bool) -> Tensor:
    """(c, c) to (c, c, 1, 1) and back in the VAE's attention; OpenCLIP's projection is (width, projection)."""
    if _VAE_CONVOLUTION.fullmatch(name):
        return tensor[:, :, None, None] if to_ldm else tensor.flatten(1)
    return tensor.T.contiguous() if name.endswith(".text_projection") else tensor


def _fused(component: str, names: Sequence[str]) -> dict[str, list[str]]:
    """Each name to what it is made of: OpenCLIP's q, k and v, of (width, width) and (width,), stand one after the other
    in one matrix, (3 width, width), and one bias, (3 width,)."""
    known, fused = set(names), {}
    for name in names:
        if not (match := _QKV_KEY.fullmatch(name)):
            fused[name] = [name]
        elif (whole := f"{match[1]}in_proj_{match[2]}") not in fused:
            fused[whole] = [f"{match[1]}{part}_proj.{match[2]}" for part in "qkv"]
            if missing := [part for part in fused[whole] if part not in known]:
                raise ExportError("is missing", f"{component}.{missing[0]}", "Load the base again.")
    return fused


def _split(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """What `_fused` puts together, as views; any other tensor as it is."""
    if not (match := _FUSED_KEY.fullmatch(key)):
        return {key: tensor}
    return {f"{match[1]}{part}_proj.{match[2]}": third for part, third in zip("qkv", tensor.chunk(3), strict=True)}
