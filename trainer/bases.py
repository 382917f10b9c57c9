"""What a base model is, read from its small configuration files: no weights are loaded and no torch is imported."""

from __future__ import annotations

import hashlib
import json
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from .architectures import ARCHITECTURES
from .errors import BaseModelError, first_line

FamilyName = Literal["sd1", "sd2", "sdxl"]

POCKET = Path(__file__).parent / "pocket"
FAMILY_TITLES: dict[FamilyName, str] = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sdxl": "SDXL"}
_ACCEPTED = "Give a diffusers folder, a Hub id such as owner/name, pocket, or random:sd15, random:sd21, random:sdxl."
_HUB_TIMEOUT = 4  # seconds


@dataclass(frozen=True)
class BaseInfo:
    """A base model before it is loaded."""

    model: str
    """What the configuration says: a Hub id, a folder, `pocket` or `random:...`."""
    source: str
    """Where the weights come from: a folder, a Hub id, or `random:...`."""
    family: FamilyName
    prediction: Literal["epsilon", "v_prediction"]
    resolution: int
    """Side in pixels of the square the base was trained at."""
    vae_factor: int
    """Pixels per latent, along one side."""
    bucket_step: int
    """Bucket sides are multiples of this many pixels, so that every UNet level divides evenly."""
    revision: str = ""
    """The Hub's commit; empty for other bases."""

    @property
    def identity(self) -> str:
        """Tells these weights from any others, whatever precision they are loaded in and wherever they lie."""
        folder = Path(self.source)
        return _weights_identity(folder) if folder.is_dir() else f"{self.source}@{self.revision}"

    @property
    def title(self) -> str:
        return f"{self.short_name} ({FAMILY_TITLES[self.family]}, {self.prediction}, {self.resolution} px)"

    @property
    def short_name(self) -> str:
        """The name without any path of this computer."""
        return Path(self.model).name if Path(self.model).is_dir() else self.model


def inspect_base(model: str) -> BaseInfo:
    """Find a base model and recognise its family from its configuration.

    Raises:
        BaseModelError: if it cannot be found, or is not of the Stable Diffusion family.
    """
    if model.startswith("random:"):
        architecture = model.removeprefix("random:")
        if architecture not in ARCHITECTURES:
            raise BaseModelError(f"there is no architecture {architecture!r}", "base.model", _ACCEPTED)
        parts = ARCHITECTURES[architecture]
        return _recognise(model, model, parts["unet"], parts["vae"], parts["scheduler"])
    folder = POCKET if model == "pocket" else Path(model).expanduser()
    if folder.is_dir():
        return _inspect_folder(model, folder)
    if folder.is_file():
        raise BaseModelError(
            f"{model} is a single file, and this version loads diffusers folders",
            "base.model",
            "Convert it with diffusers: StableDiffusionPipeline.from_single_file(...).save_pretrained",
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise BaseModelError(f"{model} does not exist", "base.model", _ACCEPTED)
    return _inspect_hub(model)


def _inspect_folder(model: str, folder: Path) -> BaseInfo:
    if not (folder / "model_index.json").is_file():
        raise BaseModelError(
            f"{folder} has no model_index.json, so it is not a diffusers folder", "base.model", _ACCEPTED
        )
    unet, vae, scheduler = (_read_json(folder / name) for name in _CONFIG_FILES)
    return _recognise(model, str(folder.resolve()), unet, vae, scheduler)


def _inspect_hub(model: str) -> BaseInfo:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        files = _hub_files(model, ["model_index.json", *_CONFIG_FILES])
    except HFValidationError as error:
        raise BaseModelError(f"{model} is neither a folder here nor a Hub id", "base.model", _ACCEPTED) from error
    except LocalEntryNotFoundError as error:  # a kind of the next one
        raise _unreachable(model) from error
    except EntryNotFoundError as error:
        raise BaseModelError(f"{model} on the Hub is not a diffusers model", "base.model", _ACCEPTED) from error
    except HfHubHTTPError as error:
        raise BaseModelError(
            f"the Hub refuses {model}: {first_line(error)}",
            "base.model",
            "Check the name; for a gated model run: hf auth login",
        ) from error
    except OSError as error:
        raise _unreachable(model) from error
    found = _recognise(model, model, *(_read_json(file) for file in files[1:]))
    return replace(found, revision=files[0].parent.name)


def _hub_files(model: str, names: Sequence[str]) -> list[Path]:
    """Files of a model: from this computer's cache if all are there, else from the Hub."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import logging

    cached = [try_to_load_from_cache(model, name) for name in names]
    files = [Path(file) for file in cached if isinstance(file, str)]
    if len(files) == len(names):
        return files
    if not hub_answers():
        raise _unreachable(model)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the lines of its retries; what it cannot do, it raises
    try:
        return [Path(hf_hub_download(model, name)) for name in names]
    finally:
        logging.set_verbosity(verbosity)


def hub_answers() -> bool:
    """Whether anything answers at the Hub's address; asked first, because huggingface_hub tries for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_HUB_TIMEOUT).close()
    except HTTPError as error:
        error.close()
    except URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # huggingface_hub brings certificates of its own
    except OSError:
        return False
    return True


def _unreachable(model: str) -> BaseModelError:
    return BaseModelError(
        f"{model} is no folder here, and the Hugging Face Hub cannot be reached",
        "base.model",
        "Check the name and the connection, or give a folder.",
    )


_CONFIG_FILES = ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")


def _recognise(
    model: str, source: str, unet: dict[str, Any], vae: dict[str, Any], scheduler: dict[str, Any]
) -> BaseInfo:
    """The family shows in the UNet: SDXL adds time ids, SD 2 projects linearly, SD 1 with 1x1 convolutions."""
    if unet.get("in_channels") != 4 or not unet.get("cross_attention_dim"):
        raise BaseModelError(
            f"the UNet of {model} is not that of a text-to-image Stable Diffusion",
            "base.model",
            "Inpainting, depth and other special bases cannot be trained.",
        )
    family: FamilyName = "sd1"
    if unet.get("addition_embed_type") == "text_time":
        family = "sdxl"
    elif unet.get("use_linear_projection"):
        family = "sd2"
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise BaseModelError(
            f"the scheduler of {model} predicts {prediction!r}",
            "base.model",
            "Only epsilon and v_prediction bases can be trained.",
        )
    vae_factor, unet_factor = (2 ** (_levels(config, model) - 1) for config in (vae, unet))
    return BaseInfo(
        model=model,
        source=source,
        family=family,
        prediction=prediction,
        resolution=_side(unet, model) * vae_factor,
        vae_factor=vae_factor,
        bucket_step=vae_factor * unet_factor,
    )


def _levels(config: dict[str, Any], model: str) -> int:
    """How many resolutions a UNet or VAE works at; each next one halves the sides."""
    channels = config.get("block_out_channels")
    if not isinstance(channels, list) or not channels:
        raise _unclear(config, "block_out_channels", model)
    return len(channels)


def _side(unet: dict[str, Any], model: str) -> int:
    """Side of the square of latents the UNet was trained at."""
    side = unet.get("sample_size")
    if not isinstance(side, int) or side < 1:
        raise _unclear(unet, "sample_size", model)
    return side


def _unclear(config: dict[str, Any], key: str, model: str) -> BaseModelError:
    found = f"is {config[key]!r}" if key in config else "is missing"
    return BaseModelError(f"in a config.json of {model} {key} {found}", "base.model", "Save the model again.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseModelError(f"{path} is missing", "base.model", "The folder is incomplete; save it again.") from None
    except OSError as error:
        raise BaseModelError(
            f"{path} cannot be read ({error.strerror})", "base.model", "Change its permissions."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BaseModelError(f"{path} is not valid JSON ({error})", "base.model", "Save the model again.") from None
    if not isinstance(values, dict):
        raise BaseModelError(f"{path} is not a JSON object", "base.model", "Save the model again.")
    return values


def _weights_identity(folder: Path) -> str:
    """SHA-256 over each weight file's name, size, header, and a few blocks of its bytes."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*/*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()}:{size}".encode())
        with file.open("rb") as handle:
            for start in range(0, size, max(1, size // _BLOCKS)):
                handle.seek(start)
                digest.update(handle.read(_BLOCK))
    return digest.hexdigest()


_BLOCKS, _BLOCK = 64, 1 << 14
