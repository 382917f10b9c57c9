"""`python -m tools.pocket.card`: the pocket base's model card, from what its run wrote down and what was measured."""

from __future__ import annotations

import json
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from lorasmith.trainer.files import write_text
from lorasmith.trainer.jobs import RunFolder
from lorasmith.trainer.story import Story

from .sources import PACKAGES

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "pillow", "numpy")
ROWS = 10
TEMPLATE = Path(__file__).with_name("card.md")
"""What only a person knows, with the places of the tables."""


def main(
    folder: Annotated[Path, typer.Option(help="Where the base was made and measured.")] = Path(".cache/pocket"),
) -> None:
    """Write README.md into the base's folder."""
    run = RunFolder(folder / "runs" / "pocket")
    measured = json.loads((folder / "measure.json").read_text(encoding="utf-8"))
    concepts = json.loads((folder / "pocket" / "concepts.json").read_text(encoding="utf-8"))
    parts = {
        "CONCEPTS": str(len(concepts)),
        "MEASURE": measure_table(measured),
        "CURVE": curve_table(run),
        "SOURCES": "\n".join(f"- `{p.name}` {p.version} ({p.licence})" for p in PACKAGES),
        "VERSIONS": ", ".join(
            [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in LIBRARIES)]
        ),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, value in parts.items():
        text = text.replace(f"{{{name}}}", value)
    if missing := re.findall(r"\{[A-Z]+\}", text):
        raise SystemExit(f"{TEMPLATE}: there is nothing to put in the place of {', '.join(missing)}")
    write_text(folder / "pocket" / "README.md", text)
    print(folder / "pocket" / "README.md")


def measure_table(measured: dict[str, Any]) -> str:
    """Retrieval for each seed, and the VAE's errors."""
    head = ["| seed | colour layout, top-1 | top-5 | latents, top-1 | top-5 |", "|---|---|---|---|---|"]
    keys = ("layout_top1", "layout_top5", "latents_top1", "latents_top5")
    rows = [f"| {r['seed']} | " + " | ".join(f"{r[key]:.1%}" for key in keys) + " |" for r in measured["retrieval"]]
    errors = (
        f"Mean absolute error of the VAE, of 0 to 1: {measured['vae_error_base']} on the pictures of its world, "
        f"{measured['vae_error_style']} on the example style, which it has never seen."
    )
    return "\n".join([*head, *rows, "", errors])


def curve_table(run: RunFolder) -> str:
    """The mean loss of each tenth of the run."""
    story = Story(run.events)
    story.refresh()
    size = max(1, len(story.steps) // ROWS)
    tenths = [story.steps[start : start + size] for start in range(0, len(story.steps) - size + 1, size)]
    rows = [f"| {tenth[-1].images:,} | {sum(step.loss for step in tenth) / len(tenth):.4f} |" for tenth in tenths]
    return "\n".join(["| images seen | loss |", "|---|---|", *rows])


if __name__ == "__main__":
    typer.run(main)
