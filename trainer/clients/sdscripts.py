"""kohya's sd-scripts: measured with its merge and its key check.

It makes a LoRA for the layers within attention, residual and resampling blocks of the UNet, and within attention and
MLP of the text encoders, where the file has a `lora_down` of that name; everything else is dropped without a word. The
names of SDXL's UNet are LDM's, to which diffusers' are converted. An alpha of 0 counts as the rank, tensors must have
the very shapes of the layers (a 1x1 convolution's are 4-D), and other kinds than LoRA and LoCon need LyCORIS.
"""

from __future__ import annotations

from .contents import ALPHA, Contents
from .taking import LORA, Kind, Taken, at_first_dot, change_of, fits_exactly, grouped, refused, unreadable_alpha
from .trees import Layer, Tree, underlined

_UNET = {"Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"}
_TEXT = {"CLIPAttention", "CLIPMLP"}
_PLAIN = Kind("lora", LORA.needs)


def read(contents: Contents, tree: Tree) -> Taken:
    names, taken = _names(tree), Taken(scaling="it takes an alpha of 0 for the rank")
    for name, leaves in grouped(contents.shapes, at_first_dot).items():
        if (layer := names.get(name)) is None or "lora_down.weight" not in leaves:
            continue
        if why := unreadable_alpha(contents, leaves):
            return refused(why)
        if "lora_up.weight" not in leaves:
            taken.drop(leaves.values(), "its layer has no lora_up, which stays zero")
        elif not fits_exactly(contents, layer, leaves):
            return refused(f"it stops at {name}, whose tensors have not the shapes of the layer's own")
        else:
            taken.changes.append(change_of(contents, layer, leaves, _PLAIN, _scale(contents, leaves)))
    return taken


def _scale(contents: Contents, leaves: dict[str, str]) -> float:
    is_zero = ALPHA in leaves and contents.alphas[leaves[ALPHA]] == 0
    return 1.0 if is_zero else contents.scale_of(leaves)


def _names(tree: Tree) -> dict[str, Layer]:
    prefixes = {"text_encoder": "lora_te1_" if tree.family == "sdxl" else "lora_te_", "text_encoder_2": "lora_te2_"}
    names: dict[str, Layer] = {}
    for layer in tree.layers:
        if not layer.is_projection or layer.within.isdisjoint(_UNET if layer.component == "unet" else _TEXT):
            continue
        if layer.component != "unet":
            names[f"{prefixes[layer.component]}{underlined(layer.path)}"] = layer
            continue
        names[f"lora_unet_{underlined(layer.path)}"] = layer
        if tree.family == "sdxl":
            names[f"lora_unet_{underlined(layer.ldm)}"] = layer
    return names
