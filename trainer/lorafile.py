"""A LoRA file on disk: its header, hashes and tensors, and what can be told of it without any model."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .bases import FamilyName
from .errors import UserError
from .keys import ALPHA, LEAVES, Format, component_of, split_key

_DIFFUSERS_LEAVES = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
# Width of the text that cross-attention reads, in the published models.
_CROSS_ATTENTION: dict[int, FamilyName] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_TEXT_WIDTH: dict[int, FamilyName] = {768: "sd1", 1024: "sd2"}


@dataclass(frozen=True)
class Hashes:
    """The names a file goes by, lower-case hex."""

    sha256: str
    """Of the whole file."""
    autov1: str
    """A1111's first hash: 64 KiB from 1 MiB on, 8 digits."""
    autov2: str
    """The first 10 digits of `sha256`."""
    autov3: str
    """The first 12 digits of the SHA-256 of the bytes after the header: what LoRA managers look for."""
    tensors: str
    """All 64 digits of it."""


@dataclass(frozen=True)
class LoraFile:
    """The header of a `.safetensors` file; tensors are read when they are asked for."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    """safetensors' names: `F16`, `BF16`, `F32`, ..."""
    metadata: dict[str, str]

    @classmethod
    def open(cls, path: Path) -> LoraFile:
        """Read the header.

        Raises:
            UserError: if there is no such file, or it is not safetensors, or it is cut short.
        """
        if not path.is_file():
            raise UserError("is a folder" if path.is_dir() else "no such file", str(path), "Name a .safetensors file.")
        try:
            with safe_open(path, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
                shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
                dtypes = {key: part.get_dtype() for key, part in slices.items()}
                return cls(path, shapes, dtypes, dict(file.metadata() or {}))
        except SafetensorError as error:
            raise UserError(
                f"is not a whole safetensors file ({error})",
                str(path),
                "Copy or download it again; a .ckpt or .pt file must be converted first.",
            ) from error
        except OSError as error:
            raise UserError(
                f"cannot be read ({error.strerror or error})", str(path), "Check its permissions."
            ) from error

    def tensors(self, suffix: str = "") -> dict[str, Tensor]:
        """The tensors whose key ends so, on the CPU."""
        with safe_open(self.path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in self.shapes if key.endswith(suffix)}

    @cached_property
    def format(self) -> Format | None:
        """Whose names the keys are; None if neither's, or a mixture."""
        known = bool(self.shapes) and all(component_of(key) for key in self.shapes)
        if known and all(key.startswith("lora_") and "." in key for key in self.shapes):
            return "kohya"
        return "diffusers" if known and all(key.endswith(_DIFFUSERS_LEAVES) for key in self.shapes) else None

    @cached_property
    def layers(self) -> dict[str, dict[str, str]]:
        """Name of a layer to its tensors, by kohya's leaves, to their keys; keys of unknown kinds are left out."""
        found: dict[str, dict[str, str]] = {}
        for key in self.shapes:
            if split := split_key(key):
                found.setdefault(split[0], {})[split[1]] = key
        return found

    @cached_property
    def hashes(self) -> Hashes:
        """Read once from end to end."""
        whole, after = hashlib.sha256(), hashlib.sha256()
        with self.path.open("rb") as file:
            head = file.read(8)
            head += file.read(int.from_bytes(head, "little"))
            whole.update(head)
            while block := file.read(1 << 20):
                whole.update(block)
                after.update(block)
            file.seek(0x100000)
            first = hashlib.sha256(file.read(0x10000)).hexdigest()
        digest, tensors = whole.hexdigest(), after.hexdigest()
        return Hashes(digest, first[:8], digest[:10], tensors[:12], tensors)


def inspect(path: Path) -> dict[str, Any]:
    """What is in a LoRA file, ready for JSON; no model is loaded. Of a whole model, it says that it is one.

    Raises:
        UserError: if it is not a whole safetensors file.
    """
    file = LoraFile.open(path)
    family, because = guess_family(file)
    known = {key for keys in file.layers.values() if keys.keys() - {ALPHA} for key in keys.values()}
    whole = any(key.startswith("model.diffusion_model.") for key in file.shapes)
    return {
        "name": path.name,
        "bytes": path.stat().st_size,
        "format": "ldm, a whole model" if whole else file.format or "unknown",
        "family": family or "unknown",
        "family_because": because,
        "dtypes": dict(Counter(file.dtypes.values())),
        "components": _components(file),
        "other_keys": [] if whole else sorted(set(file.shapes) - known),
        "hashes": asdict(file.hashes),
        "metadata": {key: _readable(value) for key, value in sorted(file.metadata.items())},
    }


def guess_family(file: LoraFile) -> tuple[FamilyName | None, str]:
    """The family a LoRA was made for, and what tells it: names first, then widths, then what the file says."""
    components = {component_of(key) for key in file.shapes}
    if "text_encoder_2" in components:
        return "sdxl", "it names two text encoders"
    if any(key.startswith(("lora_unet_input_blocks", "lora_unet_output_blocks")) for key in file.shapes):
        return "sdxl", "its UNet has sgm names"
    for name, keys in file.layers.items():
        width = _inputs({leaf: file.shapes[key] for leaf, key in keys.items()})
        if name.endswith(("attn2_to_k", "attn2.to_k")) and width in _CROSS_ATTENTION:
            return _CROSS_ATTENTION[width], f"its cross-attention reads text of width {width}"
        is_text_width = name.endswith(("self_attn_q_proj", "self_attn.q_proj")) and width in _TEXT_WIDTH
        if is_text_width and not name.startswith("lora_te1_"):
            return _TEXT_WIDTH[width], f"its text encoder has width {width}"
    if any(key.startswith("lora_te1_") for key in file.shapes):
        return "sdxl", "it names the first of two text encoders"
    said = _family_said(file.metadata)
    return said, "its metadata says so" if said else "neither names, widths nor metadata tell"


def _inputs(shapes: dict[str, tuple[int, ...]]) -> int:
    """How wide the vectors are that an adapted linear layer reads; 0 if its tensors do not tell."""
    widths = {leaf: shape[1] for leaf, shape in shapes.items() if len(shape) > 1}
    for leaf in ("lora_down.weight", "hada_w1_b", "diff"):
        if leaf in widths:
            return widths[leaf]
    factors = [widths.get(f"lokr_w{number}", widths.get(f"lokr_w{number}_b", 0)) for number in (1, 2)]
    return factors[0] * factors[1]


def _family_said(metadata: dict[str, str]) -> FamilyName | None:
    version = metadata.get("ss_base_model_version", "") + " " + metadata.get("modelspec.architecture", "")
    if "sdxl" in version or "stable-diffusion-xl" in version:
        return "sdxl"
    if metadata.get("ss_v2") == "True" or "sd_v2" in version or "stable-diffusion-v2" in version:
        return "sd2"
    return "sd1" if "sd_v1" in version or "stable-diffusion-v1" in version else None


def _components(file: LoraFile) -> dict[str, dict[str, Any]]:
    """By component: how many layers, their forms, ranks and alphas, each with its count."""
    alphas = {key: float(t.flatten()[0]) for key, t in file.tensors(f".{ALPHA}").items() if t.numel()}
    found: dict[str, dict[str, Any]] = {}
    for name, keys in file.layers.items():
        if not keys.keys() - {ALPHA}:
            continue
        entry = found.setdefault(
            component_of(name) or "unknown",
            {"modules": 0, "forms": Counter(), "ranks": Counter(), "alphas": Counter()},
        )
        entry["modules"] += 1
        entry["forms"][_form(keys)] += 1
        if rank := _rank({leaf: file.shapes[key] for leaf, key in keys.items()}):
            entry["ranks"][str(rank)] += 1
            entry["alphas"][f"{alphas.get(keys.get(ALPHA, ''), rank):g}"] += 1
    counters = ("forms", "ranks", "alphas")
    return {name: entry | {counter: dict(entry[counter]) for counter in counters} for name, entry in found.items()}


def _form(keys: Iterable[str]) -> str:
    """As `Delta.form`, told by the leaves."""
    return "dora" if "dora_scale" in keys else next(form for form, leaves in LEAVES.items() if set(leaves) & set(keys))


def _rank(shapes: dict[str, tuple[int, ...]]) -> int:
    for leaf in ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if shapes.get(leaf):
            return shapes[leaf][0]
    return 0


def _readable(value: str) -> Any:
    """Structured values as they are meant; a long one, such as a thumbnail, by its length."""
    if value.startswith(("{", "[")):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value if len(value) <= 1000 else f"{value[:40]}... ({len(value)} characters)"
