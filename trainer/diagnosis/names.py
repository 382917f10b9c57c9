"""What is wrong with the keys of a LoRA file: whose layers they name, how, and whether each layer has all of its own.

Nothing but the header is read. Which client finds which names was measured with the clients themselves; where a
sentence names clients, the others read the file as it is meant.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from ..architectures import FAMILY_TITLES
from ..clients.table import Reading, read_by
from .finding import Case, Finding, Layer, Severity, found

CONVERT = "Write it anew with lorasmith convert, which names every layer as all clients do."
_AGAIN = "Save it again from the run that made it."
_MOST_UNKNOWN = 12  # keys; Forge and Fooocus skip a file that has more of them

_S = r"[._]"  # kohya's names part with `_` what all others part with `.`
_IN_BLOCK = (
    rf"(?:proj_in|proj_out|transformer_blocks{_S}\d+{_S}"
    rf"(?:attn[12]{_S}to_(?:q|k|v|out{_S}0)|ff{_S}net{_S}(?:0{_S}proj|2)))"
)
_DIFFUSERS = (
    rf"(?:(?:(?:down|up)_blocks{_S}\d+|mid_block){_S}(?:attentions{_S}\d+{_S}{_IN_BLOCK}"
    rf"|resnets{_S}\d+{_S}(?:conv1|conv2|conv_shortcut|time_emb_proj)|(?:down|up)samplers{_S}0{_S}conv)"
    rf"|conv_in|conv_out|(?:time|add)_embedding{_S}linear_[12])"
)
_SGM = (
    rf"(?:(?:(?:input|output)_blocks{_S}\d+|middle_block){_S}\d+{_S}(?:{_IN_BLOCK}"
    rf"|in_layers{_S}2|out_layers{_S}3|emb_layers{_S}1|skip_connection|op|conv)"
    rf"|input_blocks{_S}0{_S}0|out{_S}2|time_embed{_S}[02]|label_emb{_S}0{_S}[02])"
)
_TEXT = rf"(?:text_model{_S})?encoder{_S}layers{_S}\d+{_S}(?:self_attn{_S}(?:q|k|v|out)_proj|mlp{_S}fc[12])"
_OF_DIFFUSERS = re.compile(rf"(?:lora_unet_|unet\.|){_DIFFUSERS}")
_OF_SGM = re.compile(rf"(?:lora_unet_|unet\.|diffusion_model\.|){_SGM}")
_OF_TEXT = re.compile(rf"(?:lora_te[12]?_|text_encoder(?:_2)?\.|){_TEXT}")
_OUTSIDE = re.compile(
    rf".*(?:conv_in|conv_out|_embedding{_S}linear_[12]|time_embed{_S}[02]|label_emb{_S}0{_S}[02]"
    rf"|input_blocks{_S}0{_S}0|(?:^|[._])out{_S}2)"
)
_WRAPPED = re.compile(r".*(?:_orig_mod[._]|(?:^|[._])module\.|base_model\.model\.)")
_NAMED_ADAPTER = re.compile(r".*\.lora_(?:[AB]|magnitude_vector)\.(?!weight)\w+(?:\.weight)?")


def name_findings(case: Case) -> Iterator[Finding]:
    """All that the keys tell."""
    keys = list(case.file.shapes)
    if not keys:
        yield Finding("error", "the file", "holds no tensors", _AGAIN)
        return
    if case.is_of_other_family:
        yield _other_family(case)
    yield from _unknown(case)
    yield from found("error", [key for key in keys if _WRAPPED.match(key)], _WRAPPER, CONVERT)
    yield from found("warning", [key for key in keys if _NAMED_ADAPTER.fullmatch(key)], _ADAPTER_NAME, CONVERT)
    yield from _incomplete(case.layers)
    yield from _twice(case.layers)
    yield from _text_encoders(case)
    yield from _unet_names(case)
    yield from _dotted(case.layers)
    yield from _forms(case.layers)


_WRAPPER = "the name of a wrapper (torch.compile, DDP, PEFT) is part of the key, which clients do not look for"
_ADAPTER_NAME = "the name of an adapter was left in the key, which only some clients overlook"


def _other_family(case: Case) -> Finding:
    assert case.base
    family, because = case.guess
    assert family
    what = f"is for {FAMILY_TITLES[family]} ({because}), and the base is {FAMILY_TITLES[case.base.info.family]}"
    return Finding("error", "the file", what, "Name a base of the file's family, or take another file.")


# ---------------------------------------------------------------------------------------------------------------------
# keys that are no part of a LoRA for these models

_OTHER_MODEL = "Use it with the models that it was made for."
_CHOOSE = "Choose it in the client as what it is; it is no LoRA."
_KINDS: tuple[tuple[str, Severity, str, str], ...] = (
    (
        r"model\.diffusion_model\..*|first_stage_model\..*|cond_stage_model\..*|conditioner\..*",
        "error",
        "is of a whole model (a checkpoint), not of a LoRA",
        "Choose it in the client as the model; lorasmith extract makes a LoRA of it and its original.",
    ),
    (r".*(?:double_blocks|single_blocks|single_transformer_blocks).*", "error", "is of a LoRA for Flux", _OTHER_MODEL),
    (
        r".*joint_blocks.*|lora_te3_.*|text_encoder_3\..*",
        "error",
        "is of a LoRA for Stable Diffusion 3",
        _OTHER_MODEL,
    ),
    (
        r"(?:lora_)?transformer[._].*|(?:lora_unet_|diffusion_model\.|)(?:blocks|layers|transformer_blocks)[._]\d.*",
        "error",
        "is of a LoRA for a diffusion transformer (SD 3, Flux, Wan, Lumina or another)",
        _OTHER_MODEL,
    ),
    (
        r"lora_prior_.*|.*motion_modules.*|.*temporal_.*",
        "error",
        "is of a LoRA for another kind of model (a prior, or motion)",
        _OTHER_MODEL,
    ),
    (
        r"control_model\..*|.*input_hint_block.*|controlnet_.*|lora_controlnet.*|zero_convs\..*",
        "error",
        "is of a ControlNet",
        _CHOOSE,
    ),
    (r"ip_adapter\..*|image_proj.*", "error", "is of an IP-Adapter", _CHOOSE),
    (r"(?:encoder|decoder)\.(?:down|up|mid|conv).*|(?:post_)?quant_conv.*", "error", "is of a VAE", _CHOOSE),
    (
        r"bundle_emb\..*",
        "warning",
        "is of an embedding bundled with the LoRA: diffusers refuses the file, InvokeAI leaves the embedding out",
        "Put it into a file of its own.",
    ),
    (
        r"emb_params|string_to_param.*|clip_[lg](?:_out)?",
        "error",
        "is of an embedding (textual inversion)",
        "Load it as an embedding; beside a LoRA, put it into a file of its own.",
    ),
    (
        r".*\.(?:diff_b|w_norm|b_norm)",
        "warning",
        "is a change of a bias or norm, which diffusers, sd-scripts and this program do not read",
        "Train again without; no plain LoRA can hold it.",
    ),
    (
        r".*\.(?:oft_blocks|oft_diag|rescale)|.*oft_(?:R|r|s|blocks).*",
        "warning",
        "is a rotation (OFT), which diffusers, sd-scripts and this program do not read",
        "Bake it into a plain LoRA with the program that made it.",
    ),
    (
        r".*\.(?:a[12]|b[12]|bm[12])\.weight",
        "warning",
        "is of a GLoRA, which diffusers, sd-scripts and this program do not read",
        "Bake it into a plain LoRA with the program that made it.",
    ),
    (
        r".*\.on_input|lora_\w+\.weight|.*\.(?:ia3_l|lora_ia3).*",
        "warning",
        "is of an IA3, which diffusers, sd-scripts and this program do not read",
        "Train a LoRA instead.",
    ),
    (
        rf"(?:unet\.|text_encoder\.|)(?:{_TEXT}|text_model\.embed|(?:down|up)_blocks|mid_block|conv_in).*\.(?:weight|bias)",
        "error",
        "is a whole weight of a model, not a change of it",
        "Choose it in the client as the model; lorasmith extract makes a LoRA of it and its original.",
    ),
)
"""What keys are that name no layer's LoRA: pattern, and what a finding says. The first that fits counts."""


def _unknown(case: Case) -> Iterator[Finding]:
    """Keys that no reader finds a layer for, by what they are."""
    split = {key: layer for layer in case.layers for key in layer.keys.values()}
    left = [key for key in case.file.shapes if not _WRAPPED.match(key) and not is_known(split.get(key))]
    groups: dict[int | None, list[str]] = {}
    for key in left:
        kind = next((number for number, (pattern, *_) in enumerate(_KINDS) if re.fullmatch(pattern, key)), None)
        groups.setdefault(kind, []).append(key)
    stray = groups.pop(None, [])
    for number, keys in sorted(groups.items(), key=lambda group: group[0] or 0):
        _, severity, what, fix = _KINDS[number or 0]
        more = _SKIPPED if severity == "warning" and len(keys) > _MOST_UNKNOWN else ""
        yield from found(severity, keys, what + more, fix)
    more = _SKIPPED if len(stray) > _MOST_UNKNOWN else ""
    yield from found("error", stray, _STRAY + more, "Remove it, or save the file again from the run that made it.")
    if case.base and not case.is_of_other_family:
        named = [layer for layer in case.layers if is_known(layer) and not _is_misnamed(case, layer)]
        absent = [layer.name for layer in named if layer.place is None]
        what = f"{FAMILY_TITLES[case.base.info.family]}, as {case.base.info.short_name} is one, has no such layer"
        yield from found("error", absent, what, "Name the base that it was made for.", "layers")


_STRAY = "is no part of a LoRA that clients know: diffusers refuses the file, others leave it out without a word"
_SKIPPED = f"; with more than {_MOST_UNKNOWN} such keys, Forge and Fooocus skip the whole file"


def is_known(layer: Layer | None) -> bool:
    """Whether it is a layer that there is in models of these families."""
    return layer is not None and (layer.place is not None or _names_a_layer(layer.name))


def _is_misnamed(case: Case, layer: Layer) -> bool:
    """Whether it has a name of the original code, which there are for SDXL alone."""
    return case.family in ("sd1", "sd2") and _OF_DIFFUSERS.fullmatch(layer.name) is None and _is_of_sgm(layer)


def _is_of_sgm(layer: Layer) -> bool:
    return bool(_OF_SGM.fullmatch(layer.name))


def _names_a_layer(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in (_OF_DIFFUSERS, _OF_SGM, _OF_TEXT))


# ---------------------------------------------------------------------------------------------------------------------
# layers


def _incomplete(layers: list[Layer]) -> Iterator[Finding]:
    """A layer needs all factors of its product."""
    lacking: dict[str, list[str]] = {}
    for layer in layers:
        if layer.missing and is_known(layer):
            lacking.setdefault(" and ".join(sorted(layer.missing)), []).append(layer.name)
    for missing, names in lacking.items():
        yield from found("error", names, f"lacks {missing}, so that clients refuse or skip it", _AGAIN, "layers")


def _twice(layers: list[Layer]) -> Iterator[Finding]:
    there = [layer for layer in layers if layer.place]
    counts = Counter((layer.place, leaf) for layer in there for leaf in layer.keys)
    names = [layer.name for layer in there if any(counts[layer.place, leaf] > 1 for leaf in layer.keys)]
    yield from found("error", names, "is the same layer as another one under another name", _AGAIN, "layers")


def _text_encoders(case: Case) -> Iterator[Finding]:
    layers = [layer for layer in case.layers if _OF_TEXT.fullmatch(layer.name)]
    names = [layer.name for layer in layers]
    nameless = [name for name in names if "text_model" not in name]
    kohya = [name for name in nameless if name.startswith("lora_te")]
    dotted = [name for name in nameless if name.startswith("text_encoder")]
    yield from found("error", kohya, _NO_TEXT_MODEL, CONVERT, "layers")
    yield from found("warning", dotted, _NO_TEXT_MODEL_DOTTED, CONVERT, "layers")
    if case.family in ("sd1", "sd2"):
        numbered = [name for name in names if name.startswith("lora_te1_")]
        yield from found("warning", numbered, _TE1, CONVERT, "layers")
    if case.family == "sdxl":
        yield from found("warning", [name for name in names if name.startswith("lora_te_")], _TE, CONVERT, "layers")
    yield from _part_of_attention(case, layers)


_NO_TEXT_MODEL = (
    "lacks text_model_ in its name, as transformers from 5.6 on has it: ComfyUI, A1111, Forge, InvokeAI, sd-scripts "
    "and stable-diffusion.cpp leave it out"
)
_NO_TEXT_MODEL_DOTTED = "lacks text_model in its name: diffusers with a transformers before 5.6 refuses it"
_TE1 = "the text encoder is numbered as in SDXL files: InvokeAI and sd-scripts leave it out without a word"
_TE = "the text encoder is not numbered, as in files of SD 1: A1111 leaves it out, InvokeAI refuses the file"


def _part_of_attention(case: Case, layers: list[Layer]) -> Iterator[Finding]:
    """A1111's OpenCLIP has one module for the attention of a layer."""
    open_clip = {"sd2": "text_encoder", "sdxl": "text_encoder_2"}.get(case.family or "")
    there: dict[str, set[str]] = {}
    for layer in layers:
        if layer.component == open_clip and (attention := _ATTENTION.fullmatch(layer.name)):
            there.setdefault(attention[1], set()).add(attention[2])
    parts = [name for name, which in there.items() if len(which) < 4]
    what = "does not adapt all of q, k, v and out: A1111 leaves such attention of this text encoder out"
    yield from found("warning", parts, what, "Train all four.", "layers")


_ATTENTION = re.compile(rf"(.*self_attn){_S}(q|k|v|out)_proj")


def _unet_names(case: Case) -> Iterator[Finding]:
    names = [layer.name for layer in case.layers if layer.component == "unet"]
    sgm = [name for name in names if _OF_SGM.fullmatch(name) and not _OF_DIFFUSERS.fullmatch(name)]
    diffusers = [name for name in names if _OF_DIFFUSERS.fullmatch(name)]
    if sgm and diffusers:
        few = min(sgm, diffusers, key=len)
        yield from found("error", few, _MIXED.format(others=len(names) - len(few)), CONVERT, "layers")
    elif sgm and case.family in ("sd1", "sd2"):
        what = f"has a name of the original code, and for {FAMILY_TITLES[case.family]} diffusers refuses those"
        yield from found("error", sgm, what, CONVERT, "layers")
    if case.family == "sdxl":
        lost = [name for name in diffusers if re.fullmatch(r"lora_unet_(up_blocks_0_upsam|add_embed).*", name)]
        yield from found("warning", lost, _LOST_BY_A1111, CONVERT, "layers")
    outside = [name for name in names if _OUTSIDE.fullmatch(name)]
    what = "lies outside of the blocks: sd-scripts leaves it out, and so do LoRAs that it merges"
    yield from found("warning", outside, what, "Train layers of the blocks only.", "layers")


_MIXED = (
    "is named in another way than the other {others} layers of the UNet (diffusers' blocks, the original's blocks): "
    "diffusers drops one kind without a word, InvokeAI refuses the file"
)
_LOST_BY_A1111 = "has diffusers' name, under which A1111 does not find it"


def _dotted(layers: list[Layer]) -> Iterator[Finding]:
    """Names that are not kohya's."""
    dotted = [layer.name for layer in layers if "." in layer.name and _names_a_layer(layer.name)]
    original = [name for name in dotted if name.startswith("diffusion_model.")]
    own = [name for name in dotted if not name.startswith("diffusion_model.")]
    yield from found("warning", own, _OWN_NAMES, CONVERT, "layers")
    yield from found("warning", original, "has ComfyUI's own name, which other clients do not read", CONVERT, "layers")


_OWN_NAMES = (
    "has the name of diffusers or PEFT: only diffusers reads it whole; A1111, Forge, InvokeAI and sd-scripts apply "
    "nothing, ComfyUI leaves attention out, SD.Next and stable-diffusion.cpp leave text encoders out"
)


def _forms(layers: list[Layer]) -> Iterator[Finding]:
    """Kinds that not all clients read."""
    for form in ("dora", "loha", "lokr", "full"):
        names = [layer.name for layer in layers if layer.form == form]
        said = [how.format(", ".join(read_by(form, kind))) for kind, how in _READINGS.items() if read_by(form, kind)]
        what = f"is a {form}, {' and '.join(said)}"
        yield from found("warning", names, what, "lorasmith resize writes a plain LoRA of it.", "layers")


_READINGS: dict[Reading, str] = {"none": "which {} do not read", "other": "of which {} make another change"}
