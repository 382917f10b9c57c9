"""ComfyUI and Forge: read in their sources, `comfy/lora.py` with `comfy/weight_adapter/`, and Forge's older copy.

Both go through a list of all names that a layer may have in a file and look for tensors under each: LDM's and
diffusers' names in kohya's spelling, LDM's with dots, and those of diffusers' first files, in which an attention layer
is `attn1.processor.to_q`. PEFT's files say `attn1.to_q`, so their attention is not found, but all the rest is. What is
left over is named in the log (ComfyUI), or counted: from 13 keys on, Forge takes nothing of the file. DoRA with the
lengths of columns is exact in both; of rows, ComfyUI divides by the lengths of the base's weight instead of the changed
one's.
"""

from __future__ import annotations

from collections.abc import Callable

from .contents import ALPHA, Contents
from .taking import (
    BIAS,
    FULL,
    GLORA,
    LENGTHS,
    LOHA,
    LOKR,
    LORA,
    MISFIT,
    NORM,
    OFT,
    Kind,
    Taken,
    by_ending,
    change_of,
    fits,
    grouped,
    kind_of,
    lengths_of_columns,
    refused,
    unreadable_alpha,
)
from .trees import Layer, Tree, underlined

_PAIR = {"lora_up.weight": "up", "lora_down.weight": "down"}
_SPELLINGS = {
    **{f".{leaf}": leaf for leaf in _PAIR},
    **{f"_lora.{side}.weight": leaf for leaf, side in _PAIR.items()},
    **{f".lora.{side}.weight": leaf for leaf, side in _PAIR.items()},
    **{f".lora_linear_layer.{side}.weight": leaf for leaf, side in _PAIR.items()},
    ".lora_B.weight": "lora_up.weight",
    ".lora_A.weight": "lora_down.weight",
}
_KINDS: tuple[Kind, ...] = (LORA, LOHA, *LOKR, GLORA, NORM, FULL, BIAS)
_BEGIN = {
    LORA.needs[1]: LORA,
    LOHA.needs[0]: LOHA,
    GLORA.needs[0]: GLORA,
    **{leaf: kind for kind in LOKR for leaf in kind.needs},
}
"""The tensors at which it begins to read a kind; it then stops at any other that is missing."""
_TEXT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
_MOST_LEFT_OVER = 12


def read(contents: Contents, tree: Tree) -> Taken:
    """ComfyUI."""
    newer = {".lora_B.default.weight": "lora_up.weight", ".lora_A.default.weight": "lora_down.weight"}
    return _read(contents, tree, (*_KINDS, *OFT), newer, _lengths)


def read_forge(contents: Contents, tree: Tree) -> Taken:
    """Forge."""
    taken = _read(contents, tree, _KINDS, {}, lengths_of_columns)
    left = len(contents.shapes) - len(taken.used) - sum(why == MISFIT for why in taken.dropped.values())
    if not taken.refusal and left > _MOST_LEFT_OVER:
        most = f"more than the {_MOST_LEFT_OVER} at which it skips the whole file"
        return refused(f"it has no layer for {left} of the {len(contents.shapes)} keys, {most}")
    return taken


def _lengths(axis: str) -> str:
    wrong = "it divides DoRA's lengths of rows by those of the base's weight instead of the changed one's"
    return "" if axis == "columns" else wrong


def _read(
    contents: Contents,
    tree: Tree,
    kinds: tuple[Kind, ...],
    newer: dict[str, str],
    lengths: Callable[[str], str],
) -> Taken:
    leaves_of_all = {leaf for kind in kinds for leaf in (*kind.needs, *kind.may)} | {ALPHA, LENGTHS}
    spellings = {f".{leaf}": leaf for leaf in leaves_of_all} | _SPELLINGS | newer
    names, taken = _names(tree), Taken()
    for name, leaves in grouped(contents.shapes, by_ending(spellings)).items():
        if (layer := names.get(name)) is None:
            continue
        if why := unreadable_alpha(contents, leaves):
            return refused(why)
        kind = kind_of(leaves, kinds)
        begun = next((_BEGIN[leaf] for leaf in _BEGIN if leaf in leaves), None)
        if begun and kind_of(leaves, [kind for kind in kinds if kind.form == begun.form]) is None:
            return refused(f"it stops at {name}, of which only {', '.join(sorted(leaves))} is there")
        if kind is None:
            # An alpha or a length is counted as read wherever it stands.
            taken.besides |= {leaves[leaf] for leaf in (ALPHA, LENGTHS) if leaf in leaves}
            taken.drop((key for leaf, key in leaves.items() if leaf not in (ALPHA, LENGTHS)), "its layer is incomplete")
        elif fits(contents, layer, leaves, kind):
            taken.changes.append(change_of(contents, layer, leaves, kind, lengths=lengths))
        else:
            taken.drop(leaves.values(), MISFIT)
    return taken


def _names(tree: Tree) -> dict[str, Layer]:
    names: dict[str, Layer] = {}
    for layer in tree.unet:
        names[f"lora_unet_{underlined(layer.ldm)}"] = layer
        names[f"diffusion_model.{layer.ldm}"] = layer
        names[f"lora_unet_{underlined(layer.path)}"] = layer
        old = layer.path.replace(".to_", ".processor.to_").removesuffix(".0" if ".to_out." in layer.path else "")
        names |= {old: layer, f"unet.{old}": layer}
    for layer in tree.texts:
        if layer.path.endswith(_TEXT) and layer.path.startswith("text_model.encoder.layers."):
            prefixes = ("lora_te2_",) if layer.component == "text_encoder_2" else ("lora_te_", "lora_te1_")
            names |= {f"{prefix}{underlined(layer.path)}": layer for prefix in prefixes}
            names[f"{layer.component}.{layer.path}"] = layer
    names |= {f"lora_te2_{layer.path}": layer for layer in tree.texts if layer.path == "text_projection"}
    return names
