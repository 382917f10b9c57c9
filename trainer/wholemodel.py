"""Files of a whole model: one `.safetensors` that clients read as a checkpoint, or a diffusers folder.

Either is read back before it takes its name. A checkpoint file also holds the configurations of its parts, under
`lorasmith.components` in its metadata, because names and shapes do not tell them all. Of other files,
`singlefile.py` tells what it can; `baseweights.py` turns one into the other, weight by weight.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from .architectures import Configs
from .bases import POCKET, FamilyName
from .errors import ExportError, UserError
from .export import DTYPES, Precision
from .files import atomic_file, atomic_folder
from .ldm import from_ldm, to_ldm, with_text_model
from .models import FAMILIES, Base, load_base
from .sharing.metadata import architecture_of
from .singlefile import COMPONENTS
from .tensorfile import require_ending

Weights = dict[str, dict[str, Tensor]]
"""By component and by the names that diffusers gives them on disk."""


def save_checkpoint_file(base: Base, path: Path, precision: Precision = "fp16") -> None:
    """Write UNet, VAE and text encoders to one file in LDM's names, read it back, and only then give it its name.

    Raises:
        ExportError: if an adapter is on, a weight is not finite or has no place in such a file, or what was read back
            is not the same.
    """
    require_ending(path)
    family, shapes = base.info.family, (base.unet.config, base.vae.config)
    weights, header = _weights(base, precision), checkpoint_header(base, path.stem)
    with atomic_file(path) as temporary:
        save_file(to_ldm(family, weights, *shapes) | marks(base), temporary, header)
        _require_same(from_ldm(family, load_file(temporary), *shapes), weights)


def save_model_folder(base: Base, folder: Path, precision: Precision = "fp16") -> None:
    """Write a diffusers folder that `from_pretrained` loads, read it back, and only then give it its name.

    Raises:
        ExportError: if an adapter is on, a weight is not finite, or what was read back is not the same.
        UserError: if the folder holds anything but an earlier model.
    """
    save = partial(_save_weights, _weights(base, precision))
    write_folder(folder, base.info.family, configs_of(base), tokenizers_of(base), save)


# ---------------------------------------------------------------------------------------------------------------------
# what a model is made of


def _weights(base: Base, precision: Precision) -> Weights:
    """All weights as they are written: on the CPU, contiguous and finite."""
    weights: Weights = {}
    exact_vae = base.vae if base.vae.dtype == torch.float32 else load_base(base.info).vae
    for component, module in (*base.components.items(), ("vae", exact_vae)):
        own = {key: tensor for key, tensor in module.state_dict().items() if not key.endswith("position_ids")}
        for key, tensor in own.items():
            where = f"{component}.{key}"
            if "lora_" in key or "base_layer" in key:
                raise ExportError("belongs to an adapter", where, "Merge the adapter and take it off, or export it.")
            own[key] = tensor = tensor.detach().to("cpu", DTYPES[precision]).contiguous()
            if not tensor.isfinite().all():
                if module.state_dict()[key].isfinite().all():
                    raise ExportError(f"is beyond the range of {precision}", where, "Export with --precision fp32.")
                fix = "Export an earlier checkpoint; train with a lower learning rate."
                raise ExportError("holds what is no number", where, fix)
        weights[component] = with_text_model(own) if component in base.text_encoders else own
    return weights


def configs_of(base: Base) -> Configs:
    """The configurations of all components, as files hold them; of `base`, shapes are enough."""
    parts = {"unet": base.unet, "vae": base.vae, "scheduler": base.scheduler}
    configs: Configs = {name: json.loads(part.to_json_string()) for name, part in parts.items()}
    for name, encoder in base.text_encoders.items():
        # transformers 5 loads in the `dtype` that stands here, where diffusers loads the UNet in float32, whatever the
        # files hold; a plain `from_pretrained` would get parts that do not fit together.
        fixed = {"architectures": [type(encoder).__name__], "dtype": "float32"}
        configs[name] = json.loads(encoder.config.to_json_string()) | fixed
    for config in configs.values():
        config.pop("_name_or_path", None)  # a path of this computer
    for name, tokenizer in tokenizers_of(base).items():
        configs[name] = {"model_max_length": tokenizer.model_max_length, "pad_token": tokenizer.pad_token}
    return configs


def checkpoint_header(base: Base, title: str) -> dict[str, str]:
    """What a checkpoint file says about itself: ModelSpec, and the configurations of its parts.

    Raises:
        ExportError: if a tokenizer is not the one that clients use with such files.
    """
    own = CLIPTokenizer.from_pretrained(POCKET / "tokenizer").get_vocab()
    for name, tokenizer in tokenizers_of(base).items():
        if tokenizer.get_vocab() != own:
            raise ExportError("is not CLIP's own, which clients use", name, "Save a diffusers folder.")
    parts = {"family": base.info.family, **configs_of(base)}
    return _modelspec(base, title) | {COMPONENTS: json.dumps(parts, allow_nan=False)}


def _modelspec(base: Base, title: str) -> dict[str, str]:
    """ModelSpec 1.0.0: https://github.com/Stability-AI/ModelSpec."""
    info, v = base.info, base.info.prediction == "v_prediction"
    known = {
        "sai_model_spec": "1.0.0",
        "architecture": architecture_of(info),
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": title,
        "resolution": f"{info.resolution}x{info.resolution}",
        "prediction_type": "v" if v else "epsilon",
    }
    return {"format": "pt", **{f"modelspec.{key}": value for key, value in known.items()}}


def marks(base: Base) -> dict[str, Tensor]:
    """ComfyUI and Forge take an SDXL for one that predicts v, or ends in pure noise, if it holds tensors so named."""
    info, is_xl = base.info, base.info.family == "sdxl"
    marks = {"v_pred": info.prediction == "v_prediction", "ztsnr": info.zero_terminal_snr}
    return {name: torch.zeros(0) for name, holds in marks.items() if is_xl and holds}


def component_classes(family: FamilyName) -> dict[str, tuple[str, str]]:
    """(library, class) of each component but the tokenizers."""
    encoders = {name: ("transformers", kind.__name__) for name, kind in FAMILIES[family].text_encoder_classes.items()}
    parts = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "DDIMScheduler"}
    return {name: ("diffusers", kind) for name, kind in parts.items()} | encoders


def tokenizer_names(family: FamilyName) -> list[str]:
    return [name.replace("text_encoder", "tokenizer") for name in FAMILIES[family].text_encoder_classes]


def tokenizers_of(base: Base) -> dict[str, CLIPTokenizer]:
    """By the names of their folders."""
    return dict(zip(tokenizer_names(base.info.family), base.tokenizers, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# folders


WEIGHT_FILES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
"""What the libraries call the file of a component's weights."""


def write_folder(
    folder: Path,
    family: FamilyName,
    configs: Configs,
    tokenizers: Mapping[str, CLIPTokenizer],
    save: Callable[[str, Path], None],
) -> None:
    """Write a diffusers folder, whole or not at all; `save` writes the weights of a component to a file.

    Raises:
        UserError: if the folder holds anything but an earlier model.
    """
    if folder.exists() and not (folder / "model_index.json").is_file() and any(folder.iterdir()):
        raise UserError("is there, and holds no model", str(folder), "Name another folder.")
    with atomic_folder(folder) as temporary:
        _write_json(temporary / "model_index.json", _model_index(family))
        for name, (library, _) in component_classes(family).items():
            (temporary / name).mkdir()
            config = "scheduler_config.json" if name == "scheduler" else "config.json"
            _write_json(temporary / name / config, configs[name])
            if name != "scheduler":
                save(name, temporary / name / WEIGHT_FILES[library])
        for name, tokenizer in tokenizers.items():
            tokenizer.backend_tokenizer.no_truncation()  # what it was last used with is no part of the model
            tokenizer.backend_tokenizer.no_padding()
            tokenizer.save_pretrained(temporary / name)
            tokenizer.backend_tokenizer.model.save(str(temporary / name))  # the files that transformers 4 reads


def _save_weights(weights: Weights, component: str, file: Path) -> None:
    save_file(weights[component], file, {"format": "pt"})
    _require_same({component: load_file(file)}, {component: weights[component]})


def _model_index(family: FamilyName) -> dict[str, Any]:
    none = (None, None)
    own = {"safety_checker": none, "requires_safety_checker": False}
    return {
        "_class_name": FAMILIES[family].pipeline_class.__name__,
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": none,
        "image_encoder": none,
        **({"force_zeros_for_empty_prompt": True} if family == "sdxl" else own),
        **component_classes(family),
        **dict.fromkeys(tokenizer_names(family), ("transformers", "CLIPTokenizer")),
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")


def _require_same(read: Weights, written: Weights) -> None:
    """What is read lies in the file as long as it is held, and Windows renames no open file: so hold it only here."""
    for component, weights in written.items():
        odd = read[component].keys() ^ weights.keys()
        for key in weights.keys() - odd:
            found, meant = read[component][key], weights[key]
            odd |= set() if found.dtype == meant.dtype and torch.equal(found, meant) else {key}
        if odd:
            raise ExportError("was not read back as it was written", f"{component}.{min(odd)}", "Save it again.")
