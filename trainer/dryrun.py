"""A computation on shapes alone, on PyTorch's meta device, and the memory that it would take.

PyTorch's own autograd decides what is kept for the backward pass, so nothing is known here of layers. Two things that
the meta device does otherwise than a real one are put right: attention keeps no matrix of all pairs, and autocast,
which knows no meta tensors, casts as it would on the device that is meant.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True)
class Taken:
    """Bytes that a computation takes beyond what was there before it."""

    kept: int
    """After the forward pass, for the backward pass."""
    peak: int
    """The most at any time."""
    left: int
    """After all of it, such as gradients."""


def forward_and_backward(
    forward: Callable[[], Tensor], present: Iterable[Tensor], autocast: Autocast | None = None, recomputes: bool = False
) -> Taken:
    """What a forward pass to a scalar loss and its backward pass take; `present` are weights, and gradients that are
    there before. The function is called once and must make its inputs itself. Casts are over before the backward pass,
    unless it recomputes parts of the forward one."""
    live = Live(present)
    with _on_shapes(live, autocast):
        loss = forward()
        kept = live.now
    with _on_shapes(live, autocast if recomputes else None):
        _backward(loss)
    del loss
    return Taken(kept, live.peak, live.now)


def _backward(loss: Tensor) -> None:
    """`loss.backward()`, of which modes see what is done within: what is recomputed, and functions of our own."""
    engine: Any = torch.autograd.Variable._execution_engine  # pyright: ignore[reportAttributeAccessIssue]
    one = torch.ones_like(loss)
    engine.run_backward((loss,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True)


@torch.no_grad()
def forward_alone(forward: Callable[[], Any], present: Iterable[Tensor], autocast: Autocast | None = None) -> Taken:
    """What a computation without gradients takes."""
    live = Live(present)
    with _on_shapes(live, autocast):
        made = forward()
        kept = live.now
    del made
    return Taken(kept, live.peak, live.now)


def _on_shapes(live: Live, autocast: Autocast | None) -> ExitStack:
    stack = ExitStack()
    for mode in (torch.device("meta"), live, _FusedAttention(), *([autocast] if autocast else [])):
        stack.enter_context(mode)
    return stack


class Live(TorchDispatchMode):
    """Adds up the memory of all tensors that are made and not yet given up; what is `present` before does not count,
    nor do weights in oneDNN's order, which have no storage."""

    def __init__(self, present: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._before = [tensor.untyped_storage() for tensor in present]
        self._known: dict[int, Any] = {storage._cdata: storage for storage in self._before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and not tensor.is_mkldnn:
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        """PyTorch keeps the Python object of a storage for as long as anything, also autograd, holds the storage."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._give_up(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _give_up(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


# ---------------------------------------------------------------------------------------------------------------------
# what real devices do otherwise


class _FusedAttention(TorchFunctionMode):
    """Attention as fused kernels have it: it keeps what it reads, what it gives, and a number for each query."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """Shapes of (batch, heads, tokens, d) (Dao 2023, "FlashAttention-2", algorithms 1 and 2)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, seen, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return seen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        del gradients
        return tuple(torch.empty_like(one) for one in ctx.saved_tensors[:3])


class Autocast(TorchFunctionMode):
    """What `torch.autocast` does to the operations of a UNet and of CLIP.

    The lists are those of its documentation ("CUDA Ops that can autocast to ...", and likewise for CPUs), of them what
    these models use. Casts of weights that are trained are kept until the forward pass is over.
    """

    def __init__(self, dtype: torch.dtype, on_gpu: bool) -> None:
        super().__init__()
        self.dtype, self.to_fp32 = dtype, _TO_FP32_ON_A_GPU if on_gpu else _TO_FP32
        self._weights: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        cast = self._lower if func in _TO_LOWER else _to_fp32 if func in self.to_fp32 else None
        if cast:
            args, kwargs = tree_map(cast, args), tree_map(cast, kwargs)
        return func(*args, **kwargs)

    def __exit__(self, *error: Any) -> None:
        self._weights.clear()
        super().__exit__(*error)

    def _lower(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype not in _CAST or value.dtype == self.dtype:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(self.dtype)
        if id(value) not in self._weights:
            self._weights[id(value)] = value.to(self.dtype)
        return self._weights[id(value)]


def _to_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _CAST else value


_CAST = (torch.float32, torch.bfloat16, torch.float16)
_TO_LOWER = {
    functional.linear,
    functional.conv2d,
    functional.scaled_dot_product_attention,
    torch.matmul,
    torch.bmm,
    torch.mm,
    torch.addmm,
    torch.baddbmm,
    torch.einsum,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.bmm,
    Tensor.mm,
}
_TO_FP32 = {functional.mse_loss}
_TO_FP32_ON_A_GPU = _TO_FP32 | {
    functional.layer_norm,
    functional.group_norm,
    functional.softmax,
    torch.softmax,
    Tensor.softmax,
    torch.exp,
    torch.log,
    torch.pow,
    Tensor.pow,
    Tensor.__pow__,
    Tensor.sum,
    torch.sum,
    torch.norm,
}
