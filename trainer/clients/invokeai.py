"""InvokeAI 6.14: measured with its own loader and patcher, and read in its source where that was not enough.

It first tells by the width of a few tensors for which base a file is; metadata is not looked at. A file that has none
of these tensors is of no base that it knows, and a LoCon of SD 1's convolutions alone passes for SDXL. Then it groups
keys by what stands before the first dot, and one group that it cannot read is the end of the file. It looks for each
layer by diffusers' path, in the UNet under `lora_unet_`, in text encoders under `lora_te_`, or `lora_te1_` and
`lora_te2_` of SDXL. Groups under another prefix are not looked at, without a word.
"""

from __future__ import annotations

import math
import re

from ..architectures import FAMILY_TITLES, FamilyName
from .contents import Contents
from .taking import (
    FULL,
    IA3,
    LENGTHS,
    LOHA,
    LOKR,
    LORA,
    NORM,
    Taken,
    at_first_dot,
    change_of,
    fits,
    grouped,
    kind_of,
    lengths_of_columns,
    refused,
    unreadable_alpha,
)
from .trees import Layer, Tree, underlined

_KINDS = (LORA, LOHA, *LOKR, FULL, IA3, NORM)
_WIDTHS: dict[int, FamilyName] = {768: "sd1", 1024: "sd2", 1280: "sdxl", 2048: "sdxl"}
_TELLING = ("_attn2_to_k.", "_attn2_to_v.", "time_emb_proj.lora_down")
_MARKS = ("lora_te_", "lora_unet_", "lora_te1_", "lora_te2_")
_MARKS_AT_THE_END = (
    *("to_k_lora.up.weight", "to_q_lora.down.weight", "lora_A.weight", "lora_B.weight"),
    *("lokr_w1", "lokr_w2", "hada_w1_a", "hada_w2_a"),
)


def read(contents: Contents, tree: Tree) -> Taken:
    if why := _unlike_its_base(contents, tree):
        return refused(why)
    taken, keys = Taken(), [key for key in contents.shapes if not key.startswith("bundle_emb")]
    taken.drop(contents.shapes.keys() - set(keys), "it leaves embeddings out, so that their words mean nothing")
    if tree.family == "sdxl" and (why := _unconverted(keys, tree)):
        return refused(why)
    if nameless := next((key for key in keys if "." not in key), None):
        return refused(f"it stops at {nameless}, which names no tensor of a layer")
    names = _names(tree)
    for name, leaves in grouped(keys, at_first_dot).items():
        # A DoRA is always read as one of a plain LoRA.
        kind = kind_of(leaves, (LORA,) if LENGTHS in leaves else _KINDS)
        if kind is None:
            return refused(f"it does not know what {name} is with {', '.join(sorted(leaves))}, and rejects the file")
        if why := unreadable_alpha(contents, leaves):
            return refused(why)
        if (layer := names.get(name)) is None:
            continue
        if not fits(contents, layer, leaves, kind):
            return refused(f"it stops at {name}, whose tensors do not fit the layer")
        taken.changes.append(change_of(contents, layer, leaves, kind, lengths=lengths_of_columns))
    return taken


def _names(tree: Tree) -> dict[str, Layer]:
    texts = {"text_encoder": "lora_te1_" if tree.family == "sdxl" else "lora_te_", "text_encoder_2": "lora_te2_"}
    names = {f"{texts[layer.component]}{underlined(layer.path)}": layer for layer in tree.texts}
    names |= {f"lora_unet_{underlined(layer.path)}": layer for layer in tree.unet}
    if tree.family == "sdxl":
        names |= {f"lora_unet_{underlined(layer.ldm)}": layer for layer in tree.unet}
    return names


def _unconverted(keys: list[str], tree: Tree) -> str:
    """Why the names of an SDXL file cannot all be brought to diffusers'."""
    blocks = tuple({"_".join(underlined(layer.ldm).split("_")[:3]) + "_" for layer in tree.unet if layer.ldm})
    unet = [key.removeprefix("lora_unet_") for key in keys if key.startswith("lora_unet_")]
    if strange := next((key for key in keys if not key.startswith(("lora_unet_", "lora_te1_", "lora_te2_"))), None):
        return f"it knows no key of SDXL that begins as {strange} does, and rejects the file"
    converted = [key.replace(".", "_").startswith(blocks) for key in unet]
    if any(converted) and not all(converted):
        return "it does not convert a file in which LDM's and diffusers' names are mixed"
    return ""


_DEEP = re.compile(
    r"lora_unet_(?:(?:down|up)_blocks_\d+_attentions_\d+|mid_block_attentions_\d+"
    r"|(?:in|out)put_blocks_\d+_\d+|middle_block_\d+)_transformer_blocks_(?:[2-9]|\d\d+)_"
)
"""The third layer or a later one of an attention block."""


def _unlike_its_base(contents: Contents, tree: Tree) -> str:
    """Why it does not offer the file for this base."""
    if not any(key.startswith(_MARKS) or key.endswith(_MARKS_AT_THE_END) for key in contents.shapes):
        return "it does not take the file for a LoRA"
    # A base of other widths than the published ones cannot be told from a file; the names decide alone then.
    widths: dict[int, FamilyName] = {**_WIDTHS, tree.text_width: tree.family}
    width = _text_width(contents)
    guess = None if width is None else widths.get(width)
    if guess is None and any(map(_DEEP.match, contents.shapes)):
        guess = "sdxl"  # only SDXL's blocks are so deep
    if guess is None:
        return "it does not find out by the widths of the tensors for which base the file is"
    if guess != tree.family:
        return f"by the widths of the tensors it takes the file for one of {FAMILY_TITLES[guess]}"
    return ""


def _text_width(contents: Contents) -> int | None:
    """The width of the text, by the first tensor that tells it: as its loop over the sorted keys finds it.

    Of SDXL's text encoders the sum counts, and each tensor of them that does not tell forgets what one before it told.
    So a file of text encoders alone is never recognised.
    """
    first = second = None
    for key in sorted(contents.shapes):
        width = None
        if key.startswith("lora_unet_") and any(part in key for part in _TELLING):
            width = _inputs(contents, key)
        elif key.startswith("lora_te") and "_self_attn_" in key:
            found = _inputs(contents, key)
            if key.startswith("lora_te1_"):
                first = found
            elif key.startswith("lora_te2_"):
                second = found
            else:
                width = found
        if first is not None and second is not None:
            width = first + second
        if width is not None:
            return width
    return None


def _inputs(contents: Contents, key: str) -> int | None:
    """How wide the layer's input is, if this tensor tells it; a LoKr tells it only by two whole factors."""
    stem, _, leaf = key.partition(".")
    shape = contents.shapes[key]
    if leaf.startswith("lokr_"):
        factors = [contents.shapes.get(f"{stem}.lokr_w{n}", ()) for n in (1, 2)]
        return math.prod(factor[1] for factor in factors) if all(len(factor) > 1 for factor in factors) else None
    return shape[1] if leaf in ("lora_down.weight", "hada_w1_b", "hada_w2_b", "diff") and len(shape) >= 2 else None
