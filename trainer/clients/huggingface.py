"""diffusers 0.42 and PEFT: measured with the libraries themselves, which this project has, and read in their source.

diffusers takes a file whose keys all begin as kohya's for one of kohya's, and any other for its own. Of the first kind
it converts pairs of `lora_down` and `lora_up` with their alpha; any key that remains, as those of LoHa and LoKr do,
makes it refuse the file. SDXL's LDM names it converts, unless one key has a diffusers name: then it drops all of them.
Of its own kind every key must have `lora` in it, and what does not begin with a component's name is passed over. The
scale comes from the alphas, of which only one value a component reaches attention layers and most text encoders;
without any from the header; else it is 1. All this was held against diffusers itself in about a thousand random files.

PEFT's names are those of the live modules, after the component: `<path>.lora_A.weight` and `<path>.lora_B.weight`. It
has no reader of kohya's files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from peft import LoraConfig

from .contents import ALPHA, Contents, said_number, said_scale
from .taking import (
    LENGTHS,
    Change,
    Groups,
    Taken,
    at_first_dot,
    by_ending,
    fits_exactly,
    grouped,
    refused,
    unreadable_alpha,
)
from .trees import Layer, Tree, underlined

_PREFIXES = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
_KOHYA = tuple(prefix for prefixes in _PREFIXES.values() for prefix in prefixes)
_LDM = ("input_blocks", "middle_block", "output_blocks")
_OWN = ("down_blocks", "mid_block", "up_blocks")
_DOWN, _UP = "lora_down.weight", "lora_up.weight"
_ATTENTION = re.compile(r"\.self_attn\.[qkv]_proj|\.self_attn\.out_proj")
_PEFT = {".lora_A.weight": _DOWN, ".lora_B.weight": _UP, ".lora_magnitude_vector": LENGTHS}
_OLD_UNET = {
    **{f".lora.{side}.weight": leaf for side, leaf in (("down", _DOWN), ("up", _UP))},
    **{f"_lora.{side}.weight": leaf for side, leaf in (("down", _DOWN), ("up", _UP))},
}
_OLD_TEXT = {f".lora_linear_layer.{side}.weight": leaf for side, leaf in (("down", _DOWN), ("up", _UP))}
_OLD_TEXT |= {f"_lora.{side}.weight": leaf for side, leaf in (("down", _DOWN), ("up", _UP))}


@dataclass(frozen=True)
class _Pair:
    """A layer of one component, after the conversion of its names."""

    path: str
    leaves: Mapping[str, str]

    def is_text_attention(self) -> bool:
        return bool(_ATTENTION.search(f".{self.path}"))


def read(contents: Contents, tree: Tree) -> Taken:
    """diffusers."""
    taken = Taken(scaling="it applies the most common alpha to all attention layers and to most of a text encoder")
    lengths = [key for key in contents.shapes if LENGTHS in key]
    taken.drop(lengths, "it leaves DoRA's lengths out")
    keys = [key for key in contents.shapes if LENGTHS not in key]
    if contents.said is None:
        return refused("it stops at lora_adapter_metadata in the header, which is not JSON")
    if odd := next((name for name in contents.said if name.rpartition(".")[2] not in _CONFIGURATION), None):
        return refused(f"it stops at {odd} in the header, which is no setting of this version of PEFT")
    if all(key.startswith(_KOHYA) for key in keys):
        return _read_kohya(contents, tree, taken, keys)
    if stray := next((key for key in keys if "lora" not in key), None):
        return refused(f"it refuses the file for {stray}, which has not the word lora in it")
    for component in {layer.component: None for layer in tree.layers}:
        own = [key for key in keys if key.startswith(f"{component}.")]
        found = _own_pairs(component, own)
        if isinstance(found, str):
            return refused(found)
        if why := _apply(contents, tree, taken, component, found):
            return refused(why)
    return taken


def read_peft(contents: Contents, tree: Tree) -> Taken:
    """PEFT."""
    taken = Taken()
    taken.drop((key for key in contents.shapes if key.startswith(_KOHYA)), "it has no reader of kohya's names")
    names = {f"{layer.component}.{layer.path}": layer for layer in tree.layers}
    names |= {f"base_model.model.{layer.path}": layer for layer in tree.layers if layer.component != "text_encoder_2"}
    for name, leaves in grouped(contents.shapes, by_ending(_PEFT)).items():
        layer = names.get(name)
        if layer is None or not leaves.keys() >= {_DOWN, _UP}:
            continue
        if not fits_exactly(contents, layer, leaves):
            return refused(f"it stops at {name}, whose tensors have not the shapes of the layer's own")
        component, _, path = name.partition(".")
        scale = said_scale(contents.said, component, path) if contents.said else 1.0
        taken.changes.append(Change(layer, frozenset(leaves.values()), scale))
    return taken


# ---------------------------------------------------------------------------------------------------------------------
# kohya's files


_CONFIGURATION = frozenset(LoraConfig.__dataclass_fields__)


def _read_kohya(contents: Contents, tree: Tree, taken: Taken, keys: list[str]) -> Taken:
    if tree.family == "sdxl" and _holds(keys, _LDM) and _holds(keys, _OWN):
        mixed = {key for key in keys if _holds([key], _LDM)}
        taken.drop(mixed, "it drops all LDM names where a diffusers name is among them")
        keys = [key for key in keys if key not in mixed]
    groups = {name: leaves for name, leaves in grouped(keys, at_first_dot).items() if _DOWN in leaves}
    if halved := next((name for name, leaves in groups.items() if _UP not in leaves), None):
        return refused(f"it stops at {halved}, which has a lora_down and no lora_up")
    known = {leaves[leaf] for leaves in groups.values() for leaf in (_DOWN, _UP, ALPHA) if leaf in leaves}
    if left := [key for key in keys if key not in known]:
        return refused(f"it refuses the file for {len(left)} keys that it does not convert, such as {left[0]}")
    if contents.said and any(ALPHA in leaves for leaves in groups.values()):
        return refused("it refuses alphas beside lora_adapter_metadata in the header")
    for leaves in groups.values():
        if why := unreadable_alpha(contents, leaves):
            return refused(why)
    for component in {layer.component: None for layer in tree.layers}:
        own = {name: leaves for name, leaves in groups.items() if name.startswith(_PREFIXES[component])}
        found = _unet_pairs(own, tree) if component == "unet" else _text_pairs(component, own, taken)
        why = found if isinstance(found, str) else _apply(contents, tree, taken, component, found)
        if why:
            return refused(why)
    return taken


def _unet_pairs(groups: Groups, tree: Tree) -> list[_Pair]:
    names = _kohya_names(tree)
    return [_Pair(names.get(name, ""), leaves) for name, leaves in groups.items()]


def _text_pairs(component: str, groups: Groups, taken: Taken) -> list[_Pair] | str:
    """By the out_proj it tells that attention has the names of its first files; without any it is not converted."""
    pairs = [_Pair(_text_path(name), leaves) for name, leaves in groups.items()]
    if not pairs or any(pair.path.endswith(".out_proj") for pair in pairs):
        return pairs
    if not any(".mlp." in pair.path for pair in pairs):
        return f"it does not find out how {component} is named without out_proj"
    attention = [pair for pair in pairs if pair.is_text_attention()]
    why = "it does not convert a text encoder's attention without out_proj"
    taken.drop((key for pair in attention for key in pair.leaves.values()), why)
    return [_Pair("" if pair in attention else pair.path, pair.leaves) for pair in pairs]


def _holds(keys: Iterable[str], parts: tuple[str, ...]) -> bool:
    return any(part in key for key in keys for part in parts)


def _kohya_names(tree: Tree) -> dict[str, str]:
    """Paths in the UNet. Of `add_embedding` only LDM's name comes out of the conversion as it should."""
    names = {
        f"lora_unet_{underlined(layer.path)}": layer.path
        for layer in tree.unet
        if not layer.path.startswith("add_embedding")
    }
    for layer in tree.unet:
        if tree.family == "sdxl" or "block" not in layer.path:
            names[f"lora_unet_{underlined(layer.ldm)}"] = layer.path
    return names


def _text_path(name: str) -> str:
    """A text encoder's path as its conversion by replacement makes it of a name."""
    path = re.sub(r"^lora_te[12]?_", "", name).replace("_", ".")
    for whole in ("text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "text_projection"):
        path = path.replace(whole.replace("_", "."), whole)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# its own files


def _own_pairs(component: str, keys: list[str]) -> list[_Pair] | str:
    """The layers of a component; or why their names cannot be told."""
    plain = [key.removeprefix(f"{component}.") for key in keys]
    if component == "unet":
        is_new = bool(plain) and "lora_A" in plain[0]
        groups = grouped(plain, by_ending(_PEFT if is_new else _OLD_UNET | _PEFT))
        paths = {name: name if is_new else _as_now(name) for name in groups}
    else:
        groups = grouped(plain, by_ending(_PEFT | _OLD_TEXT))
        paths = {name: re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", name) for name in groups}
        told = any(
            "to_out_lora" in key or "lora_linear_layer" in key or (".lora_A." in key and _ATTENTION.search(f".{key}"))
            for key in plain
        )
        if plain and not told:
            return f"it does not find out how {component} is named without attention"
    return [
        _Pair(paths[name], {leaf: f"{component}.{key}" for leaf, key in leaves.items()})
        for name, leaves in groups.items()
    ]


def _as_now(name: str) -> str:
    """A path of the UNet as the first versions of diffusers wrote it."""
    return re.sub(r"\.to_out$", ".to_out.0", name.replace(".processor.", "."))


# ---------------------------------------------------------------------------------------------------------------------
# what becomes of the layers of one component


def _apply(contents: Contents, tree: Tree, taken: Taken, component: str, pairs: list[_Pair]) -> str:
    """Adds the changes of a component to what is taken; says why the file is refused, if it is."""
    live = {_live_path(layer, tree): layer for layer in tree.layers if layer.component == component}
    found = [(live[path], pair) for pair in pairs if (path := _stripped(pair.path, component, tree)) in live]
    if pairs and not any(_UP in pair.leaves for _, pair in found):
        return f"it finds no layer of {component} by the names of the file"
    alphas = list(_alphas(contents, pairs))
    for layer, pair in found:
        if not pair.leaves.keys() >= {_DOWN, _UP}:
            if component == "unet":
                return f"it leaves unet.{layer.path}, which is incomplete, without weights, and stops when it draws"
            if _UP in pair.leaves:
                own = frozenset(pair.leaves.values())
                taken.changes.append(Change(layer, own, 1.0, "it makes up a missing lora_A"))
            elif contents.rank_of(pair.leaves) != _common_rank(contents, pairs):
                return f"it stops at {component}.{layer.path}, which has no lora_B that tells its rank"
            else:
                taken.drop(pair.leaves.values(), "its layer has no lora_B, which stays zero")
            continue
        if not fits_exactly(contents, layer, pair.leaves):
            return f"it stops at {component}.{layer.path}, whose tensors have not the shapes of the layer's own"
        used = frozenset(pair.leaves.values())
        if contents.said:
            rank = said_number(contents.said, component, layer.path, "rank", "r")
            if rank != contents.rank_of(pair.leaves):
                return f"it stops at {component}.{layer.path}, for which the header has rank {rank:g}"
            scale = said_scale(contents.said, component, layer.path)
        else:
            scale = _scale(contents, tree, layer, pair, alphas)
        loses_lengths = component != "unet" and LENGTHS in pair.leaves
        wrong = "it does not load DoRA's lengths of a text encoder" if loses_lengths else ""
        taken.changes.append(Change(layer, used, scale, wrong))
    return ""


def _common_rank(contents: Contents, pairs: Iterable[_Pair]) -> int:
    ups = (contents.shapes[pair.leaves[_UP]] for pair in pairs if _UP in pair.leaves)
    ranks = Counter(up[1] for up in ups if len(up) > 1).most_common(1)
    return ranks[0][0] if ranks else 0


def _alphas(contents: Contents, pairs: Iterable[_Pair]) -> Iterator[float]:
    return (contents.alphas[pair.leaves[ALPHA]] for pair in pairs if ALPHA in pair.leaves)


def _scale(contents: Contents, tree: Tree, layer: Layer, pair: _Pair, alphas: list[float]) -> float:
    """The alpha that reaches the layer, by its rank.

    One that differs from the most common one goes by a name that attention layers do not have, nor any layer of a text
    encoder which has lost the `text_model.` that is in the file.
    """
    if not alphas:
        return 1.0
    alpha = Counter(alphas).most_common(1)[0][0]
    if ALPHA in pair.leaves and _reaches(layer, pair, tree):
        alpha = contents.alphas[pair.leaves[ALPHA]]
    return alpha / contents.rank_of(pair.leaves)


def _reaches(layer: Layer, pair: _Pair, tree: Tree) -> bool:
    if layer.component == "unet":
        return not re.search(r"\.to_(?:q|k|v|out\.0)$", layer.path)
    return ".mlp." in layer.path and pair.path == _live_path(layer, tree)


def _live_path(layer: Layer, tree: Tree) -> str:
    return layer.path.removeprefix("text_model.") if layer.component in tree.flattened else layer.path


def _stripped(path: str, component: str, tree: Tree) -> str:
    """A path of the file as it is looked up: without `text_model.` where the live modules have none."""
    return path.removeprefix("text_model.") if component in tree.flattened else path
