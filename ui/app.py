"""The browser app: start a run with three answers, watch runs, take their files. All it knows is in run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from ..configs import read_recipe
from ..trainer.bases import inspect_base
from ..trainer.configfile import merge, to_toml, validate
from ..trainer.errors import LorasmithError
from ..trainer.events import Sampled, Step, read_events
from ..trainer.files import write_text
from ..trainer.jobs import RunFolder, check_name_is_free, find_runs, start_detached
from ..trainer.plan import make_plan

REFRESH_SECONDS = 2
_SMOOTHING = 0.95


def build(folder: Path) -> gr.Blocks:
    """The page over a folder of runs."""
    with gr.Blocks(title="Lorasmith", analytics_enabled=False) as page:
        gr.Markdown("# Lorasmith\nFrom a folder of images to a style LoRA.")
        with gr.Tab("Runs"):
            _runs_tab(page, folder)
        with gr.Tab("New run"):
            _new_run_tab(folder)
    return page


def serve(folder: Path, port: int) -> None:
    """Serve the page on this computer only, until Ctrl-C; runs go on without it."""
    folder.mkdir(parents=True, exist_ok=True)
    build(folder).launch(server_name="127.0.0.1", server_port=port, allowed_paths=[str(folder.absolute())])


# ---------------------------------------------------------------------------------------------------------------------
# runs


def _runs_tab(page: gr.Blocks, folder: Path) -> None:
    with gr.Row():
        picked = gr.Dropdown([], label="Run", scale=4)
        stop = gr.Button("Stop and save", scale=1)
    sentence = gr.Markdown()
    loss = gr.LinePlot(x="step", y="loss", color="kind", title="Loss", height=260)
    previews = gr.Gallery(label="Previews: the untouched base first", columns=4, height="auto", object_fit="contain")
    files = gr.Files(label="Files to share", interactive=False)

    shown = gr.State(None)
    views: list[Any] = [picked, shown, sentence, loss, previews, files]

    def refresh(name: str | None, before: Any) -> list[Any]:
        return view(folder, name, before)

    gr.Timer(REFRESH_SECONDS).tick(refresh, [picked, shown], views, show_progress="hidden", api_visibility="private")
    picked.change(refresh, [picked, shown], views, show_progress="hidden", api_visibility="private")
    page.load(lambda: view(folder, None, None), None, views, show_progress="hidden", api_visibility="private")
    stop.click(lambda name: ask_to_stop(folder, name), picked, sentence, api_visibility="private")

    def api_status(name: str) -> str:
        return sentence_of(folder, name)

    def api_stop(name: str) -> str:
        return ask_to_stop(folder, name)

    gr.api(api_status, api_name="status")
    gr.api(api_stop, api_name="stop")


def view(folder: Path, name: str | None, before: Any) -> list[Any]:
    """The run picker, what is shown now, and a run's sentence, losses, previews and files.

    Without a name the newest run is shown. Pictures and files are sent again only when there are new ones.
    """
    names = [run.name for run in find_runs(folder)]
    name = name if name in names else next(iter(names), None)
    picker = gr.Dropdown(choices=names, value=name)
    if name is None:
        return [picker, None, sentence_of(folder, name), losses(None), [], []]
    run = RunFolder(folder / name)
    previews, files = previews_of(run), [str(path) for path in sorted(run.exports.glob("*.*"))]
    now = (name, len(previews), tuple(files))
    fresh = [previews, files] if now != before else [gr.skip(), gr.skip()]
    return [picker, now, sentence_of(folder, name), losses(run), *fresh]


def sentence_of(folder: Path, name: str | None) -> str:
    """Where a run stands."""
    if not name:
        return "There are no runs yet. Start one under *New run*, or with `lorasmith demo`."
    return f"**{name}**: {RunFolder(folder / name).status().sentence}"


def losses(run: RunFolder | None) -> pd.DataFrame:
    """Raw and smoothed loss by step."""
    rows, smooth = [], None
    for record in read_events(run.events) if run else []:
        if isinstance(record.event, Step):
            loss = record.event.loss
            smooth = loss if smooth is None else _SMOOTHING * smooth + (1 - _SMOOTHING) * loss
            rows += [(record.event.step, loss, "each step"), (record.event.step, smooth, "smoothed")]
    return pd.DataFrame(rows, columns=["step", "loss", "kind"])


def previews_of(run: RunFolder) -> list[tuple[str, str]]:
    """(file, label) of all previews, step by step."""
    return [
        (str(run.path / record.event.folder / f"{number:02d}.png"), f"step {record.event.step}: {prompt}")
        for record in read_events(run.events)
        if isinstance(record.event, Sampled)
        for number, prompt in enumerate(record.event.prompts)
    ]


def ask_to_stop(folder: Path, name: str | None) -> str:
    """Ask a run to save and stop."""
    if not name:
        raise gr.Error("There is no run to stop.")
    try:
        RunFolder(folder / name).ask_to_stop()
    except LorasmithError as error:
        raise gr.Error(str(error)) from error
    return f"**{name}** will save and stop after its current step."


# ---------------------------------------------------------------------------------------------------------------------
# a new run


def _new_run_tab(folder: Path) -> None:
    images = gr.Textbox(label="Images", info="A folder on this computer; captions in .txt files beside the images.")
    base = gr.Textbox("pocket", label="Base model", info="A Hub id, a diffusers folder, or pocket for a first try.")
    name = gr.Textbox(label="Name", info="The run's folder and the LoRA file are called so.")
    trigger = gr.Textbox(label="Trigger word", info="The word that will call the style; may be empty.")
    with gr.Row():
        plan_button, train_button = gr.Button("Plan"), gr.Button("Train", variant="primary")
    answer = gr.Markdown()
    answers: list[Any] = [images, base, name, trigger]
    plan_button.click(lambda *given: plan_of(folder, *given)[0], answers, answer, api_name="plan")
    train_button.click(lambda *given: start(folder, *given), answers, answer, api_name="train")


def plan_of(folder: Path, images: str, base: str, name: str, trigger: str) -> tuple[str, str]:
    """The plan in a few lines of Markdown, and its complete TOML; every problem is shown as an error."""
    try:
        recipe = "demo" if base == "pocket" else f"style-{inspect_base(base).family}"
        given = {
            "name": name,
            "runs": str(folder.absolute()),
            "base": {"model": base},
            "data": [{"path": str(Path(images).absolute()) if images else "", "trigger": trigger}],
        }
        plan = make_plan(validate(merge(read_recipe(recipe), given), source="new run"))
        check_name_is_free(plan.config)
    except LorasmithError as error:
        raise gr.Error(str(error), duration=None) from error
    facts = plan.facts()
    lines = [
        f"**{name}** on {plan.base.title}, recipe {recipe}",
        f"- {facts['images']} images, {facts['captions']} captions used",
        f"- {facts['steps']} steps of {facts['batch']} images; each image {facts['shows_per_image']:g} times",
        *(f"- **look:** {warning}" for warning in facts["warnings"]),
    ]
    return "\n".join(lines), to_toml(plan.config)


def start(folder: Path, images: str, base: str, name: str, trigger: str) -> str:
    """Write the configuration and train it in a process of its own."""
    sentence, toml = plan_of(folder, images, base, name, trigger)
    file = folder / f"{name}.toml"
    write_text(file, toml)
    start_detached(["train", str(file.absolute())])
    return f"{sentence}\n\nStarted. Look under *Runs*; closing this page does not stop it."
