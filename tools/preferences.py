"""`python -m tools.preferences`: does a run learn what a rater prefers, and keep its style?

The example style is trained on the pocket base, and draws prompts that are not held out, each with a few seeds. A
simulated rater (`tools/raters.py`) prefers one of each two pictures by a number that can be measured, such as how dark
or warm it is, and says so in a file of ratings. `lorasmith refine` learns from it. Then both runs draw the held-out
concepts: by how much has the number moved, in units of its spread there, and what is left of the style? Where too
little is, an earlier checkpoint is measured as well. Some minutes on two free cores; what is trained, drawn and
measured is kept, and not done again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from lorasmith.trainer import run as runs
from lorasmith.trainer.bases import POCKET
from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.configfile import merge, validate
from lorasmith.trainer.console import Reporter
from lorasmith.trainer.demo import read_held_out
from lorasmith.trainer.encoder import to_tensor
from lorasmith.trainer.example import EXAMPLES, TRIGGER, example_config
from lorasmith.trainer.files import write_text
from lorasmith.trainer.jobs import RunFolder
from lorasmith.trainer.plan import make_plan
from lorasmith.trainer.preferences.ratings import Pair, Ratings, Thumb
from lorasmith.trainer.preferences.refining import refined
from lorasmith.trainer.release import Trained
from lorasmith.trainer.sample import Drawing, contact_sheet, draw, save_previews
from lorasmith.trainer.score import StyleMeasure, colour_layout_distance

from .raters import RATERS

PARENT = "rated"
SHOWN = 16
SHIFT, KEPT = 1.0, 0.9
"""What is asked: by so many deviations what is preferred moves, and so much of the style score is left."""


@dataclass(frozen=True)
class Outcome:
    """What became of the held-out pictures at a step of the refined run."""

    rater: str
    seed: int
    pairs: int
    thumbs: int
    step: int
    steps: int
    """Of the whole run."""
    before: float
    after: float
    spread: float
    """Standard deviation of what the rater measures, over the held-out pictures before."""
    style_before: float
    """Mean probability of the target style, 0 to 1."""
    style_after: float
    layout_before: float
    """Mean colour-layout distance to the true picture, 0 to 1."""
    layout_after: float

    @property
    def shift(self) -> float:
        """In units of the spread."""
        return (self.after - self.before) / self.spread

    @property
    def style_kept(self) -> float:
        """Share of the style score that is left."""
        return self.style_after / self.style_before

    @property
    def is_as_asked(self) -> bool:
        """Whether it has learned what is preferred, and not lost the style over it."""
        return self.shift >= SHIFT and self.style_kept >= KEPT

    @property
    def row(self) -> str:
        """Of the table."""
        cells = (
            *(self.rater, self.seed, f"{self.step} of {self.steps}", f"{self.shift:+.2f}", f"{self.style_kept:.0%}"),
            *(f"{self.layout_before:.3f} to {self.layout_after:.3f}", "yes" if self.is_as_asked else "no"),
        )
        return f"| {' | '.join(map(str, cells))} |"


HEAD = """\
| prefers more | seed | step | moves by | style kept | distance to the true picture | both |
| --- | --- | --- | --- | --- | --- | --- |"""


def main(
    rater: Annotated[list[str] | None, typer.Option(help=f"What is preferred: {', '.join(RATERS)}; or all.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Of what is trained; 42 if not given.")] = None,
    prompts: Annotated[int, typer.Option(min=2, help="Prompts that are drawn to be rated.")] = 16,
    pictures: Annotated[int, typer.Option(min=2, help="Pictures of each.")] = 4,
    images: Annotated[int, typer.Option(min=8, help="Images that the run sees which is refined.")] = 1400,
    thumbs: Annotated[bool, typer.Option(help="Say thumbs up and down only, of different prompts.")] = False,
    suffix: Annotated[str, typer.Option(help="Behind the names of the refined runs.")] = "",
    set_: Annotated[list[str] | None, typer.Option("--set", help="Settings of the refined runs.")] = None,
    folder: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path(".cache/preferences"),
) -> None:
    """Train, draw, rate, refine and measure; a table of it."""
    typer.echo(HEAD)
    for number in seed or [42]:
        trained = parent_run(folder / f"seed-{number}", images, number)
        for one in rater or list(RATERS):
            for outcome in measured(trained, one, prompts, pictures, thumbs, one + suffix, set_ or []):
                typer.echo(outcome.row)


def measured(
    parent: RunFolder,
    rater: str,
    prompts: int,
    pictures: int,
    thumbs: bool = False,
    name: str = "refined",
    overrides: Sequence[str] = (),
) -> list[Outcome]:
    """What became of the held-out pictures: at the last step and, as long as the style is not kept, at the checkpoint
    before."""
    new = RunFolder(parent.path.parent / name)
    known = new.path / "outcomes.json"
    if known.exists():
        return [Outcome(**told) for told in json.loads(known.read_text("utf-8"))]
    ratings = rated(parent, RATERS[rater], prompts, pictures, thumbs, parent.path / "ratings" / f"{name}.jsonl")
    if not new.path.exists():
        _carry_out(validate(refined(parent, ratings, name), "refine", overrides))
    outcomes: list[Outcome] = []
    for step in reversed(new.saved_steps()):
        outcomes.append(compared(parent, new, step, rater, ratings))
        if outcomes[-1].style_kept >= KEPT:
            break
    write_text(known, json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n")
    return outcomes


def parent_run(folder: Path, images: int, seed: int = 42) -> RunFolder:
    """The example style, trained once."""
    run = RunFolder((folder / PARENT).absolute())
    if not run.path.exists():
        values = merge(
            example_config(folder).model_dump(), {"name": PARENT, "seed": seed, "budget": {"images": images}}
        )
        values |= {
            "recipe": "",
            "runs": str(folder.absolute()),
            "sample": values["sample"] | {"every": 0, "prompts": []},
        }
        _carry_out(validate(values))
    return run


def _carry_out(config: RunConfig) -> None:
    with Reporter() as report:
        finished = runs.train(make_plan(config), report)
    if finished.stopped_by:
        raise typer.Exit(1)


def prompts_to_rate(count: int) -> list[str]:
    """Concepts that are neither held out nor trained, evenly spread."""
    held_out = {prompt for prompt, _ in read_held_out()}
    trained = {file.read_text(encoding="utf-8").strip() for file in (EXAMPLES / "blueprint").glob("*.txt")}
    rows = json.loads((POCKET / "concepts.json").read_text("utf-8"))
    names = [prompt for prompt, _ in rows if prompt not in held_out | trained]
    return [f"{TRIGGER} {prompt}" for prompt in names[:: len(names) // count][:count]]


def rated(
    run: RunFolder, value: Callable[[Image.Image], float], prompts: int, pictures: int, thumbs: bool, file: Path
) -> Ratings:
    """What the rater says of pictures by the last checkpoint: of each prompt the two that differ most, then the two
    between them, and so on."""
    drawn = drawn_to_rate(run, prompts, pictures)
    ratings = Ratings(run, file)
    if file.exists():
        return ratings
    for number in range(prompts):
        ranked = [
            ratings.name_of(one) for one in sorted(drawn[number::prompts], key=lambda one: value(Image.open(one)))
        ]
        half, liked = len(ranked) // 2, number % 2 == 0
        if thumbs:
            for picture in ranked[half:] if liked else ranked[:half]:
                ratings.add(Thumb(picture=picture, up=liked))
        else:
            for place in range(half):
                ratings.add(Pair(better=ranked[-1 - place], worse=ranked[place]))
    return ratings


def drawn_to_rate(run: RunFolder, prompts: int, pictures: int) -> list[Path]:
    """All prompts with one noise each, then all with another; each picture has a seed of its own."""
    folder = run.path / "samples" / f"{prompts}-prompts-{pictures}-times"
    asked = prompts_to_rate(prompts) * pictures
    if not folder.is_dir():
        trained = runs.load_run(run.path, None)
        drawing = replace(drawing_of(trained), seed=trained.config.sample.seed + 1000)
        lora = f"{run.name} step {trained.step}"
        save_previews(folder, draw(trained.base, asked, drawing), asked, drawing, trained.base.info.short_name, lora)
    return sorted(folder.glob("*.png"), key=lambda file: int(file.stem))


def compared(parent: RunFolder, new: RunFolder, step: int, rater: str, ratings: Ratings) -> Outcome:
    """The held-out concepts by both runs, with the same noise."""
    held_out = read_held_out()
    files = dict(held_out).values()
    prompts = [f"{TRIGGER} {prompt}" for prompt, _ in held_out]
    others = [file.name for file in sorted((EXAMPLES / "measure/base").glob("*.webp")) if file.name not in files]
    before, after = _drawn(parent, None, tuple(prompts)), _drawn(new, step, tuple(prompts))
    vae = runs.load_run(parent.path, None).base.vae
    measure = StyleMeasure.fit(vae, to_tensor(_true("base", others)), to_tensor(_true("target", others)))
    true = to_tensor(_true("target", list(files)))
    values = [np.array([RATERS[rater](picture) for picture in pictures]) for pictures in (before, after)]
    labels = [prompt.removeprefix(f"{TRIGGER} emoji of ") for prompt in prompts[:SHOWN]]
    pictures = [one for pair in zip(before[:SHOWN], after[:SHOWN], strict=True) for one in pair]
    sheet = contact_sheet(
        pictures, [word for label in labels for word in (label, "refined")], "Held-out, before, refined"
    )
    sheet.save(new.path / f"before-after-{step}.png")
    said = ratings.standing()
    return Outcome(
        rater=rater,
        seed=new.read_config().seed,
        pairs=sum(isinstance(one, Pair) for one in said),
        thumbs=sum(isinstance(one, Thumb) for one in said),
        step=step,
        steps=max(new.saved_steps()),
        before=float(values[0].mean()),
        after=float(values[1].mean()),
        spread=float(values[0].std(ddof=1)),
        style_before=float(measure.probability(to_tensor(before)).mean()),
        style_after=float(measure.probability(to_tensor(after)).mean()),
        layout_before=colour_layout_distance(to_tensor(before), true).mean().item(),
        layout_after=colour_layout_distance(to_tensor(after), true).mean().item(),
    )


@lru_cache
def _drawn(run: RunFolder, step: int | None, prompts: tuple[str, ...]) -> list[Image.Image]:
    trained = runs.load_run(run.path, step)
    return draw(trained.base, prompts, drawing_of(trained))


def drawing_of(trained: Trained) -> Drawing:
    return Drawing.of(trained.config.sample, trained.base.info.resolution)


def _true(style: str, files: Sequence[str]) -> list[Image.Image]:
    return [Image.open(EXAMPLES / "measure" / style / file).convert("RGB") for file in files]


if __name__ == "__main__":
    typer.run(main)
