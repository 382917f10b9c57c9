"""A plain loop to compare with: what diffusers' example train_text_to_image_lora.py does in a step, written anew.

The example (https://github.com/huggingface/diffusers, examples/text_to_image) loads the base in fp32, casts it to the
precision of the training and freezes it, adds LoRA layers with PEFT (`unet.add_adapter`, r = alpha, Gaussian start),
and hands UNet, AdamW, loader and schedule to accelerate, which puts autocast around the UNet. In each step it

- decodes the pictures of a batch and tokenizes their captions, in the loader, without worker processes;
- encodes the pictures with the VAE and draws from its posterior, and encodes the captions with the text encoder;
- draws noise and time-steps, and adds one to the other with the scheduler;
- lets the UNet predict, takes the mean of the squared errors in fp32, and gathers it from all processes to add its
  `item()` to the sum that is logged;
- goes backward, and steps optimizer and schedule.

Adapters have the precision of the base: only under fp16 does the example keep them in fp32. It means to clip gradients,
but gives `clip_grad_norm_` an iterator that the optimizer has used up, so that nothing is clipped; here neither, which
is in its favour. Its sister for SDXL, train_text_to_image_lora_sdxl.py, does the same with two text encoders, the sizes
of the pictures, and the VAE in fp32.

The weights are those that our trainer loads, and so are the layers that get an adapter, the rank and the pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from PIL import Image
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTokenizer

from ..config import RunConfig
from ..events import Phase
from ..loop import Emit
from ..models import Base, Tokens, load_base
from ..plan import as_trained, base_of
from ..precision import DTYPES, mixed_precision
from ..targets import layers_of


class Reference:
    """The plain loop over the base, pictures, batch, rank, targets and precision of a configuration."""

    def __init__(self, config: RunConfig, emit: Emit) -> None:
        precision = mixed_precision(config.runtime.precision)
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=precision)
        self.device: torch.device = self.accelerator.device
        self.dtype = DTYPES[precision]
        info = as_trained(base_of(config), config)
        emit(Phase("loading the base"))
        self.base = load_base(info)
        for module in self.base.components.values():
            module.to(device=self.device, dtype=self.dtype)
        self.base.vae.to(device=self.device, dtype=torch.float32 if info.family == "sdxl" else self.dtype)
        _add_lora(self.base, config)
        if precision == "fp16":
            cast_training_params(self.base.unet, dtype=torch.float32)

        trained = filter(lambda parameter: parameter.requires_grad, self.base.unet.parameters())
        rate, decay = config.optimizer.lr, config.optimizer.weight_decay
        optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.999), weight_decay=decay, eps=1e-8)
        pictures = _Pictures(Path(config.data[0].path), self.base)
        loader = DataLoader(pictures, config.budget.batch, shuffle=True, collate_fn=_stacked)
        self.unet, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            self.base.unet, optimizer, loader, get_scheduler("constant", optimizer)
        )
        self.batches, self.logged = self._epochs(), 0.0

    def train(self, should_stop: Callable[[], bool]) -> None:
        while not should_stop():
            self._step()

    def _step(self) -> None:
        with self.accelerator.accumulate(self.unet):
            pixels, ids = next(self.batches)
            loss = self._loss(pixels, ids)
            mean = cast(Tensor, self.accelerator.gather(loss.repeat(len(pixels)))).mean()
            self.logged += mean.item()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()

    def _epochs(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Batches of pictures (batch, 3, H, W) in -1 to 1, and token ids (batch, tokens) for each text encoder."""
        while True:
            self.unet.train()
            yield from self.loader

    def _loss(self, pixels: Tensor, ids: list[Tensor]) -> Tensor:
        base, scheduler, batch = self.base, self.base.scheduler, len(pixels)
        latents = base.vae.encode(pixels.to(base.vae.dtype)).latent_dist.sample() * base.scaling_factor
        latents = latents.to(self.dtype)
        noise = torch.randn_like(latents)
        total = scheduler.config["num_train_timesteps"]
        t = torch.randint(0, total, (batch,), device=latents.device).long()
        noisy = scheduler.add_noise(latents, noise, t)  # pyright: ignore[reportArgumentType]
        conditions = base.family.encode(list(base.text_encoders.values()), Tokens(ids, [1] * batch))
        is_epsilon = base.info.prediction == "epsilon"
        target = noise if is_epsilon else scheduler.get_velocity(latents, noise, t)  # pyright: ignore
        sides = pixels.shape[-2:]
        sizes = torch.tensor([[*sides, 0, 0, *sides]] * batch, device=latents.device)
        predicted = base.family.predict(self.unet, noisy, t, conditions, sizes)
        return mse_loss(predicted.float(), target.float())


def _add_lora(base: Base, config: RunConfig) -> None:
    """As the example does it, on the layers that ours trains: with the default targets those that it names itself,
    to_k, to_q, to_v and to_out.0."""
    layers = layers_of(base, {"unet": base.unet}, config.adapter, config.block)["unet"]
    settings, names = config.adapter, [layer.name for layer in layers]
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]  # a float is fine
        init_lora_weights="gaussian",
        target_modules=names,
    )
    base.unet.add_adapter(lora)
    if config.runtime.attention == "xformers":
        base.unet.enable_xformers_memory_efficient_attention()
    if config.runtime.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()


class _Pictures(Dataset):
    """A folder of PNG files with captions beside them; each is read and tokenized whenever it is asked for."""

    def __init__(self, folder: Path, base: Base) -> None:
        self.files, self.tokenizers = sorted(folder.glob("*.png")), base.tokenizers
        self.captions = [file.with_suffix(".txt").read_text(encoding="utf-8").strip() for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Tensor, list[Tensor]]:
        with Image.open(self.files[number]) as picture:
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
        return pixels, [self._ids(tokenizer, self.captions[number]) for tokenizer in self.tokenizers]

    def _ids(self, tokenizer: CLIPTokenizer, caption: str) -> Tensor:
        fixed: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return cast(Tensor, tokenizer(caption, max_length=tokenizer.model_max_length, **fixed).input_ids)[0]


def _stacked(examples: list[tuple[Tensor, list[Tensor]]]) -> tuple[Tensor, list[Tensor]]:
    pixels, ids = zip(*examples, strict=True)
    return torch.stack(pixels), [torch.stack(of_one) for of_one in zip(*ids, strict=True)]
