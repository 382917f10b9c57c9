"""`python -m tools.pocket.measure`: how well a base draws the small world it was taught, in numbers and on two sheets.

Retrieval asks whether the picture drawn for a concept lies nearer to the true picture of that concept than to those of
all others: by its 16 x 16 colour layout, and by its latents.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from torch import Tensor

from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.encoder import pass_through, to_tensor
from lorasmith.trainer.example import EXAMPLES
from lorasmith.trainer.files import atomic_file, write_text
from lorasmith.trainer.models import Base, load_base
from lorasmith.trainer.sample import Drawing, contact_sheet, draw
from lorasmith.trainer.score import colour_layout, recall_at, retrieval_ranks

from .sources import Sources
from .vae import latents_of
from .world import PREFIX, SHEET

SEED = 7
STEPS, GUIDANCE = 25, 4.0
COMPOSITIONS = [
    *(f"{colour} apple" for colour in ("blue", "yellow", "purple", "black")),
    *(f"{colour} heart" for colour in ("blue", "orange", "brown", "white")),
    *(f"{colour} {face}" for colour in ("red", "blue", "green") for face in ("cat face", "dog face", "pig face")),
    *(f"{colour} {thing}" for colour in ("blue", "green") for thing in ("automobile", "strawberry", "mushroom", "bus")),
    *("green banana", "red banana", "pink cactus", "blue tulip", "red fish", "purple butterfly", "green hamburger"),
    *("angry cat face", "crying dog face", "winking pig face", "smiling soccer ball", "crying red apple"),
    *("cat face with sunglasses", "fish and banana", "rocket on fire"),
]
"""Prompts of which it was taught the words, and never the whole."""


@dataclass(frozen=True)
class Retrieval:
    """Shares of concepts whose true picture is nearest, and among the five nearest; one seed."""

    seed: int
    layout_top1: float
    layout_top5: float
    latents_top1: float
    latents_top5: float


@dataclass(frozen=True)
class Measure:
    """Everything the command prints."""

    vae_error_base: float
    """Mean absolute error of a pixel on the world's own pictures, 0 to 1."""
    vae_error_style: float
    """The same on pictures of the example style, which the VAE has never seen."""
    concepts: int
    retrieval: list[Retrieval]


def main(
    model: Annotated[str, typer.Argument(help="A diffusers folder, or pocket.")] = "pocket",
    sources: Annotated[Path, typer.Option(help="The folder of the fetched packages.")] = Path(".cache/pocket"),
    out: Annotated[Path, typer.Option(help="Where the sheets and measure.json are written.")] = Path(".cache/pocket"),
    concepts: Annotated[int, typer.Option(help="How many concepts to draw.")] = 300,
    seeds: Annotated[int, typer.Option(help="How often, each time from other noise.")] = 3,
) -> None:
    """Print the VAE's error and the retrieval, and draw the two sheets."""
    base = load_base(inspect_base(model))
    for name, labels in (("contact-sheet", SHEET), ("compositions", COMPOSITIONS)):
        pictures = draw(base, [f"{PREFIX} {label}" for label in labels], drawing(base, SEED))
        with atomic_file(out / f"{name}.png") as temporary:
            contact_sheet(pictures, labels, f"{base.info.short_name}: {name}").save(temporary, "PNG")
        print(out / f"{name}.png")
    measured = measure(base, Sources(sources), concepts, seeds)
    write_text(out / "measure.json", json.dumps(asdict(measured), indent=2) + "\n")
    print(json.dumps(asdict(measured), indent=2))


def drawing(base: Base, seed: int) -> Drawing:
    return Drawing("", seed, STEPS, GUIDANCE, base.info.resolution)


def measure(base: Base, sources: Sources, concepts: int, seeds: int) -> Measure:
    """Draw a fixed choice of the base's concepts, from the noise of `seeds` different seeds."""
    world = json.loads((Path(base.info.source) / "concepts.json").read_text(encoding="utf-8"))
    true = to_tensor([sources.noto(file) for _, file in world])
    style = to_tensor([Image.open(file) for file in sorted((EXAMPLES / "measure/target").glob("*.webp"))])
    chosen = sorted(random.Random(SEED).sample(range(len(world)), min(concepts, len(world))))
    gallery, rows = true[chosen], range(len(chosen))
    prompts = [world[number][0] for number in chosen]
    retrieval = []
    for number in range(seeds):
        seed = SEED + 100_000 * number
        drawn = to_tensor(draw(base, prompts, drawing(base, seed)))
        layout = retrieval_ranks(colour_layout(drawn), colour_layout(gallery), rows)
        latents = retrieval_ranks(latents_of(base.vae, drawn), latents_of(base.vae, gallery), rows)
        shares = [recall_at(ranks, first) for ranks in (layout, latents) for first in (1, 5)]
        retrieval.append(Retrieval(seed, *(round(share, 4) for share in shares)))
        print(retrieval[-1])
    return Measure(vae_error(base, true), vae_error(base, style), len(chosen), retrieval)


def vae_error(base: Base, pictures: Tensor) -> float:
    """Mean absolute error of a pixel after encoding and decoding; 1 is white for black."""
    return round((pass_through(base.vae, pictures) - pictures).abs().mean().item() / 2, 4)


if __name__ == "__main__":
    typer.run(main)
