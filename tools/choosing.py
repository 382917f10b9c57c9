"""`python -m tools.choosing`: does the recommended cell beat the last checkpoint at strength 1, on held-out pairs?

For each style and seed a run is trained on the pocket base, its wall is scored as `lorasmith compare` does it, and the
held-out concepts are drawn twice: by the recommended cell, and by the last checkpoint at strength 1. What they should
have looked like is known, and the scores never saw it. Some minutes a run on two free cores.

Two styles: the example's, drawings by another hand in blue ink; and prints in four colours of an evening, made of the
base's own pictures.
With `--overfit` a run sees 4 images over and over, and must be called overfitted. With `--tune` strengths by block are
searched from the recommended cell, as `lorasmith tune-strength` does, and what looked best is measured as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from torch import Tensor

from lorasmith.trainer.adapter import load_adapter_state, strength
from lorasmith.trainer.bases import POCKET
from lorasmith.trainer.checkpoint import load_checkpoint
from lorasmith.trainer.choosing.choice import Choice, choice_file, write_choice
from lorasmith.trainer.choosing.judge import judge_wall
from lorasmith.trainer.choosing.mixture import Mixture
from lorasmith.trainer.choosing.page import notes_of, page_of
from lorasmith.trainer.choosing.tuned import write_tuned
from lorasmith.trainer.choosing.tunedsheet import tuned_file, tuned_sheet
from lorasmith.trainer.choosing.tuning import Tuning, task_of
from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.configfile import merge, validate
from lorasmith.trainer.console import Reporter
from lorasmith.trainer.demo import read_held_out
from lorasmith.trainer.encoder import to_tensor
from lorasmith.trainer.example import EXAMPLES, STYLE, example_config
from lorasmith.trainer.files import write_text
from lorasmith.trainer.jobs import RunFolder, create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.models import Base
from lorasmith.trainer.painting.sheet import order_sheet, save_sheet
from lorasmith.trainer.painting.studio import Studio
from lorasmith.trainer.painting.wall import wall_order
from lorasmith.trainer.plan import make_plan
from lorasmith.trainer.run import load_run
from lorasmith.trainer.sample import Drawing, draw
from lorasmith.trainer.score import StyleMeasure, colour_layout_distance
from lorasmith.trainer.soups import interpolate_run

PRINT = "print"
STYLES = (STYLE, PRINT)
_INKS = ((48, 24, 84), (196, 58, 92), (250, 148, 74), (255, 238, 200))
"""From dark to light."""
_PRINTS = 32
FEW = 4
"""Images of a run that is overfitted on purpose."""
FEW_SEEN = 5000


@dataclass(frozen=True)
class Measured:
    """A cell on the held-out pairs."""

    step: int
    strength: float
    distance: float
    """Mean colour-layout distance to the true picture, 0 to 1."""
    style: float
    """Mean probability of the target style, 0 to 1."""


@dataclass(frozen=True)
class Row:
    style: str
    seed: int
    recommended: Measured | None
    last: Measured

    @property
    def wins(self) -> bool:
        return self.recommended is not None and self.recommended.distance < self.last.distance

    def __str__(self) -> str:
        told = [f"{self.style:10}", f"{self.seed:4d}"]
        told += [_told(self.recommended) if self.recommended else "none", _told(self.last)]
        return "  ".join([*told, "yes" if self.wins else "same" if self.recommended == self.last else "no"])


def _told(cell: Measured) -> str:
    return f"{cell.step:5d} at {cell.strength:<4g} distance {cell.distance:.4f} style {cell.style:.2f}"


def main(
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0 on.")] = 10,
    style: Annotated[list[str] | None, typer.Option(help=f"{' or '.join(STYLES)}; both if not given.")] = None,
    images: Annotated[int, typer.Option(min=8, help="Images that a run sees.")] = 3600,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Another setting; may be repeated."),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where runs are kept; what is trained is not trained again.")] = Path(
        ".cache/choosing"
    ),
    every_cell: Annotated[bool, typer.Option(help="Measure all cells of the walls, to see what could be had.")] = False,
    tune: Annotated[bool, typer.Option(help="Search strengths by block as well.")] = False,
    overfit: Annotated[bool, typer.Option(help=f"Only train and judge a run on {FEW} images.")] = False,
    seen: Annotated[int, typer.Option(min=40, help="Images that this run sees, each many times.")] = FEW_SEEN,
) -> None:
    """Train, judge, measure, and print the table."""
    if overfit:
        run = trained(overfitted_config(folder, seen))
        print(judged(run).reason)
        return
    rows: list[Row] = []
    for name in style or STYLES:
        for seed in range(seeds):
            run = trained(run_config(name, seed, images, folder, set_ or []))
            rows.append(measured(run, name, seed, every_cell))
            print(rows[-1], flush=True)
            if tune:
                print(tuned(run, name), flush=True)
    for name in style or STYLES:
        own = [row for row in rows if row.style == name]
        same = sum(row.recommended == row.last for row in own)
        print(
            f"{name}: the recommended cell wins in {sum(row.wins for row in own)} of {len(own)}, is the last in {same}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# runs


def run_config(style: str, seed: int, images: int, folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """As the demo trains, with another seed, and with other settings."""
    data = EXAMPLES / STYLE if style == STYLE else print_images(folder / "images" / PRINT)
    example = example_config(folder)
    over = {
        "name": "-".join([style, str(images), *(re.sub("[^0-9A-Za-z.]+", "-", text) for text in overrides), str(seed)]),
        "seed": seed,
        "data": [{"path": str(data), "trigger": style, "caption_dropout": 0.1}],
        "budget": {"images": images},
        "save": {"every": max(1, images // example.budget.batch // 5)},
        "sample": {"prompts": [_called(prompt, style) for prompt in example.sample.prompts]},
    }
    return validate(merge(example.model_dump(exclude_unset=True), over), "tools.choosing", overrides)


def _called(prompt: str, style: str) -> str:
    return prompt.replace(STYLE, style, 1)


def overfitted_config(folder: Path, seen: int = FEW_SEEN) -> RunConfig:
    """Few images, seen many hundred times each."""
    source = sorted((EXAMPLES / STYLE).glob("*.png"))[:FEW]
    data = folder / "images" / f"{STYLE}-{FEW}"
    data.mkdir(parents=True, exist_ok=True)
    for file in source:
        for each in (file, file.with_suffix(".txt")):
            (data / each.name).write_bytes(each.read_bytes())
    config = run_config(STYLE, 0, seen, folder)
    over = {
        "name": f"overfit-{seen}",
        "data": [{"path": str(data), "trigger": STYLE}],
        "budget": {"batch": FEW},
        "save": {"every": seen // FEW // 5},
    }
    return validate(merge(config.model_dump(exclude_unset=True), over), source="tools.choosing")


def trained(config: RunConfig) -> RunFolder:
    """The run, which is trained unless it is there; without previews and without an export."""
    run = RunFolder(Path(config.runs, config.name).absolute())
    if run.saved_steps():
        return run
    prompts = config.sample.prompts
    plan = make_plan(config)
    with Reporter() as report:
        Trainer(plan, create_run(plan.config), report).train(lambda: False)
    assert prompts == run.read_config().sample.prompts
    return run


# ---------------------------------------------------------------------------------------------------------------------
# what is measured


def judged(run: RunFolder) -> Choice:
    """As `lorasmith compare` does it, with all that it writes."""
    order = wall_order(run, prompts=run.read_config().sample.prompts)
    choice = judge_wall(order, Studio())
    save_sheet(order_sheet(order, run.name, notes_of(choice)), order.sheet())
    write_text(order.sheet().with_suffix(".html"), page_of(order, run.name, choice))
    write_choice(choice, choice_file(order))
    return choice


@dataclass(frozen=True)
class HeldOut:
    """Concepts that no run is trained on, with what they should look like."""

    prompts: list[str]
    true: Tensor
    drawing: Drawing
    measure: StyleMeasure

    @classmethod
    def of(cls, run: RunFolder, base: Base, style: str) -> HeldOut:
        held_out = read_held_out()
        measured = dict(held_out).values()
        others = [file.name for file in sorted(_base_folder().glob("*.webp")) if file.name not in measured]
        true, target = (target_pictures(style, files) for files in ([file for _, file in held_out], others))
        measure = StyleMeasure.fit(base.vae, to_tensor(base_pictures(others)), to_tensor(target))
        drawing = Drawing.of(run.read_config().sample, base.info.resolution)
        return cls([f"{style} {prompt}" for prompt, _ in held_out], to_tensor(true), drawing, measure)

    def measured(self, base: Base) -> tuple[float, float]:
        """Distance and style of what the base draws as it acts now."""
        pictures = to_tensor(draw(base, self.prompts, self.drawing))
        distance = colour_layout_distance(pictures, self.true).mean().item()
        return distance, float(self.measure.probability(pictures).mean())


def measured(run: RunFolder, style: str, seed: int, every_cell: bool) -> Row:
    choice = judged(run)
    base = load_run(run.path, None).base
    held_out = HeldOut.of(run, base, style)

    def measure_cell(step: int, at: float) -> Measured:
        load_adapter_state(base, load_checkpoint(run.checkpoint(step)).adapter)
        with strength(base, at):
            return Measured(step, at, *held_out.measured(base))

    best, last = choice.recommended, max(run.saved_steps())
    wanted = [(cell.step, cell.strength) for cell in choice.cells if every_cell]
    wanted += [(last, 1.0), *([(best.step, best.strength)] if best else [])]
    found = {cell: measure_cell(*cell) for cell in dict.fromkeys(wanted)}
    told = [asdict(one) | {"scores": asdict(choice.cell(*cell).scores)} for cell, one in found.items()]
    write_text(run.path / "held-out.json", json.dumps(told, indent=2) + "\n")
    return Row(style, seed, found[best.step, best.strength] if best else None, found[last, 1.0])


def tuned(run: RunFolder, style: str) -> str:
    """What a search of strengths says of a run whose wall is judged, and how its start and what looked best do."""
    task = task_of(run)
    tuning = Tuning(task, Studio())
    found = tuning.search()
    write_tuned(found, tuned_file(task))
    save_sheet(tuned_sheet(task, found), tuned_file(task).with_suffix(".png"))
    confirmed = found.verdict.confirmed
    mixtures = [one.mixture for one in confirmed] if confirmed else [task.start]
    told = [f"{len(found.tried)} tried, {found.drawn} pictures drawn. {found.verdict.reason}"]
    return "\n  ".join(told + [_on_held_out(run, mixture, style) for mixture in mixtures])


def _on_held_out(run: RunFolder, mixture: Mixture, style: str) -> str:
    if mixture.is_mean:
        mean = interpolate_run(run.path, mixture.steps)
        base, acting = mean.trained.base, mean.at(mixture.strengths)
    else:
        base = load_run(run.path, mixture.steps[0]).base
        acting = strength(base, mixture.strengths)
    held_out = HeldOut.of(run, base, style)
    with acting:
        distance, probability = held_out.measured(base)
    return f"{mixture.title}: distance {distance:.4f} style {probability:.2f}"


# ---------------------------------------------------------------------------------------------------------------------
# pictures


def base_pictures(files: Sequence[str]) -> list[Image.Image]:
    return [Image.open(_base_folder() / file).convert("RGB") for file in files]


def target_pictures(style: str, files: Sequence[str]) -> list[Image.Image]:
    """What the same concepts look like in a style."""
    if style == PRINT:
        return [printed(picture) for picture in base_pictures(files)]
    return [Image.open(EXAMPLES / "measure/target" / file).convert("RGB") for file in files]


def printed(picture: Image.Image) -> Image.Image:
    """A print in four inks, one for each quarter of the lightness."""
    light = np.asarray(picture.convert("L"))
    return Image.fromarray(np.array(_INKS, dtype=np.uint8)[light // 64])


def print_images(folder: Path) -> Path:
    """The training set: concepts that are not held out, evenly spread over all."""
    held_out = dict(read_held_out()).values()
    captions = {Path(file).stem: prompt for prompt, file in json.loads((POCKET / "concepts.json").read_text("utf-8"))}
    files = [file.name for file in sorted(_base_folder().glob("*.webp")) if file.name not in held_out]
    chosen = files[:: len(files) // _PRINTS][:_PRINTS]
    folder.mkdir(parents=True, exist_ok=True)
    for file, picture in zip(chosen, target_pictures(PRINT, chosen), strict=True):
        picture.save(folder / f"{Path(file).stem}.png")
        write_text(folder / f"{Path(file).stem}.txt", captions[Path(file).stem] + "\n")
    return folder


def _base_folder() -> Path:
    return EXAMPLES / "measure/base"


if __name__ == "__main__":
    typer.run(main)
