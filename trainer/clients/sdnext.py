"""SD.Next: read in its source, `networks.py` and `lora_convert.py` of its LoRA extension.

It works on diffusers' modules, and turns LDM's names into theirs for every family by SDXL's rules, so that the
upsampler of block 0 is not found under the LDM name that it has in SD 1 and SD 2. A key of more than five parts is
taken for PEFT's: then its name is all but the last two parts, which fits the UNet, but no text encoder, whose prefix is
another one. It warns with counts, skips a layer that it does not understand, and registers bundled embeddings.
"""

from __future__ import annotations

from .contents import Contents
from .taking import (
    FULL,
    GLORA,
    IA3,
    LOHA,
    LOKR,
    LORA,
    NORM,
    OFT,
    Taken,
    grouped,
    lengths_of_columns,
    refused,
    take,
    unreadable_alpha,
)
from .trees import Layer, Tree, underlined

_KINDS = (LORA, LOHA, IA3, *OFT, *LOKR, FULL, NORM, GLORA)
_MOST_PARTS = 5


def read(contents: Contents, tree: Tree) -> Taken:
    embeddings = {key for key in contents.shapes if key.startswith("bundle_emb.")}
    keys = [key for key in contents.shapes if key not in embeddings]
    if nameless := next((key for key in keys if "." not in key), None):
        return refused(f"it stops at {nameless}, which names no tensor of a layer")
    names = _names(tree)
    groups = grouped(keys, _split)
    for name, leaves in groups.items():
        if name in names and (why := unreadable_alpha(contents, leaves)):
            return refused(why)
    taken = take(contents, groups, names, _KINDS, lengths_of_columns)
    # Embeddings are registered after layers were found; without any, the file counts as one that failed.
    taken.besides |= embeddings if taken.changes else set()
    return taken


def _split(key: str) -> tuple[str, str]:
    parts = key.split(".")
    if len(parts) <= _MOST_PARTS:
        name, _, leaf = key.partition(".")
        return name, leaf
    name, leaf = "_".join(parts[:-2]), ".".join(parts[-2:])
    name = name if name.startswith("lora_") else f"lora_{name}"
    return name, leaf.replace("lora_A", "lora_down").replace("lora_B", "lora_up")


def _names(tree: Tree) -> dict[str, Layer]:
    prefixes = {"text_encoder": "lora_te1_" if tree.family == "sdxl" else "lora_te_", "text_encoder_2": "lora_te2_"}
    names = {f"{prefixes[layer.component]}{underlined(layer.path)}": layer for layer in tree.texts}
    for layer in tree.unet:
        names[f"lora_unet_{underlined(layer.path)}"] = layer
        if not layer.ldm.endswith(".1.conv"):
            names |= {f"{start}_{underlined(layer.ldm)}": layer for start in ("lora_unet", "diffusion_model")}
    return names
