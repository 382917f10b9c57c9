"""LoRA files of any trainer, read as changes of a live model's layers, and merged into them.

Which layer a key belongs to is told by names alone: those that each layer of the model has in the files of kohya,
LyCORIS, diffusers (new and old) and PEFT. Every key must find its layer, because what is left over would be a part of
the LoRA that is silently missing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .architectures import FAMILY_TITLES, FamilyName
from .delta import Changes, Delta
from .errors import Problem, UserError
from .jsonfile import parse_json
from .keys import ALPHA, known_names, split_key
from .lorafile import LoraFile, fitting, guess_family

_SHOWN = 3  # keys that an error names
_FILES = "Name a LoRA .safetensors file, with its strength if that is not 1, as in detail.safetensors:0.6."

# What has keys of its own that are not read here.
_UNSUPPORTED = {
    r".*\.(?:diff_b|b_norm|w_norm)": "changes of biases and norms cannot be read",
    r".*\.(?:oft_blocks|oft_diag|rescale)|.*oft_(?:R|r|s|blocks).*": "rotations (OFT) cannot be read",
    r".*\.(?:a[12]|b[12]|bm[12])\.weight": "GLoRA cannot be read",
    r".*\.on_input|lora_\w+\.weight|.*\.(?:ia3_l|lora_ia3).*": "IA3 cannot be read",
    r"bundle_emb\..*|emb_params|string_to_param.*|clip_[lg]": "it holds embeddings: take them out into a file of "
    "their own",
    r"model\.diffusion_model\..*|first_stage_model\..*|cond_stage_model\..*|conditioner\..*": "it is a whole model, "
    "not a LoRA",
    r"(?:transformer|lora_transformer|lora_unet_(?:double|single)_blocks|lora_unet_joint_blocks)\W?.*": "it is for a "
    "model of another kind (a diffusion transformer)",
}
COMPLETE = (
    {"lora_down.weight", "lora_up.weight"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    {"diff"},
    *({*one, *two} for one, two in product(*(((f"lokr_w{n}",), (f"lokr_w{n}_a", f"lokr_w{n}_b")) for n in (1, 2)))),
)
"""Sets of tensors of which a layer needs one."""


def read_lora(path: Path, components: Mapping[str, nn.Module], family: FamilyName) -> dict[str, list[Delta]]:
    """What a LoRA file changes in plain components (without adapters), by component; tensors as in the file.

    A file without alphas acts at scale 1, unless its header says otherwise, as diffusers writes it there.

    Raises:
        UserError: if the file cannot be read, holds a key that is no part of a LoRA of these components, or a tensor
            that does not fit its layer.
    """
    file = LoraFile.open(path)
    by_name = places(components, family)
    keys = {key: split_key(key) for key in file.shapes}
    left = [key for key, split in keys.items() if split is None or split[0] not in by_name]
    if left or not keys:
        raise UserError(_left_over(left, len(keys), file, family), str(path), _fix_of(file, family))
    layers: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in file.tensors().items():
        name, leaf = split_key(key) or (key, "")
        if leaf in layers.setdefault(by_name[name], {}):
            raise UserError(f"holds {key} under another name as well", str(path), "Make the file again.")
        layers[by_name[name]][leaf] = _as_rows(tensor) if "lora_magnitude_vector" in key else tensor
    _require(path, _problems(layers))
    alphas = _Alphas(file)
    changes: dict[str, list[Delta]] = {}
    for (component, layer), tensors in layers.items():
        changes.setdefault(component, []).append(_delta(component, layer, tensors, alphas))
    _require(path, _misfits(components, changes))
    return changes


def places(components: Mapping[str, nn.Module], family: FamilyName) -> dict[str, tuple[str, str]]:
    """Every name that a layer may have in a file, to its component and path."""
    unet: Any = components.get("unet")
    per_block = unet.config["layers_per_block"] if unet is not None else 2
    places = {}
    for component, module in components.items():
        for path, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                names = known_names(family, component, path, per_block)
                places |= dict.fromkeys(names, (component, path))
    return places


def _as_rows(lengths: Tensor) -> Tensor:
    """PEFT's lengths, which are always those of rows: (out,), of a convolution (1, out, 1, 1), to (out, 1)."""
    return lengths.reshape(-1, 1)


def _delta(component: str, layer: str, tensors: dict[str, Tensor], alphas: _Alphas) -> Delta:
    alpha = tensors.pop(ALPHA, None)
    rank = Delta(layer, tensors, 0.0).rank
    known = float(alpha) if alpha is not None else alphas.of(component, layer, rank)
    return Delta(layer, tensors, known)


class _Alphas:
    """The alphas of a file that has none among its tensors: where diffusers puts PEFT's configuration into the header,
    and where PEFT writes a file of its own beside it."""

    def __init__(self, file: LoraFile) -> None:
        self._path = file.path
        self._said = self._object(file.metadata.get("lora_adapter_metadata", "{}"))
        beside = file.path.with_name("adapter_config.json")
        if file.path.name == "adapter_model.safetensors" and beside.is_file():
            self._said |= self._object(beside.read_text(encoding="utf-8", errors="replace"))

    def of(self, component: str, layer: str, rank: int) -> float:
        """The rank, which makes the scale 1, where nothing is said."""
        try:
            patterns = self._about(component, "alpha_pattern") or {}
            alpha = fitting(patterns, layer)
            for name in ("lora_alpha", "alpha"):
                alpha = self._about(component, name) if alpha is None else alpha
            alpha = float(rank if alpha is None else alpha)
        except (TypeError, ValueError, AttributeError, OverflowError):
            raise self._unreadable() from None
        return alpha * math.sqrt(rank) if self._about(component, "use_rslora") else alpha

    def _about(self, component: str, name: str) -> Any:
        return self._said.get(f"{component}.{name}", self._said.get(name))

    def _object(self, text: str) -> dict[str, Any]:
        try:
            said = parse_json(text)
        except ValueError:
            raise self._unreadable() from None
        if not isinstance(said, dict):
            raise self._unreadable()
        return said

    def _unreadable(self) -> UserError:
        what = "lora_adapter_metadata in its header, or adapter_config.json beside it, is not PEFT's configuration"
        return UserError(what, str(self._path), "Save it again: without that, the scale is not known.")


# ---------------------------------------------------------------------------------------------------------------------
# what cannot be read


def _left_over(left: list[str], keys: int, file: LoraFile, family: FamilyName) -> str:
    if not keys:
        return "holds nothing"
    shown = ", ".join(left[:_SHOWN]) + (f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else "")
    what = f"{len(left)} of its {keys} keys are no part of a LoRA for this {FAMILY_TITLES[family]}: {shown}"
    for pattern, why in _UNSUPPORTED.items():
        if any(re.fullmatch(pattern, key) for key in left):
            return f"{what}; {why}"
    guess, because = guess_family(file)
    return f"{what}; it is for {FAMILY_TITLES[guess]}, for {because}" if guess and guess != family else what


def _fix_of(file: LoraFile, family: FamilyName) -> str:
    guess, _ = guess_family(file)
    if guess and guess != family:
        return f"Take a LoRA made for {FAMILY_TITLES[family]}, or a base of the file's family."
    return "Take a LoRA, LoCon, DoRA, LoHa, LoKr or full (diff) file of this family, as it came from its trainer."


def _problems(layers: Mapping[tuple[str, str], dict[str, Tensor]]) -> Iterator[str]:
    for (component, layer), tensors in layers.items():
        if not any(needed <= tensors.keys() for needed in COMPLETE):
            yield f"{component}.{layer} is not complete: it holds {', '.join(sorted(tensors))} only"
        if bad := [leaf for leaf, tensor in tensors.items() if not tensor.isfinite().all()]:
            yield f"{component}.{layer} holds NaN or infinity in {bad[0]}"
        if ALPHA in tensors and tensors[ALPHA].numel() != 1:
            yield f"{component}.{layer} has an alpha of {tensors[ALPHA].numel()} numbers"


def _misfits(components: Mapping[str, nn.Module], changes: Changes) -> Iterator[str]:
    for component, deltas in changes.items():
        for delta in deltas:
            shape = tuple(_weight(components[component], delta.name).shape)
            if not delta.fits(shape):
                made_of = ", ".join(f"{leaf} {tuple(tensor.shape)}" for leaf, tensor in delta.tensors.items())
                yield f"{component}.{delta.name} is of shape {shape}, which {made_of} does not change"


def _require(path: Path, problems: Iterator[str]) -> None:
    if found := list(problems):
        fix = "Take a LoRA that was made for this base's family, and copy or download it again."
        shown = [Problem(str(path), what, "") for what in found[:_SHOWN]]
        shown[-1] = Problem(str(path), shown[-1].what, fix)
        raise UserError.of(shown)


# ---------------------------------------------------------------------------------------------------------------------
# merging


def parse_merge(text: str, where: str = "base.merge") -> tuple[Path, float]:
    """A LoRA file with its strength, `FILE` or `FILE:STRENGTH`, as both; a colon after a drive's letter is the path's.

    Raises:
        UserError: if it names no .safetensors file, or its strength is no number or 0.
    """
    found = re.fullmatch(r"(?P<path>.+\.safetensors)(?::(?P<strength>.*))?", text, re.IGNORECASE)
    if not found:
        raise UserError(f"{text!r} is not a .safetensors file", where, _FILES)
    try:
        strength = float(found["strength"] or 1.0) if found["strength"] != "" else math.nan
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength) or strength == 0:
        raise UserError(f"{found['strength']!r} in {text!r} is no strength", where, _FILES)
    return Path(found["path"]).expanduser(), strength


@torch.no_grad()
def merge(components: Mapping[str, nn.Module], changes: Changes, strength: float = 1.0) -> None:
    """Add `strength` times the changes to the weights of plain components, computed in fp32."""
    for component, deltas in changes.items():
        for delta in deltas:
            weight = _weight(components[component], delta.name)
            weight.copy_(weight.float() + strength * delta.of(weight))


@contextmanager
def merged(components: Mapping[str, nn.Module], changes: Changes, strength: float) -> Iterator[None]:
    """Within the block the changes are merged; afterwards the weights are what they were, bit by bit."""
    weights = [_weight(components[component], delta.name) for component in changes for delta in changes[component]]
    kept = [weight.cpu().clone() for weight in weights] if strength else []
    try:
        if strength:
            merge(components, changes, strength)
        yield
    finally:
        for weight, original in zip(weights, kept, strict=False):
            weight.copy_(original)


def _weight(component: nn.Module, layer: str) -> Tensor:
    weight = component.get_submodule(layer).weight
    assert isinstance(weight, Tensor)
    return weight.detach()
