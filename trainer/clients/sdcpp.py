"""stable-diffusion.cpp of 2025: measured on SD 1 and SDXL, and read in `name_conversion.cpp` and `lora.hpp`.

It turns underlines and dots of a name into one another until the name is that of a tensor of its model, so that
kohya's, LDM's and diffusers' names of the UNet all do, `lora_te_` is `lora_te1_`, and a dot too many does no harm. Of
names that hold an underline only those that it lists survive this: `text_encoder`, so that PEFT's text encoders are not
applied, `time_embedding.linear_1`, `time_embed`, `add_embedding` and `label_emb` are not among them. An alpha stored as
a whole number ends the whole program; DoRA's lengths are left out. On SD 2 it was not measured; that it reads OpenCLIP
there as it does in SDXL is taken for granted.
"""

from __future__ import annotations

from .contents import ALPHA, Contents
from .taking import BIAS, FULL, LOHA, LOKR, LORA, Kind, Taken, by_ending, grouped, refused, take
from .trees import Layer, Tree, underlined

_KINDS = (LORA, LOHA, *(Kind("lokr", kind.needs) for kind in LOKR), FULL, BIAS)
_SIDES = {"up": "lora_up.weight", "down": "lora_down.weight", "mid": "lora_mid.weight"}
_SPELLINGS = {
    **{f".{leaf}": leaf for kind in _KINDS for leaf in (*kind.needs, *kind.may)},
    **{f"{start}lora.{side}.weight": leaf for side, leaf in _SIDES.items() for start in "._"},
    **{f".lora_A{end}": "lora_down.weight" for end in (".weight", ".default.weight", "")},
    **{f".lora_B{end}": "lora_up.weight" for end in (".weight", ".default.weight", "")},
    f".{ALPHA}": ALPHA,
}
_WHOLE_NUMBERS = ("I", "U", "BOOL")
# Parts of paths whose underline it takes for a dot.
_LOST = ("time_embedding.", "add_embedding.", "text_projection")


def read(contents: Contents, tree: Tree) -> Taken:
    for key in contents.alphas:
        if contents.file.dtypes[key].startswith(_WHOLE_NUMBERS):
            return refused(f"{key} is a whole number ({contents.file.dtypes[key]}), at which it ends with a crash")
    split = by_ending(_SPELLINGS)
    groups = grouped(contents.shapes, lambda key: _plain(split(key)))
    taken = take(contents, groups, _names(tree), _KINDS)
    taken.drop((key for key in contents.shapes if key.endswith(".dora_scale")), "it leaves DoRA's lengths out")
    return taken


def _plain(parts: tuple[str, str] | None) -> tuple[str, str] | None:
    """A layer's name as its conversion leaves it, with the component apart."""
    if parts is None:
        return None
    name, leaf = parts
    name = name.removeprefix("lora.").removeprefix("lora_").removeprefix("lycoris_").removeprefix("lycoris.")
    name = name.replace(".processor", "")
    return (underlined(name) if not name.startswith("text_encoder") else name), leaf


def _names(tree: Tree) -> dict[str, Layer]:
    names: dict[str, Layer] = {}
    for layer in tree.layers:
        if layer.path.startswith(_LOST):
            continue
        if layer.component == "unet":
            starts, paths = ("unet_", "diffusion_model_"), {layer.path, layer.ldm}
            paths |= {path.removesuffix(".0") for path in paths if path.endswith(".to_out.0")}
            names[underlined(layer.path)] = layer
        else:
            starts = ("te2_", "clip_g_") if layer.component == "text_encoder_2" else ("te_", "te1_", "clip_l_")
            paths = {layer.path}
        names |= {f"{start}{underlined(path)}": layer for start in starts for path in paths}
    return names
