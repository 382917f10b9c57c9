"""`python -m tools.kinds`: train the example style in every way there is, and compare: style, content, size, time.

Every row of the table in docs/training.md is a run of the demo's recipe with the settings it names; what has been
measured in FOLDER is not measured again. An hour on two CPU cores.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lorasmith.trainer.adapter import strength
from lorasmith.trainer.configfile import validate
from lorasmith.trainer.console import Reporter
from lorasmith.trainer.demo import measure_style, read_held_out
from lorasmith.trainer.events import Event, Step
from lorasmith.trainer.example import EXAMPLES, STYLE, TRIGGER
from lorasmith.trainer.files import write_text
from lorasmith.trainer.jobs import create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.plan import Plan, make_plan
from lorasmith.trainer.run import load_run, train
from lorasmith.trainer.sample import Drawing, contact_sheet, draw

IMAGES = 1800
TIMED_STEPS = 6
DOCUMENT = Path("docs/training.md")
_TABLE = re.compile(r"(<!-- kinds -->\n).*?(<!-- end -->)", re.DOTALL)


def _faster(factor: int) -> list[str]:
    """The demo's learning rates times a factor."""
    return [f"optimizer.lr={factor * 7e-4:g}", f"optimizer.text_encoder_lr={factor * 2e-4:g}"]


KINDS: dict[str, list[str]] = {
    "lora, the demo's settings": [],
    "lora, attention alone": ["adapter.targets=attention"],
    "lora, rank 4": ["adapter.rank=4", "adapter.alpha=4.0"],
    "rslora": ["adapter.rslora=true", "adapter.alpha=4.0"],
    "dora": ["adapter.kind=dora"],
    "loha": ["adapter.kind=loha", *_faster(4)],
    "lokr": ["adapter.kind=lokr", "adapter.decompose_factor=4", *_faster(4)],
    "oft": ["adapter.kind=oft", "adapter.targets=all-linear", *_faster(3)],
    "boft": ["adapter.kind=boft", "adapter.targets=all-linear", "adapter.block_size=8", *_faster(3)],
    "full": ["adapter.kind=full", "optimizer.lr=1e-4", "optimizer.text_encoder_lr=5e-5"],
    "init pissa": ["adapter.init=pissa"],
    "init olora": ["adapter.init=olora"],
    "init eva": ["adapter.init=eva"],
    "LoRA+": ["optimizer.loraplus_ratio=4", "optimizer.lr=3e-4"],
    "two new tokens": ["adapter.new_tokens=2", "optimizer.token_lr=1e-3"],
    "weighting none": ["objective.weighting=none"],
    "weighting soft-min-snr": ["objective.weighting=soft-min-snr"],
    "weighting debiased": ["objective.weighting=debiased"],
    "loss l1": ["objective.loss=l1"],
    "loss huber": ["objective.loss=huber"],
    "noise offset 0.05": ["objective.noise_offset=0.05"],
    "multi-resolution noise": ["objective.multires_noise_iterations=4"],
    "input perturbation 0.1": ["objective.input_perturbation=0.1"],
    "time-steps logit-normal": ["objective.timesteps=logit-normal"],
    "average of weights, 0.98": ["optimizer.ema_decay=0.98"],
    "lion": ["optimizer.kind=lion", "optimizer.lr=1e-4", "optimizer.text_encoder_lr=3e-5"],
    "prodigy": ["optimizer.kind=prodigy"],
    "prodigy, d_coef 0.3": ["optimizer.kind=prodigy", "optimizer.options.d_coef=0.3"],
    "adamw-schedulefree": ["optimizer.kind=adamw-schedulefree", "optimizer.schedule=constant"],
}
"""What is compared, by what differs from the demo's recipe."""


def main(
    folder: Annotated[Path, typer.Option(help="Where runs are made, and their results kept.")] = Path(".cache/kinds"),
    images: Annotated[int, typer.Option(help="Images seen by each run.")] = IMAGES,
) -> None:
    """Train and measure every kind, and write the table into docs/training.md."""
    results = {name: measured(name, settings, folder, images) for name, settings in KINDS.items()}
    for name, settings in KINDS.items():
        results[name]["step_seconds"] = step_seconds(name, settings, folder)
    text = DOCUMENT.read_text(encoding="utf-8")
    write_text(DOCUMENT, _TABLE.sub(lambda found: f"{found[1]}{table(results, images)}{found[2]}", text))
    print(f"written into {DOCUMENT}")


def measured(name: str, settings: list[str], folder: Path, images: int) -> dict[str, Any]:
    """The result of one run, which is made if it is not there yet."""
    file = folder / f"{_plain(name)}-{images}.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    plan = plan_of(file.stem, folder, [f"budget.images={images}", *settings])
    with Reporter() as report:
        finished = train(plan, report)
    base, drawing = load_run(finished.run.path, None).base, Drawing.of(plan.config.sample, plan.base.resolution)
    prompts = [f"{TRIGGER} {prompt}" for prompt, _ in read_held_out()]
    with strength(base, 0):
        before = draw(base, prompts, drawing)
    after = draw(base, prompts, drawing)
    contact_sheet(after, [prompt.partition(" of ")[2] for prompt in prompts], name).save(file.with_suffix(".png"))
    result = {
        "settings": settings,
        "parameters": sum(part.parameters for part in plan.parts),
        "bytes": finished.exports[0].stat().st_size,
        "score": asdict(measure_style(base, before, after)),
    }
    shutil.rmtree(finished.run.path)
    write_text(file, json.dumps(result, indent=2) + "\n")
    return result


def step_seconds(name: str, settings: list[str], folder: Path) -> float:
    """The shortest of a few steps: what else the computer does makes steps longer, never shorter."""
    plan = plan_of(f"{_plain(name)}-timed", folder, [f"budget.images={8 * TIMED_STEPS}", *settings])
    events: list[Event] = []
    run = create_run(plan.config)
    Trainer(plan, run, events.append).train(lambda: False)
    shutil.rmtree(run.path)
    return min(event.seconds for event in events if isinstance(event, Step))


def plan_of(name: str, folder: Path, settings: list[str]) -> Plan:
    values = {
        "name": name,
        "runs": str(folder),
        "recipe": "demo",
        "data": [{"path": str(EXAMPLES / STYLE), "trigger": TRIGGER, "caption_dropout": 0.1}],
    }
    return make_plan(validate(values, "kinds", ["sample.every=0", "save.every=0", *settings]))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def table(results: dict[str, dict[str, Any]], images: int) -> str:
    """The results as a Markdown table, times of a step as shares of plain LoRA's."""
    unit = next(iter(results.values()))["step_seconds"]
    base = next(iter(results.values()))["score"]
    untrained = f"the style is {base['probability_base']:.2f} and the content {base['retrieval_base']:.0%}"
    return (
        f"{images} images seen by each; without any training {untrained}.\n\n"
        "| | settings beside the demo's | thousand parameters | file, MiB | style | content | step |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |\n"
        + "".join(_row(name, one, one["step_seconds"] / unit) for name, one in results.items())
    )


def _row(name: str, result: dict[str, Any], time_taken: float) -> str:
    score, thousands, size = result["score"], result["parameters"] / 1e3, result["bytes"] / 2**20
    return (
        f"| {name} | {_settings(result['settings'])} | {thousands:,.0f} | {size:.1f} "
        f"| {score['probability_lora']:.2f} | {score['retrieval_lora']:.0%} | {time_taken:.1f} |\n"
    )


def _settings(settings: list[str]) -> str:
    return ", ".join(f"`{setting.partition('.')[2]}`" for setting in settings)


if __name__ == "__main__":
    typer.run(main)
