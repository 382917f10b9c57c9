"""What a LoRA file says about itself: `ss_*` (kohya), `modelspec.*` (ModelSpec 1.0.1), `sshs_*` (hashes).

All values are text; structured ones are strict JSON. A fact that is not known is left out, never invented. Nothing
private is written: of folders and models only the last part of the name, of captions only the tag counts the caller
gives. Who reads which key: https://github.com/Stability-AI/ModelSpec and A1111's `extensions-builtin/Lora/network.py`.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from PIL import Image

from . import __version__
from .bases import BaseInfo, FamilyName
from .config import RunConfig

if TYPE_CHECKING:
    from .delta import Form
    from .tensorfile import TensorWriter

THUMBNAIL_SIDE = 256

_ARCHITECTURES: dict[FamilyName, str] = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}
_LICENSES: dict[FamilyName, str] = {"sd1": "creativeml-openrail-m", "sd2": "openrail++", "sdxl": "openrail++"}
# SD 1 and SD 2 are conditioned on the text encoder's last layer, SDXL on the last but one.
_ENCODER_LAYER: dict[FamilyName, str] = {"sd1": "1", "sd2": "1", "sdxl": "2"}


@dataclass(frozen=True)
class FolderFacts:
    """One folder of training images."""

    path: str
    images: int
    repeats: int = 1
    """How often each image was shown in one epoch."""
    trigger: str = ""

    @property
    def name(self) -> str:
        return last_part(self.path)


@dataclass(frozen=True)
class Facts:
    """What is known of a run when its LoRA is written. Every field but the name may be missing."""

    name: str
    """Name of the LoRA; the file is `<name>.safetensors`."""
    config: RunConfig | None = None
    folders: tuple[FolderFacts, ...] = ()
    buckets: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """(width, height) in pixels to number of images."""
    tag_frequency: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Folder to tag to number of images; a tag is what stands between two commas, in lower case."""
    steps: int | None = None
    """Optimizer steps behind these weights."""
    images_seen: int | None = None
    started: float | None = None
    """Unix time."""
    finished: float | None = None
    loss: float | None = None
    """Mean training loss near the end."""
    author: str = ""
    description: str = ""
    license: str = ""
    """Empty: the license of the base."""
    picture: Image.Image | None = None
    """What the style looks like: thumbnail and preview."""
    baked: BakedFacts | None = None

    @property
    def triggers(self) -> list[str]:
        """The words that call the style, each once, in order."""
        given = [folder.trigger for folder in self.folders]
        given += [data.trigger for data in self.config.data] if self.config else []
        return list(dict.fromkeys(word for word in given if word))


@dataclass(frozen=True)
class Shape:
    """Rank, alpha and reach of the adapters, counted on the tensors that are written."""

    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    convolutions: bool
    """Whether 3x3 convolutions are adapted too."""
    form: Form = "lora"

    @property
    def rank(self) -> str | None:
        return _one(self.ranks)

    @property
    def alpha(self) -> str | None:
        return _one(self.alphas)


def _one(values: Sequence[float]) -> str | None:
    """What all layers have; kohya's word if they differ; None if there are none."""
    different = set(values)
    return None if not different else str(values[0]) if len(different) == 1 else "Dynamic"


# sd-scripts' module for plain LoRAs; what else there is, LyCORIS reads, by the names of its algorithms.
_NETWORKS: dict[Form, tuple[str, dict[str, str]]] = {
    "lora": ("networks.lora", {}),
    "dora": ("lycoris.kohya", {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}),
    "loha": ("lycoris.kohya", {"algo": "loha"}),
    "lokr": ("lycoris.kohya", {"algo": "lokr"}),
    "full": ("lycoris.kohya", {"algo": "full"}),
}


@dataclass(frozen=True)
class BakedFacts:
    """What became of changes of other kinds that were written as a plain LoRA."""

    rank: int
    lost: Mapping[str, float]
    """|rest| / |change| by component."""


def build(facts: Facts, info: BaseInfo, shape: Shape, file: TensorWriter) -> dict[str, str]:
    """The whole header: str to str. The tensors' bytes do not depend on it, so their hash can be part of it."""
    kohya, digest = training(facts, info, shape), file.digest()
    return kohya | hashes(file, kohya, digest) | modelspec(facts, info, digest)


def rewritten(
    header: Mapping[str, str],
    name: str,
    info: BaseInfo,
    shape: Shape,
    baked: BakedFacts,
    file: TensorWriter,
) -> dict[str, str]:
    """The header of a file that was baked from another: what that one said, but for what its tensors were."""
    said = {key: value for key, value in header.items() if not key.startswith(_OF_TENSORS)}
    spec = {key: value for key, value in said.items() if key.startswith("modelspec.")}
    kohya = _family(info) | {key: value for key, value in said.items() if key not in spec}
    kohya |= as_text({"ss_output_name": name, **network(shape), **baking(baked)})
    digest = file.digest()
    spec |= {"modelspec.title": name, "modelspec.hash_sha256": f"0x{digest}"} if spec else {}
    return kohya | hashes(file, kohya, digest) | spec


_OF_TENSORS = ("ss_network_", "sshs_", "modelspec.hash_", "lora_adapter_metadata", "lorasmith_baked_")


# ---------------------------------------------------------------------------------------------------------------------
# kohya's keys


def training(facts: Facts, info: BaseInfo, shape: Shape) -> dict[str, str]:
    """`ss_*`: A1111 and Forge choose by the first three whether a file is offered at all for a model."""
    known: dict[str, Any] = {
        "ss_output_name": facts.name,
        **_family(info),
        "ss_sd_model_name": last_part(info.model),
        "ss_clip_skip": None if info.family == "sdxl" else _ENCODER_LAYER[info.family],
        "ss_steps": facts.steps,
        "ss_training_started_at": facts.started,
        "ss_training_finished_at": facts.finished,
        "lorasmith_version": __version__,
        "lorasmith_images_seen": facts.images_seen,
    }
    known |= network(shape) | (baking(facts.baked) if facts.baked else {})
    known |= _dataset(facts) | (_settings(facts.config, info) if facts.config else {})
    return as_text(known)


def _family(info: BaseInfo) -> dict[str, str]:
    versions = {
        "sd1": "sd_v1",
        "sd2": "sd_v2_v" if info.prediction == "v_prediction" else "sd_v2",
        "sdxl": "sdxl_base_v1-0",
    }
    return {"ss_base_model_version": versions[info.family], "ss_v2": str(info.family == "sd2")}


def network(shape: Shape) -> dict[str, Any]:
    """What made the tensors, in kohya's words."""
    module, arguments = _NETWORKS[shape.form]
    if shape.convolutions and shape.rank:
        arguments = arguments | {"conv_dim": shape.rank, "conv_alpha": shape.alpha}
    return {
        "ss_network_module": module,
        "ss_network_dim": shape.rank,
        "ss_network_alpha": shape.alpha,
        "ss_network_args": arguments,
    }


def baking(baked: BakedFacts) -> dict[str, Any]:
    """The rank of a baked LoRA, and the share of each component's change that it lacks."""
    lost = {component: round(share, 6) for component, share in baked.lost.items()}
    return {"lorasmith_baked_rank": baked.rank, "lorasmith_baked_lost": lost}


def _dataset(facts: Facts) -> dict[str, Any]:
    names = unique(folder.name for folder in facts.folders)
    folders = dict(zip(names, facts.folders, strict=True))
    buckets = enumerate(facts.buckets.items())
    tagged = unique(last_part(folder) for folder in facts.tag_frequency)
    return {
        "ss_dataset_dirs": {n: {"n_repeats": f.repeats, "img_count": f.images} for n, f in folders.items()},
        "ss_num_train_images": sum(f.images * f.repeats for f in facts.folders) or None,
        "ss_bucket_info": {"buckets": {str(i): {"resolution": list(size), "count": n} for i, (size, n) in buckets}}
        if facts.buckets
        else None,
        "ss_tag_frequency": {
            name: {str(tag): int(count) for tag, count in tags.items()}
            for name, tags in zip(tagged, facts.tag_frequency.values(), strict=True)
        },
        "ss_datasets": [{"subsets": [{"class_tokens": word} for word in facts.triggers]}] if facts.triggers else None,
    }


def _settings(config: RunConfig, info: BaseInfo) -> dict[str, Any]:
    side = max(data.resolution for data in config.data) or info.resolution
    precision = {"fp32": "no", "auto": None}.get(config.runtime.precision, config.runtime.precision)
    return {
        "ss_resolution": f"({side}, {side})",
        "ss_seed": config.seed,
        "ss_learning_rate": config.optimizer.lr,
        "ss_unet_lr": config.optimizer.lr if config.adapter.unet else None,
        "ss_text_encoder_lr": config.optimizer.text_encoder_lr if config.adapter.text_encoder else None,
        "ss_optimizer": {"adamw": "torch.optim.adamw.AdamW"}.get(config.optimizer.kind, config.optimizer.kind),
        "ss_lr_scheduler": config.optimizer.schedule,
        "ss_max_grad_norm": config.optimizer.max_grad_norm,
        "ss_batch_size_per_device": config.budget.batch,
        "ss_gradient_accumulation_steps": config.budget.accumulate,
        "ss_gradient_checkpointing": config.runtime.gradient_checkpointing,
        "ss_mixed_precision": precision,
        "ss_min_snr_gamma": config.objective.min_snr_gamma or None,
        "ss_noise_offset": config.objective.noise_offset or None,
        "ss_caption_dropout_rate": config.data[0].caption_dropout,
    }


# ---------------------------------------------------------------------------------------------------------------------
# ModelSpec, hashes, thumbnail


def modelspec(facts: Facts, info: BaseInfo, digest: str) -> dict[str, str]:
    """ModelSpec 1.0.1 of a LoRA; `digest` is the hash of the bytes after the header."""
    v = info.prediction == "v_prediction"
    sgm = "https://github.com/Stability-AI/generative-models"
    triggers = ", ".join(facts.triggers)
    known = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{architecture_of(info)}/lora",
        "implementation": sgm if info.family == "sdxl" else "diffusers",
        "title": facts.name,
        "resolution": f"{info.resolution}x{info.resolution}",
        "prediction_type": "v" if v else "epsilon",
        "encoder_layer": _ENCODER_LAYER[info.family],
        "hash_sha256": f"0x{digest}",
        "date": iso_date(facts.finished) if facts.finished is not None else None,
        "author": facts.author,
        "description": facts.description,
        "license": license_of(facts, info),
        "trigger_phrase": triggers,
        "usage_hint": usage_hint(facts, info),
        "thumbnail": data_uri(facts.picture) if facts.picture else None,
    }
    return {f"modelspec.{key}": value for key, value in known.items() if value}


def hashes(file: TensorWriter, kohya: Mapping[str, str], digest: str) -> dict[str, str]:
    """`sshs_*` of a file; the legacy hash is that of the file whose header holds the `ss_*` keys only."""
    return {"sshs_model_hash": digest, "sshs_legacy_hash": file.legacy_hash(kohya)}


def data_uri(picture: Image.Image) -> str:
    """A JPEG of at most 256 pixels a side, as `data:image/jpeg;base64,...`."""
    small = flat(picture)
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def flat(picture: Image.Image) -> Image.Image:
    """A fresh RGB copy on white, without anything that was attached to the picture."""
    layer = picture.convert("RGBA")
    copy = Image.new("RGB", picture.size, "white")
    copy.paste(layer, mask=layer.getchannel("A"))
    return copy


# ---------------------------------------------------------------------------------------------------------------------
# words


def architecture_of(info: BaseInfo) -> str:
    """ModelSpec's name of a base's architecture."""
    v = info.family == "sd2" and info.prediction == "v_prediction"
    return "stable-diffusion-v2-768-v" if v else _ARCHITECTURES[info.family]


def usage_hint(facts: Facts, info: BaseInfo) -> str:
    """How to use the file: what the tensors cannot say."""
    hints = [f"Write {', '.join(facts.triggers)} in the prompt."] if facts.triggers else []
    if embedding := embedding_file(facts):
        hints.append(f"It needs the embedding {embedding} as well: load that beside it.")
    if info.merges:
        merged = ", ".join(f"{last_part(file)} at {strength:g}" for file, strength in info.merges)
        hints.append(f"It was trained with {merged} on: load that beside it.")
    if info.family != "sdxl":
        hints.append("Use clip skip 1.")
    if info.prediction == "v_prediction":
        hints.append("The base predicts v: choose v-prediction in the client.")
    return " ".join(hints)


def embedding_file(facts: Facts) -> str:
    """The name of the file with the trigger's embeddings, if new tokens were trained; clients take its stem for the
    word. Empty if there is none."""
    if facts.config is None or not facts.config.adapter.new_tokens:
        return ""
    return re.sub(r"[^\w .-]", "_", facts.config.trigger) + ".safetensors"


def license_of(facts: Facts, info: BaseInfo) -> str:
    """The license given, or that of the base's family; a LoRA is a derivative of its base."""
    if facts.license:
        return facts.license
    if info.model == "pocket":
        return "apache-2.0"
    return "" if info.model.startswith("random:") else _LICENSES[info.family]


def iso_date(unix: float) -> str:
    return datetime.fromtimestamp(unix, tz=timezone.utc).isoformat(timespec="seconds")


def last_part(path: str) -> str:
    """The last part of a path or Hub id, of any system: nothing of this computer."""
    parts = [part for part in re.split(r"[\\/]+", path) if part not in ("", ".", "..")]
    return parts[-1].encode("utf-8", "replace").decode() if parts else "images"


def unique(names: Iterable[str]) -> list[str]:
    """The names in order; one that comes again gets a number."""
    found: list[str] = []
    for name in names:
        number = sum(other == name or other.startswith(f"{name}_") for other in found)
        found.append(f"{name}_{number + 1}" if name in found else name)
    return found


def as_text(known: Mapping[str, Any]) -> dict[str, str]:
    """What is known, as values of a header."""
    return {key: _text(value) for key, value in known.items() if value not in (None, {}, [])}


def _text(value: Any) -> str:
    """Tables as strict JSON (browsers refuse NaN), all else as Python writes it, as kohya does."""
    return json.dumps(value, allow_nan=False) if isinstance(value, dict | list) else str(value)
