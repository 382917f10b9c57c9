"""Which kernel computes the UNet's attention, shape by shape.

PyTorch has several, and xformers has one; which is the fastest depends on the card, the widths of the heads and the
numbers of queries and keys. PyTorch chooses by rules of its own. Here each kernel is tried on random numbers of the
very shape, forward and backward, before the first step. What fails, what gives another result, and what would keep too
much is left out; the fastest of the rest is taken for this shape from then on, with and without gradients.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..datasets.buckets import Size
from .errors import ConfigError, first_line

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""softmax(Q K^T / sqrt(d)) V for (batch, heads, tokens, d) (Vaswani et al. 2017, eq. 1)."""
Timer = Callable[[Callable[[], object]], float]
"""How long something takes, in milliseconds."""

PROBED_ON = ("cuda",)
"""Devices on which "auto" tries kernels. On a CPU `cpu_kernels` has a rule that was measured."""
USUAL = "sdpa"
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""How far result and gradients may be from those of math in fp32: |a - b| / |b|. A CPU's flash attention is 6e-7, 3e-3
and 4e-4 away; TF32, which a GPU may take for fp32, has ten bits."""
_WORTH = 0.95
"""Another kernel than PyTorch's choice takes at most so much of its time, or it is not worth the risk."""
_WARM_UP, _TIMED = 2, 5
_HOPELESS = 2.0
"""A kernel of which two timed passes take so much of the best one's time is not timed again."""
_FEW_PAIRS = 0.25
"""A kernel that keeps a number for each pair may keep so much of all that it reads and gives: plans foresee none."""
_FAILURES = (ImportError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError, OSError)
"""What libraries raise where a kernel cannot run."""


# ---------------------------------------------------------------------------------------------------------------------
# kernels


@dataclass(frozen=True)
class Kernel:
    """A way to compute attention."""

    name: str
    attend: Attend
    keeps_pairs: bool = False
    """Whether it keeps a number for each pair of a query and a key."""


def _by_pytorch(backend: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(query, key, value)


def _by_xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    # it takes (batch, tokens, heads, d)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return memory_efficient_attention(query, key, value).transpose(1, 2)


KERNELS = (
    Kernel(USUAL, scaled_dot_product_attention),
    Kernel("flash", partial(_by_pytorch, SDPBackend.FLASH_ATTENTION)),
    Kernel("cudnn", partial(_by_pytorch, SDPBackend.CUDNN_ATTENTION)),
    Kernel("efficient", partial(_by_pytorch, SDPBackend.EFFICIENT_ATTENTION)),
    Kernel("math", partial(_by_pytorch, SDPBackend.MATH), keeps_pairs=True),
    Kernel("xformers", _by_xformers),
)
"""PyTorch's own choice first."""


def kernel_named(name: str) -> Kernel:
    return next(kernel for kernel in KERNELS if kernel.name == name)


class Shape(NamedTuple):
    """Of queries (batch, heads, queries, width), and of keys and values likewise."""

    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, query: Tensor, key: Tensor) -> Shape:
        batch, heads, queries, width = query.shape
        return cls(batch, heads, queries, key.shape[2], width, query.dtype)

    @property
    def words(self) -> str:
        """`4 x 8 heads of 40, 4096 x 77, bfloat16`: also its name in a checkpoint."""
        heads, pairs = f"{self.batch} x {self.heads} heads of {self.width}", f"{self.queries} x {self.keys}"
        return f"{heads}, {pairs}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def numbers(self) -> int:
        """Of queries, keys, values and the result."""
        return 2 * self.batch * self.heads * (self.queries + self.keys) * self.width

    @property
    def pairs(self) -> int:
        return self.batch * self.heads * self.queries * self.keys


# ---------------------------------------------------------------------------------------------------------------------
# the probe


@dataclass(frozen=True)
class Chosen:
    """What is taken for a shape; where it was found by a probe just now, also how."""

    shape: Shape
    kernel: str
    milliseconds: dict[str, float] = field(default_factory=dict)
    """Of each kernel that fits, forward and backward."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why others do not."""

    def facts(self) -> dict[str, Any]:
        return asdict(self) | {"shape": self.shape.words}


def choose(
    shapes: Sequence[Shape], known: Mapping[str, str], device: torch.device, timer: Timer | None = None
) -> Iterator[Chosen]:
    """The kernel of each shape: the one that is `known`, by the shape's words, or the one that is found fastest."""
    names = {kernel.name for kernel in KERNELS}
    for shape in shapes:
        name = known.get(shape.words)
        yield Chosen(shape, name) if name in names else fastest(KERNELS, shape, device, timer or timer_on(device))


def fastest(kernels: Sequence[Kernel], shape: Shape, device: torch.device, timer: Timer) -> Chosen:
    """The kernel that takes the least time. The first one is taken if it cannot be told, or if no other is worth it."""
    times, left_out = dict[str, float](), dict[str, str]()
    try:
        trial = _Trial(shape, device)
    except _FAILURES as error:  # the memory may be full
        return Chosen(shape, kernels[0].name, left_out={kernel.name: _why(error, ()) for kernel in kernels})
    for kernel in kernels:
        if why := trial.unfit(kernel):
            left_out[kernel.name] = why
            continue
        try:
            best = min(times.values(), default=math.inf)
            times[kernel.name] = round(trial.time(kernel, timer, best), 4)
        except _FAILURES as error:
            left_out[kernel.name] = _why(error, ())
    usual, best = kernels[0].name, min(times, key=times.__getitem__, default=kernels[0].name)
    is_worth_it = best != usual and times[best] <= _WORTH * times.get(usual, math.inf)
    return Chosen(shape, best if is_worth_it else usual, times, left_out)


class _Trial:
    """Random numbers of a shape, as they lie in memory in a UNet, and what comes of them. No generator but its own is
    drawn from."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self._generator = shape, torch.Generator(device).manual_seed(0)
        self.given = [self._random(count).requires_grad_() for count in (shape.queries, shape.keys, shape.keys)]
        self.gradient = self._random(shape.queries)

    def _random(self, tokens: int) -> Tensor:
        size, like = (self.shape.batch, tokens, self.shape.heads, self.shape.width), self._generator
        numbers = torch.randn(size, generator=like, device=like.device)
        return numbers.to(self.shape.dtype).transpose(1, 2)

    def unfit(self, kernel: Kernel) -> str:
        """Why a kernel cannot be taken; empty if it can."""
        shape = self.shape
        if kernel.keeps_pairs and shape.pairs > _FEW_PAIRS * shape.numbers:
            size = shape.pairs * shape.dtype.itemsize / 2**20
            return f"it keeps a number for each pair of a query and a key, {size:.1f} MiB"
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                apart = self.error(kernel.attend)
            except _FAILURES as error:
                return _why(error, [str(one.message) for one in warned])
        within = apart <= TOLERANCE[shape.dtype]  # which what is not a number is not
        return "" if within else f"its result is {apart:.2%} away from that of math"

    def time(self, kernel: Kernel, timer: Timer, best: float) -> float:
        """The median time of a forward and a backward pass, in milliseconds; `best` is that of the best one so far."""
        once = partial(self._run, kernel.attend)
        for _ in range(_WARM_UP):
            once()
        times = [timer(once) for _ in range(2)]
        if min(times) <= _HOPELESS * best:
            times += [timer(once) for _ in range(_TIMED - 2)]
        return statistics.median(times)

    def error(self, attend: Attend) -> float:
        """The largest relative error of result and gradients, in the first head of the first image and the last of the
        last one: more of them would take much memory in math."""
        ends = [_ends(one.detach()).float().requires_grad_() for one in self.given]
        exact = _forward_and_backward(kernel_named("math").attend, ends, _ends(self.gradient).float())
        found = [_ends(one).float() for one in self._run(attend)]
        pairs = zip(found, exact, strict=True)
        # the largest of them, or nan, which `max` may lose
        return torch.stack([(one - other).norm() / other.norm() for one, other in pairs]).max().item()

    def _run(self, attend: Attend) -> list[Tensor]:
        return _forward_and_backward(attend, self.given, self.gradient)


def _forward_and_backward(attend: Attend, given: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
    """The result, and the gradients of queries, keys and values."""
    with torch.enable_grad():
        seen = attend(*given)
        return [seen.detach(), *torch.autograd.grad(seen, given, gradient)]


def _ends(numbers: Tensor) -> Tensor:
    """(batch, heads, tokens, d) to (2, 1, tokens, d)."""
    return torch.stack([numbers[0, :1], numbers[-1, -1:]])


def timer_on(device: torch.device) -> Timer:
    return _by_events if device.type == "cuda" else _by_clock


def _by_events(work: Callable[[], object]) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    work()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended)


def _by_clock(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1000


def place_of(device: torch.device) -> str:
    """Where what was found is true: a device, with a version of PyTorch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, PyTorch {torch.__version__}"


def _why(error: BaseException, warned: Iterable[str]) -> str:
    """What a library says, in a line. PyTorch gives its reasons in warnings, among those of kernels that were not
    asked for; xformers below a list of what it was given."""
    if isinstance(error, ImportError):
        return f"{_NOT_INSTALLED} ({first_line(error)})"
    below = [line for line in str(error).splitlines() if line.startswith("    ") and " : " not in line]
    reasons = [line.partition(" (Triggered internally")[0] for line in warned if not any(w in line for w in _NO_REASON)]
    return "; ".join(dict.fromkeys(line.strip() for line in [*below, *reasons])) or first_line(error).rstrip(".")


_NO_REASON = ("not used because", "runtime disabled")
_NOT_INSTALLED = "it is not installed"


# ---------------------------------------------------------------------------------------------------------------------
# a UNet that computes so


class Kernels:
    """Computes attention by the kernel of its shape; other shapes by the `usual` one."""

    def __init__(self, usual: Attend = scaled_dot_product_attention) -> None:
        self.usual, self.by_shape = usual, dict[Shape, Attend]()

    def take(self, chosen: Iterable[Chosen]) -> None:
        for one in chosen:
            self.by_shape[one.shape] = kernel_named(one.kernel).attend

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if torch.is_autocast_enabled(query.device.type):  # which knows PyTorch's own function alone
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        return self.by_shape.get(Shape.of(query, key), self.usual)(query, key, value)


def attend_by(unet: Any, attend: Attend) -> None:
    """Let all plain attention of a UNet be computed so."""
    for module in unet.modules():
        if isinstance(module, Attention) and type(module.processor) is AttnProcessor2_0 and is_plain(module):
            module.set_processor(cast(Any, Attending(attend)))


def is_plain(attention: Attention) -> bool:
    """Whether it is softmax(Q K^T / sqrt(d)) V over heads, and nothing else."""
    further = (attention.group_norm, attention.spatial_norm, attention.norm_cross, attention.norm_q, attention.norm_k)
    is_further = any(one is not None for one in further) or attention.added_kv_proj_dim is not None
    return not is_further and not attention.residual_connection and attention.rescale_output_factor == 1.0


class Attending:
    """An attention processor as diffusers calls it; (batch, tokens, width) to the same."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if attention_mask is not None or hidden_states.dim() != 3:
            return AttnProcessor2_0()(attention, hidden_states, encoder_hidden_states, attention_mask, temb)
        asked = self.asked(attention, hidden_states, encoder_hidden_states)
        query, key, value = (one.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for one in asked)
        seen = self.attend(query, key, value).transpose(1, 2).flatten(2)
        return attention.to_out[1](attention.to_out[0](seen))

    def asked(self, attention: Any, hidden: Tensor, other: Tensor | None) -> Sequence[Tensor]:
        """Queries, keys and values, each (batch, tokens, width)."""
        read = hidden if other is None else other
        return attention.to_q(hidden), attention.to_k(read), attention.to_v(read)


def shapes_of(unet: Any, batches: Iterable[tuple[int, Size]], texts: Sequence[int], dtype: torch.dtype) -> list[Shape]:
    """The shapes of a UNet's plain attention, each once, the smallest first.

    Args:
        batches: of each kind, how many images, and width and height in latents.
        texts: how many tokens captions have.
        dtype: that queries are computed in.
    """
    layers = {
        (level(unet, name), module.heads, module.inner_dim // module.heads, module.is_cross_attention)
        for name, module in unet.named_modules()
        if isinstance(module, Attention) and is_plain(module)
    }
    found = set[Shape]()
    for images, size in batches:
        for depth, heads, width, reads_text in layers:
            queries = _halved(size[0], depth) * _halved(size[1], depth)
            keys = texts if reads_text else (queries,)
            found |= {Shape(images, heads, queries, count, width, dtype) for count in keys}
    return sorted(found, key=lambda shape: shape[:-1])


def level(unet: Any, name: str) -> int:
    """How often the sides have been halved where a layer of a block stands; 0 elsewhere."""
    part, _, rest = name.partition(".")
    last = len(unet.down_blocks) - 1
    number = int(rest.partition(".")[0]) if part in ("down_blocks", "up_blocks") else 0
    return {"down_blocks": number, "mid_block": last, "up_blocks": last - number}.get(part, 0)


def _halved(side: int, times: int) -> int:
    """A convolution with a stride of two rounds up."""
    return -(-side // 2**times)


# ---------------------------------------------------------------------------------------------------------------------
# a kernel that was asked for


def refuse_unfit(name: str, unet: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Try a kernel that was asked for on each width of heads, over few tokens.

    Raises:
        ConfigError: if it cannot run here, or not in this precision, or not with these heads.
    """
    for shape in shapes_of(unet, [(1, (16, 16))], (77,), dtype):
        if why := _Trial(shape, device).unfit(Kernel(name, kernel_named(name).attend)):
            what = f"{name} cannot compute this base's attention here ({shape.words}): {why}"
            fix = 'Set runtime.attention = "auto".'
            raise ConfigError(what, "runtime.attention", f"{_mend(name, why)}{fix}")


def _mend(name: str, why: str) -> str:
    """What else could be done about it."""
    if name != "xformers":
        return ""
    if why.startswith(_NOT_INSTALLED):
        return "Install it (pip install xformers). Or: "
    return f"Install the xformers that was built for PyTorch {torch.__version__}. Or: " if _NOT_BUILT in why else ""


_NOT_BUILT = "operator wasn't built"
