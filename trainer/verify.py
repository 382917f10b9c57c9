"""Is the file on disk the same as the model in memory? It is loaded back into a fresh pipeline and compared.

diffusers alone cannot tell: it reads names that no other client reads, skips layers without a word, and applies one
alpha to all layers of a component. So the file is held against three things, and any deviation fails the export:

1. the names, types and scales that all clients agree on, by this project's own reading of the file;
2. the weight change of every layer, as the file gives it and as the fresh pipeline applies it;
3. what text encoders and UNet answer to fixed inputs, with the size of the adapter's own effect as the measure.

The fresh pipeline is diffusers' own, which loads plain LoRAs, and DoRAs of the UNet in its own format. What it does not
load (LoHa, LoKr, full changes, DoRA in kohya's names) is merged into a fresh base by this project's reader of any
trainer's files, as the clients do it that know LyCORIS; `loraread` shares no table with what wrote the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .adapter import ADAPTER, base_weight, deltas, strength
from .architectures import ARCHITECTURES, PUBLISHED
from .clients.reading import read_by_clients
from .clients.table import COMPATIBILITY, Client
from .delta import Changes, Delta, Form, product_norm
from .errors import ExportError, Problem, UserError, first_line
from .files import rename
from .keys import ALPHA, Format, base_name, component_of, grammar, leaf_of
from .lorafile import LoraFile
from .loraread import merged, read_lora
from .models import Base, Conditions
from .pivotal import unread

PROMPT = "a photo of a red house by the sea, painted in oil"
SHOWN = 5  # deviations that an error names

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Largest |change in the file - change in memory| / |change in memory| of a layer, in Frobenius norms. Two matrices
# rounded to a mantissa of m bits are off by about 0.4 * 2**-m; the rest is room for products that cancel.
WEIGHT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# A layer whose change is a smaller share than this of its component's largest change does nothing that can be seen.
NEGLIGIBLE = 1e-3
# Largest |fresh - live| / |live - without adapter| of an answer, by the precision of the file and of the base.
EFFECT_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# What arithmetic alone may change besides, as a share of the whole answer, by the precision of the base.
ROUNDING = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
# A weak adapter drowns in that, so both models are asked at a strength at which it changes this share of the answer.
VISIBLE, MOST = 0.2, 4.0**10


@dataclass(frozen=True)
class Answer:
    """How one component answers to fixed inputs."""

    effect: float
    """|live - without adapter| / |without adapter|, at strength 1."""
    error: float
    """|fresh - live| / |live - without adapter|, at the strength below."""
    strength: float
    """1, or what makes a weak adapter's effect large enough to be compared."""


@dataclass(frozen=True)
class Verification:
    """How near the file is to the model in memory."""

    modules: dict[str, int]
    """Adapted layers by component: the same in the file, in memory and in the fresh pipeline."""
    weight_error: float
    """The largest relative error of a layer's weight change."""
    weight_tolerance: float
    answers: dict[str, Answer]
    """By component."""
    answer_tolerance: float
    """Largest `Answer.error` allowed, besides the rounding of the base's own precision."""


class _Different(Exception):  # noqa: N818 (it never leaves this file)
    """Holds what deviates."""


def verify(path: Path, base: Base, load_fresh: Callable[[], Base], changes: Changes | None = None) -> Verification:
    """Load the file into a fresh pipeline and compare it with the live model, or with `changes` made from it.

    `load_fresh` gives the same base without an adapter, in the same precision and on the same device as `base`.

    Raises:
        ExportError: naming the first deviations. The file has then been renamed to `<name>.safetensors.rejected`.
    """
    try:
        return _compare(path, base, load_fresh, changes)
    except _Different as different:
        deviations = different.args[0]
    rejected = path.with_name(f"{path.name}.rejected")
    rename(path.replace, rejected)
    if len(deviations) > SHOWN:
        deviations = [*deviations[:SHOWN], f"and {len(deviations) - SHOWN} more deviations"]
    fix = f"Do not share it: it was set aside as {rejected.name}. Export again, from the last checkpoint."
    fixes = [""] * (len(deviations) - 1) + [fix]
    raise ExportError.of(Problem(path.name, text, fix) for text, fix in zip(deviations, fixes, strict=True))


def _compare(path: Path, base: Base, load_fresh: Callable[[], Base], changes: Changes | None) -> Verification:
    """Cheapest first; each step makes sense only if the one before it found nothing."""
    try:
        file = LoraFile.open(path)
    except UserError as error:
        raise _Different([error.problems[0].what]) from error
    format = file.format or "kohya"
    live = named_layers(base, changes or live_changes(base), format)
    written, types = _compare_tensors(file, base, live, format)

    modules = dict(Counter(module_component(name) for name in live))
    most = 1.0 if _rounds_lengths(base, live, format) else MOST
    said = answers_of(base, modules, partial(strength, base), most) if changes is None else {}
    places = base.places()
    base.to("cpu")  # a GPU that just holds one base must not have to hold two
    fresh = load_fresh()
    if changes is not None:
        said = answers_of(fresh, modules, partial(merged, fresh.components, changes), most)
    types.add(base.dtype)
    applied, acting = _loaded(fresh, path, format, live)
    _require(set_deviations(live, applied, "in a fresh pipeline"))
    limit = max(WEIGHT_TOLERANCE[t] for t in types)
    _require(weight_deviations(live, applied, limit, "in a fresh pipeline", base.dtype))
    tolerance = max(EFFECT_TOLERANCE[t] for t in types)
    answers = compare_answers(fresh, said, tolerance, acting)
    errors = [*change_errors(live, written).values(), *change_errors(live, applied, base.dtype).values()]
    del fresh, applied, acting
    base.put_back(places)
    return Verification(
        modules=modules,
        weight_error=max(errors),
        weight_tolerance=limit,
        answers=answers,
        answer_tolerance=tolerance,
    )


def _rounds_lengths(base: Base, live: Mapping[str, Layer], format: Format) -> bool:
    """Whether diffusers brings the lengths of a DoRA to half precision, an error that would grow with the strength."""
    has_lengths = any(layer.delta.form == "dora" for layer in live.values())
    return has_lengths and format == "diffusers" and base.dtype != torch.float32


def _compare_tensors(
    file: LoraFile, base: Base, live: Mapping[str, Layer], format: Format
) -> tuple[dict[str, Delta], set[torch.dtype]]:
    """The changes that the file holds, and the types they are kept in."""
    _require(name_deviations(file, base, live, format))
    _require(client_deviations(file, base, live, format))
    written = read_layers(file, live, format)
    _require(tensor_deviations(file, live, written))
    types = {_DTYPES[dtype] for key, dtype in file.dtypes.items() if not key.endswith(f".{ALPHA}")}
    _require(weight_deviations(live, written, max(WEIGHT_TOLERANCE[t] for t in types), "in the file"))
    return written, types


def _require(deviations: Iterable[str]) -> None:
    if found := list(deviations):
        raise _Different(found)


def module_component(name: str) -> str:
    return component_of(name) or "unknown"


# ---------------------------------------------------------------------------------------------------------------------
# names, types and scales


@dataclass(frozen=True)
class Layer:
    """One adapted layer: its change, and the layer whose weight is changed."""

    delta: Delta
    """On the CPU."""
    component: nn.Module

    @property
    def weight(self) -> Tensor:
        """The untouched weight, on the CPU; on the meta device, where shapes are all there is."""
        layer: Any = self.component.get_submodule(self.delta.name)
        weight = base_weight(self.component, self.delta.name) if isinstance(layer, BaseTunerLayer) else layer.weight
        return weight.detach() if weight.device.type == "meta" else weight.detach().cpu()


def live_changes(base: Base) -> dict[str, list[Delta]]:
    """What the adapters of a live base change in its layers, by component, on the CPU."""
    return {component: [d.on("cpu") for d in deltas(module)] for component, module in base.components.items()}


def named_layers(base: Base, changes: Changes, format: Format) -> dict[str, Layer]:
    """The changed layers of all components, by their names in a file."""
    family, n = base.info.family, int(base.unet.config["layers_per_block"])
    return {
        base_name(family, component, delta.name, format, n): Layer(delta, base.components[component])
        for component, own in changes.items()
        for delta in own
    }


def name_deviations(file: LoraFile, base: Base, live: Mapping[str, Layer], format: Format) -> Iterator[str]:
    """Every key is of the grammar, and each live layer has all its keys, and there is no other key."""
    pattern = grammar(base.info.family, format)
    yield from (f"{key} is not a name that clients read" for key in file.shapes if not pattern.fullmatch(key))
    expected = [name + leaf_of(tensor, format) for name in live for tensor in tensor_names(live[name].delta, format)]
    yield from set_deviations(expected, file.shapes, "in the file")
    if "lora_adapter_metadata" in file.metadata:
        yield "the header holds lora_adapter_metadata, which makes diffusers refuse the file"


_MAPS: tuple[Client, ...] = ("A1111", "ComfyUI", "diffusers", "sd-scripts")
"""The clients whose ways to find layers by name are those of all others."""


def client_deviations(file: LoraFile, base: Base, live: Mapping[str, Layer], format: Format) -> Iterator[str]:
    """Whoever reads this kind of file does with it what it means, with every key, by the client's own map of names.

    Some clients know published models by heart, layer for layer, so that of other shapes it is only told.
    """
    published = ARCHITECTURES[PUBLISHED[base.info.family].removeprefix("random:")]["unet"]
    if format != "kohya" or any(list(base.unet.config[k]) != list(published[k]) for k in _SHAPE):
        return
    forms: set[Form] = {layer.delta.form for layer in live.values()}
    readers = [client for client in _MAPS if all(COMPATIBILITY[form][client] == "same" for form in forms)]
    for reading in read_by_clients(file, base):
        if reading.client in readers and reading.reading != "same":
            yield f"{reading.client} would not do what was trained: {reading.why.rstrip('.')}"


_SHAPE = ("block_out_channels", "down_block_types")


def tensor_names(delta: Delta, format: Format) -> list[str]:
    """What a file holds of a layer; a full change has no scale, and diffusers' files have it in `up`."""
    return [*delta.tensors, *([ALPHA] if format == "kohya" and delta.form != "full" else [])]


def set_deviations(expected: Iterable[str], found: Iterable[str], where: str) -> Iterator[str]:
    expected, found = set(expected), set(found)
    yield from (f"{name} was trained, but is missing {where}" for name in sorted(expected - found))
    yield from (f"{name} is {where}, but was not trained" for name in sorted(found - expected))


def read_layers(file: LoraFile, live: Mapping[str, Layer], format: Format) -> dict[str, Delta]:
    """The file's layers as every client must read them; without an alpha the scale is 1."""
    tensors = file.tensors()
    found = {}
    for name, layer in live.items():
        own = {leaf: tensors[name + leaf_of(leaf, format)] for leaf in layer.delta.tensors}
        if format == "diffusers" and "dora_scale" in own:
            own["dora_scale"] = own["dora_scale"].view(layer.delta.tensors["dora_scale"].shape)
        alpha = tensors.get(f"{name}.{ALPHA}")
        read = Delta(layer.delta.name, own, 0.0)
        found[name] = Delta(read.name, own, float(read.rank if alpha is None else alpha.sum()))
    return found


def tensor_deviations(file: LoraFile, live: Mapping[str, Layer], written: Mapping[str, Delta]) -> Iterator[str]:
    """Types and shapes that all clients take, finite values, one alpha a component, no component without effect."""
    alphas: dict[str, set[float]] = {}
    effective: dict[str, bool] = {}
    for name, delta in written.items():
        if shapes_of(delta) != shapes_of(live[name].delta):
            yield f"{name} has other shapes than the live layer"
        if not all(tensor.isfinite().all() for tensor in delta.tensors.values()):
            yield f"{name} holds NaN or infinity"
        if "lora_up.weight" in delta.tensors:
            alphas.setdefault(module_component(name), set()).add(delta.alpha)
        effective[module_component(name)] = effective.get(module_component(name), False) or not is_still(delta)
    for key, dtype in file.dtypes.items():
        if key.endswith(f".{ALPHA}") and (dtype != "F32" or file.shapes[key] != ()):
            yield f"{key} is not a single fp32 number, which some clients cannot read"
        elif dtype not in _DTYPES:
            yield f"{key} is of type {dtype}"
    for component, values in alphas.items():
        if file.format == "kohya" and len(values) > 1:
            yield f"{component} has several alphas {sorted(values)}, of which diffusers applies one to all layers"
    yield from (
        f"{component} was trained, but all its changes are zero" for component, any_ in effective.items() if not any_
    )
    if file.metadata.get("sshs_model_hash", file.hashes.tensors) != file.hashes.tensors:
        yield "sshs_model_hash in the header is not the hash of the tensors"


def shapes_of(delta: Delta) -> dict[str, tuple[int, ...]]:
    return {leaf: tuple(tensor.shape) for leaf, tensor in delta.tensors.items()}


def is_still(delta: Delta) -> bool:
    """Whether it changes nothing, for one of the factors of its product is zero."""
    return not all(tensor.any() for leaf, tensor in delta.tensors.items() if leaf != "dora_scale")


# ---------------------------------------------------------------------------------------------------------------------
# the change of each layer


def weight_deviations(
    live: Mapping[str, Layer],
    other: Mapping[str, Delta],
    tolerance: float,
    where: str,
    dtype: torch.dtype | None = None,
) -> Iterator[str]:
    for name, error in change_errors(live, other, dtype).items():
        if not error <= tolerance:
            mine, theirs = live[name].delta, other[name]
            scales = f"; alpha {theirs.alpha:g} at rank {theirs.rank}, live {mine.alpha:g} at {mine.rank}"
            scales = scales if mine.rank else ""
            yield f"{name}: its change is off by {error:.2%} {where} (allowed {tolerance:.2%}{scales})"


def change_errors(
    live: Mapping[str, Layer], other: Mapping[str, Delta], dtype: torch.dtype | None = None
) -> dict[str, float]:
    """|other - live| / |live| of each layer's change, in Frobenius norms.

    A layer that hardly changes, next to the largest change of its component, is held against that one: its numbers
    may be so small that fp16 keeps few of their bits, and they do nothing. What a base of type `dtype` rounds in the
    lengths of a DoRA is no error of the file.
    """
    measured = {name: _size_and_difference(layer, other[name], dtype) for name, layer in live.items()}
    largest: dict[str, float] = {}
    for name, (size, _) in measured.items():
        component = module_component(name)
        largest[component] = max(largest.get(component, 0.0), size)
    errors = {}
    for name, (size, difference) in measured.items():
        scale = max(size, NEGLIGIBLE * largest[module_component(name)])
        errors[name] = difference / scale if scale else (float("inf") if difference else 0.0)
    return errors


def _size_and_difference(live: Layer, other: Delta, dtype: torch.dtype | None) -> tuple[float, float]:
    """|live| and |other - live| of the changes, fp64."""
    if live.delta.is_plain and other.is_plain:
        return plain_size(live.delta), plain_difference(live.delta, other)
    weight = live.weight
    weight = torch.empty_like(weight, device="cpu") if weight.device.type == "meta" else weight  # its shape is enough
    mine = live.delta.of(weight, torch.float64)
    difference = float((other.of(weight, torch.float64) - mine).norm())
    if dtype and live.delta.form == "dora":
        difference = max(0.0, difference - torch.finfo(dtype).eps * float(weight.double().norm()))
    return float(mine.norm()), difference


def plain_size(delta: Delta) -> float:
    return product_norm(*_factors(delta))


def plain_difference(live: Delta, other: Delta) -> float:
    """|other - live| of two plain LoRAs, without forming a product.

    With A = [up, up'] and B = [down; down'], |A B|^2 = trace(A'A BB'), a product of matrices as small as the rank; in
    fp64 its own rounding is about 1e-8 of the norm.
    """
    up, down = _factors(live)
    other_up, other_down = _factors(other)
    return product_norm(torch.cat([other_up, -up], 1), torch.cat([other_down, down], 0))


def _factors(delta: Delta) -> tuple[Tensor, Tensor]:
    return delta.scale * delta.up.double().cpu().flatten(1), delta.down.double().cpu().flatten(1)


# ---------------------------------------------------------------------------------------------------------------------
# loading, and the answers to fixed inputs


Acting = Callable[[float], AbstractContextManager[None]]
"""Within the block, what was trained acts at a strength; 0 is the untouched base."""


def _loaded(fresh: Base, path: Path, format: Format, live: Mapping[str, Layer]) -> tuple[dict[str, Delta], Acting]:
    """Bring the file into a fresh base, as any user does: the changes that it makes there, and how to let it act."""
    if format == "diffusers" or all(layer.delta.is_plain for layer in live.values()):
        _load(fresh, path)
        changes, acting = live_changes(fresh), partial(strength, fresh)
    else:
        try:
            changes = read_lora(path, fresh.components, fresh.info.family)
        except UserError as error:
            raise _Different([problem.what for problem in error.problems]) from error
        acting = partial(merged, fresh.components, changes)
    return {name: layer.delta for name, layer in named_layers(fresh, changes, format).items()}, acting


def _load(fresh: Base, path: Path) -> None:
    try:
        load_as_users_do(fresh, path)
    except REFUSALS as error:
        raise _Different([f"diffusers does not load it: {first_line(error)}"]) from error


REFUSALS = (ValueError, RuntimeError, LookupError, TypeError, AttributeError)
"""What diffusers and PEFT raise on a bad file."""


def load_as_users_do(fresh: Base, path: Path) -> None:
    """Put a file's adapter on a base by diffusers' own loader; raises one of `REFUSALS`."""
    folder = str(path.absolute().parent)
    fresh.pipeline().load_lora_weights(folder, weight_name=path.name, adapter_name=ADAPTER)


@dataclass(frozen=True)
class Said:
    """What a component answers to fixed inputs."""

    answer: Tensor
    whole: float
    """Norm of the answer without the adapter."""
    effect: float
    """Norm of what the adapter changes in it."""
    shown: float
    """The same at the strength it was raised to."""
    strength: float

    def is_met(self, error: float, tolerance: float, dtype: torch.dtype) -> bool:
        """Whether an answer that is off by `error` is the same but for rounding; `dtype` is the base's."""
        return error <= tolerance * self.shown + ROUNDING[dtype] * self.whole


@torch.no_grad()
def answers_of(base: Base, trained: Iterable[str], acting: Acting, most: float) -> dict[str, Said]:
    """The answers of the trained components, at a strength, `most` at most, that lets the effect be seen."""
    with unread(base):  # new tokens stand in a file of their own
        with acting(0):
            plain = base.encode([PROMPT])
        answers = {}
        for name in trained:
            with acting(0):
                without = _answer(base, name, plain)
            whole, factor = float(without.norm()), 1.0
            with acting(1):
                live = _answer(base, name, plain)
            effect = shown = float((live - without).norm())
            while shown < VISIBLE * whole and factor < most:
                factor = min(most, factor * max(2.0, VISIBLE * whole / shown if shown else most))
                with acting(factor):
                    live = _answer(base, name, plain)
                shown = float((live - without).norm())
            answers[name] = Said(live, whole, effect, shown, factor)
    return answers


def compare_answers(fresh: Base, said: Mapping[str, Said], tolerance: float, acting: Acting) -> dict[str, Answer]:
    """Compare what the fresh pipeline answers with what the live model said."""
    found, deviations = {}, []
    for name, error in answer_errors(fresh, said, acting).items():
        live = said[name]
        if not live.shown > 0:
            deviations.append(f"the adapter of {name} changes nothing in its output")
        elif not live.is_met(error, tolerance, fresh.dtype):
            share = error / live.shown
            deviations.append(f"the output of {name} in a fresh pipeline is off by {share:.2%} of the effect")
        else:
            found[name] = Answer(live.effect / live.whole, error / live.shown, live.strength)
    _require(deviations)
    return found


@torch.no_grad()
def answer_errors(fresh: Base, said: Mapping[str, Said], acting: Acting) -> dict[str, float]:
    """By component, the norm of what a base answers otherwise than was said, at the same strength."""
    with acting(0):
        plain = fresh.encode([PROMPT])
    errors = {}
    for name, live in said.items():
        with acting(live.strength):
            errors[name] = float((_answer(fresh, name, plain) - live.answer).norm())
    return errors


def _answer(base: Base, component: str, conditions: Conditions) -> Tensor:
    """A flat fp32 vector: the UNet's answer to fixed noise, a text encoder's to a fixed prompt."""
    if component == "unet":
        return _prediction(base, conditions).float().cpu().flatten()
    encoded = base.encode([PROMPT])
    configs: list[Any] = [encoder.config for encoder in base.text_encoders.values()]
    hidden = encoded.hidden.split([config.hidden_size for config in configs], dim=-1)
    answer = dict(zip(base.text_encoders, hidden, strict=True))[component].flatten()
    if component == "text_encoder_2" and encoded.pooled is not None:
        answer = torch.cat([answer, encoded.pooled.flatten()])
    return answer.float().cpu()


def _prediction(base: Base, conditions: Conditions) -> Tensor:
    """The UNet on a small square of noise, half-way through the noise schedule."""
    side = 2 * base.info.bucket_step // base.info.vae_factor
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)).to(base.device, base.dtype)
    pixels = side * base.info.vae_factor
    sizes = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], device=base.device, dtype=torch.float32)
    t = torch.tensor([base.scheduler.config["num_train_timesteps"] // 2], device=base.device)
    return base.family.predict(base.unet, noise, t, conditions, sizes)
