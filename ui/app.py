"""The browser app: start a run with three answers, watch runs, take their files. All it knows is in run folders."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any

import gradio as gr
import pandas as pd

from ..configs import recipe_for
from ..trainer.bases import inspect_base
from ..trainer.configfile import to_toml, validate
from ..trainer.console import length_sentence
from ..trainer.errors import LorasmithError, UserError
from ..trainer.events import Sampled, Step, history
from ..trainer.files import write_text
from ..trainer.jobs import RunFolder, check_name_is_free, find_runs, start_detached
from ..trainer.plan import make_plan
from .share import clients_of, files_of

REFRESH_SECONDS = 2
EXAMPLE = "blueprint"
"""The first run that `lorasmith demo` makes in a folder."""
_SMOOTHING = 0.95
_LINES_OF_A_LOG = 12


@dataclass
class Starts:
    """The processes that this page has started, by the name of their run; what each says is in `<name>.log`."""

    folder: Path
    processes: dict[str, Popen[Any]] = field(default_factory=dict)
    newest: str = ""

    def start(self, name: str, arguments: list[str]) -> None:
        self.processes[name] = start_detached(arguments, self.folder / f"{name}.log")
        self.newest = name

    def alive(self, name: str) -> bool:
        return name in self.processes and self.processes[name].poll() is None

    def last_words(self, name: str) -> str:
        """The end of what the process said, as Markdown; empty if it was not started from a page."""
        log = self.folder / f"{name}.log"
        if not log.is_file():
            return ""
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LINES_OF_A_LOG:]
        return "\n\n~~~text\n" + "\n".join(lines) + f"\n~~~\nAll of it: `{log}`"

    def news(self, name: str) -> str:
        """Where a start stands that has no run folder: not yet, or because it failed."""
        if not name or (self.folder / name / "config.toml").is_file():
            return ""
        if self.alive(name):
            return f"**{name}** is being started."
        words = self.last_words(name)
        return words and f"**{name}** could not be started:{words}"


def build(folder: Path) -> gr.Blocks:
    """The page over a folder of runs."""
    with gr.Blocks(title="Lorasmith", analytics_enabled=False) as page:
        gr.Markdown("# Lorasmith\nFrom a folder of images to a style LoRA.")
        starts, news = Starts(folder), gr.Markdown()
        with gr.Tab("Runs"):
            _runs_tab(page, starts, news)
        with gr.Tab("New run"):
            _new_run_tab(starts)
    return page


def serve(folder: Path, port: int) -> None:
    """Serve the page on this computer only, until Ctrl-C; runs go on without it.

    Raises:
        UserError: if the port is in use.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = build(folder)
    try:
        page.launch(server_name="127.0.0.1", server_port=port, allowed_paths=[str(folder.absolute())])
    except OSError as error:
        raise UserError(
            f"the port {port} is in use", "--port", f"Take another one: --port {port % 65535 + 1}"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# runs


def _runs_tab(page: gr.Blocks, starts: Starts, news: gr.Markdown) -> None:
    folder = starts.folder
    with gr.Row():
        picked = gr.Dropdown([], label="Run", scale=4)
        stop = gr.Button("Stop and save", scale=1)
    sentence = gr.Markdown()
    example = gr.Button("Train the example", variant="primary", visible=False)
    loss = gr.LinePlot(x="step", y="loss", color="kind", title="Loss", height=260, visible=False)
    previews = gr.Gallery(
        label="Previews: the untouched base first", columns=4, height="auto", object_fit="contain", visible=False
    )
    files = gr.Files(label="Files to share", interactive=False, visible=False)
    clients = gr.Dataframe(label="What each client makes of them", interactive=False, wrap=True, visible=False)

    shown = gr.State(None)
    views: list[Any] = [news, picked, shown, sentence, example, loss, previews, files, clients]

    def refresh(name: str | None, before: Any) -> list[Any]:
        return view(starts, name, before)

    def train_the_example() -> list[Any]:
        starts.start(EXAMPLE, ["demo", "--out", str(folder.absolute())])
        return view(starts, None, None)

    gr.Timer(REFRESH_SECONDS).tick(refresh, [picked, shown], views, show_progress="hidden", api_visibility="private")
    picked.change(refresh, [picked, shown], views, show_progress="hidden", api_visibility="private")
    page.load(lambda: view(starts, None, None), None, views, show_progress="hidden", api_visibility="private")
    example.click(train_the_example, None, views, show_progress="hidden", api_visibility="private")
    stop.click(lambda name: ask_to_stop(folder, name), picked, sentence, api_visibility="private")

    def api_status(name: str) -> str:
        return sentence_of(starts, name)

    def api_stop(name: str) -> str:
        return ask_to_stop(folder, name)

    gr.api(api_status, api_name="status")
    gr.api(api_stop, api_name="stop")


def view(starts: Starts, name: str | None, before: Any) -> list[Any]:
    """News, the run picker, what is shown now, a run's sentence, the example's button, losses, previews, files and what
    clients make of them.

    Without a name the newest run is shown; without a run, how to make one. What is empty is hidden; pictures and files
    are sent again only when there are new ones.
    """
    folder, news = starts.folder, starts.news(starts.newest)
    names = [run.name for run in find_runs(folder)]
    name = name if name in names else next(iter(names), None)
    picker = gr.Dropdown(choices=names, value=name)
    if name is None:
        nothing = [gr.update(value=None, visible=False)] * 4
        example = gr.update(visible=not starts.alive(starts.newest))
        return [news, picker, None, sentence_of(starts, name), example, *nothing]
    run = RunFolder(folder / name)
    previews, files = previews_of(run), files_of(run)
    now = (name, len(previews), tuple(files))
    made = [previews, files, clients_of(run)]
    fresh = [gr.update(value=v, visible=len(v) > 0) if now != before else gr.skip() for v in made]
    loss = losses(run)
    plot = gr.update(value=loss, visible=not loss.empty)
    return [news, picker, now, sentence_of(starts, name), gr.update(visible=False), plot, *fresh]


def sentence_of(starts: Starts, name: str | None) -> str:
    """Where a run stands; of one that failed, with the last that its process said."""
    if not name:
        return "There are no runs yet. Start one under *New run*, or see what a run is with the example, in minutes."
    if news := starts.news(name):
        return news
    status = RunFolder(starts.folder / name).status()
    return f"**{name}**: {status.sentence}{starts.last_words(name) if status.state == 'failed' else ''}"


def losses(run: RunFolder) -> pd.DataFrame:
    """Raw and smoothed loss by step."""
    rows, smooth = [], None
    for record in history(run.events):
        if isinstance(record.event, Step):
            loss = record.event.loss
            smooth = loss if smooth is None else _SMOOTHING * smooth + (1 - _SMOOTHING) * loss
            rows += [(record.event.step, loss, "each step"), (record.event.step, smooth, "smoothed")]
    return pd.DataFrame(rows, columns=["step", "loss", "kind"]).astype({"step": int, "loss": float})


def previews_of(run: RunFolder) -> list[tuple[str, str]]:
    """(file, label) of all previews, step by step."""
    return [
        (str(run.path / record.event.folder / f"{number:02d}.png"), f"step {record.event.step}: {prompt}")
        for record in history(run.events)
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


def _new_run_tab(starts: Starts) -> None:
    images = gr.Textbox(label="Images", info="A folder on this computer; captions in .txt files beside the images.")
    base = gr.Textbox("pocket", label="Base model", info="A Hub id, a diffusers folder, or pocket for a first try.")
    name = gr.Textbox(label="Name", info="The run's folder and the LoRA file are called so.")
    trigger = gr.Textbox(label="Trigger word", info="The word that will call the style; may be empty.")
    with gr.Row():
        plan_button, train_button = gr.Button("Plan"), gr.Button("Train", variant="primary")
    answer = gr.Markdown()
    answers: list[Any] = [images, base, name, trigger]
    plan_button.click(lambda *given: plan_of(starts.folder, *given)[0], answers, answer, api_name="plan")
    train_button.click(lambda *given: start(starts, *given), answers, answer, api_name="train")


def plan_of(folder: Path, images: str, base: str, name: str, trigger: str) -> tuple[str, str]:
    """The plan in a few lines of Markdown, and its complete TOML; every problem is shown as an error."""
    try:
        found = inspect_base(base)
        recipe = recipe_for(base, found.family, found.prediction)
        given = {
            "name": name,
            "recipe": recipe,
            "runs": str(folder.absolute()),
            "base": {"model": base},
            "data": [{"path": str(Path(images).absolute()) if images else "", "trigger": trigger}],
        }
        plan = make_plan(validate(given, source="new run"))
        check_name_is_free(plan.config)
    except LorasmithError as error:
        raise gr.Error(str(error), duration=None) from error
    facts = plan.facts()
    lines = [
        f"**{name}** on {plan.base.title}, recipe {recipe}",
        f"- {facts['images']} images, {facts['captions']} captions used",
        f"- {length_sentence(plan)}",
        *(f"- **look:** {warning}" for warning in facts["warnings"]),
    ]
    return "\n".join(lines), to_toml(plan.config)


def start(starts: Starts, images: str, base: str, name: str, trigger: str) -> str:
    """Write the configuration and train it in a process of its own."""
    sentence, toml = plan_of(starts.folder, images, base, name, trigger)
    file = starts.folder / f"{name}.toml"
    write_text(file, toml)
    starts.start(name, ["train", str(file.absolute())])
    return f"{sentence}\n\nStarted. Look under *Runs*; closing this page does not stop it."
