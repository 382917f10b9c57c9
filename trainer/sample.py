"""Pictures and previews: the same prompt and seed always give the same, and its text chunk says how it was made."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .config import SampleSection
from .files import atomic_file, atomic_folder
from .jobs import preview_files
from .memory import in_halves, parts_of
from .models import Base, Conditions
from .painting.samplers import SAMPLERS, Sampler

_PIXELS_AT_ONCE = 64 * 64 * 64
Made = TypeVar("Made")


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn, apart from their prompts."""

    negative_prompt: str
    seed: int
    """The first picture's; the second's is one more, and so on."""
    steps: int
    guidance: float
    size: int
    """Side of the square picture, in pixels."""
    sampler: Sampler = "ddim"

    @classmethod
    def of(cls, settings: SampleSection, size: int) -> Drawing:
        return cls(settings.negative_prompt, settings.seed, settings.steps, settings.guidance, size)

    def parameters(self, prompt: str, number: int, model: str) -> str:
        """How picture `number` is drawn, in the form that A1111 reads."""
        return (
            f"{prompt}\nNegative prompt: {self.negative_prompt}\n"
            f"Steps: {self.steps}, Sampler: {SAMPLERS[self.sampler]}, CFG scale: {self.guidance}, "
            f"Seed: {self.seed + number}, Size: {self.size}x{self.size}, Model: {model}"
        )


def draw(
    base: Base, prompts: Sequence[str], drawing: Drawing, after_step: Callable[[], None] = lambda: None
) -> list[Image.Image]:
    """One picture for each prompt; picture i has the seed `drawing.seed + i`. Where the memory does not hold those that
    are drawn together, fewer are.

    `after_step` is called after every step of the sampler; what it raises ends the drawing.
    """
    at_once = pictures_at_once(drawing.size)
    with base.at_work("text encoders"):
        texts = _in_parts(partial(_read, base, drawing), prompts, at_once)
    latents = _in_parts(partial(_denoised, base, drawing, after_step), list(enumerate(texts, drawing.seed)), at_once)
    with base.at_work("VAE"):
        return _in_parts(partial(_decoded, base), latents, at_once)


def _in_parts(work: Callable[[Sequence[Any]], list[Made]], things: Sequence[Any], at_once: int) -> list[Made]:
    """What `work` makes of things, so many together, or fewer where the memory is full."""
    return [made for _, part in parts_of([things], at_once) for made in in_halves(work, part)]


def pictures_at_once(size: int) -> int:
    """Small pictures are drawn together, large ones one by one; `size` is the side of one in pixels."""
    return max(1, _PIXELS_AT_ONCE // size**2)


@torch.no_grad()
def _read(base: Base, drawing: Drawing, prompts: Sequence[str]) -> list[Conditions]:
    """Of each picture that is drawn together with others, its prompt and its negative prompt: (2, tokens, width)."""
    with _in_precision_of(base):
        text = base.encode([*prompts, *[drawing.negative_prompt] * len(prompts)]).to(base.dtype)
    return [text[number :: len(prompts)] for number in range(len(prompts))]


@torch.no_grad()
def _denoised(
    base: Base, drawing: Drawing, after_step: Callable[[], None], wanted: Sequence[tuple[int, Conditions]]
) -> list[Tensor]:
    """`wanted` are seeds, and texts as `_read` gives them; latents of each, (1, 4, h, w)."""

    def step_taken(*_: Any) -> dict[str, Any]:
        after_step()
        return {}  # nothing is changed

    with _in_precision_of(base), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="__array__ implementation")  # between diffusers and newer numpys
        pipeline = base.denoising()
        pipeline.scheduler = scheduler_of(base, drawing.sampler)
        latents = pipeline(
            **_as_pipelines_take_it([text for _, text in wanted]),
            generator=[torch.Generator().manual_seed(seed) for seed, _ in wanted],
            num_inference_steps=drawing.steps,
            guidance_scale=drawing.guidance,
            height=drawing.size,
            width=drawing.size,
            output_type="latent",
            callback_on_step_end=step_taken,
        ).images
    return list(latents.split(1))


@torch.no_grad()
def _decoded(base: Base, latents: Sequence[Tensor]) -> list[Image.Image]:
    pixels = base.decode(torch.cat(list(latents)))
    pixels = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def _in_precision_of(base: Base) -> torch.autocast:
    return torch.autocast(base.device.type, base.dtype, enabled=base.dtype != torch.float32)


def scheduler_of(base: Base, sampler: Sampler) -> Any:
    """A sampler over the base's noise schedule, with what it predicts and the time-steps it is meant for.

    DDIM (Song et al. 2021), Euler with and without new noise in each step (Karras et al. 2022, algorithm 2), and
    DPM-Solver++(2M) (Lu et al. 2022), also at the noise levels of Karras et al.
    """
    if sampler == "ddim":
        return base.scheduler
    kind, settings = _SCHEDULERS[sampler]
    return kind.from_config(base.scheduler.config, **settings)


_SCHEDULERS: dict[Sampler, tuple[Any, dict[str, Any]]] = {
    "euler": (EulerDiscreteScheduler, {}),
    "euler-a": (EulerAncestralDiscreteScheduler, {}),
    "dpm++-2m": (DPMSolverMultistepScheduler, {}),
    "dpm++-2m-karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
}


def _as_pipelines_take_it(texts: Sequence[Conditions]) -> dict[str, Tensor]:
    """Prompts and as many negative prompts, encoded as in training: a pipeline itself would cut long ones."""
    (prompts, negatives), pooled = _side_by_side([text.hidden for text in texts]), [text.pooled for text in texts]
    embeddings = {"prompt_embeds": prompts, "negative_prompt_embeds": negatives}
    if pooled[0] is None:
        return embeddings
    prompts, negatives = _side_by_side(cast(list[Tensor], pooled))
    return embeddings | {"pooled_prompt_embeds": prompts, "negative_pooled_prompt_embeds": negatives}


def _side_by_side(pairs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All prompts, and all negative ones."""
    return torch.stack([prompt for prompt, _ in pairs]), torch.stack([negative for _, negative in pairs])


# ---------------------------------------------------------------------------------------------------------------------
# previews on disk


def save_previews(
    folder: Path, pictures: Sequence[Image.Image], prompts: Sequence[str], drawing: Drawing, model: str, lora: str
) -> None:
    """Write `00.png`, `01.png`, ...; the folder appears whole or not at all. `lora` is empty for the untouched base."""
    with atomic_folder(folder) as temporary:
        for number, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
            text = _png_text(prompt, number, drawing, model, lora)
            picture.save(temporary / f"{number:02d}.png", pnginfo=text)


def save_picture(file: Path, picture: Image.Image, prompt: str, drawing: Drawing, model: str, lora: str) -> None:
    """Write one PNG as previews are written; it is there whole or not at all."""
    with atomic_file(file) as temporary:
        picture.save(temporary, "PNG", pnginfo=_png_text(prompt, 0, drawing, model, lora))


def drawn_like(folder: Path) -> list[str]:
    """How each preview of a folder was drawn, apart from its LoRA; previews that can be compared have the same."""
    return [text.partition(_LORA)[0] for text in map(_parameters_of, preview_files(folder))]


_LORA = ", Lora: "


def _png_text(prompt: str, number: int, drawing: Drawing, model: str, lora: str) -> PngInfo:
    """The PNG's text: each value by its name, and all of them as A1111's `parameters`."""
    values = {
        "positive_prompt": prompt,  # ComfyUI takes what is called `prompt` for a graph
        "negative_prompt": drawing.negative_prompt,
        "seed": str(drawing.seed + number),
        "steps": str(drawing.steps),
        "sampler": SAMPLERS[drawing.sampler],
        "guidance": str(drawing.guidance),
        "size": f"{drawing.size}x{drawing.size}",
        "model": model,
        "lora": lora or "none",
        "parameters": drawing.parameters(prompt, number, model) + (_LORA + lora if lora else ""),
    }
    info = PngInfo()
    for name, value in values.items():
        info.add_itxt(name, value)
    return info


def _parameters_of(file: Path) -> str:
    with Image.open(file) as picture:
        picture.load()
        return str(picture.info.get("parameters", ""))


# ---------------------------------------------------------------------------------------------------------------------
# the before/after grid


_MARGIN, _LABEL, _TITLE = 12, 30, 64
_INK, _GREY, _GROUND = "#1d1d1f", "#6e6e73", "#ffffff"


def before_after_grid(
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    labels: Sequence[str],
    title: str,
    columns: int = 4,
    side: int = 128,
    after_is: str = "with the LoRA",
) -> Image.Image:
    """Pairs of pictures, the base on the left, each pair with its label; `side` in pixels."""
    rows = -(-len(labels) // columns)
    pair, high = 2 * side + 2, side + _LABEL
    width = columns * pair + (columns + 1) * _MARGIN
    grid = Image.new("RGB", (width, _TITLE + rows * (high + _MARGIN)), _GROUND)
    pen = ImageDraw.Draw(grid)
    pen.text((_MARGIN, 10), title, _INK, font=ImageFont.load_default(20))
    pen.text(
        (_MARGIN, 38),
        f"In each pair: left the base, right {after_is}; same prompt, same seed.",
        _GREY,
        font=ImageFont.load_default(14),
    )
    for index, label in enumerate(labels):
        left = _MARGIN + index % columns * (pair + _MARGIN)
        top = _TITLE + index // columns * (high + _MARGIN)
        for offset, picture in ((0, before[index]), (side + 2, after[index])):
            grid.paste(picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (left + offset, top))
        font = ImageFont.load_default(13)
        pen.text((left + pair / 2, top + side + 6), _shortened(label, pair, font), _INK, font=font, anchor="ma")
    return grid


def contact_sheet(
    pictures: Sequence[Image.Image], labels: Sequence[str], title: str, columns: int = 8, side: int = 128
) -> Image.Image:
    """Pictures in rows, each with its label below; `side` in pixels."""
    rows, cell = -(-len(labels) // columns), side + _MARGIN
    sheet = Image.new("RGB", (columns * cell + _MARGIN, _LABEL + 2 * _MARGIN + rows * (cell + _LABEL)), _GROUND)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, 10), title, _INK, font=ImageFont.load_default(20))
    font = ImageFont.load_default(12)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        left = _MARGIN + index % columns * cell
        top = _LABEL + 2 * _MARGIN + index // columns * (cell + _LABEL)
        sheet.paste(picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (left, top))
        pen.text((left + side / 2, top + side + 6), _shortened(label, side, font), _INK, font=font, anchor="ma")
    return sheet


def _shortened(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, with its end replaced by an ellipsis if it would be wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    return next(short for short in _ever_shorter(text) if font.getlength(short) <= width)


def _ever_shorter(text: str) -> Iterator[str]:
    yield from (text[:end].rstrip() + "..." for end in range(len(text), -1, -1))
