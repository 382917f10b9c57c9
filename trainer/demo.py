"""The demo: train the example style on the embedded base; show and measure what was learned on held-out concepts."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image
from torch import Tensor

from . import run
from .adapter import strength
from .console import Reporter, out, print_plan
from .encoder import to_tensor
from .example import EXAMPLES, TRIGGER, example_config
from .files import atomic_file, write_text
from .jobs import RunFolder
from .models import Base
from .plan import make_plan
from .sample import Drawing, before_after_grid, draw
from .score import (
    RETRIEVED,
    StyleMeasure,
    StyleScore,
    colour_layout_distance,
    light_layout,
    recall_at,
    retrieval_ranks,
    wrong_concept_distance,
)

IN_THE_GRID = 16


def run_demo(folder: Path) -> run.Finished:
    """Train, export and verify, draw the held-out concepts without and with the LoRA, and print the style measure."""
    plan = make_plan(example_config(folder))
    print_plan(plan)
    with Reporter() as report:
        finished = run.train(plan, report)
    if finished.stopped_by:
        return finished

    base = run.load_run(finished.run.path, None).base
    drawing = Drawing.of(plan.config.sample, plan.base.resolution)
    held_out = read_held_out()
    prompts = [f"{TRIGGER} {prompt}" for prompt, _ in held_out]
    with strength(base, 0):
        before = draw(base, prompts, drawing)
    after = draw(base, prompts, drawing)

    grid = _save_grid(finished.run, before, after, prompts)
    score = measure_style(base, before, after)
    write_text(finished.run.path / "style.json", json.dumps(asdict(score), indent=2) + "\n")
    out.print(f"measured on {len(prompts)} held-out concepts:")
    for sentence in score.sentences():
        out.print(sentence)
    _say_where(finished.run, finished.exports, grid, folder)
    return finished


def read_held_out() -> list[tuple[str, str]]:
    """(prompt, file name of its true picture) of the concepts that are never trained on."""
    rows = json.loads((EXAMPLES / "held-out.json").read_text(encoding="utf-8"))
    return [(prompt, file) for prompt, file in rows]


def measure_style(base: Base, before: Sequence[Image.Image], after: Sequence[Image.Image]) -> StyleScore:
    """How much of the example style the held-out pictures `after` have gained over `before`, in held-out order."""
    held_out = [file for _, file in read_held_out()]
    everything = sorted(file.name for file in (EXAMPLES / "measure/base").glob("*.webp"))
    others = [file for file in everything if file not in held_out]
    measure = StyleMeasure.fit(base.vae, _true("base", others), _true("target", others))
    true = _true("target", held_out)
    drawn = {name: to_tensor(pictures) for name, pictures in (("base", before), ("lora", after))}
    own = [everything.index(file) for file in held_out]

    def retrieval(pictures: Tensor) -> float:
        ranks = retrieval_ranks(light_layout(pictures), light_layout(_true("base", everything)), own)
        return recall_at(ranks, RETRIEVED)

    return StyleScore(
        accuracy=measure.accuracy(_true("base", held_out), true),
        probability_base=float(measure.probability(drawn["base"]).mean()),
        probability_lora=float(measure.probability(drawn["lora"]).mean()),
        layout_base=colour_layout_distance(drawn["base"], true).mean().item(),
        layout_lora=colour_layout_distance(drawn["lora"], true).mean().item(),
        layout_wrong=wrong_concept_distance(drawn["lora"], true).mean().item(),
        retrieval_base=retrieval(drawn["base"]),
        retrieval_lora=retrieval(drawn["lora"]),
    )


def _true(style: str, files: Sequence[str]) -> Tensor:
    return to_tensor([Image.open(EXAMPLES / "measure" / style / file) for file in files])


def _save_grid(trained: RunFolder, before: list[Image.Image], after: list[Image.Image], prompts: list[str]) -> Path:
    labels = [prompt.removeprefix(f"{TRIGGER} emoji of ") for prompt in prompts]
    first = slice(IN_THE_GRID)
    title = "Held-out concepts, never trained on"
    grid = before_after_grid(before[first], after[first], labels[first], title)
    path = trained.path / "before-after.png"
    with atomic_file(path) as temporary:
        grid.save(temporary, "PNG")
    return path


def _say_where(trained: RunFolder, exports: list[Path], grid: Path, folder: Path) -> None:
    out.print(f"before and after: {grid}", markup=False)
    for file in exports:
        out.print(f"LoRA: {file}", markup=False)
    out.print(f"everything else: {trained.path}", markup=False)
    command = "lorasmith" if shutil.which("lorasmith") else os.path.relpath(sys.argv[0])
    out.print(f"see it in a browser: {command} ui --runs {folder}", markup=False)
