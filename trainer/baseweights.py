"""A whole model, read and written tensor by tensor: memory holds one of them, however large the model is.

Files are mapped into memory, so that what is not asked for is not read, and what was read is given back when memory is
short. What is made of a model goes through a `TensorWriter`, into one file that clients read as a checkpoint or into a
diffusers folder, with the same names, header and configurations as `wholemodel.py` gives a model in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer

from ..datasets.workers import Progress
from .anatomy import skeleton
from .bases import NO_MODEL, BaseInfo, hub_answers, require_modest
from .delta import Changes, Delta
from .errors import BaseModelError, ExportError, UserError, first_line
from .export import DTYPES, Precision
from .files import until_verified
from .jsonfile import read_json
from .ldm import from_ldm, ldm_parts, ldm_tensor, text_name, vae_from_file, with_text_model
from .lorafile import LoraFile
from .loraread import read_lora
from .models import Base, clip_tokenizer, load_base, noise_schedule, saved_tokenizer
from .paths import path_of
from .sharing.facts import last_part
from .singlefile import read_single_file, read_vae_file
from .strengths import Strengths
from .tensorfile import TensorWriter, tensor_writer
from .weightfile import PICKLES
from .wholemodel import (
    WEIGHT_FILES,
    Weights,
    checkpoint_header,
    component_classes,
    configs_of,
    marks,
    tokenizer_names,
    tokenizers_of,
    write_folder,
)

Change = Callable[[str, str, Tensor], Tensor]
"""What becomes of a parameter, by component (`vae` too), name and value; on the CPU, of any floating type."""
_COMPLETE = "A base needs model_index.json, and .safetensors weights of every component."


class Additions:
    """The changes of LoRA files, to be added to a base's weights whenever one is read."""

    def __init__(self) -> None:
        self._by_path: dict[str, list[tuple[Delta, float]]] = {}

    def __len__(self) -> int:
        """How many weights change."""
        return len(self._by_path)

    def add(self, changes: Changes, strengths: Strengths) -> None:
        """Put in the changes of one more file. Where several change a weight, each is added to what those before made
        of it; that matters to DoRAs alone."""
        for component, deltas in changes.items():
            for delta in deltas:
                if strength := strengths.of(component, delta.name):
                    path = path_of(component, f"{delta.name}.weight")
                    self._by_path.setdefault(path, []).append((delta, strength))

    def to(self, component: str, name: str, tensor: Tensor) -> Tensor:
        """A parameter with what is added to it, fp32; one that does not change is given back as it is."""
        for delta, strength in self._by_path.get(path_of(component, name), ()):
            tensor = tensor.float() + strength * delta.of(tensor)
        return tensor


@dataclass(frozen=True)
class BaseWeights:
    """The weights of a base, each read when it is asked for; made by `open`."""

    outline: Base
    """The base with shapes for weights, but with its own noise schedule."""
    _stored: Weights
    _tokenizers: Callable[[], list[CLIPTokenizer]]
    _merged: Additions = field(default_factory=Additions)

    @classmethod
    def open(cls, info: BaseInfo) -> BaseWeights:
        """Find all weights of a base: of a diffusers folder, a Hub model, or a single file. `random:` ones are made in
        memory. Another VAE and LoRA files to merge (`base.vae`, `base.merge`) are part of the base, as in training.

        Raises:
            BaseModelError: if weights are missing, of another shape, or no part of the model.
            UserError: if a LoRA file to merge does not fit.
        """
        if info.source.startswith("random:"):
            base = load_base(info)
            return cls(base, _weights_of(base), lambda: base.tokenizers)
        is_file = Path(info.source).is_file()
        outline, stored, tokenizers = _single_file(info) if is_file else _diffusers_model(info)
        if info.vae:
            outline, stored = _with_other_vae(info, outline, stored)
        merged = Additions()
        for file, strength in info.merges:
            merged.add(read_lora(Path(file), outline.components, info.family), Strengths(strength))
        return cls(outline, _only_needed(info, outline, stored), tokenizers, merged)

    @property
    def info(self) -> BaseInfo:
        return self.outline.info

    def whole_outline(self) -> Base:
        """The outline with the base's own tokenizers.

        Raises:
            BaseModelError: if they cannot be read.
        """
        return dataclasses.replace(self.outline, tokenizers=self._tokenizers())

    def names(self) -> dict[str, list[str]]:
        """Parameter names by component, `vae` among them; text encoders' begin with `text_model.`, as in files."""
        return {component: list(own) for component, own in self._stored.items()}

    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The shapes of all parameters, by component and name."""
        return {
            component: {name: tuple(tensor.shape) for name, tensor in own.items()}
            for component, own in self._stored.items()
        }

    def weight(self, component: str, path: str) -> Tensor:
        """The weight of a layer, by its dotted path."""
        return self.tensor(component, f"{path}.weight")

    def tensor(self, component: str, name: str) -> Tensor:
        """A parameter on the CPU, in the file's type; fp32 if a file of base.merge changes it. With or without
        `text_model.`"""
        return self._merged.to(component, name, self._of(component, name))

    def dtype(self, component: str, name: str) -> torch.dtype:
        """The type that a parameter has in the base's file."""
        return self._of(component, name).dtype

    def _of(self, component: str, name: str) -> Tensor:
        return self._stored[component][text_name(name) if component.startswith("text_encoder") else name]


def open_alike(one: BaseInfo, other: BaseInfo) -> tuple[BaseWeights, BaseWeights]:
    """The weights of two bases of the same family, whose parameters are all of the same shapes.

    Raises:
        UserError: if they are not so.
        BaseModelError: if one of them is not whole.
    """
    names = f"{one.short_name} and {other.short_name}"
    if one.family != other.family:
        what = f"are of different families, {one.family} and {other.family}"
        raise UserError(what, names, "Name two models of one family.")
    opened = BaseWeights.open(one), BaseWeights.open(other)
    mine, theirs = ({(c, n): s for c, own in w.shapes().items() for n, s in own.items()} for w in opened)
    if odd := sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)):
        where = ".".join(odd[0])
        what = f"differ in {len(odd)} shapes, such as {where}: {_shape(mine, odd[0])} and {_shape(theirs, odd[0])}"
        raise UserError(what, names, "Name two models that were made from one and the same.")
    return opened


def _shape(shapes: Mapping[tuple[str, str], tuple[int, ...]], key: tuple[str, str]) -> str:
    return str(shapes[key]) if key in shapes else "absent"


# ---------------------------------------------------------------------------------------------------------------------
# reading


def _weights_of(base: Base) -> Weights:
    """All weights of a base by component, in the names of files."""
    parts: dict[str, Any] = {**base.components, "vae": base.vae}
    weights: Weights = {}
    for component, module in parts.items():
        own = {name: tensor for name, tensor in module.state_dict().items() if not name.endswith("position_ids")}
        weights[component] = with_text_model(own) if component in base.text_encoders else own
    return weights


_Tokenizers = Callable[[], list[CLIPTokenizer]]


def _single_file(info: BaseInfo) -> tuple[Base, Weights, _Tokenizers]:
    found = read_single_file(Path(info.source), "base.model")
    configs = found.configs
    stored = from_ldm(info.family, found.file.tensors(), configs["unet"], configs["vae"])

    def tokenizers() -> list[CLIPTokenizer]:
        names = tokenizer_names(info.family)
        return [clip_tokenizer(configs[name], f"base.model: {info.model}, {name}") for name in names]

    return _outline(info, configs["scheduler"], configs["vae"]), stored, tokenizers


def _diffusers_model(info: BaseInfo) -> tuple[Base, Weights, _Tokenizers]:
    place: dict[str, Any] = {"revision": info.revision or None}
    with _readable(info):
        vae: Any = AutoencoderKL.load_config(info.source, subfolder="vae", **place)
        scheduler: Any = DDIMScheduler.load_config(info.source, subfolder="scheduler", **place)
    stored: Weights = {}
    for name, (library, _) in component_classes(info.family).items():
        if name != "scheduler":
            where = f"base.model: {info.model}, {name}"
            stored[name] = _component(info.source, info.revision, name, WEIGHT_FILES[library], where)
            stored[name] = with_text_model(stored[name]) if name.startswith("text_encoder") else stored[name]
    stored["vae"] = vae_from_file(stored["vae"], vae)

    def tokenizers() -> list[CLIPTokenizer]:
        with _readable(info):
            return [saved_tokenizer(info, name) for name in tokenizer_names(info.family)]

    return _outline(info, scheduler, vae), stored, tokenizers


@contextmanager
def _readable(info: BaseInfo) -> Iterator[None]:
    """What the libraries say against a folder, as an error with its fix."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{info.model} cannot be read: {first_line(error)}", "base.model", _COMPLETE) from error


def _outline(info: BaseInfo, scheduler: Mapping[str, Any], vae: Mapping[str, Any]) -> Base:
    """The base as `load_base` gives it, with shapes for weights."""
    base = dataclasses.replace(skeleton(info), scheduler=noise_schedule(info, scheduler))
    return _with_vae(base, vae, f"base.model: {info.model}, vae")


def _with_vae(outline: Base, config: Mapping[str, Any], where: str) -> Base:
    try:
        require_modest(config)
        with torch.device("meta"):
            vae: Any = AutoencoderKL.from_config(dict(config))
    except NO_MODEL as error:
        what = f"its configuration makes no model: {first_line(error)}"
        raise BaseModelError(what, where, "Save or download it again.") from error
    return dataclasses.replace(outline, vae=vae)


def _with_other_vae(info: BaseInfo, outline: Base, stored: Weights) -> tuple[Base, Weights]:
    """`base.vae` in place of the base's own."""
    where = f"base.vae: {info.vae}"
    config: Any
    if Path(info.vae).is_file():
        file, config = read_vae_file(Path(info.vae), "base.vae")
        tensors = file.tensors()
    else:
        place: dict[str, Any] = {"subfolder": info.vae_subfolder or None, "revision": info.vae_revision or None}
        with _readable(info):
            config = AutoencoderKL.load_config(info.vae, **place)
        file_name = WEIGHT_FILES["diffusers"]
        tensors = _component(info.vae, info.vae_revision, info.vae_subfolder, file_name, where)
    outline = _with_vae(outline, {**config, "scaling_factor": info.scaling_factor}, where)
    return outline, {**stored, "vae": vae_from_file(tensors, config)}


_Find = Callable[[str], Path | None]


def _component(source: str, revision: str, folder: str, file_name: str, where: str) -> dict[str, Tensor]:
    """The mapped weights of one component of a folder or Hub model; what is on this computer, goes first."""
    find: _Find = partial(_find, source, revision, folder, where)
    files = _weight_files(find, file_name, where)
    if not (files and all(files.values())) and not Path(source).is_dir() and hub_answers():
        files = _weight_files(partial(find, online=True), file_name, where)
    if not files:
        raise BaseModelError(f"there is no {file_name}", where, _COMPLETE)
    return _mapped(files, where)


def _weight_files(find: _Find, whole: str, where: str) -> dict[str, Path | None]:
    """Names of files to their places: of one file or of several that an index names; in half precision only if there
    are no others, as when a base is loaded. Nothing if there are none."""
    half = whole.replace(".safetensors", ".fp16.safetensors")
    for name, index in ((whole, f"{whole}.index.json"), (half, f"{whole}.index.fp16.json")):
        if file := find(name):
            return {name: file}
        if listing := find(index):
            return {shard: find(shard) for shard in _shards(listing, where)}
    return {}


def _find(source: str, revision: str, folder: str, where: str, name: str, online: bool = False) -> Path | None:
    """A file of a component's folder; of a Hub model from this computer's cache, or from the Hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    if Path(source).is_dir():
        path = Path(source) / folder / name
        return path if path.is_file() else None
    place: dict[str, Any] = {"subfolder": folder or None, "revision": revision or None}
    try:
        return Path(hf_hub_download(source, name, local_files_only=not online, **place))
    except EntryNotFoundError:  # on the Hub, or in the cache
        return None
    except HfHubHTTPError as error:
        what = f"the Hub refuses {source}: {first_line(error)}"
        raise BaseModelError(what, where, "For a gated model run: hf auth login") from error


def _shards(index: Path, where: str) -> list[str]:
    """The files that hold the weights, each once."""
    try:
        return sorted(set(read_json(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BaseModelError(f"{index.name} is no index of weights", where, "Download the model again.") from None


def _mapped(files: Mapping[str, Path | None], where: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, file in files.items():
        if file is None:
            raise BaseModelError(f"{name} is missing", where, _COMPLETE)
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            what = f"{name} cannot be read: {first_line(error)}"
            raise BaseModelError(what, where, "Copy or download it again.") from error
    return tensors


def _only_needed(info: BaseInfo, outline: Base, stored: Weights) -> Weights:
    """The weights that the model is made of, in its own order. What else a diffusers folder holds, is never loaded.

    Raises:
        BaseModelError: if some are missing, or of another shape.
    """
    weights: Weights = {}
    for component, needed in _weights_of(outline).items():
        own = stored[component]
        odd = [name for name, tensor in needed.items() if name not in own or own[name].shape != tensor.shape]
        if odd:
            what = f"{len(odd)} weights are missing or of another shape, such as {odd[0]}"
            raise BaseModelError(what, f"base.model: {info.model}, {component}", "Copy or download it again.")
        weights[component] = {name: own[name] for name in needed}
    return weights


# ---------------------------------------------------------------------------------------------------------------------
# writing


def rewrite(
    info: BaseInfo,
    target: Path,
    change: Change,
    precision: Precision | None = None,
    title: str = "",
    progress: Progress | None = None,
    merged_from: Sequence[str] = (),
) -> None:
    """Write a base with `change` applied to each of its parameters, to one `.safetensors` file or a diffusers folder.

    Without a precision, each keeps its type. What was written is read back before it takes its name; while it is
    written, it takes twice its size on the disk. A file's header says what was put in (`merged_from`).

    Raises:
        UserError: if the target is what is read, or no place for a model.
        BaseModelError: if the base is not whole.
        ExportError: if a weight is not finite, or has no place in such a file, or what was read back is not the same.
    """
    refuse_target(target, [info.source, info.vae, *(file for file, _ in info.merges)])
    weights = BaseWeights.open(info)
    base, made = weights.whole_outline(), _Made(weights, change, precision, progress)
    if target.suffix == ".safetensors":
        _write_file(base, made, target, title or target.stem, merged_from)
        return
    save = partial(_write_component, made)
    write_folder(target, info.family, configs_of(base), tokenizers_of(base), save)


def unchanged(component: str, name: str, tensor: Tensor) -> Tensor:
    """The `Change` by which a model is only written in another way."""
    del component, name
    return tensor


def refuse_target(target: Path, sources: Iterable[str | Path]) -> None:
    """Nothing that is read may be overwritten: it is read until the end.

    Raises:
        UserError: if the target is one of the sources, or a folder with one inside, or a pickle.
    """
    if target.suffix in PICKLES:
        what = f"would be a pickle ({target.suffix}), which is not written"
        raise UserError(what, str(target), "Name a .safetensors file, or a folder.")
    place = target.resolve()
    for source in sources:
        path = Path(source)
        if str(source) and path.exists() and place in (path.resolve(), *path.resolve().parents):
            raise UserError(f"is what is read, or holds it ({source})", str(target), "Name another file or folder.")


class _Made:
    """The parameters as they are written, each made when it is asked for."""

    def __init__(
        self, weights: BaseWeights, change: Change, precision: Precision | None, progress: Progress | None
    ) -> None:
        self.weights = weights
        self._change = change
        self._dtype = DTYPES[precision] if precision else None
        self._progress = progress
        self._done, self._total = 0, sum(len(own) for own in weights.names().values())

    def of(self, component: str, name: str) -> Tensor:
        """One parameter in the precision that it is written in.

        Raises:
            ExportError: if it is not finite.
        """
        exact = self._change(component, name, self.weights.tensor(component, name))
        dtype = self._dtype or self.weights.dtype(component, name)
        cast = exact.to(dtype)
        if not _is_finite(cast):
            where = f"{component}.{name}"
            if _is_finite(exact):
                beyond = f"is beyond the range of {dtype}".replace("torch.", "")
                raise ExportError(beyond, where, "Write it in another precision, such as fp32.")
            raise ExportError("holds what is no number", where, "Take another copy of the models, or less strength.")
        self._done += 1
        if self._progress:
            self._progress(self._done, self._total)
        return cast


def _is_finite(tensor: Tensor) -> bool:
    plain = tensor.float() if tensor.element_size() == 1 else tensor  # torch does not ask fp8
    return bool(plain.isfinite().all())


def _write_file(base: Base, made: _Made, target: Path, title: str, merged_from: Sequence[str]) -> None:
    """One file in LDM's names."""
    header = checkpoint_header(base, title)
    if merged_from:
        header["modelspec.merged_from"] = ", ".join(last_part(name) for name in merged_from)
    parts = ldm_parts(base.info.family, made.weights.names(), base.unet.config, base.vae.config)
    with tensor_writer(target.parent) as writer:
        for key, own in parts.items():
            writer.add(key, ldm_tensor(key, [made.of(component, name) for component, name in own]))
        for key, mark in marks(base).items():
            writer.add(key, mark)
        write_verified(writer, target, header | {"modelspec.hash_sha256": f"0x{writer.digest()}"})


def _write_component(made: _Made, component: str, file: Path) -> None:
    """The weights of one component of a diffusers folder."""
    with tensor_writer(file.parent) as writer:
        for name in made.weights.names()[component]:
            writer.add(name, made.of(component, name))
        write_verified(writer, file, {"format": "pt"})


def write_verified(writer: TensorWriter, target: Path, header: Mapping[str, str]) -> None:
    """Write a file, read from the disk what it holds, and only then give it its name.

    Raises:
        ExportError: if what was read is not what the writer was given.
    """
    with until_verified(target) as unverified:
        writer.write(unverified, header)
        if LoraFile.open(unverified).hashes.tensors != writer.digest():
            raise ExportError("was not read back as it was written", str(target), "The disk may be broken.")
