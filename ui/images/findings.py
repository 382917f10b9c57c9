"""What the dataset doctor has found, each kind of it with a button for its fix."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from threading import Thread
from typing import Any

import gradio as gr

from ...datasets.checks import Examination, Finding, Severity
from ...datasets.removal import remove_file, remove_images
from ...datasets.repair import Repairs, write_copy
from ...datasets.uploads import free_folder
from ...trainer.errors import LorasmithError, UserError
from ..context import QUIETLY, told
from ..html import esc, notice, problems, sentence
from .cards import View

WORDS: dict[Severity, str] = {"error": "Stops training", "warning": "Look at", "note": "Good to know"}
TITLES = {
    "unusable": "files that cannot be used",
    "same file": "the same file twice",
    "same picture": "nearly the same picture twice",
    "too small": "small images",
    "blurred": "soft images",
    "JPEG blocks": "strong JPEG compression",
    "borders": "plain bars at the edges",
    "unlike the rest": "unlike the rest",
    "no caption": "without a caption",
    "same caption": "the same caption",
    "long caption": "long captions",
    "trigger": "the trigger word",
    "one subject": "one subject everywhere",
    "rotated": "turned upright",
    "transparent": "transparency",
    "converted": "converted as they are read",
}
_BUTTONS = {
    "; --fix does it": "; a mended copy is without them",
    ": lorasmith caption": "",
    "use data.weight": "set its weight on the Train page",
    "data.resolution =": "a resolution of",
    "set data.mask": "set mask",
    "Set data.trigger in the configuration": "Give a trigger word above",
}
_SHOWN = 5
_MENDED = {"unusable", "same file", "same picture", "borders"}
"""What a mended copy is without."""
_DUPLICATES = {"same file", "same picture"}
_REMOVABLE = {"too small", "blurred", "JPEG blocks", "unlike the rest"}
_POLLED = 0.2  # seconds


@dataclass(frozen=True)
class Group:
    """All findings of one kind."""

    check: str
    severity: Severity
    findings: tuple[Finding, ...]

    @property
    def title(self) -> str:
        return f"{WORDS[self.severity]}: {TITLES.get(self.check, self.check)}"

    @property
    def images(self) -> tuple[str, ...]:
        """All that they are about, each once."""
        return tuple(dict.fromkeys(name for finding in self.findings for name in finding.images))

    @property
    def doubles(self) -> tuple[str, ...]:
        """Of duplicates, all but the one to keep."""
        return tuple(dict.fromkeys(name for finding in self.findings for name in finding.images[1:]))


def groups_of(findings: Sequence[Finding]) -> list[Group]:
    """By severity and kind, the most severe first."""
    return [
        Group(check, severity, tuple(found))
        for (severity, check), found in groupby(findings, key=lambda finding: (finding.severity, finding.check))
    ]


def troubled(examination: Examination | None) -> frozenset[str]:
    """The images that something should be done about."""
    findings = [f for f in examination.findings if f.severity != "note"] if examination else []
    return frozenset(name for finding in findings for name in (*finding.images, finding.where))


def html_of(group: Group, folder: Path) -> str:
    """The findings of one kind as a list; a fix that all share is said once."""
    fixes = {in_the_page(finding.fix) for finding in group.findings}
    lines = []
    for finding in group.findings[:_SHOWN]:
        where = "" if finding.where == str(folder) else f'<span class="where">{esc(finding.where)}</span> '
        fix = f" {esc(in_the_page(finding.fix))}" if len(fixes) > 1 else ""
        lines.append(f"<li>{where}{esc(sentence(finding.what))}{fix}</li>")
    if len(group.findings) > _SHOWN:
        lines.append(f"<li>And {len(group.findings) - _SHOWN} more.</li>")
    shared = f'<p class="fix">{esc(*fixes)}</p>' if len(fixes) == 1 else ""
    title = f"<strong>{esc(group.title)} ({len(group.findings)})</strong>"
    return f'<div class="notice {group.severity}">{title}<ul>{"".join(lines)}</ul>{shared}</div>'


def in_the_page(fix: str) -> str:
    """A fix as it is said where there are buttons in place of commands."""
    for command, button in _BUTTONS.items():
        fix = fix.replace(command, button)
    return fix


def verdict(examination: Examination) -> str:
    """One sentence: whether training can start."""
    errors, warnings = examination.count("error"), examination.count("warning")
    if errors:
        one = errors == 1
        what = f"{errors} {'problem stops' if one else 'problems stop'} training"
        return notice(what, f"Mend {'it' if one else 'them'} here, or let a mended copy be written.")
    if warnings:
        return f"<p>Nothing stops training. {warnings} thing{'' if warnings == 1 else 's'} to look at first:</p>"
    return "<p>✓ There is nothing to mend.</p>"


# ---------------------------------------------------------------------------------------------------------------------
# fixes


@told
def remove(folder: str, names: Sequence[str], view: View) -> tuple[View, str]:
    """Take images, or one file that is none, out of the folder; the cards anew, and what was done."""
    path = Path(folder)
    what = remove_images(path, names) if len(names) > 1 else remove_file(path, names[0])
    return view.anew, notice(what[0].upper() + what[1:], "Undo brings it all back.", "note")


def show_only(names: tuple[str, ...], view: View) -> View:
    """The cards of these images, and no others."""
    return view.of(show="All", contains="", only=names)


def mended_copy(examination: Examination, uploads: Path) -> Iterator[tuple[str, Path | None]]:
    """Write a mended copy; how far it is as HTML, and at the end the new folder."""
    out = free_folder(uploads, f"{examination.folder.name}-mended")
    done: list[str | Repairs | LorasmithError] = ["beginning"]

    def work() -> None:
        try:
            done.append(write_copy(examination, out, lambda at, of: done.append(f"image {min(at + 1, of)} of {of}")))
        except LorasmithError as error:
            done.append(error)
        except OSError as error:
            what = f"the copy cannot be written ({error.strerror or error})"
            done.append(UserError(what, str(error.filename or out), "Look at the room and the permissions there."))

    thread = Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        yield f'<p role="status">Writing a mended copy: {esc(done[-1])}.</p>', None
        time.sleep(_POLLED)
    match done[-1]:
        case Repairs() as repairs:
            told = f"The mended copy is in use now: {repairs}. It is in {out}; your own folder is as it was"
            yield notice(told, kind="note"), out
        case LorasmithError() as error:
            yield problems(error), None
        case _:
            yield notice("The copy broke off", "What happened stands in the terminal that the app runs in."), None


# ---------------------------------------------------------------------------------------------------------------------
# on the page


@dataclass
class Wires:
    """What the buttons of findings act on."""

    view: gr.State
    done: gr.HTML
    folder: gr.Textbox
    in_use: gr.State
    captions: gr.Accordion
    captioning: gr.Accordion
    uploads: Path


def findings_shown(examination: Examination, wires: Wires) -> None:
    """All findings; called within a `gr.render`."""
    folder = examination.folder
    gr.HTML(verdict(examination), padding=False)
    groups = groups_of(examination.findings)
    if any(group.check in _MENDED and group.severity != "note" for group in groups):
        _mend_button(examination, wires)
    for group in groups:
        if group.severity != "note":
            gr.HTML(html_of(group, folder), padding=False)
            _buttons(group, examination, wires)
    notes = [group for group in groups if group.severity == "note"]
    if notes:
        with gr.Accordion(f"Good to know ({sum(len(group.findings) for group in notes)})", open=False):
            for group in notes:
                gr.HTML(html_of(group, folder), padding=False)
                _buttons(group, examination, wires)


def _buttons(group: Group, examination: Examination, wires: Wires) -> None:
    folder, total = str(examination.folder), len(examination.items)
    changed: list[Any] = [wires.view, wires.done]
    with gr.Row():
        if group.images:
            shown = gr.Button(f"Show {_these(group.images)}", size="sm", scale=0, min_width=160)
            shown.click(partial(show_only, group.images), wires.view, wires.view, **QUIETLY)
        if group.check in _DUPLICATES and group.doubles:
            button = gr.Button(f"Remove {_these(group.doubles)}", size="sm", scale=0, min_width=160)
            button.click(partial(remove, folder, group.doubles), wires.view, changed, **QUIETLY)
        elif group.check in _REMOVABLE and len(group.images) < total:
            button = gr.Button(f"Remove {_these(group.images)}", size="sm", scale=0, min_width=160)
            button.click(partial(remove, folder, group.images), wires.view, changed, **QUIETLY)
        elif group.check == "unusable":
            for name in _files(group, Path(folder))[:_SHOWN]:
                button = gr.Button(f"Remove {name}", size="sm", scale=0, min_width=160)
                button.click(partial(remove, folder, [name]), wires.view, changed, **QUIETLY)
        elif group.check == "no caption":
            write = gr.Button("Write captions", size="sm", scale=0, min_width=160)
            write.click(lambda: gr.update(open=True), None, wires.captioning, **QUIETLY)
        elif group.check == "trigger":
            add = gr.Button("Add the trigger", size="sm", scale=0, min_width=160)
            add.click(lambda: gr.update(open=True), None, wires.captions, **QUIETLY)


def _these(names: Sequence[str]) -> str:
    return Path(names[0]).name if len(names) == 1 else f"these {len(names)} images"


def _files(group: Group, folder: Path) -> list[str]:
    """The files that are to blame, as far as they are files below the folder."""
    return list(dict.fromkeys(f.where for f in group.findings if (folder / f.where).is_file()))


def _mend_button(examination: Examination, wires: Wires) -> None:
    def mend(view: View) -> Iterator[list[Any]]:
        for said, out in mended_copy(examination, wires.uploads):
            used = [str(out), str(out), View(str(out), version=view.version + 1)] if out else [gr.skip()] * 3
            yield [said, *used]

    button = gr.Button("Write a mended copy", size="sm", scale=0, min_width=160)
    button.click(mend, wires.view, [wires.done, wires.folder, wires.in_use, wires.view], **QUIETLY)
