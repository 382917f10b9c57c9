"""What came of an export: how it stands, its files, what clients make of them, and where they go from here."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from ...trainer.errors import UserError
from ...trainer.jobs import RunFolder
from ..context import FOLLOWING, QUIETLY, Context, told
from ..html import esc, notice
from .card import CSS as CARD_CSS
from .card import card_html
from .copying import copy_to
from .errand import Stand
from .exported import CSS as FILES_CSS
from .exported import bundles_of, cards_of, files_html, files_of, names_of, verified_html, weights_of
from .exporting import export_html, exports_of, start_export
from .publishing import contents_html, publish, upload_html, uploads_of
from .remembered import remember, remembered
from .wish import WishForm, wish_of


class Outcome:
    """How the export stands, its files, and where they go."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.stand = gr.HTML(padding=False)
        gr.Markdown("### Files")
        self.files = gr.HTML(css_template=FILES_CSS, padding=False)
        with gr.Accordion("What each client makes of the files", open=True):
            self.verified = gr.HTML(padding=False)
        with gr.Accordion("Model card", open=False):
            self.card = gr.HTML(css_template=CARD_CSS, padding=False)
        with gr.Accordion("Copy into the folder of a WebUI or ComfyUI", open=False):
            self.file = gr.Dropdown([], label="File", interactive=True)
            self.folder = gr.Textbox(
                partial(remembered, context.runs, "folder"),  # read when a page is opened
                label="Folder",
                info="Of the program, or the one in it where its LoRAs are, on this computer. Remembered.",
            )
            self.companions = gr.Checkbox(
                True, label="With its picture and notes", info="A1111, Forge and InvokeAI show them beside its name."
            )
            self.copy = gr.Button("Copy")
            self.copied = gr.HTML(padding=False)
        with gr.Accordion("Publish on the Hugging Face Hub", open=False):
            self._publishing()
        self.seen = gr.State(None)

    def _publishing(self) -> None:
        gr.Markdown("Nothing is sent until you press the button. The name, the files and the token then go to the Hub.")
        self.upload = gr.Dropdown([], label="Bundle", interactive=True)
        self.contents = gr.HTML(padding=False)
        self.repo = gr.Textbox(label="Repository", info="owner/name; it is made if it is not there.", max_length=200)
        self.private = gr.Checkbox(True, label="Private", info="Only you see it, until you change that on its page.")
        self.overwrite = gr.Checkbox(
            False,
            label="Also where the repository holds something else",
            info="Files of other names stay; those of the same names are replaced.",
        )
        self.token = gr.Textbox(
            label="Token",
            info="One that may write. It goes to the upload alone, and is not kept.",
            type="password",
            max_length=500,
        )
        self.publish = gr.Button("Publish")
        self.published = gr.HTML(padding=False)

    def listen(self, news: gr.State, form: WishForm) -> None:
        context = self.context
        shown = [self.stand, form.export, self.files, self.verified, self.card, self.file, self.upload, self.published]

        @told
        def look(name: str | None, seen: Any) -> list[Any]:
            return output_of(context, name, seen)

        @told
        def export(name: str | None, seen: Any, *answers: Any) -> list[Any]:
            run = _run(context, name)
            start_export(context, run, wish_of(run, list(answers)))
            remember(context.runs, "author", str(answers[6]).strip())
            return output_of(context, name, seen)

        @told
        def copy(name: str | None, file: str | None, folder: str, companions: bool) -> str:
            run = _run(context, name)
            source = _one_of(weights_of(run), file, "File", "Export first.")
            target = context.path(folder)
            whole = run.read_config().adapter.kind == "full"
            copies = copy_to(source, target, companions, whole)
            remember(context.runs, "folder", folder.strip())
            names = "".join(f"<li><code>{esc(path)}</code></li>" for path in copies)
            return f'<p role="status">Copied:</p><ul>{names}</ul>'

        @told
        def send(name: str | None, bundle: str | None, repo: str, hidden: bool, over: bool, token: str) -> list[Any]:
            run = _run(context, name)
            source = _one_of(bundles_of(run), bundle, "Bundle", "Export with the bundle ticked first.")
            publish(run, source, repo, hidden, over, token)
            return ["", upload_html(uploads_of(run).stand())]

        def contents(name: str | None, bundle: str | None) -> str:
            run = context.run(name)
            return contents_html(
                next((found for found in bundles_of(run) if found.name == bundle), None) if run else None
            )

        seen = [context.picked, self.seen]
        news.change(look, seen, [*shown, self.seen], **FOLLOWING)
        form.export.click(export, [*seen, *form.answers], [*shown, self.seen], **QUIETLY)
        self.copy.click(copy, [context.picked, self.file, self.folder, self.companions], self.copied, **QUIETLY)
        asked = [context.picked, self.upload, self.repo, self.private, self.overwrite, self.token]
        self.publish.click(send, asked, [self.token, self.published], **QUIETLY)
        self.upload.change(contents, [context.picked, self.upload], self.contents, **QUIETLY)


def output_of(context: Context, name: str | None, seen: Any) -> list[Any]:
    """How the export stands and all that is there, as they are now, and what they were read from; nothing is sent again
    that is as it was `seen`."""
    run = context.run(name)
    if run is None:
        return [*[gr.skip()] * 8, None]
    export, upload, files = exported(run)
    now = (name, export, files, upload)
    before = seen if seen and seen[0] == name else (None, None, None, None)
    is_running = export.state == "running"
    button = gr.Button("Exporting..." if is_running else "Export and verify", interactive=not is_running)
    shown: list[Any] = [export_html(export), button] if export != before[1] else [gr.skip()] * 2
    shown += _files_shown(run) if files != before[2] else [gr.skip()] * 5
    shown += [upload_html(upload)] if upload != before[3] else [gr.skip()]
    return [*shown, now]


def exported(run: RunFolder) -> tuple[Stand, Stand, list[Any]]:
    """How the export stands, how the upload, and what tells that files are others than before."""
    return exports_of(run).stand(), uploads_of(run).stand(), [_traces(file) for file in files_of(run)]


def _traces(file: Path) -> tuple[Any, ...]:
    """What changes when a file is written anew, and when its hash is known."""
    is_known = file.suffix != ".safetensors" or names_of(file) is not None
    return file, file.stat().st_size, file.stat().st_mtime_ns, is_known


def _files_shown(run: RunFolder) -> list[Any]:
    """Files, what clients make of them, the newest card, and the choices of what to copy and to publish."""
    cards, weights, bundles = cards_of(run), weights_of(run), bundles_of(run)
    none = notice("Nothing was exported yet.", "Press Export and verify.", "note")
    return [
        files_html(run) or none,
        verified_html(run) or none,
        card_html(run, cards[0]) if cards else none,
        gr.Dropdown(choices=[file.name for file in weights], value=weights[0].name if weights else None),
        gr.Dropdown(choices=[file.name for file in bundles], value=bundles[0].name if bundles else None),
    ]


def _run(context: Context, name: str | None) -> RunFolder:
    run = context.run(name)
    if run is None:
        raise UserError("no run is chosen", "Run", "Choose one at the top of the page.")
    return run


def _one_of(files: list[Path], name: str | None, what: str, fix: str) -> Path:
    """A file by its name, of those that are offered."""
    found = next((file for file in files if file.name == name), None)
    if found is None:
        raise UserError("there is none to choose" if not files else "none is chosen", what, fix)
    return found
