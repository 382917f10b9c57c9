"""What a base model is, told by its small configuration files or its header: no weights are loaded, and no torch is
imported unless the base is a pickle."""

from __future__ import annotations

import hashlib
import re
import ssl
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from .architectures import ARCHITECTURES, FAMILY_TITLES, FamilyName
from .errors import BaseModelError, first_line
from .jsonfile import read_json
from .singlefile import BY_NAME, PUBLISHED_VAE, SCALING_FACTOR, read_single_file, read_vae_file, says_v

POCKET = Path(__file__).parent / "pocket"
_ACCEPTED = (
    "Give a diffusers folder, a .safetensors file, a Hub id such as owner/name, pocket, or random:sd15, random:sd21, "
    "random:sdxl."
)
_ACCEPTED_VAES = "Give a diffusers folder, a .safetensors file, or a Hub id such as owner/name."
_HUB_TIMEOUT = 4  # seconds


@dataclass(frozen=True)
class BaseInfo:
    """A base model before it is loaded."""

    model: str
    """What the configuration says: a Hub id, a folder, a file, `pocket` or `random:...`."""
    source: str
    """Where the weights come from: a folder, a file, a Hub id, or `random:...`."""
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
    zero_terminal_snr: bool = False
    """Whether the last time-step is pure noise (Lin et al. 2024)."""
    prediction_stated: bool = True
    """Whether the base says what it predicts; if not, that is one of the assumptions."""
    assumptions: tuple[str, ...] = ()
    """What is taken for granted because nothing says it, in sentences that name the setting to change."""
    scaling_factor: float = SCALING_FACTOR["sd1"]
    """Latents are multiplied by it to about unit variance."""
    vae: str = ""
    """Where another VAE comes from: a folder, a file or a Hub id. Empty: the base's own."""
    vae_subfolder: str = ""
    vae_revision: str = ""
    merges: tuple[tuple[str, float], ...] = ()
    """LoRA files that become part of the base, each with its strength."""

    @property
    def identity(self) -> str:
        """Tells these weights from any others, whatever precision they are loaded in and wherever they lie."""
        own = _identity(self.source, "*/*.safetensors", self.revision)
        pattern = f"{self.vae_subfolder or '.'}/*.safetensors"
        vae = f" with the VAE {_identity(self.vae, pattern, self.vae_revision)}" if self.vae else ""
        return own + vae + "".join(f" with {_identity(file, '', '')} at {at!r}" for file, at in self.merges)

    @property
    def title(self) -> str:
        return f"{self.short_name} ({FAMILY_TITLES[self.family]}, {self.prediction}, {self.resolution} px)"

    @property
    def short_name(self) -> str:
        """The name without any path of this computer."""
        return Path(self.model).name if Path(self.model).expanduser().exists() else self.model


def inspect_base(model: str, vae: str = "", merge: Sequence[str] = ()) -> BaseInfo:
    """Find a base model and recognise its family; `vae` names another VAE than its own, `merge` LoRA files for it.

    Raises:
        BaseModelError: if one of them cannot be found, is of another family, or does not fit the other.
        UserError: if there is no such LoRA file.
    """
    base = _inspect(model)
    return _with_merges(_with_vae(base, vae) if vae else base, merge)


def anchored_base(name: str) -> str:
    """The name of a base or VAE so that it means the same from anywhere: paths become absolute."""
    path = Path(name).expanduser()
    return str(path.absolute()) if name and name != "pocket" and path.exists() else name


def _inspect(model: str) -> BaseInfo:
    if model.startswith("random:"):
        architecture = model.removeprefix("random:")
        if architecture not in ARCHITECTURES:
            raise BaseModelError(f"there is no architecture {architecture!r}", "base.model", _ACCEPTED)
        parts = ARCHITECTURES[architecture]
        return _recognise(model, model, parts["unet"], parts["vae"], parts["scheduler"])
    path = POCKET if model == "pocket" else _local(model, "base.model", _ACCEPTED)
    if path.is_dir():
        return _inspect_folder(model, path)
    if path.is_file():
        return _inspect_file(model, path)
    if not _HUB_ID.fullmatch(model):
        raise BaseModelError(f"{model} does not exist", "base.model", _ACCEPTED)
    return _inspect_hub(model)


def _local(name: str, where: str, accepted: str) -> Path:
    """The path that a name may be.

    Raises:
        BaseModelError: if it can be none, and no name on the Hub.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, or ~nobody
        raise BaseModelError(f"{name[:100]!r} is neither a folder here nor a Hub id", where, accepted) from error
    return path


_HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")


def _inspect_file(model: str, path: Path) -> BaseInfo:
    found = read_single_file(path, "base.model")
    parts = (found.configs[name] for name in ("unet", "vae", "scheduler"))
    info = _recognise(model, str(path.resolve()), *parts)
    return replace(info, family=found.family, prediction_stated=found.prediction_stated, assumptions=found.assumptions)


def _inspect_folder(model: str, folder: Path) -> BaseInfo:
    if not (folder / "model_index.json").is_file():
        raise BaseModelError(
            f"{folder} has no model_index.json, so it is not a diffusers folder", "base.model", _ACCEPTED
        )
    unet, vae, scheduler = (_read_json(folder / name) for name in _CONFIG_FILES)
    return _recognise(model, str(folder.resolve()), unet, vae, scheduler)


def _inspect_hub(model: str) -> BaseInfo:
    with _hub_errors(model, "base.model", _ACCEPTED):
        files = _hub_files(model, ["model_index.json", *_CONFIG_FILES], "base.model")
    found = _recognise(model, model, *(_read_json(file) for file in files[1:]))
    return replace(found, revision=files[0].parent.name)


@contextmanager
def _hub_errors(model: str, where: str, accepted: str) -> Iterator[None]:
    """What the Hub says against a model, as an error with its fix."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        yield
    except HFValidationError as error:
        raise BaseModelError(f"{model} is neither a folder here nor a Hub id", where, accepted) from error
    except LocalEntryNotFoundError as error:  # a kind of the next one
        raise _unreachable(model, where) from error
    except EntryNotFoundError as error:
        raise BaseModelError(f"{model} on the Hub is not a diffusers model", where, accepted) from error
    except HfHubHTTPError as error:
        what = f"the Hub refuses {model}: {first_line(error)}"
        raise BaseModelError(what, where, "Check the name; for a gated model run: hf auth login") from error
    except OSError as error:
        raise _unreachable(model, where) from error


def _hub_files(model: str, names: Sequence[str], where: str) -> list[Path]:
    """Files of a model: from this computer's cache if all are there, else from the Hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    files = [file for name in names if (file := _cached(model, name))]
    if len(files) == len(names):
        return files
    if not hub_answers():
        raise _unreachable(model, where)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the lines of its retries; what it cannot do, it raises
    try:
        return [Path(hf_hub_download(model, name)) for name in names]
    finally:
        logging.set_verbosity(verbosity)


def _cached(model: str, name: str) -> Path | None:
    """A file of a model that was downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, name)
    return Path(found) if isinstance(found, str) else None


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


def _unreachable(model: str, where: str) -> BaseModelError:
    return BaseModelError(
        f"{model} is no folder here, and the Hugging Face Hub cannot be reached",
        where,
        "Check the name and the connection, or give a folder.",
    )


MOST_LEVELS = 8
"""Sizes of picture that a UNet or VAE works at; published ones have 3 or 4, and each more halves the sides."""
LARGEST_SIDE = 4096
"""Latents along one side that a UNet was trained at; published ones have 64 to 128."""
MOST_LAYERS = 100
"""Of one kind in one part of a model; the deepest text encoder has 32. One of a billion takes for ever to be made."""
_LARGEST_SCALE = 1e6  # of latents; published VAEs have 0.13 to 0.18
NO_MODEL = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, ArithmeticError, AssertionError)
"""What the libraries raise of a configuration that makes none."""


def require_modest(config: Mapping[str, Any]) -> None:
    """Refuse a configuration of a component that would take for ever to be made.

    Raises:
        ValueError: naming the setting.
    """
    for key, value in config.items():
        if isinstance(value, list | tuple) and len(value) > MOST_LAYERS:
            raise ValueError(f"{key} is a list of {len(value)}")
        if "layers" in key and max(_numbers_in(value), default=0) > MOST_LAYERS:
            raise ValueError(f"{key} is {value}")


def _numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers_in(inner)
    elif isinstance(value, int | float):
        yield value


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
    named = "prediction_type" not in scheduler and says_v(Path(model).name)
    prediction = scheduler.get("prediction_type", "v_prediction" if named else "epsilon")
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
        zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr")),
        prediction_stated=not named,
        assumptions=(BY_NAME.format(name=Path(model).name),) if named else (),
        scaling_factor=_scale(vae, SCALING_FACTOR["sd1"], model),  # diffusers' default
    )


def _levels(config: dict[str, Any], model: str, where: str = "base.model") -> int:
    """How many resolutions a UNet or VAE works at; each next one halves the sides."""
    channels = config.get("block_out_channels")
    if not isinstance(channels, list) or not 0 < len(channels) <= MOST_LEVELS:
        raise _unclear(config, "block_out_channels", model, where)
    return len(channels)


def _side(unet: dict[str, Any], model: str) -> int:
    """Side of the square of latents the UNet was trained at."""
    side = unet.get("sample_size")
    if not isinstance(side, int) or not 0 < side <= LARGEST_SIDE:
        raise _unclear(unet, "sample_size", model)
    return side


def _scale(vae: dict[str, Any], default: float, model: str, where: str = "base.model") -> float:
    """What latents are multiplied by."""
    scale = vae.get("scaling_factor", default)
    if not isinstance(scale, int | float) or not 0 < scale < _LARGEST_SCALE:
        raise _unclear(vae, "scaling_factor", model, where)
    return float(scale)


def _unclear(config: dict[str, Any], key: str, model: str, where: str = "base.model") -> BaseModelError:
    found = f"is {config[key]!r}" if key in config else "is missing"
    return BaseModelError(f"in a config.json of {model} {key} {found}", where, "Save the model again.")


def _read_json(path: Path, where: str = "base.model") -> dict[str, Any]:
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise BaseModelError(f"{path} is missing", where, "The folder is incomplete; save it again.") from None
    except OSError as error:
        raise BaseModelError(f"{path} cannot be read ({error.strerror})", where, "Change its permissions.") from None
    except ValueError as error:
        raise BaseModelError(f"{path} is not valid JSON ({error})", where, "Save the model again.") from None
    if not isinstance(values, dict):
        raise BaseModelError(f"{path} is not a JSON object", where, "Save the model again.")
    return values


def _identity(source: str, pattern: str, revision: str) -> str:
    """Of a folder or file: SHA-256 over each weight file's size and a few blocks of its bytes, its header among them;
    a folder's files count with their names. Of anything else: its name and commit."""
    path, digest = Path(source), hashlib.sha256()
    if not path.exists():
        return f"{source}@{revision}"
    files: Iterable[Path] = [path] if path.is_file() else sorted(path.glob(pattern))
    for file in files:
        name, size = file.relative_to(path).as_posix() if path.is_dir() else "", file.stat().st_size
        digest.update(f"{name}:{size}".encode())
        with file.open("rb") as handle:
            for start in range(0, size, max(1, size // _BLOCKS)):
                handle.seek(start)
                digest.update(handle.read(_BLOCK))
    return digest.hexdigest()


_BLOCKS, _BLOCK = 64, 1 << 14


# ---------------------------------------------------------------------------------------------------------------------
# another VAE


def _with_merges(base: BaseInfo, merge: Sequence[str]) -> BaseInfo:
    if not merge:
        return base
    from .loraread import parse_merge  # brings torch

    return replace(base, merges=tuple((str(file.absolute()), strength) for file, strength in map(parse_merge, merge)))


def _with_vae(base: BaseInfo, vae: str) -> BaseInfo:
    """The base with a VAE of the same latents: as many channels, and as many pixels to each."""
    config, found = _find_vae(base, vae)
    channels, factor = config.get("latent_channels", 4), 2 ** (_levels(config, vae, "base.vae") - 1)
    if channels != 4:
        raise BaseModelError(f"{vae} makes latents of {channels} channels", "base.vae", _OTHER_VAE)
    if factor != base.vae_factor:
        what = f"{vae} makes a latent of {factor} x {factor} pixels, and the base knows {base.vae_factor} x"
        raise BaseModelError(f"{what} {base.vae_factor}", "base.vae", _OTHER_VAE)
    scale = _scale(config, base.scaling_factor, vae, "base.vae")
    told = () if scale == base.scaling_factor else (_OTHER_SCALE.format(scale, base.scaling_factor),)
    return replace(found, scaling_factor=scale, assumptions=found.assumptions + told)


_OTHER_VAE = "Name a VAE that was made for this family."
_OTHER_SCALE = (
    "base.vae scales its latents by {:g}, and the base's own by {:g}: it may be made for another family. If pictures "
    'come out wrong, name another, or set base.vae = "".'
)


def _find_vae(base: BaseInfo, vae: str) -> tuple[dict[str, Any], BaseInfo]:
    """A VAE's configuration, and the base with the place of its weights."""
    path = _local(vae, "base.vae", _ACCEPTED_VAES)
    if path.is_file():
        config = read_vae_file(path, "base.vae")[1]
        assumptions = base.assumptions + (() if config["block_out_channels"] == PUBLISHED_VAE else (_ODD_VAE,))
        return config, replace(base, vae=str(path.resolve()), assumptions=assumptions)
    if path.is_dir():
        subfolder = next((folder for folder in ("", "vae") if (path / folder / "config.json").is_file()), None)
        if subfolder is None:
            raise BaseModelError(f"{path} has no config.json, so it is no VAE", "base.vae", _ACCEPTED_VAES)
        config_file, revision, source = path / subfolder / "config.json", "", str(path.resolve())
    elif _HUB_ID.fullmatch(vae):
        subfolder, config_file = _hub_vae(vae)
        revision = config_file.parents[1 if subfolder else 0].name
        source = vae
    else:
        raise BaseModelError(f"{vae} does not exist", "base.vae", _ACCEPTED_VAES)
    config = _read_json(config_file, "base.vae")
    if (kind := config.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        raise BaseModelError(f"{vae} is no VAE of Stable Diffusion but {kind}", "base.vae", _OTHER_VAE)
    return config, replace(base, vae=source, vae_subfolder=subfolder, vae_revision=revision)


_ODD_VAE = (
    "base.vae is of another size than the published VAEs, and its shapes do not tell everything; groups of norms are "
    "assumed to be of 32. A diffusers folder would say."
)


def _hub_vae(vae: str) -> tuple[str, Path]:
    """The subfolder and configuration of a VAE on the Hub, which may be a part of a model."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for subfolder, name in _VAE_CONFIGS.items():
        if file := _cached(vae, name):
            return subfolder, file
    with _hub_errors(vae, "base.vae", _ACCEPTED_VAES):
        try:
            return "vae", _hub_files(vae, [_VAE_CONFIGS["vae"]], "base.vae")[0]
        except LocalEntryNotFoundError:  # a kind of the next one
            raise
        except EntryNotFoundError:
            return "", _hub_files(vae, [_VAE_CONFIGS[""]], "base.vae")[0]


_VAE_CONFIGS = {"vae": "vae/config.json", "": "config.json"}
