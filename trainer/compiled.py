"""The blocks that a UNet repeats, compiled by PyTorch: one compilation serves all blocks of a kind.

They are compiled whole or not at all, so that no part of one silently computes as before. A compilation is for the
shapes it was made for; where a run has batches of several, it takes any, and is made in an order that depends on the
plan alone, so that a run that is resumed computes as one that was not. What imports the compiler does so here, late.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from .errors import ConfigError, Mending, TrainingError, first_line

if TYPE_CHECKING:
    from torch import nn

    from ..datasets.buckets import Shot, Size
    from .config import RunConfig
    from .plan import Plan

BACKEND = "inductor"
REPAYS_AFTER = 500
"""Steps, by rule of thumb: of so many, two seconds each, a tenth is the minute or two that compiling takes."""
_FEW_SHAPES = 3
"""Up to so many of a run's batches are compiled one by one. Measured on two small blocks: to trace them for any shape
takes over three times as long as for one."""
_COMPILATIONS_OF_A_BLOCK = 16
"""Far more than there can be, of each block: by shape (a few, or any and that of one picture), each with and without
gradients, and for inputs that have gradients and that have none."""
_NOT_OURS = (r".*Function'> should not be instantiated", r"The \.grad attribute of a Tensor that is not a leaf")
"""Warnings of what the compiler does itself while it traces."""
_INSTALL = {
    "cpu": "Install a C++ compiler (on Debian and Ubuntu: apt install g++; on Windows: Visual Studio's Build Tools)",
    "cuda": "Install Triton and a C compiler (on Linux: pip install triton, apt install gcc; on Windows: "
    "pip install triton-windows)",
    "mps": "Install a newer PyTorch",
}


def check_compiler(config: RunConfig) -> None:
    """A compiler must be at hand where blocks are to be compiled; nothing is compiled yet.

    Raises:
        ConfigError: saying what to install.
    """
    if not config.runtime.compile:
        return
    from .device import kind_here

    kind = kind_here()
    if kind == "cuda" and find_spec("triton") is None:
        raise _missing("needs Triton on a GPU, which is not installed", kind)
    if kind == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except (RuntimeError, OSError) as error:
            raise _missing(f"needs a C++ compiler, and none is at hand: {first_line(error)}", kind) from error


def try_compiler(kind: Literal["cpu", "cuda", "mps"]) -> None:
    """Compile a sum of sines, and its derivative: a compiler may be there and not work.

    Raises:
        ConfigError: saying what to install.
    """
    import torch

    x = torch.ones(8, device=kind, requires_grad=True)
    try:
        torch.compile(_sines, fullgraph=True, backend=BACKEND)(x).backward()
    except (RuntimeError, OSError, ImportError) as error:
        raise _missing(f"cannot be done, for the compiler does not work here: {_cause(error)}", kind) from error


def _sines(x: Any) -> Any:
    return x.sin().sum()


def _cause(error: Exception) -> str:
    """PyTorch's own first lines name the stage; what was wrong there is within."""
    return first_line(getattr(error, "inner_exception", error)).rstrip(".")


def _missing(what: str, kind: Literal["cpu", "cuda", "mps"]) -> ConfigError:
    return ConfigError(what, "runtime.compile", f"{_INSTALL[kind]}, or set runtime.compile = false.")


def compile_blocks(unet: Any, shapes: int) -> None:
    """Let the repeated blocks of a UNet be compiled when they are first called, in place: no name changes.

    Of a few `shapes` of batches each has its own compilation; of more there is one for batches of any number, size and
    length of text, but for single pictures, which have one of their own.
    """
    import torch
    from torch._dynamo import config as dynamo

    from .fastlora import make_compilable

    torch.compiler.reset()  # an earlier run of this process may have compiled the same code for other shapes
    most = _COMPILATIONS_OF_A_BLOCK * sum(1 for _ in repeated_blocks(unet))
    dynamo.recompile_limit = max(dynamo.recompile_limit, most)  # above it a block would go uncompiled
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, most)
    dynamo.optimize_ddp = False  # it would cut blocks in pieces, and knows no functions of our own
    for block in repeated_blocks(unet):
        make_compilable(block)
    unet.compile_repeated_blocks(fullgraph=True, dynamic=shapes > _FEW_SHAPES, backend=BACKEND)


def repeated_blocks(unet: Any) -> Iterator[nn.Module]:
    return (module for module in unet.modules() if type(module).__name__ in unet._repeated_blocks)


def batches_of_each_shape(plan: Plan) -> list[list[Shot]]:
    """One batch of each shape that the whole run has, the largest first."""
    found = plan.batch_of_each_shape()

    def order(shape: tuple[int, Size]) -> tuple[int, int, Size]:
        images, (width, height) = shape
        return -images * width * height, images, (width, height)

    return [found[shape] for shape in sorted(found, key=order)]


def uncompiled(is_compiled: bool) -> AbstractContextManager[Any]:
    """Within the block, blocks compute as they did before they were compiled: for pictures and measures now and then,
    in shapes of their own, no compilation would pay."""
    import torch

    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


@contextmanager
def compiler_told(where: str) -> Iterator[None]:
    """Within the block, what the compiler cannot do is told with the way to go on.

    Raises:
        TrainingError: naming the way to go on without it.
    """
    from torch._dynamo.exc import TorchDynamoException

    try:
        with warnings.catch_warnings():
            for about in _NOT_OURS:
                warnings.filterwarnings("ignore", message=about)
            yield
    except TorchDynamoException as error:
        what = f"the blocks of this base cannot be compiled: {_cause(error)}"
        fix = f"Go on without: lorasmith resume {where} --set runtime.compile=false"
        raise TrainingError(what, where, fix, Mending(overrides=("runtime.compile=false",))) from error
