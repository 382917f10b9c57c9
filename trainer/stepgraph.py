"""Optimizer steps as CUDA graphs: recorded once for each form of their inputs, then replayed by one call.

A step of a small batch is some thousands of kernels, and a fast GPU waits for Python to launch them. A graph launches
all of them at once: forward, loss, backward, clipping, AdamW, and the setting back of the gradients. It can do nothing
but the same operations on the same memory. So all that differs between two steps of a form is copied into memory that
stays where it is, learning rates included; weights, gradients and the optimizer's state stay where they are anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from torch.optim import Optimizer

from .errors import first_line
from .inputs import Inputs
from .memory import OUT_OF_MEMORY

MOST_FORMS = 8
"""Each keeps its inputs, and its graph, on the device."""
WARM_UPS = 3
"""Before a recording, as PyTorch's documentation asks: libraries choose their kernels and take their workspaces."""

Body = Callable[[Sequence[Inputs]], Tensor]
"""A whole step on inputs on the device; its figures, (3,). It waits for nothing, and no random number is drawn."""


class Recorder(Protocol):
    """Records what a function without arguments does."""

    def warm_up(self, work: Callable[[], None]) -> None: ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Returns what does the same again; whether recording does it as well is left open."""
        ...


class CudaRecorder:
    """CUDA graphs that share one pool of memory, for never more than one of them runs."""

    def __init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], None]) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            work()
        return graph.replay


class StaticStep:
    """The step of one form of inputs."""

    def __init__(self, inputs: Sequence[Inputs], device: torch.device, body: Body) -> None:
        self.inputs = [one.to(device, copy=True) for one in inputs]
        self.figures = torch.zeros(3, device=device)
        self.body, self.replay = body, self.work

    def work(self) -> None:
        """All that is recorded."""
        self.figures.copy_(self.body(self.inputs))

    def __call__(self, inputs: Sequence[Inputs]) -> Tensor:
        """Take the step on these; its figures, (3,), which the next one overwrites."""
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.take_in(given)
        self.replay()
        return self.figures


class StepGraphs:
    """The recorded steps of a run.

    Args:
        body: must depend on its inputs, the weights, and the optimizer with its rates alone, and change no others.
        optimizer: PyTorch's own AdamW, fused.
        warn: is told what is not recorded, and why.
    """

    def __init__(self, body: Body, optimizer: Optimizer, device: torch.device, warn: Callable[[str], None]) -> None:
        self.body, self.optimizer, self.device, self.warn = body, optimizer, device, warn
        self.recorder: Recorder = CudaRecorder()
        self.steps: dict[Hashable, StaticStep | None] = {}
        # AdamW reads a rate on a GPU in fp32; on a CPU in fp64, as if it were a number
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        self.rates = [torch.zeros((), dtype=dtype, device=device) for _ in optimizer.param_groups]

    def take(self, inputs: Sequence[Inputs], rates: Sequence[float]) -> Tensor | None:
        """Take a step at these learning rates; its figures on the device, (3,), which the next one overwrites. None if
        steps of this form are not recorded; then nothing has changed."""
        form = tuple(one.form for one in inputs)
        if form not in self.steps:
            self.steps[form] = self._recorded(inputs)
        step = self.steps[form]
        if step is None:
            return None
        for mine, rate in zip(self.rates, rates, strict=True):
            mine.fill_(rate)
        return step(inputs)

    def _recorded(self, inputs: Sequence[Inputs]) -> StaticStep | None:
        """A step that was tried and recorded, and has changed nothing."""
        if len(self.steps) >= MOST_FORMS:
            if len(self.steps) == MOST_FORMS:
                what = f"batches of more than {MOST_FORMS} forms (sizes, numbers of images, lengths of captions)"
                self.warn(f"{what}: steps of further ones are no CUDA graphs, and no faster")
            return None
        try:
            with unchanged(self.optimizer, self.device):
                step = StaticStep(inputs, self.device, self._body)
                self.recorder.warm_up(step.work)
                with _with(self.optimizer, "capturable", [True] * len(self.rates)):  # the fused AdamW is, in any case
                    step.replay = self.recorder.record(step.work)
                return step
        except OUT_OF_MEMORY as error:
            failure = first_line(error)
        clear_device_cache(garbage_collection=True)  # no sooner: the error held on to what the failed try had
        self.warn(f"a step is no CUDA graph, and no faster, for its recording failed: {failure}")
        return None

    def _body(self, inputs: Sequence[Inputs]) -> Tensor:
        with _with(self.optimizer, "lr", self.rates):
            return self.body(inputs)


@contextmanager
def unchanged(optimizer: Optimizer, device: torch.device) -> Iterator[None]:
    """Within the block steps are tried: after it weights, gradients, the optimizer's state and random generators are
    what they were, in the same memory. What the optimizer keeps from its first step on is there, and zero."""
    kept = {id(tensor): (tensor, tensor.detach().clone()) for tensor in _changed_by(optimizer)}
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for tensor in _changed_by(optimizer):
                before = kept.get(id(tensor))
                tensor.copy_(before[1]) if before else tensor.zero_()


def _changed_by(optimizer: Optimizer) -> Iterator[Tensor]:
    """All tensors that a step changes."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter
            yield parameter.grad
            yield from (value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor))


@contextmanager
def _with(optimizer: Optimizer, key: str, values: Sequence[Any]) -> Iterator[None]:
    """Within the block the optimizer's groups have other values of a setting."""
    before = [group[key] for group in optimizer.param_groups]

    def put(values: Sequence[Any]) -> None:
        for group, value in zip(optimizer.param_groups, values, strict=True):
            group[key] = value

    put(values)
    try:
        yield
    finally:
        put(before)
