"""How much memory a run takes at its peak, and of what that is made: foreseen on shapes alone.

A run has three stages, each with a peak of its own: images and captions are encoded, the weights are trained, previews
are drawn. Weights, gradients and the optimizer's state are counted; what a stage keeps while it computes is found by a
dry run of it (`dryrun.py`) at the largest batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, count
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import CLIPTokenizer

from ..datasets.buckets import Shot
from .adapter import let_drop
from .anatomy import skeleton
from .architectures import ARCHITECTURES
from .bases import NO_MODEL, POCKET, BaseInfo
from .config import RunConfig
from .cpukernels import ORDERS_KEPT, in_their_order, suits_order
from .denoiser import Denoiser
from .device import Device, binary, process_bytes
from .dryrun import Autocast, Taken, forward_alone, forward_and_backward
from .errors import BaseModelError, first_line
from .fewbits import keep_in_few_bits, kinds_of
from .fitting import put_on, trained_parameters
from .flat import can_be_flat
from .models import Base, Conditions, Tokens, most_chunks, saved_tokenizer
from .noise import image_loss
from .optim import make_optimizer
from .plan import Plan
from .precision import DTYPES, MixedPrecision, base_dtype, mixed_precision
from .sample import pictures_at_once
from .shelf import LEAST
from .singlefile import read_single_file, read_vae_file
from .speed import compute_fast, recompute_activations

GPU_OVERHEAD = 640 * 2**20
"""Bytes of a GPU's memory beside tensors: the CUDA context (about 450 MiB), workspaces of cuDNN and cuBLAS, and what
PyTorch's allocator cannot hand out. From other trainers' reports; it was not measured here on a GPU."""
HELD_BACK, SHARE_HELD_BACK = 50 * 2**20, 0.3
"""Bytes that a process on a CPU takes while it trains beside what lives: once, and as a share of what lives. By the
system's allocator, which cannot give back pieces between others, and by oneDNN, which keeps weights in orders of its
own for a while. Fitted to five runs on Linux, which it meets within 5 %: they stand in docs/fit.md."""
_PIECE = 2**20
"""Numbers of a trained weight on which the optimizer is tried at most."""
_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Item:
    """Something that takes memory."""

    name: str
    size: int
    """Bytes."""
    why: str

    def facts(self) -> dict[str, Any]:
        return {"name": self.name, "bytes": self.size, "why": self.why}


@dataclass(frozen=True)
class Stage:
    """A part of a run, at the moment at which it takes most."""

    name: str
    items: tuple[Item, ...]

    @property
    def size(self) -> int:
        return sum(item.size for item in self.items)

    def facts(self) -> dict[str, Any]:
        return {"stage": self.name, "bytes": self.size, "items": [item.facts() for item in self.items]}


@dataclass(frozen=True)
class Footprint:
    """What a run takes of a device's memory."""

    encoding: Stage
    training: Stage
    drawing: Stage | None
    """None where no previews are drawn."""

    @property
    def stages(self) -> list[Stage]:
        return [stage for stage in (self.encoding, self.training, self.drawing) if stage]

    @property
    def peak(self) -> int:
        return max(stage.size for stage in self.stages)

    def facts(self) -> dict[str, Any]:
        return {"peak_bytes": self.peak, "stages": [stage.facts() for stage in self.stages]}


@dataclass(frozen=True)
class Largest:
    """The batch that takes most: the last one of a bucket may be smaller, and a bucket may never fill one. Of a pair
    both pictures are in it."""

    width: int
    height: int
    shots: tuple[Shot, ...]

    @classmethod
    def of(cls, plan: Plan) -> Largest:
        """Of the first epoch that has any: an image may come in every other epoch only."""
        batches = next(batches for number in count() if (batches := plan.order.epoch(number)))
        return max((cls(*plan.bucket_of(batch[0]), plan.taken_by(batch)) for batch in batches), key=_pixels)

    @property
    def images(self) -> int:
        return len(self.shots)


def _pixels(largest: Largest) -> int:
    return largest.width * largest.height * largest.images


def _tokenizer_of(base: Base) -> CLIPTokenizer:
    """It says how many tokens a text has; files and random bases have CLIP's own."""
    source = base.info.source
    if not (source.startswith("random:") or Path(source).is_file()):
        return saved_tokenizer(base.info, "tokenizer")
    places = base.text_encoders["text_encoder"].config.max_position_embeddings
    return CLIPTokenizer.from_pretrained(POCKET / "tokenizer", model_max_length=places)


def footprint(plan: Plan, device: Device) -> Footprint:
    """What the run of a plan takes of a device.

    Raises:
        BaseModelError: if the configuration of the base's VAE cannot be read.
    """
    return ForeseenRun(plan, device).footprint()


def precision_on(device: Device, config: RunConfig) -> MixedPrecision:
    """The precision of base and activations there; of a card that is not here, that of one that has bf16."""
    if config.runtime.precision == "auto" and not device.is_here:
        return "bf16"
    return mixed_precision(config.runtime.precision)


# ---------------------------------------------------------------------------------------------------------------------
# the stages


class ForeseenRun:
    """The model of a run, in shapes, as the loop makes it."""

    def __init__(self, plan: Plan, device: Device) -> None:
        self.plan, self.config, self.device = plan, plan.config, device
        self.precision: MixedPrecision = precision_on(device, self.config)
        self.dtype = base_dtype(self.config, self.precision)
        self.base = skeleton(plan.base)
        for module in self.base.components.values():
            module.to(self.dtype)
        self.base.tokenizers = [_tokenizer_of(self.base)] * len(self.base.text_encoders)
        self.largest, self.chunks = Largest.of(plan), most_chunks(self.base, plan.captions_read())
        self.whole = {name: _bytes(module) for name, module in self.base.components.items()}
        self.numbers = {name: _numbers(module) for name, module in self.base.components.items()}
        config, self.kinds = self.config, kinds_of(self.config)
        keep_in_few_bits(self.base, self.kinds, "meta")
        self.weights = {name: _bytes(module) for name, module in self.base.components.items()}
        put_on(self.base, config.adapter, config.seed, config.block, config.trigger)
        self._prepare()
        self.vae = _vae_of(plan.base).to(DTYPES[mixed_precision(config.runtime.vae_precision)])

    def _prepare(self) -> None:
        """As `Trainer._prepare` does it."""
        config, base, on_cpu = self.config, self.base, not self.device.is_gpu
        recompute_activations(base, config)
        let_drop(base, config.adapter.drops)
        needs_autocast = compute_fast(base, config, self.dtype, self.plan.latents_at_once, on_cpu)
        self.ordered = self._in_order()
        self.autocasts = self.precision != "no" and needs_autocast
        self.denoiser = Denoiser(base, config.adapter.trains_text)

    def _in_order(self) -> int:
        """The bytes of weights that a CPU keeps in oneDNN's own order as well. There is none on the meta device: such
        convolutions keep nothing there, as they do not here."""
        convolutions = in_their_order(self.base.unet)
        for convolution in convolutions:
            kept = cast(Any, convolution.forward)
            cast(Any, convolution).forward = partial(_keeping_nothing, convolution, kept.usual)
        orders = min(len(self.plan.batch_of_each_shape()), ORDERS_KEPT) if convolutions else 0
        return 2 * orders * sum(_tensor_bytes(convolution.weight) for convolution in convolutions)

    def footprint(self) -> Footprint:
        drawing = self._drawing() if self.config.sample.every else None
        return Footprint(self._encoding(), self._training(), drawing)

    def _encoding(self) -> Stage:
        """The largest picture is in the VAE; more of them are only where there is room. A GPU has nothing else yet, and
        text encoders, which come to it after the VAE, take less there than the UNet will."""
        width, height = self.largest.width, self.largest.height
        taken = forward_alone(lambda: self._posterior(width, height), _tensors(self.vae))
        why = f"the VAE encodes one picture of {width}x{height} at a time, in {_NAMES[self.vae.dtype]}"
        beside = [] if self.device.is_gpu else [self._whole(name) for name in self.base.components]
        return Stage("encoding images", (self._around, *beside, self._vae, Item("activations", taken.peak, why)))

    def _training(self) -> Stage:
        taken, largest = self.step(), self.largest
        gradients = self._gradient_bytes
        active = taken.peak if can_be_flat(self.config) else max(taken.peak, gradients) - gradients
        pictures = "1 picture" if largest.images == 1 else f"{largest.images} pictures"
        kept = f"{binary(taken.kept)} kept for the backward pass" + (
            ", what else there is computed again" if self.config.runtime.gradient_checkpointing else ""
        )
        why = f"{pictures} of {largest.width}x{largest.height} at once: {kept}"
        items = [self._around, *self._frozen(self._at_work), *self._staying, *self._of_what_is_trained(), *self._copies]
        items.append(Item("activations", active, why))
        return Stage("training", (*items, *self._held_back(items)))

    def _held_back(self, items: Sequence[Item]) -> Iterator[Item]:
        """A GPU's allocator is in its overhead."""
        if self.device.kind == "cpu":
            alive = sum(item.size for item in items) - self._around.size
            why = "by the allocator and by kernels, beside what lives: as measured of such runs"
            yield Item("held back", HELD_BACK + int(SHARE_HELD_BACK * alive), why)

    def _drawing(self) -> Stage:
        """Text encoders, UNet and VAE work one after the other, and the UNet stays; of a GPU only the least is asked,
        one picture at a time."""
        side = self.plan.base.resolution
        pictures = 1 if self.device.is_gpu else min(len(self.config.sample.prompts), pictures_at_once(side)) or 1
        denoising = forward_alone(lambda: self._denoised(side, 2 * pictures), _tensors(self.denoiser), self._autocast())
        decoding = forward_alone(lambda: self._decoded(side, pictures), _tensors(self.vae))
        what = f"{'one picture' if pictures == 1 else f'{pictures} pictures'} of {side}x{side} at a time"
        drawn = Item("activations", denoising.peak, f"the UNet draws {what}")
        decoded = Item("activations", decoding.peak, f"the VAE decodes {what}")
        staying, reading = self._staying, self._frozen(self._reading)
        turns = [reading, [drawn], [self._vae, decoded]]
        turns = [[*turn, *(item for item in staying if item not in turn)] for turn in turns]
        longest = max(turns, key=lambda turn: sum(item.size for item in turn))
        items = [self._around, *self._frozen(self._at_work), *self._of_what_is_trained(), *self._copies]
        if self._has_averages:
            items.append(Item("trained weights put aside", 4 * self._trained_numbers, "averaged ones draw instead"))
        return Stage("drawing previews", (*items, *longest))

    # -- weights ------------------------------------------------------------------------------------------------------

    @property
    def _around(self) -> Item:
        if self.device.kind == "cuda":
            return Item("CUDA", GPU_OVERHEAD, "its context, workspaces of cuDNN and cuBLAS: an estimate")
        return Item("process", process_bytes(), "PyTorch and other libraries, as measured in this process")

    def _frozen(self, names: Sequence[str]) -> list[Item]:
        return [Item(_TITLES[name], self.weights[name], self._kept_in(name)) for name in names]

    def _whole(self, name: str) -> Item:
        """Before anything is in few bits."""
        return Item(_TITLES[name], self.whole[name], f"{_millions(self.numbers[name])} weights in {_NAMES[self.dtype]}")

    def _kept_in(self, name: str) -> str:
        linear = f", those of linear layers in {self.kinds[name]}" if name in self.kinds else ""
        return f"{_millions(self.numbers[name])} weights in {_NAMES[self.dtype]}{linear}"

    @property
    def _vae(self) -> Item:
        why = f"{_millions(_numbers(self.vae))} weights in {_NAMES[self.vae.dtype]}"
        return Item("VAE", _bytes(self.vae), why)

    @property
    def _at_work(self) -> list[str]:
        """What a step computes with."""
        return ["unet", *(self.base.text_encoders if self.config.adapter.trains_text else ())]

    @property
    def _reading(self) -> list[str]:
        """The text encoders that stay frozen."""
        return [name for name in self.base.components if name not in self._at_work]

    @property
    def _staying(self) -> list[Item]:
        """What does not rest while the run trains: small encoders without a GPU stay where they are (`shelf.py`)."""
        kinds = [[self._vae], self._frozen(self._reading)]
        return [item for items in kinds for item in items if not self._rest(items)]

    def _rest(self, items: Sequence[Item]) -> bool:
        return self.device.is_gpu or sum(item.size for item in items) >= LEAST

    @property
    def _copies(self) -> list[Item]:
        why = "convolutions once more for each direction and size of a batch, in oneDNN's order"
        return [Item("copies of weights", self.ordered, why)] if self.ordered else []

    # -- what is trained ----------------------------------------------------------------------------------------------

    @cached_property
    def _trained(self) -> list[nn.Parameter]:
        return [parameter for module in self.base.components.values() for parameter in trained_parameters(module)]

    @property
    def _trained_numbers(self) -> int:
        return sum(parameter.numel() for parameter in self._trained)

    @property
    def _gradient_bytes(self) -> int:
        return 4 * self._trained_numbers

    @property
    def _has_averages(self) -> bool:
        return bool(self.config.optimizer.ema_decay)

    def _of_what_is_trained(self) -> Iterator[Item]:
        """Of a whole model the trained weights themselves are the base's, and are counted there."""
        weights, optimizer = _millions(self._trained_numbers), self.config.optimizer
        if self.config.adapter.kind != "full":
            yield Item("adapter", 4 * self._trained_numbers, f"{weights} weights in fp32")
        yield Item("gradients", self._gradient_bytes, f"of {weights} weights in fp32")
        state = state_bytes(self.config, [tuple(one.shape) for one in self._trained])
        yield Item("optimizer", state, f"what {optimizer.kind} keeps of each weight")
        if self._has_averages:
            yield Item("averages", 4 * self._trained_numbers, "a running average of each weight, in fp32")
        if self.config.preference.start:
            yield Item("reference", 4 * self._trained_numbers, "the weights that the run began with, in fp32")

    # -- dry runs -----------------------------------------------------------------------------------------------------

    def _autocast(self) -> Autocast | None:
        return Autocast(DTYPES[self.precision], self.device.is_gpu) if self.autocasts else None

    def step(self) -> Taken:
        """A forward and a backward pass, with gradients that are there before where they are views of a whole."""
        present = list(_tensors(self.denoiser))
        if can_be_flat(self.config):
            for parameter in self._trained:
                parameter.grad = torch.zeros_like(parameter)
                present.append(parameter.grad)
        recomputes = self.config.runtime.gradient_checkpointing
        taken = forward_and_backward(self._loss, present, self._autocast(), recomputes)
        for parameter in self._trained:
            parameter.grad = None
        return taken

    def _loss(self) -> Tensor:
        objective, largest = self.config.objective, self.largest
        factor = self.plan.base.vae_factor
        shape = (largest.images, 4, largest.height // factor, largest.width // factor)
        text = self._tokens() if self.config.adapter.trains_text else self._conditions(largest.images, self.chunks)
        predicted = self.denoiser(*self._noisy(shape), text, torch.zeros(largest.images, 6))
        return image_loss(objective.loss, predicted, torch.zeros(shape), torch.ones(largest.images), None).sum()

    def _noisy(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return torch.zeros(shape, dtype=self.dtype), torch.zeros(shape[0], dtype=torch.long)

    def _tokens(self) -> Tokens:
        images, chunks = self.largest.images, self.chunks
        ids = [torch.zeros(images * chunks, self._length, dtype=torch.long)] * len(self.base.text_encoders)
        return Tokens(ids, [chunks] * images)

    def _conditions(self, images: int, chunks: int) -> Conditions:
        unet, pooled = self.base.unet.config, None
        if self.plan.base.family == "sdxl":
            width = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
            pooled = torch.zeros(images, width, dtype=self.dtype)
        return Conditions(
            torch.zeros(images, chunks * self._length, unet.cross_attention_dim, dtype=self.dtype), pooled
        )

    @property
    def _length(self) -> int:
        """Tokens of a chunk."""
        return self.base.tokenizers[0].model_max_length

    def _denoised(self, side: int, images: int) -> Tensor:
        edge = side // self.plan.base.vae_factor
        noisy, t = self._noisy((images, 4, edge, edge))
        return self.base.family.predict(self.base.unet, noisy, t, self._conditions(images, 1), torch.zeros(images, 6))

    def _posterior(self, width: int, height: int) -> Any:
        picture = torch.zeros(1, 3, height, width)
        return self.vae.encode(picture.to(self.vae.dtype)).latent_dist.parameters.float()

    def _decoded(self, side: int, pictures: int) -> Tensor:
        edge = side // self.plan.base.vae_factor
        return self.vae.decode(torch.zeros(pictures, 4, edge, edge, dtype=self.vae.dtype)).sample.float()


def _keeping_nothing(convolution: nn.Conv2d, usual: Any, x: Tensor) -> Tensor:
    return _KeepsNothing.apply(convolution, x) if suits_order(x) else usual(x)


class _KeepsNothing(torch.autograd.Function):
    """A frozen convolution, of which only shapes matter."""

    @staticmethod
    def forward(ctx: Any, convolution: nn.Conv2d, x: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return functional.conv2d(x.to(convolution.weight.dtype), convolution.weight, None, padding=convolution.padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0].new_empty(ctx.shape, dtype=ctx.dtype)


def _vae_of(info: BaseInfo) -> Any:
    """The VAE without its weights, frozen.

    Raises:
        BaseModelError: if its configuration makes no model.
    """
    source, own = info.vae or info.source, not info.vae
    try:
        if source.startswith("random:"):
            config: Any = ARCHITECTURES[source.removeprefix("random:")]["vae"]
        elif Path(source).is_file():
            file = Path(source)
            config = read_single_file(file, "base.model").configs["vae"] if own else read_vae_file(file, "base.vae")[1]
        else:
            subfolder, revision = ("vae", info.revision) if own else (info.vae_subfolder, info.vae_revision)
            config = AutoencoderKL.load_config(source, subfolder=subfolder or None, revision=revision or None)
        with torch.device("meta"):
            return AutoencoderKL.from_config(config).requires_grad_(False).eval()  # pyright: ignore
    except (OSError, *NO_MODEL) as error:
        what = f"its configuration makes no VAE: {first_line(error)}"
        raise BaseModelError(what, "base.vae" if info.vae else "base.model", "Save or download it again.") from error


def state_bytes(config: RunConfig, shapes: Iterable[tuple[int, ...]]) -> int:
    """What the optimizer keeps of trained weights of these shapes: it takes a step on one of each shape, and what it
    then has is counted. Of a large weight a part is taken, for what is kept of it grows with it."""
    counted = Counter(shapes)
    if can_be_flat(config):
        counted = Counter([(sum(_size_of(shape) * times for shape, times in counted.items()),)])
    return sum(times * _state_of(config, shape) for shape, times in counted.items())


def _state_of(config: RunConfig, shape: tuple[int, ...]) -> int:
    """Bytes for one weight of a shape."""
    rows = max(1, min(shape[0], _PIECE * shape[0] // _size_of(shape))) if shape else 1
    piece = nn.Parameter(torch.zeros(rows, *shape[1:]) if shape else torch.zeros(()))
    piece.grad = torch.ones_like(piece)
    optimizer = make_optimizer(config.optimizer, [{"params": [piece], "lr": 1e-6}])
    optimizer.step()
    kept = [value for value in optimizer.state[piece].values() if isinstance(value, Tensor)]
    return round(sum(map(_tensor_bytes, kept)) * (shape[0] / rows if shape else 1))


def _size_of(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _tensor_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(module: Any) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


def _bytes(module: Any) -> int:
    return sum(map(_tensor_bytes, _tensors(module)))


def _numbers(module: Any) -> int:
    return sum(tensor.numel() for tensor in module.parameters())


def _millions(number: int) -> str:
    return f"{number / 1e6:.4g} million" if number >= 1e6 else f"{number:,}"


_TITLES = {"unet": "UNet", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
