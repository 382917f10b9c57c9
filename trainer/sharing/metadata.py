"""What a LoRA file says about itself: `ss_*` (kohya), `modelspec.*` (ModelSpec 1.0.1), `sshs_*` (hashes).

All values are text; structured ones are strict JSON. A fact that is not known is left out, never invented, and how much
of what is known is told, `facts.py` decides. Who reads which key: https://github.com/Stability-AI/ModelSpec and A1111's
`extensions-builtin/Lora/network.py`; the `ss_*` are named and written as sd-scripts does it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..bases import BaseInfo, FamilyName
from ..config import RunConfig
from ..files import sha256_of
from .facts import AS_TRAINED, BakedFacts, Facts, base_name, last_part, unique
from .licenses import license_of
from .pictures import data_uri
from .usage import ENCODER_LAYER, recipe_of, usage_hint

if TYPE_CHECKING:
    from ..delta import Form
    from ..tensorfile import TensorWriter

_ARCHITECTURES: dict[FamilyName, str] = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}


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


def build(facts: Facts, info: BaseInfo, shape: Shape, file: TensorWriter) -> dict[str, str]:
    """The whole header: str to str. The tensors' bytes do not depend on it, so their hash can be part of it."""
    kohya, digest = training(facts, info, shape), file.digest()
    return kohya | hashes(file, kohya, digest) | modelspec(facts, info, digest)


def rewritten(
    header: Mapping[str, str],
    name: str,
    info: BaseInfo,
    shape: Shape,
    baked: BakedFacts | None,
    file: TensorWriter,
) -> dict[str, str]:
    """The header of a file that was made from another: what that one said, but for what its tensors were.

    `baked` is what its changes lost, if they were brought to another rank.
    """
    said = {key: value for key, value in header.items() if not key.startswith(_OF_TENSORS)}
    spec = {key: value for key, value in said.items() if key.startswith("modelspec.")}
    kohya = _family(info) | {key: value for key, value in said.items() if key not in spec}
    kohya |= as_text({"ss_output_name": name, **network(shape), **(baking(baked) if baked else {})})
    digest = file.digest()
    spec |= {"modelspec.title": name, "modelspec.hash_sha256": f"0x{digest}"} if spec else {}
    return kohya | hashes(file, kohya, digest) | spec


_OF_TENSORS = ("ss_network_", "sshs_", "modelspec.hash_", "lora_adapter_metadata", "lorasmith_baked_")


# ---------------------------------------------------------------------------------------------------------------------
# kohya's keys


def training(facts: Facts, info: BaseInfo, shape: Shape) -> dict[str, str]:
    """`ss_*`: A1111 and Forge choose by the first two whether a file is offered at all for a model."""
    known: dict[str, Any] = _family(info) | network(shape)
    known |= (baking(facts.baked) if facts.baked else {}) | _strengths(facts)
    if facts.tells_training:
        known |= _run(facts, info) | _base(info) | _dataset(facts)
        known |= _settings(facts.config, info) if facts.config else {}
    if facts.tells_all:
        known |= _everything(facts)
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


def _strengths(facts: Facts) -> dict[str, Any]:
    """At which strength the file holds what was trained, where that is not 1."""
    return {} if facts.strengths == AS_TRAINED else {"lorasmith_strength": str(facts.strengths)}


def _run(facts: Facts, info: BaseInfo) -> dict[str, Any]:
    settings = facts.settings
    return {
        "ss_output_name": facts.name,
        "ss_clip_skip": None if info.family == "sdxl" else ENCODER_LAYER[info.family],
        "ss_steps": facts.steps,
        "ss_max_train_steps": facts.planned_steps,
        "ss_epoch": None if facts.epochs is None else math.ceil(facts.epochs),
        "ss_training_started_at": facts.started,
        "ss_training_finished_at": facts.finished,
        "ss_training_comment": settings.description or None,
        "ss_zero_terminal_snr": info.zero_terminal_snr,
        "lorasmith_version": __version__,
        "lorasmith_images_seen": facts.images_seen,
        "lorasmith_preferred_weight": f"{facts.recommended:g}",
        "lorasmith_preview": recipe_of(facts),
    }


def _base(info: BaseInfo) -> dict[str, Any]:
    """The base's name, and of one file the hashes it goes by."""
    source = Path(info.source)
    found = source.stat() if source.is_file() else None
    legacy, whole = _hashes_of_base(source, found.st_size, found.st_mtime_ns) if found else (None, None)
    return {
        "ss_sd_model_name": last_part(base_name(info), "base"),
        "ss_sd_model_hash": legacy,
        "ss_new_sd_model_hash": whole,
        "ss_vae_name": last_part(info.vae) if info.vae else None,
    }


@lru_cache(maxsize=2)
def _hashes_of_base(file: Path, size: int, changed: int) -> tuple[str, str]:
    """A1111's first hash, and the SHA-256, of a base; once for all formats, for a base is gigabytes large."""
    del size, changed
    with file.open("rb") as handle:
        handle.seek(0x100000)
        return hashlib.sha256(handle.read(0x10000)).hexdigest()[:8], sha256_of(file)


def _dataset(facts: Facts) -> dict[str, Any]:
    names = unique(folder.name for folder in facts.folders)
    folders = dict(zip(names, facts.folders, strict=True))
    buckets = enumerate(facts.buckets.items())
    return {
        "ss_dataset_dirs": {n: {"n_repeats": f.repeats, "img_count": f.images} for n, f in folders.items()},
        "ss_num_train_images": sum(f.images * f.repeats for f in facts.folders) or None,
        "ss_enable_bucket": True if facts.buckets else None,
        "ss_bucket_info": {"buckets": {str(i): {"resolution": list(size), "count": n} for i, (size, n) in buckets}}
        if facts.buckets
        else None,
        "ss_tag_frequency": facts.told_tags,
        "ss_datasets": [{"subsets": [{"class_tokens": word} for word in facts.triggers]}] if facts.triggers else None,
    }


def _settings(config: RunConfig, info: BaseInfo) -> dict[str, Any]:
    """The settings that sd-scripts has too, by its names; those of the images are the first folder's."""
    data, adapter, optimizer, objective = config.data[0], config.adapter, config.optimizer, config.objective
    budget, runtime, side = config.budget, config.runtime, trained_side(config, info)
    precision = {"fp32": "no", "auto": None}.get(runtime.precision, runtime.precision)
    is_huber = objective.loss == "huber"
    return {
        "ss_resolution": f"({side}, {side})",
        "ss_bucket_no_upscale": not config.buckets.upscale,
        "ss_seed": config.seed,
        "ss_learning_rate": optimizer.lr,
        "ss_unet_lr": optimizer.lr if adapter.unet else None,
        "ss_text_encoder_lr": optimizer.text_encoder_lr if adapter.text_encoder else None,
        "ss_optimizer": {"adamw": "torch.optim.adamw.AdamW"}.get(optimizer.kind, optimizer.kind),
        "ss_lr_scheduler": optimizer.schedule,
        "ss_max_grad_norm": optimizer.max_grad_norm,
        "ss_network_dropout": adapter.dropout or None,
        "ss_batch_size_per_device": budget.batch,
        "ss_gradient_accumulation_steps": budget.accumulate,
        "ss_gradient_checkpointing": runtime.gradient_checkpointing,
        "ss_mixed_precision": precision,
        "ss_cache_latents": True,
        "ss_min_snr_gamma": objective.min_snr_gamma if "min-snr" in objective.weighting else None,
        "ss_debiased_estimation": objective.weighting == "debiased",
        "ss_loss_type": {"mse": "l2"}.get(objective.loss, objective.loss),
        "ss_huber_c": objective.huber_c if is_huber else None,
        "ss_huber_schedule": objective.huber_schedule if is_huber else None,
        "ss_noise_offset": objective.noise_offset or None,
        "ss_multires_noise_iterations": objective.multires_noise_iterations or None,
        "ss_multires_noise_discount": objective.multires_noise_discount
        if objective.multires_noise_iterations
        else None,
        "ss_ip_noise_gamma": objective.input_perturbation or None,
        "ss_min_timestep": objective.min_timestep or None,
        "ss_max_timestep": objective.max_timestep if objective.max_timestep < LAST_TIMESTEP else None,
        "ss_caption_dropout_rate": data.caption_dropout,
        "ss_caption_tag_dropout_rate": data.caption_tag_dropout,
        "ss_shuffle_caption": data.shuffle_caption,
        "ss_keep_tokens": data.keep_tokens,
        "ss_flip_aug": data.flip,
        "ss_color_aug": data.colour_jitter > 0,
        "ss_random_crop": data.crop == "random",
    }


LAST_TIMESTEP = 999


def trained_side(config: RunConfig | None, info: BaseInfo) -> int:
    """Side in pixels of the largest square that was trained at."""
    given = [side for data in config.data for side in data.resolutions] if config else []
    return max(given, default=info.resolution)


def _everything(facts: Facts) -> dict[str, Any]:
    """What nobody tells without being asked: prompts, and the configuration with its paths."""
    return {
        "lorasmith_prompts": [preview.prompt for preview in facts.previews],
        "lorasmith_config": facts.config.model_dump(mode="json") if facts.config else None,
    }


# ---------------------------------------------------------------------------------------------------------------------
# ModelSpec and hashes


def modelspec(facts: Facts, info: BaseInfo, digest: str) -> dict[str, str]:
    """ModelSpec 1.0.1 of a LoRA; `digest` is the hash of the bytes after the header."""
    sgm = "https://github.com/Stability-AI/generative-models"
    side = trained_side(facts.config, info)
    known = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{architecture_of(info)}/lora",
        "implementation": sgm if info.family == "sdxl" else "diffusers",
        "title": facts.title,
        "resolution": f"{side}x{side}",
        "prediction_type": "v" if info.prediction == "v_prediction" else "epsilon",
        "encoder_layer": ENCODER_LAYER[info.family],
        "hash_sha256": f"0x{digest}",
        **(_described(facts, info) if facts.tells_training else {}),
    }
    return {f"modelspec.{key}": value for key, value in known.items() if value}


def _described(facts: Facts, info: BaseInfo) -> dict[str, str | None]:
    """What the specification leaves to the author."""
    settings, license = facts.settings, license_of(facts, info)
    objective = facts.config.objective if facts.config else None
    steps = (objective.min_timestep, objective.max_timestep) if objective else (0, LAST_TIMESTEP)
    start = facts.config.adapter.start_from if facts.config else ""
    sources = [*facts.merged_from, *([last_part(start).removesuffix(".safetensors")] if start else [])]
    return {
        "date": iso_date(facts.finished) if facts.finished is not None else None,
        "author": settings.author,
        "description": settings.description,
        "license": license and (license.name if license.id == "other" else license.id),
        "usage_hint": usage_hint(facts, info),
        "trigger_phrase": ", ".join(facts.triggers),
        "tags": ", ".join(settings.tags),
        "merged_from": ", ".join(sources),
        "timestep_range": "{},{}".format(*steps) if steps != (0, LAST_TIMESTEP) else None,
        "thumbnail": data_uri(facts.picture) if facts.picture else None,
    }


def hashes(file: TensorWriter, kohya: Mapping[str, str], digest: str) -> dict[str, str]:
    """`sshs_*` of a file; the legacy hash is that of the file whose header holds the `ss_*` keys only."""
    own = {key: value for key, value in kohya.items() if key.startswith("ss_")}
    return {"sshs_model_hash": digest, "sshs_legacy_hash": file.legacy_hash(own)}


def architecture_of(info: BaseInfo) -> str:
    """ModelSpec's name of a base's architecture."""
    v = info.family == "sd2" and info.prediction == "v_prediction"
    return "stable-diffusion-v2-768-v" if v else _ARCHITECTURES[info.family]


# ---------------------------------------------------------------------------------------------------------------------
# text


def iso_date(unix: float) -> str:
    return datetime.fromtimestamp(unix, tz=UTC).isoformat(timespec="seconds")


def as_text(known: Mapping[str, Any]) -> dict[str, str]:
    """What is known, as values of a header."""
    return {key: _text(value) for key, value in known.items() if value not in (None, {}, [])}


def _text(value: Any) -> str:
    """Tables as strict JSON (browsers refuse NaN), all else as Python writes it, as kohya does."""
    return json.dumps(value, allow_nan=False) if isinstance(value, dict | list) else str(value)
