"""A model writes missing captions: `lorasmith caption`, a process of its own that goes on without the page."""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from ...datasets.captioners import SHORT_NAMES
from ...trainer.errors import UserError
from ...trainer.files import user_cache
from ...trainer.jobs import start_detached
from ...trainer.owner import Owner, ProcessId, write_process
from ..context import QUIETLY, Context, told
from ..html import esc, notice

FOLDER = ".captioning"
_FILL, _MACHINE, _ALL = "Only empty ones", "Also those a model wrote and nobody edited", "All of them"
OVERWRITE = {_FILL: "none", _MACHINE: "machine", _ALL: "all"}
_MODELS = [("BLIP, one sentence", "blip"), ("Florence-2, in detail", "florence2"), ("WD tagger, tags", "wd-tagger")]
_ADVICE = "What people wrote is kept unless you say otherwise. Read what comes out: models guess."
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.onnx")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_LINES = 40


@dataclass(frozen=True)
class Captioning:
    """The newest captioning of one folder, as its files tell it."""

    runs: Path
    folder: Path

    @property
    def _base(self) -> Path:
        return self.runs / FOLDER / hashlib.sha256(str(self.folder).encode("utf-8", "surrogatepass")).hexdigest()[:16]

    @property
    def log(self) -> Path:
        return self._base.with_suffix(".log")

    @property
    def _owner(self) -> Path:
        return self._base.with_suffix(".json")

    def start(self, model: str, overwrite: str = "none", prefix: str = "") -> None:
        """Start it.

        Raises:
            UserError: if one is under way.
        """
        if self.is_alive():
            raise UserError("captions are being written already", str(self.folder), "Wait until they are.")
        self.log.unlink(missing_ok=True)  # else what an earlier model said would be told of this one
        arguments = ["caption", str(self.folder), "--model", model, "--overwrite", overwrite]
        process = start_detached([*arguments, *(["--prefix", prefix] if prefix else [])], self.log)
        write_process(self._owner, ProcessId.of_started(process.pid))

    def is_alive(self) -> bool:
        """Whether its process still runs; another one that has its number by now does not count."""
        return Owner(self._owner).alive()

    def said(self) -> list[str]:
        """The lines of its log."""
        try:
            return self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []

    def sentence(self) -> str:
        """How far it is, or what came of it, as HTML; empty if there was none."""
        lines = self.said()
        if not self._owner.is_file():
            return ""
        if self.is_alive():
            return f'<p role="status">A model writes captions: {esc(lines[-1] if lines else "starting")}.</p>'
        error = next((line for line in lines if line.startswith("error: ")), "")
        if error:
            return notice(error.removeprefix("error: "), kind="error") + _log(lines)
        if any(line.startswith("written: ") for line in lines):
            told = next(line for line in lines if line.startswith("written: "))
            return notice(f"Captions are {told}", kind="note") + _log(lines)
        return notice("The model ended before it was done", "What it wrote stays; start it again.") + _log(lines)


def _log(lines: list[str]) -> str:
    shown = esc("\n".join(lines[-_LINES:]))
    return f'<details><summary>What it said</summary><pre class="log" tabindex="0">{shown}</pre></details>'


def whereabouts(model: str) -> str:
    """Whether a model is on this computer; nothing is asked of any other."""
    model = model.strip()
    if not model:
        return "Choose a model, or type the folder of one."
    if Path(model).expanduser().is_dir():
        return "It is in a folder on this computer."
    name = SHORT_NAMES.get(model, model)
    if not _HUB_ID.fullmatch(name):
        return "There is no such folder, and it is no name on the Hugging Face Hub."
    if is_here(name):
        return f"{name} is on this computer."
    free = shutil.disk_usage(_existing(user_cache())).free / 2**30
    return (
        f"{name} is not on this computer. The button downloads it from the Hugging Face Hub, up to 2 GB; "
        f"{free:.0f} GB are free here."
    )


def is_here(name: str) -> bool:
    """Whether the cache of the Hub holds the weights of a model."""
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(name, weights), str) for weights in _WEIGHTS)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def captioning_panel(context: Context, in_use: gr.State, trigger: gr.Textbox) -> tuple[gr.Accordion, gr.HTML]:
    """Choice of a model and the button; how far it is, is told on the clock of the page."""

    @told
    def start(folder: str, model: str, which: str, with_trigger: bool, trigger: str) -> str:
        if not folder:
            raise UserError("there are no images yet", "Folder of images", "Name a folder, or use the example images.")
        if Path(model).expanduser().is_dir():
            model = str(context.path(model))
        elif not _HUB_ID.fullmatch(SHORT_NAMES.get(model, model)):
            what = "is neither a folder here nor a name on the Hub"
            raise UserError(what, model or "Captioning model", "Choose one of the list.")
        captioning = Captioning(context.runs, Path(folder))
        captioning.start(model, OVERWRITE[which], trigger.strip() if with_trigger else "")
        return captioning.sentence()

    with gr.Accordion("Let a model write captions", open=False) as panel:
        gr.HTML(f'<p class="quiet">{esc(_ADVICE)}</p>', padding=False)
        with gr.Row():
            model = gr.Dropdown(
                _MODELS,
                value="blip",
                allow_custom_value=True,
                label="Captioning model",
                info="Or type a folder that holds a model, or its name on the Hub.",
                interactive=True,
            )
            which = gr.Radio(list(OVERWRITE), value=_FILL, label="Which captions", interactive=True)
        with_trigger = gr.Checkbox(False, label="Put the trigger word in front", interactive=True)
        where = gr.HTML(f'<p class="quiet">{esc(whereabouts("blip"))}</p>', padding=False)
        button = gr.Button("Write captions")
        said = gr.HTML(padding=False)
    model.change(lambda model: f'<p class="quiet">{esc(whereabouts(model or ""))}</p>', model, where, **QUIETLY)
    button.click(start, [in_use, model, which, with_trigger, trigger], said, **QUIETLY)
    return panel, said
