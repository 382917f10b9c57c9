"""AUTOMATIC1111's web UI, 1.10: read in its source, `extensions-builtin/Lora/networks.py` and the modules beside it.

It knows the layers by LDM's names. Those of kohya's files that follow diffusers are first translated by fixed rules,
which have the upsampler of block 0 where SD 1 has it, and no word for `add_embedding`. What finds no layer is dropped
with a message that only its debug log shows. A layer that is found but whose tensors make no known kind stops it.
OpenCLIP's text encoders (SD 2, and the second of SDXL) have attention layers of one piece, which are changed only if
all four of q, k, v and out are there. It registers embeddings that are bundled with a file.
"""

from __future__ import annotations

import re

from .contents import Contents
from .taking import (
    FULL,
    GLORA,
    IA3,
    LOHA,
    LOKR,
    LORA,
    MISFIT,
    NORM,
    OFT,
    Change,
    Groups,
    Taken,
    change_of,
    fits,
    kind_of,
    lengths_of_columns,
    refused,
    unreadable_alpha,
)
from .trees import Layer, Tree, underlined

_KINDS = (LORA, LOHA, IA3, *OFT, *LOKR, FULL, NORM, GLORA)
_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "norm1": "in_layers_0",
    "norm2": "out_layers_0",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(?:(down|up)_blocks_(\d{1,4})|mid_block)_(attentions|resnets)_(\d{1,4})_(.+)")
_RESAMPLING = re.compile(r"(down|up)_blocks_(\d{1,4})_(?:down|up)samplers_0_conv")
_OUTSIDE = {"conv_in": "input_blocks_0_0", "conv_out": "out_2"}
_TIME = re.compile(r"time_embedding_linear_(\d{1,4})")
_TEXT = re.compile(r"lora_te(2?)_text_model_encoder_layers_(\d+)_(.+)")
_OPEN_CLIP = {"mlp_fc1": "mlp_c_fc", "mlp_fc2": "mlp_c_proj", "self_attn": "attn"}


def read(contents: Contents, tree: Tree) -> Taken:
    names = _names(tree)
    groups: Groups = {}
    taken = Taken()
    for key in contents.shapes:
        stem, _, leaf = key.partition(".")
        if stem == "bundle_emb":
            if "." not in leaf:
                return refused(f"it stops at {key}, which names no vector of an embedding, and loads nothing at all")
            taken.besides.add(key)
        elif (name := _name(stem, tree, names)) is not None:
            groups.setdefault(name, {})[leaf] = key
        elif tree.family == "sdxl" and stem.endswith("_upsamplers_0_conv"):
            taken.drop([key], "it looks for SDXL's upsampler where SD 1 has it")
    for name, leaves in groups.items():
        kind, layer = kind_of(leaves, _KINDS), names[name]
        if kind is None or (kind is LORA and not layer.is_projection):
            held = ", ".join(sorted(leaves))
            return refused(f"it knows {name}, but nothing that {held} alone would be, and loads nothing at all")
        if why := unreadable_alpha(contents, leaves):
            return refused(f"{why}, and loads nothing at all")
        if fits(contents, layer, leaves, kind):
            taken.changes.append(change_of(contents, layer, leaves, kind, lengths=lengths_of_columns))
        else:
            taken.drop(leaves.values(), MISFIT)
    _leave_broken_attention(taken, tree)
    return taken


def _names(tree: Tree) -> dict[str, Layer]:
    """Its own names of the layers: the places of the modules in the models that it builds."""
    names = {f"diffusion_model_{underlined(layer.ldm)}": layer for layer in tree.unet}
    for layer in tree.texts:
        path = underlined(layer.path)
        if _is_open_clip(layer, tree):
            path = _open_clip(path.removeprefix("text_model_encoder_layers_"))
            names[f"{'1_' if tree.family == 'sdxl' else ''}{path}"] = layer
        else:
            names[f"{'0_' if tree.family == 'sdxl' else ''}transformer_{path}"] = layer
    return names


def _name(stem: str, tree: Tree, names: dict[str, Layer]) -> str | None:
    """The layer's name for that of a file: translated, or else with another prefix."""
    text = "0_transformer_text_model" if tree.family == "sdxl" else "transformer_text_model"
    tries = [
        _translated(stem, tree),
        stem.replace("lora_unet", "diffusion_model"),
        stem.replace("lora_te1_text_model", text),
    ]
    return next((name for name in tries if name in names), None)


def _translated(stem: str, tree: Tree) -> str:
    """By its rules for diffusers' names; its numbers are those of a UNet with as many layers a block as this has."""
    path = stem.removeprefix("lora_unet_")
    if path == stem:
        found = _TEXT.fullmatch(stem)
        if found and (found[1] or tree.family == "sd2"):
            return f"{'1_' if found[1] else ''}{_open_clip(f'{found[2]}_{found[3]}')}"
        return f"transformer_text_model_encoder_layers_{found[2]}_{found[3]}" if found else stem
    if found := _BLOCK.fullmatch(path):
        side, block, part, index, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
        inner = _RESNET.get(rest, rest) if part == "resnets" else rest
        number = 1 if part == "attentions" else 0
        if side is None:
            return f"diffusion_model_middle_block_{1 if number else 2 * index}_{inner}"
        first = tree.per_block * block + index
        place = f"input_blocks_{1 + first}" if side == "down" else f"output_blocks_{first}"
        return f"diffusion_model_{place}_{number}_{inner}"
    if found := _RESAMPLING.fullmatch(path):
        block = int(found[2])
        if found[1] == "down":
            return f"diffusion_model_input_blocks_{tree.per_block * (block + 1)}_0_op"
        return f"diffusion_model_output_blocks_{tree.per_block * (block + 1) - 1}_{2 if block else 1}_conv"
    if found := _TIME.fullmatch(path):
        return f"diffusion_model_time_embed_{2 * int(found[1]) - 2}"
    return f"diffusion_model_{_OUTSIDE[path]}" if path in _OUTSIDE else stem


def _open_clip(path: str) -> str:
    for ours, theirs in _OPEN_CLIP.items():
        path = path.replace(ours, theirs)
    return f"model_transformer_resblocks_{path}"


def _is_open_clip(layer: Layer, tree: Tree) -> bool:
    return layer.component == "text_encoder_2" or tree.family == "sd2"


def _leave_broken_attention(taken: Taken, tree: Tree) -> None:
    """OpenCLIP's attention is changed as a whole or not at all."""
    attentions: dict[tuple[str, str], list[Change]] = {}
    for change in taken.changes:
        if _is_open_clip(change.layer, tree) and ".self_attn." in change.layer.path:
            attentions.setdefault((change.layer.component, change.layer.path.rpartition(".")[0]), []).append(change)
    broken = [change for changes in attentions.values() if len(changes) < 4 for change in changes]
    for change in broken:
        taken.changes.remove(change)
        taken.drop(change.keys, "it changes OpenCLIP's attention only if q, k, v and out are all there")
