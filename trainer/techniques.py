"""What makes a run fast and lean: which of it is on for this run and device, and why, or why it is off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .adapter import tuner_layers
from .compiled import REPAYS_AFTER
from .config import RunConfig
from .device import kind_here
from .fastlora import speed_up
from .flat import can_be_flat
from .idle import needs_whole_weights
from .models import Base
from .precision import MixedPrecision, mixed_precision
from .shelf import LEAST

_ON_THE_DISK = f"on the disk while the run trains, if together they take {LEAST >> 20} MiB or more"


@dataclass(frozen=True)
class Technique:
    """Something that saves time or memory, or is meant to."""

    name: str
    is_on: bool
    why: str

    def facts(self) -> dict[str, Any]:
        return {"name": self.name, "on": self.is_on, "why": self.why}


def fast_share(base: Base) -> float:
    """The share of the adapter's layers that can compute the fast way, tried on a base that is not needed any more."""
    components = base.components.values()
    layers = sum(1 for component in components for _ in tuner_layers(component))
    return sum(map(speed_up, components)) / layers if layers else 0.0


def techniques_here(config: RunConfig, fast: float) -> Iterator[Technique]:
    """Those of a run on this computer."""
    return techniques(config, kind_here() != "cpu", mixed_precision(config.runtime.precision), fast)


def techniques(config: RunConfig, on_gpu: bool, precision: MixedPrecision, fast: float) -> Iterator[Technique]:
    """All of them; `fast` is the share of the adapter's layers that can compute the fast way."""
    yield _fast_lora(config, fast)
    yield _no_autocast(config, precision, fast)
    yield _flat_optimizer(config)
    yield _lean_activations(config)
    yield _attention(config, on_gpu)
    yield _cpu_kernels(config, on_gpu)
    yield _channels_last(config, on_gpu)
    yield _compile(config, fast)
    yield _base_weights(config)
    yield _cached_images()
    yield _cached_captions(config)
    yield _resting_encoders(config, on_gpu)
    yield _gradient_checkpointing(config)
    yield _steps_ahead(on_gpu, precision)
    yield _cuda_graphs(config, on_gpu)


def _fast_lora(config: RunConfig, fast: float) -> Technique:
    name, adapter = "fast_lora", config.adapter
    if adapter.kind != "lora":
        return Technique(name, False, f"layers of kind {adapter.kind} compute as PEFT has them")
    if not config.runtime.fast_lora:
        return Technique(name, False, "runtime.fast_lora is false")
    if not fast:
        why = "adapter.dropout is set" if adapter.dropout else "no layer is a plain one"
        return Technique(name, False, f"{why}, so that layers compute as PEFT has them")
    which = "each LoRA layer is" if fast == 1 else f"{fast:.0%} of the LoRA layers, all but convolutions, are"
    return Technique(name, True, f"{which} one function that keeps its input and a projection of it, and no more")


def _no_autocast(config: RunConfig, precision: MixedPrecision, fast: float) -> Technique:
    name, runtime = "no autocast", config.runtime
    if precision == "no":
        return Technique(name, True, "all is computed in fp32, and nothing is cast")
    reasons = {
        "runtime.autocast is true": runtime.autocast,
        "fp16 would overflow without it": precision == "fp16",
        "a whole model is kept in fp32 and has to be cast": config.adapter.kind == "full",
        "the embeddings of new tokens are kept in fp32": config.adapter.new_tokens > 0,
        "not all layers of the adapter compute the fast way": not runtime.fast_lora or fast < 1,
    }
    for reason, holds in reasons.items():
        if holds:
            return Technique(name, False, reason)
    return Technique(name, True, "the base computes in bf16 as it is, without casts back and forth between layers")


def _flat_optimizer(config: RunConfig) -> Technique:
    name = "flat_optimizer"
    if can_be_flat(config):
        return Technique(name, True, "what is trained lies side by side, so that AdamW's step is one operation")
    reasons = {
        "runtime.flat_optimizer is false": not config.runtime.flat_optimizer,
        f"{config.optimizer.kind} may look at single matrices": config.optimizer.kind != "adamw",
        "a whole model has few and large matrices, and no room for another copy": config.adapter.kind == "full",
    }
    left_out = "adapter.module_dropout leaves out single matrices"
    return Technique(name, False, next((reason for reason, holds in reasons.items() if holds), left_out))


def _lean_activations(config: RunConfig) -> Technique:
    name = "lean_activations"
    if not config.runtime.lean_activations:
        return Technique(name, False, "runtime.lean_activations is false")
    frozen = [] if config.adapter.kind == "full" else ["frozen convolutions keep no input", "norms keep theirs alone"]
    gated = [] if config.runtime.compile else ["gated units keep theirs alone"]
    if not frozen + gated:
        return Technique(name, False, "a whole model is trained, and the compiler decides what gated units keep")
    return Technique(name, True, f"{', '.join(frozen + gated)}: the backward pass makes the rest again")


def _attention(config: RunConfig, on_gpu: bool) -> Technique:
    name, asked = "attention by shape", config.runtime.attention
    if asked == "sdpa":
        return Technique(name, False, "runtime.attention is sdpa: PyTorch chooses")
    if asked != "auto":
        return Technique(name, False, f"runtime.attention is {asked}, which is taken for all shapes")
    if not on_gpu:
        return Technique(name, False, "on a CPU cpu_kernels has a rule that was measured")
    if kind_here() == "mps":
        return Technique(name, False, "kernels are tried on NVIDIA GPUs alone")
    return Technique(name, True, "a probe before the first step finds the fastest kernel for each shape")


def _cpu_kernels(config: RunConfig, on_gpu: bool) -> Technique:
    name, runtime = "cpu_kernels", config.runtime
    if on_gpu:
        return Technique(name, False, "a GPU computes")
    if not runtime.cpu_kernels:
        return Technique(name, False, "runtime.cpu_kernels is false")
    if runtime.compile:
        return Technique(
            name, True, "convolutions over few pixels are products of matrices; all else is left to the compiler"
        )
    return Technique(name, True, "small convolutions and short attention are products of matrices, faster on a CPU")


def _channels_last(config: RunConfig, on_gpu: bool) -> Technique:
    if config.runtime.channels_last:
        return Technique("channels_last", True, "runtime.channels_last is true")
    pays = "it pays on some cards and costs on others: measure it with lorasmith bench"
    return Technique("channels_last", False, pays if on_gpu else "on a CPU cpu_kernels gains more")


def _compile(config: RunConfig, fast: float) -> Technique:
    name, pays = "compile", f"a minute or more before the first step, which pays from about {REPAYS_AFTER} steps on"
    if not config.runtime.compile:
        return Technique(name, False, f"it would take {pays}: measure it with lorasmith bench")
    within = ", fast LoRA layers within them," if config.runtime.fast_lora and fast else ""
    return Technique(name, True, f"the UNet's repeated blocks{within} are compiled: {pays}")


def _base_weights(config: RunConfig) -> Technique:
    name, kind, bits = "base_weights", config.runtime.base_weights, {"int8": 8, "nf4": 4}
    if kind == "full":
        why = needs_whole_weights(config) or "it costs time and digits; lorasmith plan --vram says when memory needs it"
        return Technique(name, False, why)
    why = f"linear layers of what is at work keep {bits[kind]} bits of a weight, and make it whole for each product"
    return Technique(name, True, why)


def _cached_images() -> Technique:
    why = "the VAE works once for each picture: mean and deviation are kept, and each step draws a fresh sample"
    return Technique("cached images", True, why)


def _cached_captions(config: RunConfig) -> Technique:
    name = "cached captions"
    if config.adapter.trains_text:
        trained = "text encoders are trained" if config.adapter.text_encoder else "new tokens are trained"
        return Technique(name, False, f"{trained}, so that each step reads captions anew")
    return Technique(name, True, "text encoders are frozen and work once for each caption")


def _resting_encoders(config: RunConfig, on_gpu: bool) -> Technique:
    who = "the VAE waits" if config.adapter.trains_text else "VAE and text encoders wait"
    where = "in the computer's memory, and each comes to the GPU for its own work alone" if on_gpu else _ON_THE_DISK
    return Technique("resting encoders", True, f"{who} {where}")


def _gradient_checkpointing(config: RunConfig) -> Technique:
    name, blocks = "gradient_checkpointing", config.runtime.checkpointed_blocks
    if config.runtime.gradient_checkpointing:
        whose = f"of the UNet's {blocks} largest blocks " if blocks else ""
        why = f"activations {whose}are computed again in the backward pass: less memory, more time"
        return Technique(name, True, why)
    return Technique(name, False, "it costs a third more time; lorasmith plan --vram says when memory needs it")


def _steps_ahead(on_gpu: bool, precision: MixedPrecision) -> Technique:
    name = "steps ahead"
    if not on_gpu:
        return Technique(name, False, "a CPU is never waited for")
    if precision == "fp16":
        return Technique(name, False, "fp16's gradient scaler looks at each step")
    return Technique(name, True, "one process waits for no number of a GPU: up to ten steps are told together")


def _cuda_graphs(config: RunConfig, on_gpu: bool) -> Technique:
    name = "cuda_graphs"
    if config.runtime.cuda_graphs:
        return Technique(name, True, "a step is recorded once for each form of batch, and then launched by one call")
    why = "runtime.cuda_graphs is false, for it has not been tried on a GPU yet"
    return Technique(name, False, why if on_gpu else "without a GPU there are none")
