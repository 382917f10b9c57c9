"""The training loop, at three zoom levels: `train`, `train_step`, `loss`.

It turns a `Plan` into trained weights on a live base, and tells what happens as events. It knows no user interface and
no export format. What is random in a step depends on (seed, step) alone, so a resumed run equals an unbroken one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, astuple, replace
from datetime import timedelta
from functools import partial
from itertools import islice
from typing import Any, Literal, TypeVar, cast

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
)
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ..datasets.buckets import Shot
from ..datasets.cache import GoneError, LatentCache, MaskCache, TextCache
from ..datasets.dataset import Example, Showing, showing
from . import attention
from .adapter import ADAPTER, adapter_state, let_drop, load_adapter_state, strength, tuner_layers
from .arrears import Arrears, Taken, steps_ahead
from .attention import Chosen, Kernels, Shape, attend_by, choose, kernel_named, place_of, shapes_of
from .averages import Averages
from .checkpoint import Checkpoint, TrainState, prune_checkpoints, save_checkpoint
from .choosing.choice import Scores
from .compiled import batches_of_each_shape, compile_blocks, compiler_told, try_compiler, uncompiled
from .denoiser import Denoiser
from .device import kind_here
from .errors import Mending, TrainingError
from .events import AttentionChosen, Checkpointed, Event, Phase, PlanMade, Sampled, Step, Warned
from .fewbits import keep_in_few_bits, kinds_of
from .fitting import parameter_groups, parts, put_on, read_start
from .flat import Flat, can_be_flat
from .idle import RATES
from .initial import look_at_data
from .inputs import Inputs
from .jobs import Request, RunFolder
from .memory import OUT_OF_MEMORY, full_memory_is, is_full, memory_of, parts_of, until_it_fits
from .models import Conditions, Encoder, Tokens, load_base, most_chunks
from .noise import Draws, add_noise, derive_seed, draw_batch, image_loss, loss_weight, scheduled_huber_c, target_of
from .optim import effective_rates, load_optimizer, make_optimizer, schedule_factor, set_learning_rates
from .plan import Plan, prompts_from
from .precision import DTYPES, base_dtype, mixed_precision
from .preferences.dpo import Reference, implicit_reward, margins, preference_loss
from .preferences.start import read_start_of
from .sample import Drawing, draw, drawn_like, save_previews
from .scoring import Scoring
from .shelf import Resting
from .speed import compute_fast, recompute_activations
from .stepgraph import StepGraphs
from .story import DRAWING, SAVING, SCORING, VALIDATING
from .validation import Validation

Emit = Callable[[Event], None]
Outcome = Literal["finished", "stopped"]
Measured = TypeVar("Measured")

_LONGEST_WAIT = timedelta(hours=6)
"""For other processes, which encode a large set of images or draw."""
_SPLIT = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
_MOST_SKIPPED = 20
_LOOKED_AT = 32
"""Batches from which an adapter's first directions are taken."""


class Trainer:
    """One run: its base, what is trained of it, optimizer and state."""

    def __init__(self, plan: Plan, run: RunFolder, emit: Emit, checkpoint: Checkpoint | None = None) -> None:
        self.plan, self.config, self.run, self.tell = plan, plan.config, run, emit
        precision = mixed_precision(self.config.runtime.precision)
        handlers: list[Any] = [InitProcessGroupKwargs(timeout=_LONGEST_WAIT)]
        if self.config.adapter.module_dropout:  # an adapter that is left out in a step gets no gradient
            handlers.append(DistributedDataParallelKwargs(find_unused_parameters=True))
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else several processes on CPUs would not find each other
            mixed_precision=precision,
            kwargs_handlers=handlers,
        )
        if self.accelerator.distributed_type in _SPLIT:
            raise TrainingError(
                "a model that is split over processes cannot be saved or drawn with by one of them",
                "accelerate",
                "Use configs/accelerate/several-gpus.yaml.",
            )
        if self.accelerator.num_processes != plan.processes:
            raise TrainingError(
                f"{plan.processes} processes were started, but {self.accelerator.num_processes} found each other",
                "accelerate",
                "Start them with: torchrun --nproc_per_node N -m lorasmith.trainer.cli train FILE",
            )
        if self.config.runtime.compile:
            try_compiler(kind_here())
        self.skipped = 0
        self.arrears = Arrears(self.accelerator.device, steps_ahead(self.accelerator))
        self.emit(Phase("loading the base"))
        vae_dtype = DTYPES[mixed_precision(self.config.runtime.vae_precision)]
        self.dtype = base_dtype(self.config, precision)
        self.base = load_base(plan.base, self.dtype, vae_dtype=vae_dtype)
        self.base.resting = self._resting()
        self.alphas_cumprod: Tensor = self.base.scheduler.alphas_cumprod.float()
        self._fill_caches()
        self._take_up()
        self._put_on(afresh=checkpoint is None)
        self._prepare(checkpoint)
        self._choose_kernels()
        self.drawing = Drawing.of(self.config.sample, plan.base.resolution)
        self.validation = Validation.of(plan, self.latents, self.base.scaling_factor, len(self.alphas_cumprod))
        self.scoring = Scoring.of(plan, self.base.vae, self.drawing)

    # -- level 1: the run ---------------------------------------------------------------------------------------------

    def train(self, should_stop: Callable[[], bool]) -> Outcome:
        """Train until the budget is spent or someone asks to stop; either way the state is saved.

        Raises:
            TrainingError: if the loss is not finite; the last checkpoint stands.
        """
        told = compiler_told(str(self.run.path)) if self.to_compile else nullcontext()
        with self._encoders_resting(), self._all_told(), told:
            return self._train(should_stop)

    def _train(self, should_stop: Callable[[], bool]) -> Outcome:
        if self._agree(self.accelerator.is_main_process and not self._base_was_drawn()):
            self._sample(untouched=True)
        if self.state.step == 0:
            self._validate()
        if self._has_waited_enough():  # and was killed before it could say so
            return "finished"
        if self._agree(should_stop()):
            return self._stop()

        self._compile()
        steps = islice(self.plan.order.steps(self.plan.batches_per_step), self.state.step, self.plan.steps)
        for batches in steps:
            self.train_step(batches)

            # once in a while, or because someone asks: measure, preview, then save
            last, asked = self.state.step == self.plan.steps, self._requests()
            if last or is_due(self.state.step, self.config.validation.every):
                self._validate()
                last = last or self._has_waited_enough()
            if last or is_due(self.state.step, self.config.sample.every):
                self._sample()
            elif asked["sample"]:
                self._sample_as_asked()
            if last or is_due(self.state.step, self.config.save.every) or asked["save"] or self._is_best():
                self._save()

            # someone wants to stop: keep the work
            if not last and self._agree(should_stop()):
                return self._stop()
            if last:
                break
        return "finished"

    def _stop(self) -> Outcome:
        if self.saved_step != self.state.step:
            self._save()
        return "stopped"

    # -- level 2: one optimizer step ----------------------------------------------------------------------------------

    def train_step(self, batches: list[list[Shot]]) -> None:
        """One change of the weights from all images of `batches`, each image counting the same. What became of it is
        told at once, or, where that would be to wait for a GPU, some steps later.

        Raises:
            TrainingError: if a number of it, or of a step before it, is not finite; the last checkpoint stands.
        """
        started = time.perf_counter()
        rates = self._set_rates()
        figures = self._replayed(self.graphs, batches, rates) if self.graphs else None
        if figures is None:
            figures = self._stepped(batches)
        self._count(batches)
        told = effective_rates(self.optimizer)  # of an optimizer that finds its own, those it found
        self.arrears.add(Taken(self.state.step, self.state.images, batches, told, started), figures)
        if self.arrears.are_due:
            self._tell_steps()

    def _stepped(self, batches: list[list[Shot]]) -> Tensor:
        """Take a step; its figures, as `Figures` has them, (3,)."""
        loss = self._gradients(batches)
        norm = self._clip()
        self._change_weights()
        return self._figures(loss, norm)

    def _replayed(self, graphs: StepGraphs, batches: list[list[Shot]], rates: list[float]) -> Tensor | None:
        """Take the same step as one CUDA graph; its figures, (3,). None, and nothing is changed, if it is none."""
        inputs = [self._read(shots, first) for first, shots in parts_of(batches, self._at_once(batches))]
        figures = graphs.take(inputs, rates)
        if figures is not None:
            self.averages.update()
        return figures

    def _step_on(self, inputs: Sequence[Inputs]) -> Tensor:
        """What a graph records: a step on the parts of its batches. Its figures, as `Figures` has them, (3,)."""
        losses = [partial(self._error_of, self.denoiser, part) for part in inputs]
        loss = self._added_up(losses, len(inputs), sum(part.images for part in inputs))
        norm = self._clip()
        self.optimizer.step()
        self._zero_grad()
        return self._figures(loss, norm)

    def _figures(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Of a step that was taken, on the device, where nobody waits for them: (3,)."""
        return torch.stack([loss, norm, get_total_norm(self.optimized)])

    def _set_rates(self) -> list[float]:
        """Set the learning rates of the next step."""
        factor = schedule_factor(self.config.optimizer, self.state.step, self.plan.steps)
        return set_learning_rates(self.optimizer, self.base_rates, factor)

    def _clip(self) -> Tensor:
        """Limit the norm of all gradients; returns what it was."""
        most = self.config.optimizer.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.optimized, most)
        return torch.zeros((), device=self.accelerator.device) if norm is None else norm

    def _count(self, batches: list[list[Shot]]) -> None:
        self.state.step += 1
        self.state.images += sum(map(len, batches))

    def _gradients(self, batches: list[list[Shot]]) -> Tensor:
        """Make the gradients of all images of a step; returns their mean loss. Where the memory is full, batches are
        halved from then on."""
        if self.accelerator.num_processes > 1:  # one that halved alone would be waited for by the others
            return self._accumulated(batches, max(map(len, batches)))
        at_once = self._at_once(batches)
        loss, fitting = until_it_fits(partial(self._accumulated, batches), at_once, self._zero_grad)
        if fitting < at_once:
            self.state.at_once = fitting
            self.emit(Warned(self._told_of_halves(fitting)))
        return loss

    def _at_once(self, batches: list[list[Shot]]) -> int:
        """How many images of a batch are taken at a time, as far as is known."""
        largest = max(map(len, batches))
        return min(self.state.at_once or largest, largest)

    def _accumulated(self, batches: list[list[Shot]], at_once: int) -> Tensor:
        """Add up the gradients of all images of a step, of so many at a time; returns their mean loss."""
        parts = parts_of(batches, at_once)
        mine = parts[self.accelerator.process_index :: self.accelerator.num_processes]
        losses = [partial(self._loss, shots, first) for first, shots in mine]
        return self._added_up(losses, len(parts), sum(map(len, batches)))

    def _added_up(self, mine: Sequence[Callable[[], Tensor]], parts: int, images: int) -> Tensor:
        """Add up the gradients of the losses of this process's parts; returns the mean loss of all images. `parts` and
        `images` are those of all processes."""
        accelerator = self.accelerator
        accelerator.step, accelerator.gradient_accumulation_steps = 0, len(mine)  # steps differ in their parts
        total = torch.zeros((), device=accelerator.device)
        for losses_of in mine:
            with accelerator.accumulate(self.denoiser):
                losses = losses_of()
                # accelerate takes the mean over accumulated parts and over processes: undo it, and divide by images
                accelerator.backward(losses.sum() * parts / images)
                total = total + losses.detach().sum()
        return self._sum(total) / images

    def _change_weights(self) -> None:
        """Let the optimizer take its step. Where the memory is full here, the step is not tried again: some weights may
        have changed already."""
        with full_memory_is(self._optimizer_does_not_fit()):
            self.optimizer.step()
        self._zero_grad()
        self._watch_skipped_steps()
        if not self.accelerator.optimizer_step_was_skipped:
            self.averages.update()

    def _zero_grad(self) -> None:
        self.flat.zero_grad() if self.flat else self.denoiser.zero_grad()

    def _loss(self, shots: Sequence[Shot], first: int) -> Tensor:
        """The loss of each image of a batch of this step."""
        return self._from_caches(lambda: self.loss(shots, self.state.step, first), self._examples_of(shots))

    def _read(self, shots: Sequence[Shot], first: int) -> Inputs:
        """What the loss of a batch of this step is made of, in the computer's memory."""
        places = range(first, first + len(shots))
        drawn = partial(self._drawn, shots, self.state.step, places)
        return self._from_caches(lambda: self._inputs(*drawn()), self._examples_of(shots))

    def _examples_of(self, shots: Sequence[Shot]) -> list[Example]:
        return [self.plan.examples[shot.image] for shot in self.plan.taken_by(shots)]

    def _from_caches(self, work: Callable[[], Measured], examples: Sequence[Example]) -> Measured:
        """What is made of some images; what the caches hold of these no more is made anew."""
        try:
            return work()
        except GoneError as gone:
            self._encode(examples)
            self.emit(Warned(f"{gone.problems[0].where}: {gone.problems[0].what}; made anew"))
        return work()

    # -- level 3: the loss of one batch -------------------------------------------------------------------------------

    def loss(self, shots: Sequence[Shot], step: int, first: int) -> Tensor:
        """The weighted loss of each image of a batch, (batch,); `first` images of the step stand before it."""
        rated, places = self.plan.rated, range(first, first + len(shots))
        if rated is None:
            return self._errors(*self._drawn(shots, step, places), step, first)
        rows, units = rated.with_the_worse(shots)
        seen = self._drawn(rows, step, [places[unit] for unit in units])
        assert self.reference is not None
        with self.reference.standing_in():
            before = self._errors(*seen, step, first)
        reward = implicit_reward(self._errors(*seen, step, first), before, self.config.preference.beta)
        return preference_loss(margins(reward, rated.signs(shots), units))

    def _errors(self, shown: list[Showing], drawn: Draws, step: int, first: int) -> Tensor:
        """The weighted error of each image, (batch,)."""
        if self.config.adapter.drops:  # from torch's global generators, which must not depend on what came before
            torch.manual_seed(derive_seed(self.config.seed, step, first, 1))  # no image draws from this seed
        return self._weighted(self.denoiser, shown, drawn)

    def _weighted(self, denoiser: nn.Module, shown: list[Showing], drawn: Draws) -> Tensor:
        """The weighted error of each image, (batch,), of all processes or of this one alone."""
        return self._error_of(denoiser, self._inputs(shown, drawn).to(self.accelerator.device))

    def _error_of(self, denoiser: nn.Module, inputs: Inputs) -> Tensor:
        predicted, loss = denoiser(*inputs.seen), self.config.objective.loss
        return inputs.weight * image_loss(loss, predicted, inputs.target, inputs.huber_c, inputs.mask)

    def _inputs(self, shown: list[Showing], drawn: Draws) -> Inputs:
        """All that the error of each image is made of, in the computer's memory."""
        prediction, objective, alphas_cumprod = self.plan.base.prediction, self.config.objective, self.alphas_cumprod
        noisy = add_noise(drawn.x0, drawn.shown_eps, drawn.t, alphas_cumprod)
        weight = loss_weight(objective.weighting, prediction, drawn.t, alphas_cumprod, objective.min_snr_gamma)
        return Inputs(
            noisy=noisy.to(self.dtype),
            t=drawn.t,
            text=self._text(drop_captions(shown, drawn.caption)),
            sizes=torch.tensor([one.view.sizes for one in shown], dtype=torch.float32),
            target=target_of(prediction, drawn.x0, drawn.eps, drawn.t, alphas_cumprod),
            weight=weight * torch.tensor([one.example.source.loss_weight for one in shown]),
            huber_c=scheduled_huber_c(objective.huber_schedule, objective.huber_c, drawn.t, alphas_cumprod),
            mask=self.masks.read(shown, drawn.x0.shape),
        )

    def _drawn(self, shots: Sequence[Shot], step: int, places: Sequence[int]) -> tuple[list[Showing], Draws]:
        """The images of a batch, and all that is random about them, from the place of each in its step."""
        shown = [showing(self.plan.examples, shot) for shot in shots]
        seeds = [derive_seed(self.config.seed, step, place) for place in places]
        mean, std = self.latents.read(shown)
        objective, total = self.config.objective, len(self.alphas_cumprod)
        return shown, draw_batch(mean, std, self.base.scaling_factor, objective, total, seeds)

    # -- preparation --------------------------------------------------------------------------------------------------

    def _fill_caches(self) -> None:
        """Encode images, and captions if the text encoders stay frozen; one process does it, the others wait."""
        self.latents = LatentCache(self.plan.cache, self.base.vae_fingerprint)
        self.masks = MaskCache(self.plan.cache, self.base.info.vae_factor)
        self.text = TextCache(self.plan.cache, self.base.text_fingerprint)
        with self.accelerator.main_process_first():
            self._encode([*self.plan.examples, *self.plan.held_out])

    def _encode(self, examples: Sequence[Example]) -> None:
        """Make what the caches lack of some images."""
        self.latents.fill(self.base, examples, self._progress("encoding images"))
        self.masks.fill(examples, self._progress("reading masks"))
        if not self.config.adapter.trains_text:
            captions = ["", *(caption for example in examples for caption in example.captions)]
            self.text.fill(self.base, captions, self._progress("encoding captions"))

    def _resting(self) -> dict[Encoder, Resting]:
        """The VAE, and text encoders that stay frozen: while one works on a GPU, the other is not there."""
        modules: dict[Encoder, list[nn.Module]] = {"VAE": [self.base.vae]}
        if not self.config.adapter.trains_text:
            modules["text encoders"] = list(self.base.text_encoders.values())
        where = self.accelerator.device, self.plan.cache, self._warn
        return {name: Resting(name, those, *where) for name, those in modules.items()}

    def _take_up(self) -> None:
        """What a step computes with goes where it will compute, and all else to rest."""
        for one in self.base.resting.values():
            one.let_rest()
        device, config = self.accelerator.device, self.config
        keep_in_few_bits(self.base, kinds_of(config), device)
        for name, module in self.base.components.items():
            if name == "unet" or config.adapter.trains_text:
                module.to(device)

    @contextmanager
    def _encoders_resting(self) -> Iterator[None]:
        """Within the block what is not trained rests; after it all of the base is ready."""
        with ExitStack() as stack:
            for one in self.base.resting.values():
                stack.enter_context(one.resting())
            yield

    def _progress(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self.emit(Phase(name, done, total))

    def _put_on(self, afresh: bool) -> None:
        """Put on what is trained; what a checkpoint goes on from need not be looked for again."""
        config, base = self.config, self.base
        start = read_start(config.adapter, base) if afresh else {}
        put_on(base, config.adapter, config.seed, config.block, config.trigger, start)
        self.parts = parts(base, config)
        if config.preference.start:
            load_adapter_state(base, read_start_of(config))
        elif afresh and config.adapter.init == "eva":
            self._look_at_data()

    @torch.no_grad()
    def _look_at_data(self) -> None:
        components = {"unet": self.base.unet} | {
            f"text_encoders.{number}": encoder for number, encoder in enumerate(self.base.text_encoders.values())
        }
        layers = {
            f"{component}.{name}": layer
            for component, module in components.items()
            for name, layer in tuner_layers(module)
        }
        shots = islice(self.plan.order.steps(1), _LOOKED_AT)
        read = [self._inputs(*self._drawn(batch, step, range(len(batch)))) for step, [batch] in enumerate(shots)]
        batches = [inputs.to(self.accelerator.device).seen for inputs in read]
        denoiser = Denoiser(self.base, self.config.adapter.trains_text)
        progress = self._progress("looking for the directions of the data")
        others = look_at_data(layers, batches, lambda batch: denoiser(*batch), ADAPTER, progress)
        if others:
            what = f"{len(others)} of {len(layers)} layers start as by default: EVA knows no directions of convolutions"
            self.emit(Warned(f"{what}, and of layers that read less in a batch than their rank."))

    def _prepare(self, checkpoint: Checkpoint | None) -> None:
        config, base = self.config, self.base
        self.kernels = self._attend_by_kernels()
        recompute_activations(base, config)
        let_drop(base, config.adapter.drops)
        denoiser = Denoiser(base, config.adapter.trains_text, self._speed_up())
        self.denoiser = self.accelerator.prepare(denoiser)  # may put weights elsewhere: they are laid out next

        groups = parameter_groups(base, config)
        self.fused = self.accelerator.scaler is None
        self.base_rates: list[float] = [group["lr"] for group in groups]
        self.trained: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
        self.flat = Flat(groups) if can_be_flat(config) else None
        self.optimized = [parameter for group in groups for parameter in group["params"]]
        optimizer = make_optimizer(config.optimizer, groups, self.fused)
        self.optimizer = self.accelerator.prepare(optimizer)
        self.averages = Averages(self.trained, optimizer, config.optimizer.ema_decay)
        self.reference = Reference(self.optimized) if config.preference.start else None
        self.saved_step = checkpoint.state.step if checkpoint else -1
        origin = self.plan.origin
        self.state = replace(
            checkpoint.state if checkpoint else TrainState(),
            steps=self.plan.steps,
            config=origin.config_hash,
            dataset=origin.dataset_hash,
            base=origin.base_hash,
        )
        if checkpoint:
            self._restore(checkpoint)
            if checkpoint.state.steps != self.plan.steps:
                self.state.not_lower = 0  # who wants more of a run that has ended early gets it
        self.graphs = None
        if config.runtime.cuda_graphs:
            self.graphs = StepGraphs(self._step_on, optimizer, self.accelerator.device, self._warn)
        facts = self.plan.facts() | {"dataset": self.plan.dataset_facts()}
        every = {
            "sample": config.sample.every,
            "save": config.save.every,
            "validation": config.validation.every if config.validation.by == "loss" else 0,
            "scores": config.validation.every if config.validation.by == "scores" else 0,
        }
        self.emit(PlanMade(self.plan.steps, self.plan.images, facts, [asdict(part) for part in self.parts], every))

    def _speed_up(self) -> bool:
        """Let the base and its plain LoRA layers compute the fast way; returns whether they still need autocast."""
        config, base = self.config, self.base
        if config.runtime.autocast and self.accelerator.mixed_precision == "no":
            self.emit(Warned("runtime.autocast has no effect: here all is computed in fp32, and nothing is cast"))
        needs_autocast = compute_fast(base, config, self.dtype, self.plan.latents_at_once, base.device.type == "cpu")
        self.to_compile = batches_of_each_shape(self.plan) if config.runtime.compile else []
        if self.to_compile:
            compile_blocks(base.unet, len(self.to_compile))
        return needs_autocast

    def _compile(self) -> None:
        """Have what is to be compiled compiled for each shape of the run, in an order that a resume does not change.
        What does not fit into memory is left to the steps, which halve their batches."""
        for number, shots in enumerate(self.to_compile if self.state.step < self.plan.steps else []):
            self.emit(Phase("compiling", number, len(self.to_compile)))
            _if_it_fits(lambda shots=shots: self._loss(shots, 0).sum().backward())
            self._zero_grad()

    def _attend_by_kernels(self) -> Kernels | None:
        """Let attention be computed by the kernel that was asked for, or by those that a probe will find; None if it
        is computed as PyTorch, or `cpu_kernels`, will have it."""
        asked, device = self.config.runtime.attention, self.accelerator.device
        if asked == "sdpa" or (asked == "auto" and device.type not in attention.PROBED_ON):
            return None
        kernels = Kernels() if asked == "auto" else Kernels(kernel_named(asked).attend)
        attend_by(self.base.unet, kernels)
        return kernels

    def _choose_kernels(self) -> None:
        """Find the fastest kernel of attention for each shape of the run's batches. A run that goes on takes what it
        took before, so that it computes as if it had not been interrupted."""
        if self.kernels is None or self.config.runtime.attention != "auto":
            return
        device, state = self.accelerator.device, self.state
        where = place_of(device)
        known = state.attention if state.attention_on == where else {}
        found: list[Chosen] = []
        if self.accelerator.is_main_process:
            shapes, tell = self._shapes_of_attention(), self._progress("probing attention")
            for number, one in enumerate(choose(shapes, known, device)):
                tell(number + 1, len(shapes))
                found.append(one)
        [found] = broadcast_object_list([found])
        self.kernels.take(found)
        state.attention, state.attention_on = known | {one.shape.words: one.kernel for one in found}, where
        self.emit(AttentionChosen(where, [one.facts() for one in found]))

    def _shapes_of_attention(self) -> list[Shape]:
        base, dtype = self.base, DTYPES[mixed_precision(self.config.runtime.precision)]
        chunks = most_chunks(base, self.plan.captions_read())
        texts = [base.tokenizers[0].model_max_length * count for count in range(1, chunks + 1)]
        return shapes_of(base.unet, self.plan.batch_of_each_shape(), texts, dtype)

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Put back what a checkpoint holds. Whether the run may go on from it has been decided before."""
        config, saved = self.config.optimizer, checkpoint.optimizer
        load_adapter_state(self.base, checkpoint.trained or checkpoint.adapter)
        for group in saved["optimizer"]["param_groups"]:
            if group.get("fused") is not None:  # AdamW alone is made with it
                group["fused"] = self.fused  # runtime.precision may have changed
        before = checkpoint.origin.settings.get("optimizer", {})
        state = self.flat.side_by_side(saved["optimizer"]) if self.flat else saved["optimizer"]
        if not (state and load_optimizer(self.optimizer, state, config, before)):
            self.emit(Warned(f"{config.kind} starts anew: what was saved is of another optimizer, or of other groups"))
        if self.averages:
            self.averages.load_state_dict(saved.get("averages", {}))
        if self.accelerator.scaler is not None and "scaler" in saved:
            self.accelerator.scaler.load_state_dict(saved["scaler"])

    # -- details ------------------------------------------------------------------------------------------------------

    def _text(self, captions: list[str]) -> Tokens | Conditions:
        """Token ids for text encoders that are trained, cached conditions for frozen ones."""
        if self.config.adapter.trains_text:
            return self.base.tokenize(captions)
        return self.text.read(captions).to(self.dtype)

    def _not_finite(self, what: str, value: float, batches: list[list[Shot]]) -> TrainingError:
        files = ", ".join(self.plan.examples[shot.image].name for batch in batches for shot in batch)
        return TrainingError(
            f"the {what} of step {self.state.step + 1} is {value}; its images: {files}",
            str(self.run.path),
            "The last checkpoint stands. Start a new run with a lower optimizer.lr, or with bf16 or fp32.",
            Mending(anew=tuple(f"optimizer.{key}={rate / 3:.1g}" for key, rate in self._rates().items() if rate)),
        )

    def _rates(self) -> dict[str, float]:
        return {key: getattr(self.config.optimizer, key) for key in RATES.values()}

    def _told_of_halves(self, at_once: int) -> str:
        whose, step, batch = memory_of(self.accelerator.device), self.state.step + 1, self.config.budget.batch
        images = "1 image" if at_once == 1 else f"{at_once} images"
        but = " but for the adapter's dropout, which is drawn for each part" if self.config.adapter.drops else ""
        told = f"{whose} was full at step {step}; from now on batches of {batch} are taken {images} at a time"
        return f"{told}, with the same result{but}"

    def _optimizer_does_not_fit(self) -> TrainingError:
        return TrainingError(
            f"{memory_of(self.accelerator.device)} does not hold what {self.config.optimizer.kind} needs for its step",
            str(self.run.path),
            "The last checkpoint stands. Start a new run that trains less (adapter.rank, adapter.train_only), or with "
            "an optimizer that keeps less, such as adamw8bit or lion.",
        )

    def _watch_skipped_steps(self) -> None:
        """fp16's gradient scaler skips steps whose gradients overflow; a few at the start are usual, many are not."""
        self.skipped = self.skipped + 1 if self.accelerator.optimizer_step_was_skipped else 0
        if self.skipped == _MOST_SKIPPED:
            raise TrainingError(
                f"the gradients of the last {_MOST_SKIPPED} steps overflowed fp16, so nothing was learned",
                str(self.run.path),
                'The last checkpoint stands. Resume with runtime.precision = "bf16" or "fp32".',
                Mending(overrides=("runtime.precision=fp32",)),
            )

    def _report(self, loss: float, norm: float, rates: list[float], seconds: float) -> None:
        """Tell of the step at which the state stands."""
        names = [group["name"] for group in self.optimizer.param_groups]
        self.tell(
            Step(
                step=self.state.step,
                images=self.state.images,
                loss=round(loss, 6),
                grad_norm=round(norm, 6),
                lr=dict(zip(names, rates, strict=True)),
                seconds=round(seconds, 4),
                memory_mib=round(memory_in_use(self.accelerator.device) / 2**20, 1),
            )
        )

    def emit(self, event: Event) -> None:
        """Tell what happens, after all steps that were taken before it. As drawing, measuring and saving are told when
        they begin, none of them begins with a number that is not finite."""
        self._tell_steps()
        self.tell(event)

    def _warn(self, what: str) -> None:
        self.emit(Warned(what))

    def _tell_steps(self) -> None:
        """Tell the steps that the device has taken meanwhile.

        Raises:
            TrainingError: if a number of one is not finite; the state then stands before it.
        """
        told, seconds = self.arrears.read()
        for taken, figures in told:
            self.state.step, self.state.images = taken.step - 1, taken.images - sum(map(len, taken.batches))
            for what, value in figures.looked_at(self.accelerator.scaler is not None):
                if not math.isfinite(value):
                    raise self._not_finite(what, value, taken.batches)
            self._count(taken.batches)
            self._report(figures.loss, figures.grad_norm, taken.rates, seconds)

    @contextmanager
    def _all_told(self) -> Iterator[None]:
        """After the block, however it ends, no step waits to be told."""
        try:
            yield
        finally:
            self._tell_steps()

    def _sample(self, untouched: bool = False) -> None:
        """Draw the previews of this step, or those of the untouched base, which are kept as step 0."""
        settings, step = self.config.sample, 0 if untouched else self.state.step
        if not settings.every:
            return
        if self.accelerator.is_main_process:
            self._draw(settings.prompts, step, untouched)
        self.accelerator.wait_for_everyone()

    def _sample_as_asked(self) -> None:
        """Draw previews of this step also where none were planned, then of captions."""
        if self.accelerator.is_main_process:
            if prompts := self.config.sample.prompts or list(filter(None, prompts_from(self.plan.examples))):
                self._draw(prompts, self.state.step)
            else:
                why = "sample.prompts is empty, and so are the captions that prompts could be taken from"
                self.emit(Warned(f"no previews were drawn: {why}"))
        self.accelerator.wait_for_everyone()

    def _draw(self, prompts: list[str], step: int, untouched: bool = False) -> None:
        """Draw and save previews. A full memory or disk does not end the run for them: it is told, and they are left
        out; a disk that takes no checkpoint either ends it then."""
        self.emit(Phase(DRAWING))
        model, lora = self.plan.base.short_name, "" if untouched else f"{self.config.name} step {step}"
        try:
            with self.as_it_is_used(), strength(self.base, 0 if untouched else 1):
                pictures = draw(self.base, prompts, self.drawing)
            save_previews(self.run.samples(step), pictures, prompts, self.drawing, model, lora)
        except (*OUT_OF_MEMORY, OSError) as error:
            if not (isinstance(error, OSError) or is_full(error)):
                raise
            self.emit(Warned(f"step {step} has no previews: {self._why_undrawn(error)}; training goes on"))
        else:
            self.emit(Sampled(step, f"samples/step-{step:06d}", prompts))

    def _why_undrawn(self, error: Exception) -> str:
        if isinstance(error, OSError):
            return f"{error.filename or self.run.path} cannot be written ({error.strerror or error})"
        return f"{memory_of(self.accelerator.device)} does not hold what a single one of them takes"

    def _validate(self) -> None:
        """Measure the validation loss of this step, or the scores of its pictures. A full memory does not end the run
        for it: it is told, and the measure is left out."""
        if self.validation is not None:
            self._measure_loss(self.validation)
        if self.scoring is not None:
            self._score(self.scoring)

    def _score(self, scoring: Scoring) -> None:
        """One process draws; all know the scores, for all must act alike."""
        device, found = self.accelerator.device, Scores(0, 0, 0)
        if self.accelerator.is_main_process:
            self.emit(Phase(SCORING))
            with self.base.at_work("VAE"), self.as_it_is_used():
                found = _if_it_fits(lambda: self._scores(scoring))
        if self._agree(found is None):
            why = f"{memory_of(self.accelerator.device)} does not hold what a single picture takes"
            self.emit(Warned(f"step {self.state.step} has no scores: {why}; training goes on"))
        else:
            assert found is not None  # in no process
            each = self._sum(torch.tensor(astuple(found), dtype=torch.float32, device=device))
            self.emit(scoring.take_in(self.state, Scores(*each.tolist())))

    def _scores(self, scoring: Scoring) -> Scores:
        if not scoring.has_begun:
            with strength(self.base, 0):
                scoring.begin(partial(draw, self.base))
            if not scoring.knows_style:
                what = "the base's own pictures are as near to the training images as these are to each other"
                self.emit(Warned(f"the style scores say nothing: {what}"))
        with strength(self.base, 1):
            return scoring.scores(partial(draw, self.base))

    @torch.no_grad()
    def _measure_loss(self, validation: Validation) -> None:
        """Each process measures a part of it."""
        self.emit(Phase(VALIDATING))
        measure = partial(self._measured, validation)
        with self.as_it_is_used():
            measured = _if_it_fits(lambda: self._from_caches(measure, validation.examples()))
        if self._agree(measured is None):
            why = f"{memory_of(self.accelerator.device)} does not hold what a single prediction takes"
            self.emit(Warned(f"step {self.state.step} has no validation loss: {why}; training goes on"))
        else:
            assert measured is not None  # in no process
            losses = self._sum(measured.to(self.accelerator.device)).cpu()
            self.emit(validation.take_in(self.state, losses))

    def _is_best(self) -> bool:
        """Whether this step is to be saved for its validation loss or its scores."""
        return self.config.save.keep_best and self.state.best_step == self.state.step > 0

    def _has_waited_enough(self) -> bool:
        """Whether neither loss nor scores have become better for as long as it is waited for."""
        return 0 < self.config.validation.patience <= self.state.not_lower

    @property
    def ended_early(self) -> str:
        """Why a run that is finished ended before its budget was spent; empty if it did not."""
        if self.state.step == self.plan.steps:
            return ""
        what = "the validation loss has not become lower" if self.validation else "the scores have not become better"
        return f"{what} since step {self.state.best_step}"

    def _measured(self, validation: Validation) -> Tensor:
        """The part of the validation's losses that this process measures. Its steps may be other than those of the
        other processes, so it asks its model alone."""
        accelerator = self.accelerator
        losses = partial(self._weighted, accelerator.unwrap_model(self.denoiser))
        place = accelerator.process_index, accelerator.num_processes
        return validation.losses(losses, *place, self._progress(VALIDATING))

    def _base_was_drawn(self) -> bool:
        """Whether the base's previews are there, drawn as all further ones will be."""
        model, prompts = self.plan.base.short_name, self.config.sample.prompts
        wanted = [self.drawing.parameters(prompt, number, model) for number, prompt in enumerate(prompts)]
        return drawn_like(self.run.samples(0)) == wanted

    @contextmanager
    def as_it_is_used(self) -> Iterator[None]:
        """Within the block the live model is what files hold: averaged, where averages exist, and without dropout."""
        let_drop(self.base, False)
        try:
            with self.averages.swapped_in(), uncompiled(self.config.runtime.compile):
                yield
        finally:
            let_drop(self.base, self.config.adapter.drops)

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            self.emit(Phase(SAVING))
            state = self.flat.state_dict(self.optimizer) if self.flat else self.optimizer.state_dict()
            optimizer: dict[str, Any] = {"optimizer": state}
            if self.accelerator.scaler is not None:
                optimizer["scaler"] = self.accelerator.scaler.state_dict()
            trained = {}
            if self.averages:
                optimizer["averages"], trained = self.averages.state_dict(), adapter_state(self.base)
            with self.as_it_is_used():
                adapter = adapter_state(self.base)
            folder = self.run.checkpoint(self.state.step)
            save_checkpoint(folder, Checkpoint(self.state, adapter, optimizer, trained, self.plan.origin))
            prune_checkpoints(
                self.run, self.config.save.keep, self.state.best_step if self.config.save.keep_best else 0
            )
            self.emit(Checkpointed(self.state.step, f"checkpoints/{folder.name}"))
        self.saved_step = self.state.step
        self.accelerator.wait_for_everyone()

    def _requests(self) -> dict[Request, bool]:
        """What was asked for since the last step."""
        main = self.accelerator.is_main_process
        return {what: self._agree(main and self.run.take_request(what)) for what in ("sample", "save")}

    def _agree(self, asked: bool) -> bool:
        """Whether any process was asked for something; all must act alike."""
        if self.accelerator.num_processes == 1:
            return asked
        return bool(self._sum(torch.tensor(float(asked), device=self.accelerator.device)).item())

    def _sum(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        return cast(Tensor, self.accelerator.reduce(value))


def memory_in_use(device: torch.device) -> int:
    """Bytes: the most that was taken so far of a GPU's memory; without one, what this process has of the computer's."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def _if_it_fits(measure: Callable[[], Measured]) -> Measured | None:
    """What is measured; None where the memory is full."""
    try:
        return measure()
    except OUT_OF_MEMORY as error:
        if not is_full(error):
            raise
        return None


def is_due(step: int, every: int) -> bool:
    """Whether something that happens each `every` steps happens now; 0 is never."""
    return every > 0 and step % every == 0


def drop_captions(shown: list[Showing], draws: Tensor) -> list[str]:
    """Captions, some replaced by the empty one: classifier-free guidance needs an unconditional model (Ho 2022).
    `draws` (batch,) are uniform numbers below 1."""
    return [
        "" if draw < one.example.caption_dropout else one.caption
        for one, draw in zip(shown, draws.tolist(), strict=True)
    ]
