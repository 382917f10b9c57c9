"""The names of adapted layers in LoRA files: kohya's (read by every client) and diffusers' own.

A layer is known by its component (`unet`, `text_encoder`, `text_encoder_2`) and its dotted path inside it. Three traps
are avoided here. transformers drops `text_model.` from some text encoders' paths, and clients need it exactly once. In
kohya files SDXL's UNet is named after the original (sgm) code, SD 1's and SD 2's after diffusers. And only layers that
all clients know have a name at all: any other one is an error, because a client would drop it without a word.

After the layer's name, a key has a leaf that says which of the layer's tensors it is. Here tensors go by the leaves of
kohya's and LyCORIS' files, as in `Delta`; what other trainers write for them, `split_key` reads.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from .bases import FamilyName
from .errors import ExportError

if TYPE_CHECKING:
    from .delta import Form

Format = Literal["kohya", "diffusers"]
ALPHA = "alpha"

LEAVES: dict[Form, tuple[str, ...]] = {
    "lora": ("lora_down.weight", "lora_up.weight", "lora_mid.weight"),
    "dora": ("dora_scale",),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "full": ("diff",),
}
"""The tensors of a layer in kohya's and LyCORIS' files, by the form that first has them; `alpha` may stand beside."""
_OF_DIFFUSERS = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "dora_scale": "lora_magnitude_vector",
}

_PREFIXES: dict[FamilyName, dict[str, str]] = {
    "sd1": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sd2": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sdxl": {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
}

_TRANSFORMER = r"proj_in|proj_out|transformer_blocks\.\d+\.(?:attn[12]\.to_(?:q|k|v|out\.0)|ff\.net\.(?:0\.proj|2))"
_UNET_PATH = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<block>\d+)|mid_block)\."
    rf"(?:attentions\.(?P<attention>\d+)\.(?P<transformer>{_TRANSFORMER})"
    r"|resnets\.(?P<resnet>\d+)\.(?P<layer>conv1|conv2|conv_shortcut|time_emb_proj)"
    r"|(?P<sampler>(?:down|up)samplers)\.0\.conv)"
)
_TEXT_PATH = re.compile(r"encoder\.layers\.\d+\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])")
_SGM_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}

# The grammars that whole keys of a file on disk are held against. kohya's are written out on their own, so that a slip
# in the names above shows. A client parts layer and leaf at the first `.`, so a kohya name holds no other.
_T = r"(?:self_attn_(?:q|k|v|out)_proj|mlp_fc[12])"
_A = r"(?:proj_in|proj_out|transformer_blocks_\d+_(?:attn[12]_to_(?:q|k|v|out_0)|ff_net_(?:0_proj|2)))"
_R = r"(?:conv1|conv2|conv_shortcut|time_emb_proj)"
_S = r"(?:in_layers_2|out_layers_3|emb_layers_1|skip_connection)"
_SD_UNET = (
    rf"(?:(?:(?:down|up)_blocks_\d+|mid_block)_(?:attentions_\d+_{_A}|resnets_\d+_{_R})"
    r"|down_blocks_\d+_downsamplers_0_conv|up_blocks_\d+_upsamplers_0_conv)"
)
_SGM_UNET = (
    rf"(?:(?:input|output)_blocks_\d+_(?:0_{_S}|1_{_A})|middle_block_(?:[02]_{_S}|1_{_A})"
    r"|input_blocks_\d+_0_op|output_blocks_\d+_2_conv)"
)
_KOHYA_LEAF = rf"\.(?:{'|'.join(re.escape(leaf) for leaves in (*LEAVES.values(), (ALPHA,)) for leaf in leaves)})"
_DIFFUSERS_LEAF = r"\.lora_[AB]\.weight"  # of a text encoder, diffusers reads no lengths
_GRAMMARS: dict[tuple[Format, bool], re.Pattern[str]] = {
    ("kohya", False): re.compile(rf"(?:lora_unet_{_SD_UNET}|lora_te_text_model_encoder_layers_\d+_{_T}){_KOHYA_LEAF}"),
    ("kohya", True): re.compile(
        rf"(?:lora_unet_{_SGM_UNET}|lora_te[12]_text_model_encoder_layers_\d+_{_T}){_KOHYA_LEAF}"
    ),
    ("diffusers", False): re.compile(
        rf"unet\.{_UNET_PATH.pattern}(?:{_DIFFUSERS_LEAF}|\.lora_magnitude_vector)"
        rf"|text_encoder\.text_model\.{_TEXT_PATH.pattern}{_DIFFUSERS_LEAF}"
    ),
    ("diffusers", True): re.compile(
        rf"unet\.{_UNET_PATH.pattern}(?:{_DIFFUSERS_LEAF}|\.lora_magnitude_vector)"
        rf"|text_encoder(?:_2)?\.text_model\.{_TEXT_PATH.pattern}{_DIFFUSERS_LEAF}"
    ),
}


def grammar(family: FamilyName, format: Format) -> re.Pattern[str]:
    """What every key of a file must match from end to end (`fullmatch`)."""
    return _GRAMMARS[format, family == "sdxl"]


def base_name(family: FamilyName, component: str, path: str, format: Format, layers_per_block: int = 2) -> str:
    """The part of a layer's keys before the leaf, in one of the two formats."""
    if format == "kohya":
        return kohya_name(family, component, path, layers_per_block)
    return diffusers_name(component, path)


def diffusers_name(component: str, path: str) -> str:
    """`unet.<path>` or `text_encoder.text_model.<path>`.

    Raises:
        ExportError: for a layer that not all clients know.
    """
    return f"{component}.{_plain_path(component, path)}"


def kohya_name(family: FamilyName, component: str, path: str, layers_per_block: int = 2) -> str:
    """`lora_unet_...`, `lora_te_text_model_...`; for SDXL sgm names in the UNet and `lora_te1_`, `lora_te2_`.

    `layers_per_block` is the UNet's: sgm numbers all layers of one side in a row. It is 2 in every published SDXL.

    Raises:
        ExportError: for a layer that not all clients know.
    """
    if component not in _PREFIXES[family]:
        raise ExportError(f"{family} has no component {component!r}", path, "Export from the base it was trained on.")
    plain = _plain_path(component, path)
    if family == "sdxl" and component == "unet":
        plain = _sgm_path(plain, layers_per_block)
    return _PREFIXES[family][component] + plain.replace(".", "_")


def leaf_of(tensor: str, format: Format) -> str:
    """What a tensor is called after its layer's name, with the dot.

    Raises:
        ExportError: for what diffusers does not read.
    """
    if format == "diffusers" and tensor not in _OF_DIFFUSERS:
        fix = "Take the kohya format, or bake a plain LoRA, which diffusers reads."
        raise ExportError(f"diffusers has no name for {tensor}", "export", fix)
    return f".{tensor if format == 'kohya' else _OF_DIFFUSERS[tensor]}"


def component_of(key: str) -> str | None:
    """The component a key of a LoRA file belongs to, in either format; None if it says none."""
    if key.startswith(("unet.", "lora_unet_")):
        return "unet"
    if key.startswith(("text_encoder_2.", "lora_te2_")):
        return "text_encoder_2"
    return "text_encoder" if key.startswith(("text_encoder.", "lora_te_", "lora_te1_")) else None


# What other trainers write in place of a leaf, and what they add to the layer's name.
_NAME = r"(?:\.(?!weight)\w+)?"  # PEFT's name of an adapter
_SPELLINGS = {
    rf"\.lora_(?:down|A){_NAME}\.weight|\.lora(?:_linear_layer)?\.down\.weight|_lora\.down\.weight": "lora_down.weight",
    rf"\.lora_(?:up|B){_NAME}\.weight|\.lora(?:_linear_layer)?\.up\.weight|_lora\.up\.weight": "lora_up.weight",
    rf"\.lora_magnitude_vector{_NAME}(?:\.weight)?": "dora_scale",
    **{rf"\.{leaf}{_NAME}": leaf for form in ("loha", "lokr") for leaf in LEAVES[form]},
    **{re.escape(f".{leaf}"): leaf for leaf in ("lora_mid.weight", "dora_scale", "diff", ALPHA)},
}
_SPELT = [(re.compile(rf"(?P<layer>.+?)(?:{pattern})"), leaf) for pattern, leaf in _SPELLINGS.items()]
_WRAPPERS = re.compile(r"_orig_mod[._]|base_model\.model\.|(?:^|(?<=\.))module\.|\.processor(?=\.to_(?:q|k|v|out)$)")
_OLD_ATTENTION = re.compile(r"(?P<self>self_attn)?\.to_(?P<which>q|k|v|out)$")


def split_key(key: str) -> tuple[str, str] | None:
    """A key of any trainer's file as (name of the layer, leaf), the leaf in kohya's spelling; None if it has none.

    The name is rid of what wrappers (torch.compile, DDP, PEFT) and old versions of diffusers put into it, but keeps
    its component and its `text_model.`, if it has them.
    """
    for pattern, leaf in _SPELT:
        if found := pattern.fullmatch(key):
            return _OLD_ATTENTION.sub(_as_now, _WRAPPERS.sub("", found["layer"])), leaf
    return None


def _as_now(old: re.Match[str]) -> str:
    """The first versions of diffusers called text encoders' layers as the UNet's, and left `.0` out of `to_out.0`."""
    if old["self"]:
        return f"self_attn.{old['which']}_proj"
    return ".to_out.0" if old["which"] == "out" else old[0]


def known_names(family: FamilyName, component: str, path: str, layers_per_block: int = 2) -> list[str]:
    """All names under which files of any trainer may hold a layer; each belongs to this layer alone."""
    prefix = _PREFIXES[family][component]
    if component != "unet":
        plain = path.removeprefix("text_model.")
        paths = [plain, f"text_model.{plain}"]
        others = ["lora_te_", "lora_te1_"] if component == "text_encoder" else [prefix]
        bare = paths if component == "text_encoder" and family != "sdxl" else []
        return [f"{component}.{p}" for p in paths] + bare + [o + p.replace(".", "_") for o in others for p in paths]
    dotted, underlined = [f"unet.{path}", path], [prefix + path.replace(".", "_")]
    if sgm := _SGM_OUTSIDE.get(path) or _sgm_path_or_none(family, path, layers_per_block):
        dotted += [sgm, f"diffusion_model.{sgm}"]
        underlined.append(prefix + sgm.replace(".", "_"))
    return dotted + underlined


# Layers outside of the blocks: adapted by some trainers, read by some clients.
_SGM_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def _sgm_path_or_none(family: FamilyName, path: str, layers_per_block: int) -> str | None:
    """In SD 1 and SD 2 the first block on the way up has no attention, so that its upsampler is the second part."""
    if not _UNET_PATH.fullmatch(path):
        return None
    sgm = _sgm_path(path, layers_per_block)
    return sgm.replace(".2.conv", ".1.conv") if family != "sdxl" and path == "up_blocks.0.upsamplers.0.conv" else sgm


def _plain_path(component: str, path: str) -> str:
    """The path without what wrappers add to it, and with `text_model.` once."""
    plain = path.replace("_orig_mod.", "").removeprefix("module.").removeprefix("base_model.model.")
    if component == "unet":
        known = _UNET_PATH.fullmatch(plain)
    else:
        plain = plain.removeprefix("text_model.")
        known = _TEXT_PATH.fullmatch(plain)
    if not known:
        raise ExportError(
            f"{component}.{path} has no name that all clients know",
            "adapter.targets",
            "Train attention, feed-forward, residual and sampling layers only.",
        )
    return plain if component == "unet" else f"text_model.{plain}"


def _sgm_path(path: str, layers_per_block: int) -> str:
    """A diffusers UNet path in the words of sgm, where all layers of one side are numbered in a row.

    With n layers a block, block b holds `input_blocks` (n+1)b+1 ... (n+1)b+n, its downsampler is (n+1)(b+1), and on the
    way up it holds `output_blocks` (n+1)b ... (n+1)b+n; the upsampler is the third part of the last one, after the
    residual and the attention layer. At n = 2 this is SDXL's published numbering (kohya-ss/sd-scripts,
    library/sdxl_model_util.py). Every upsampled block of an SDXL has attention, so the part is always number 2.
    """
    match = _UNET_PATH.fullmatch(path)
    assert match, path
    group = match.groupdict()
    down, block, stride = group["side"] == "down", int(group["block"] or 0), layers_per_block + 1
    if group["sampler"]:
        return (
            f"input_blocks.{stride * (block + 1)}.0.op"
            if down
            else f"output_blocks.{stride * block + stride - 1}.2.conv"
        )
    index = int(group["attention"] or group["resnet"] or 0)
    if group["side"] is None:
        part = 1 if group["attention"] else 2 * index
        start = f"middle_block.{part}"
    else:
        number = stride * block + index + (1 if down else 0)
        start = f"{'input' if down else 'output'}_blocks.{number}.{1 if group['attention'] else 0}"
    return f"{start}.{group['transformer'] or _SGM_RESNET[group['layer']]}"
