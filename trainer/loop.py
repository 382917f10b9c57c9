"""The training loop, at three zoom levels: `train`, `train_step`, `loss`.

It turns a `Plan` into trained weights on a live base, and tells what happens as events. It knows no user interface and
no export format. What is random in a step depends on (seed, step) alone, so a resumed run equals an unbroken one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from ..datasets.buckets import Shot
from ..datasets.cache import LatentCache, MaskCache, TextCache
from ..datasets.dataset import Showing, showing
from .adapter import ADAPTER, adapter_state, let_drop, load_adapter_state, strength, tuner_layers
from .averages import Averages
from .checkpoint import Checkpoint, TrainState, prune_checkpoints, save_checkpoint
from .config import Precision, RunConfig
from .errors import RunError, TrainingError
from .events import Checkpointed, Event, Phase, PlanMade, Sampled, Step, Warned
from .fitting import parameter_groups, parts, put_on, read_start
from .initial import look_at_data
from .jobs import RunFolder
from .models import Base, Conditions, Tokens, load_base
from .noise import Draws, add_noise, derive_seed, draw_batch, image_loss, loss_weight, scheduled_huber_c, target_of
from .optim import effective_rates, make_optimizer, schedule_factor, set_learning_rates
from .plan import Plan
from .sample import Drawing, draw, drawn_like, save_previews

Emit = Callable[[Event], None]
Outcome = Literal["finished", "stopped"]
MixedPrecision = Literal["no", "fp16", "bf16"]

_MOST_SKIPPED = 20
_LOOKED_AT = 32
"""Batches from which an adapter's first directions are taken."""
DTYPES: dict[MixedPrecision, torch.dtype] = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Denoiser(nn.Module):
    """UNet and, where they are trained, text encoders as one module, so that accelerate wraps and synchronises one."""

    def __init__(self, base: Base, text_encoders_train: bool) -> None:
        super().__init__()
        self.family = base.family
        self.unet = base.unet
        self.text_encoders = nn.ModuleList(base.text_encoders.values() if text_encoders_train else [])

    def forward(self, noisy: Tensor, t: Tensor, text: Tokens | Conditions, sizes: Tensor) -> Tensor:
        """Prediction (batch, 4, h, w); `text` holds token ids if text encoders are trained, conditions if not."""
        conditions = text if isinstance(text, Conditions) else self.family.encode(list(self.text_encoders), text)
        return self.family.predict(self.unet, noisy, t, conditions, sizes)


class Trainer:
    """One run: its base, what is trained of it, optimizer and state."""

    def __init__(self, plan: Plan, run: RunFolder, emit: Emit, checkpoint: Checkpoint | None = None) -> None:
        self.plan, self.config, self.run, self.emit = plan, plan.config, run, emit
        precision = mixed_precision(self.config.runtime.precision)
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else several processes on CPUs would not find each other
            mixed_precision=precision,
            gradient_accumulation_steps=self.config.budget.accumulate,
            # an adapter that is left out in a step gets no gradient
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)]
            if self.config.adapter.module_dropout
            else [],
        )
        if self.accelerator.num_processes != plan.processes:
            raise TrainingError(
                f"{plan.processes} processes were started, but {self.accelerator.num_processes} found each other",
                "accelerate",
                "Start them with: torchrun --nproc_per_node N -m lorasmith.trainer.cli train FILE",
            )
        self.skipped = 0
        emit(Phase("loading the base"))
        vae_dtype = DTYPES[mixed_precision(self.config.runtime.vae_precision)]
        self.base = load_base(plan.base, base_dtype(self.config, precision), self.accelerator.device, vae_dtype)
        self.alphas_cumprod: Tensor = self.base.scheduler.alphas_cumprod.float()
        self._fill_caches()
        self._put_on(afresh=checkpoint is None)
        self._prepare(checkpoint)
        self.drawing = Drawing.of(self.config.sample, plan.base.resolution)

    # -- level 1: the run ---------------------------------------------------------------------------------------------

    def train(self, should_stop: Callable[[], bool]) -> Outcome:
        """Train until the budget is spent or someone asks to stop; either way the state is saved.

        Raises:
            TrainingError: if the loss is not finite; the last checkpoint stands.
        """
        if self._agree(self.accelerator.is_main_process and not self._base_was_drawn()):
            self._sample(untouched=True)
        if self._agree(should_stop()):
            return self._stop()

        steps = islice(self.plan.order.steps(self.plan.batches_per_step), self.state.step, self.plan.steps)
        for batches in steps:
            self._report(*self.train_step(batches))

            # once in a while: preview, then save
            last = self.state.step == self.plan.steps
            if last or is_due(self.state.step, self.config.sample.every):
                self._sample()
            if last or is_due(self.state.step, self.config.save.every):
                self._save()

            # someone wants to stop: keep the work
            if not last and self._agree(should_stop()):
                return self._stop()
        return "finished"

    def _stop(self) -> Outcome:
        if self.saved_step != self.state.step:
            self._save()
        return "stopped"

    # -- level 2: one optimizer step ----------------------------------------------------------------------------------

    def train_step(self, batches: list[list[Shot]]) -> tuple[Tensor, Tensor, list[float], float]:
        """One change of the weights from all images of `batches`, each image counting the same.

        Returns the mean loss, the norm of the gradients before clipping, the learning rates, and the seconds it took.
        """
        started = time.perf_counter()
        step, images = self.state.step, sum(len(batch) for batch in batches)
        optimizer, max_norm = self.config.optimizer, self.config.optimizer.max_grad_norm or math.inf
        factor = schedule_factor(optimizer, step, self.plan.steps)
        set_learning_rates(self.optimizer, self.base_rates, factor)

        total = loss = norm = torch.zeros((), device=self.accelerator.device)
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        for number in range(rank, len(batches), processes):
            with self.accelerator.accumulate(self.denoiser):
                losses = self.loss(batches[number], step, sum(map(len, batches[:number])))
                # accelerate takes the mean over accumulated batches and over processes: undo it, and divide by images
                self.accelerator.backward(losses.sum() * len(batches) / images)
                total = total + losses.detach().sum()
                if self.accelerator.sync_gradients:
                    loss = self._finite(self._sum(total) / images, batches)
                    norm = self._finite_norm(self.accelerator.clip_grad_norm_(self.trained, max_norm), batches)
                self.optimizer.step()
                self.optimizer.zero_grad()
        self._watch_skipped_steps()
        if not self.accelerator.optimizer_step_was_skipped:
            self.averages.update()

        self.state.step += 1
        self.state.images += images
        return loss, norm, effective_rates(self.optimizer), time.perf_counter() - started

    # -- level 3: the loss of one batch -------------------------------------------------------------------------------

    def loss(self, shots: list[Shot], step: int, first: int) -> Tensor:
        """The weighted loss of each image of a batch, (batch,); `first` images of the step stand before it."""
        shown, drawn = self._drawn(shots, step, first)
        prediction, objective, alphas_cumprod = self.plan.base.prediction, self.config.objective, self.alphas_cumprod
        target = target_of(prediction, drawn.x0, drawn.eps, drawn.t, alphas_cumprod)
        weight = loss_weight(objective.weighting, prediction, drawn.t, alphas_cumprod, objective.min_snr_gamma)
        weight = weight * torch.tensor([one.example.source.loss_weight for one in shown])
        huber_c = scheduled_huber_c(objective.huber_schedule, objective.huber_c, drawn.t, alphas_cumprod)
        mask = self.masks.read(shown, drawn.x0.shape)

        device = self.accelerator.device
        if self.config.adapter.drops:  # from torch's global generators, which must not depend on what came before
            torch.manual_seed(derive_seed(self.config.seed, step, first, 1))  # no image draws from this seed
        predicted = self.denoiser(*self._seen(shown, drawn))
        mask = None if mask is None else mask.to(device)
        return weight.to(device) * image_loss(objective.loss, predicted, target.to(device), huber_c.to(device), mask)

    def _drawn(self, shots: list[Shot], step: int, first: int) -> tuple[list[Showing], Draws]:
        """The images of a batch, and all that is random about them."""
        shown = [showing(self.plan.examples, shot) for shot in shots]
        seeds = [derive_seed(self.config.seed, step, first + number) for number in range(len(shots))]
        mean, std = self.latents.read(shown)
        objective, total = self.config.objective, len(self.alphas_cumprod)
        return shown, draw_batch(mean, std, self.base.scaling_factor, objective, total, seeds)

    def _seen(self, shown: list[Showing], drawn: Draws) -> tuple[Tensor, Tensor, Tokens | Conditions, Tensor]:
        """What the denoiser is given of a batch."""
        noisy = add_noise(drawn.x0, drawn.shown_eps, drawn.t, self.alphas_cumprod)
        text = self._text(drop_captions(shown, drawn.caption))
        sizes = torch.tensor([one.view.sizes for one in shown])
        device, dtype = self.accelerator.device, self.base.dtype
        return noisy.to(device, dtype), drawn.t.to(device), text, sizes.to(device, torch.float32)

    # -- preparation --------------------------------------------------------------------------------------------------

    def _fill_caches(self) -> None:
        """Encode images, and captions if the text encoders stay frozen; one process does it, the others wait."""
        self.latents = LatentCache(self.plan.cache, self.base.vae_fingerprint)
        self.masks = MaskCache(self.plan.cache, self.base.info.vae_factor)
        self.text = TextCache(self.plan.cache, self.base.text_fingerprint)
        with self.accelerator.main_process_first():
            self.latents.fill(self.base, self.plan.examples, self._progress("encoding images"))
            self.masks.fill(self.plan.examples, self._progress("reading masks"))
            if not self.config.adapter.trains_text:
                captions = ["", *(caption for example in self.plan.examples for caption in example.captions)]
                self.text.fill(self.base, captions, self._progress("encoding captions"))

    def _progress(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self.emit(Phase(name, done, total))

    def _put_on(self, afresh: bool) -> None:
        """Put on what is trained; what a checkpoint goes on from need not be looked for again."""
        config, base = self.config, self.base
        start = read_start(config.adapter, base) if afresh else {}
        put_on(base, config.adapter, config.seed, config.block, config.trigger, start)
        self.parts = parts(base, config)
        if afresh and config.adapter.init == "eva":
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
        batches = [self._seen(*self._drawn(batch, step, 0)) for step, [batch] in enumerate(shots)]
        denoiser = Denoiser(self.base, self.config.adapter.trains_text)
        progress = self._progress("looking for the directions of the data")
        others = look_at_data(layers, batches, lambda batch: denoiser(*batch), ADAPTER, progress)
        if others:
            what = f"{len(others)} of {len(layers)} layers start as by default: EVA knows no directions of convolutions"
            self.emit(Warned(f"{what}, and of layers that read less in a batch than their rank."))

    def _prepare(self, checkpoint: Checkpoint | None) -> None:
        config, base = self.config, self.base
        if config.runtime.attention == "xformers":
            base.unet.enable_xformers_memory_efficient_attention()
        if config.runtime.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
            for encoder in base.text_encoders.values() if config.adapter.trains_text else ():
                enable = getattr(encoder, "activation_checkpointing_enable", None)  # its name in newer transformers
                (enable or encoder.gradient_checkpointing_enable)()
                encoder.train()
            base.unet.train()  # both libraries recompute only in training mode; neither has dropout here
        let_drop(base, config.adapter.drops)

        groups = parameter_groups(base, config)
        self.fused = self.accelerator.scaler is None
        self.base_rates: list[float] = [group["lr"] for group in groups]
        self.trained = [parameter for group in groups for parameter in group["params"]]
        optimizer = make_optimizer(config.optimizer, groups, self.fused)
        self.denoiser, self.optimizer = self.accelerator.prepare(Denoiser(base, config.adapter.trains_text), optimizer)
        self.averages = Averages(optimizer, config.optimizer.ema_decay)
        self.saved_step = checkpoint.state.step if checkpoint else -1
        self.state = TrainState(dataset=self.plan.dataset_fingerprint, base=self.plan.base.identity)
        if checkpoint:
            self._restore(checkpoint)
        facts = self.plan.facts() | {"dataset": self.plan.dataset_facts()}
        self.emit(PlanMade(self.plan.steps, self.plan.images, facts, [asdict(part) for part in self.parts]))

    def _restore(self, checkpoint: Checkpoint) -> None:
        saved, images_by_step = checkpoint.state, [0, *self.plan.images_by_step]
        images = images_by_step[saved.step] if saved.step < len(images_by_step) else -1
        for what, then, now in (
            ("images or captions", saved.dataset, self.state.dataset),
            ("base model", saved.base, self.state.base),
            ("format of checkpoints", saved.version, self.state.version),
            ("images in each step (the number of processes?)", saved.images, images),
        ):
            if then != now:
                raise RunError(
                    f"the {what} have changed since the run was saved",
                    str(self.run.path),
                    "Put them back as they were, or start a new run.",
                )
        load_adapter_state(self.base, checkpoint.trained or checkpoint.adapter)
        for group in checkpoint.optimizer["optimizer"]["param_groups"]:
            if group.get("fused") is not None:  # AdamW alone is made with it
                group["fused"] = self.fused  # runtime.precision may have changed
        self.optimizer.load_state_dict(checkpoint.optimizer["optimizer"])
        if self.averages:
            self.averages.load_state_dict(checkpoint.optimizer["averages"])
        if self.accelerator.scaler is not None and "scaler" in checkpoint.optimizer:
            self.accelerator.scaler.load_state_dict(checkpoint.optimizer["scaler"])
        self.state = saved

    # -- details ------------------------------------------------------------------------------------------------------

    def _text(self, captions: list[str]) -> Tokens | Conditions:
        """Token ids for text encoders that are trained, cached conditions for frozen ones."""
        if self.config.adapter.trains_text:
            return self.base.tokenize(captions).to(self.accelerator.device)
        return self.text.read(captions).to(self.accelerator.device, self.base.dtype)

    def _finite(self, loss: Tensor, batches: list[list[Shot]]) -> Tensor:
        """The loss, if it is a number; else a `TrainingError` that names the files of the step."""
        if not loss.isfinite():
            raise self._not_finite("loss", loss, batches)
        return loss

    def _finite_norm(self, norm: Tensor | None, batches: list[list[Shot]]) -> Tensor:
        """The gradients' norm, if it is a number. fp16's gradient scaler looks for itself, and skips such a step."""
        norm = torch.zeros(()) if norm is None else norm
        if self.accelerator.scaler is None and not norm.isfinite():
            raise self._not_finite("gradient", norm, batches)
        return norm

    def _not_finite(self, what: str, value: Tensor, batches: list[list[Shot]]) -> TrainingError:
        files = ", ".join(self.plan.examples[shot.image].name for batch in batches for shot in batch)
        return TrainingError(
            f"the {what} of step {self.state.step + 1} is {value.item()}; its images: {files}",
            str(self.run.path),
            "The last checkpoint stands. Lower optimizer.lr, or use bf16 or fp32.",
        )

    def _watch_skipped_steps(self) -> None:
        """fp16's gradient scaler skips steps whose gradients overflow; a few at the start are usual, many are not."""
        self.skipped = self.skipped + 1 if self.accelerator.optimizer_step_was_skipped else 0
        if self.skipped == _MOST_SKIPPED:
            raise TrainingError(
                f"the gradients of the last {_MOST_SKIPPED} steps overflowed fp16, so nothing was learned",
                str(self.run.path),
                'The last checkpoint stands. Set runtime.precision = "bf16" or "fp32".',
            )

    def _report(self, loss: Tensor, norm: Tensor, rates: list[float], seconds: float) -> None:
        names = [group["name"] for group in self.optimizer.param_groups]
        self.emit(
            Step(
                step=self.state.step,
                images=self.state.images,
                loss=round(loss.item(), 6),
                grad_norm=round(float(norm), 6),
                lr=dict(zip(names, rates, strict=True)),
                seconds=round(seconds, 4),
            )
        )

    def _sample(self, untouched: bool = False) -> None:
        """Draw the previews of this step, or those of the untouched base, which are kept as step 0."""
        settings, step = self.config.sample, 0 if untouched else self.state.step
        if not settings.every:
            return
        if self.accelerator.is_main_process:
            self.emit(Phase("drawing previews"))
            with self.as_it_is_used(), strength(self.base, 0 if untouched else 1):
                pictures = draw(self.base, settings.prompts, self.drawing)
            model, lora = self.plan.base.short_name, "" if untouched else f"{self.config.name} step {step}"
            save_previews(self.run.samples(step), pictures, settings.prompts, self.drawing, model, lora)
            self.emit(Sampled(step, f"samples/step-{step:06d}", settings.prompts))
        self.accelerator.wait_for_everyone()

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
            with self.averages.swapped_in():
                yield
        finally:
            let_drop(self.base, self.config.adapter.drops)

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            optimizer: dict[str, Any] = {"optimizer": self.optimizer.state_dict()}
            if self.accelerator.scaler is not None:
                optimizer["scaler"] = self.accelerator.scaler.state_dict()
            trained = {}
            if self.averages:
                optimizer["averages"], trained = self.averages.state_dict(), adapter_state(self.base)
            with self.as_it_is_used():
                adapter = adapter_state(self.base)
            folder = self.run.checkpoint(self.state.step)
            save_checkpoint(folder, Checkpoint(self.state, adapter, optimizer, trained))
            prune_checkpoints(self.run, self.config.save.keep)
            self.emit(Checkpointed(self.state.step, f"checkpoints/{folder.name}"))
        self.saved_step = self.state.step
        self.accelerator.wait_for_everyone()

    def _agree(self, stop: bool) -> bool:
        """Whether any process was asked to stop; all must act alike."""
        if self.accelerator.num_processes == 1:
            return stop
        return bool(self._sum(torch.tensor(float(stop), device=self.accelerator.device)).item())

    def _sum(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        return cast(Tensor, self.accelerator.reduce(value))


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


def base_dtype(config: RunConfig, precision: MixedPrecision) -> torch.dtype:
    """What the base's weights are kept in. fp32 if they are trained: below it, small changes would be lost."""
    return torch.float32 if config.adapter.kind == "full" else DTYPES[precision]


def mixed_precision(setting: Precision) -> MixedPrecision:
    """The precision of base and activations on this computer."""
    if setting != "auto":
        return "no" if setting == "fp32" else setting
    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
