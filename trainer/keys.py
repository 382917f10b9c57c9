"""The names of adapted layers in LoRA files: kohya's (read by every client) and diffusers' own.

A layer is known by its component (`unet`, `text_encoder`, `text_encoder_2`) and its dotted path inside it. Three traps
are avoided here. transformers drops `text_model.` from some text encoders' paths, and clients need it exactly once. In
kohya files SDXL's UNet is named after the original (sgm) code, SD 1's and SD 2's after diffusers. And only layers that
all clients know have a name at all: any other one is an error, because a client would drop it without a word.
"""

from __future__ import annotations

import re
from typing import Literal

from .bases import FamilyName
from .errors import ExportError

Format = Literal["kohya", "diffusers"]

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
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
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
_KOHYA_LEAF = r"\.(?:lora_(?:down|up)\.weight|alpha)"
_DIFFUSERS_LEAF = r"\.lora_[AB]\.weight"
_GRAMMARS: dict[tuple[Format, bool], re.Pattern[str]] = {
    ("kohya", False): re.compile(rf"(?:lora_unet_{_SD_UNET}|lora_te_text_model_encoder_layers_\d+_{_T}){_KOHYA_LEAF}"),
    ("kohya", True): re.compile(
        rf"(?:lora_unet_{_SGM_UNET}|lora_te[12]_text_model_encoder_layers_\d+_{_T}){_KOHYA_LEAF}"
    ),
    ("diffusers", False): re.compile(
        rf"(?:unet\.{_UNET_PATH.pattern}|text_encoder\.text_model\.{_TEXT_PATH.pattern}){_DIFFUSERS_LEAF}"
    ),
    ("diffusers", True): re.compile(
        rf"(?:unet\.{_UNET_PATH.pattern}|text_encoder(?:_2)?\.text_model\.{_TEXT_PATH.pattern}){_DIFFUSERS_LEAF}"
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


def component_of(key: str) -> str | None:
    """The component a key of a LoRA file belongs to, in either format; None if it says none."""
    if key.startswith(("unet.", "lora_unet_")):
        return "unet"
    if key.startswith(("text_encoder_2.", "lora_te2_")):
        return "text_encoder_2"
    return "text_encoder" if key.startswith(("text_encoder.", "lora_te_", "lora_te1_")) else None


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
