"""The files that a run has written to share: their sizes and hashes, and what each client makes of them."""

from __future__ import annotations

import re
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ...trainer.files import sha256_of
from ...trainer.jobs import VERIFIED, RunFolder
from ...trainer.jsonfile import read_json
from ..html import esc, notice, table
from ..urls import export_url

_SAID = {
    "same": "does what was trained",
    "part": "does a part of it",
    "other": "does something else",
    "none": "does not read it",
}
_NOT_TO_SHARE = re.compile(r"(^|/)\.|\.unverified\.|\.rejected$|\.tmp$|\.log$")
_KINDS = {
    VERIFIED: "what was found of the files when they were loaded back, by client",
    "-grid.png": "previews without and with what was trained, side by side",
    ".png": "the thumbnail, which clients show beside the name",
    ".json": "trigger, strength and notes, which A1111, Forge and InvokeAI show",
    ".md": "the model card",
    ".zip": "the bundle: all of it in one file",
}
"""By the end of a name; the first that fits."""
CSS = """
  section { border: 1px solid var(--line); border-radius: 6px; padding: 0.5rem 0.75rem; margin: 0.5rem 0; }
  section h4 { margin: 0; overflow-wrap: anywhere; }
  section p { margin: 0.25rem 0; }
  dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 0.75rem; margin: 0; }
  dt { color: var(--quiet); }
  dd { margin: 0; overflow-wrap: anywhere; }
  @media (max-width: 640px) { dl { grid-template-columns: 1fr; } dd { margin-bottom: 0.3rem; } }
"""
"""Of the component that shows the files; it holds for what is in it only."""
_AT_ONCE = 50_000_000  # bytes; what is larger is hashed aside, and told when that is done


def files_of(run: RunFolder) -> list[Path]:
    """All files that were exported, but for those that are being written, and those that were rejected."""
    files = (path for path in sorted(run.exports.rglob("*")) if path.is_file())
    return [path for path in files if not _NOT_TO_SHARE.search(path.relative_to(run.exports).as_posix())]


def weights_of(run: RunFolder) -> list[Path]:
    """Those that a client loads as they are; first those that all clients read, the newest first."""
    found = [file for file in files_of(run) if file.suffix == ".safetensors" and file.parent == run.exports]
    return sorted(found, key=lambda file: (file.stem.endswith("-diffusers"), -file.stat().st_mtime))


def bundles_of(run: RunFolder) -> list[Path]:
    """The newest first."""
    return sorted(run.exports.glob("*.zip"), key=lambda file: file.stat().st_mtime, reverse=True)


def cards_of(run: RunFolder) -> list[Path]:
    """The newest first."""
    return sorted(run.exports.glob("*.md"), key=lambda file: file.stat().st_mtime, reverse=True)


# ---------------------------------------------------------------------------------------------------------------------
# hashes


@dataclass(frozen=True)
class Names:
    """What a file goes by."""

    sha256: str
    model_hash: str
    """kohya's `sshs_model_hash`, as the file says it; empty if it says none."""

    @property
    def autov2(self) -> str:
        return self.sha256[:10]


def names_of(file: Path) -> Names | None:
    """Read once from end to end; None while a large file is still being read."""
    found = file.stat()
    reading = _names(file, found.st_size, found.st_mtime_ns)
    return reading.result() if found.st_size <= _AT_ONCE or reading.done() else None


@lru_cache(maxsize=256)
def _names(file: Path, size: int, changed: int) -> Future[Names]:
    del size, changed
    return _READER.submit(_read_names, file)


_READER = ThreadPoolExecutor(1, "hashes")


def _read_names(file: Path) -> Names:
    try:
        with safe_open(file, "np") as opened:
            said = (opened.metadata() or {}).get("sshs_model_hash", "")
    except SafetensorError:
        said = ""
    return Names(sha256_of(file), said)


# ---------------------------------------------------------------------------------------------------------------------
# in HTML


def files_html(run: RunFolder) -> str:
    """Weights with their hashes, then all else."""
    weights = weights_of(run)
    others = [file for file in files_of(run) if file not in weights]
    others.sort(key=lambda file: file.suffix != ".zip")
    parts = [_weights_html(run, file) for file in weights]
    if others:
        rows = [
            (_link(run, file, file.relative_to(run.exports).as_posix()), esc(size_of(file)), esc(_kind_of(run, file)))
            for file in others
        ]
        parts.append(table(["File", "Size", "What it is"], rows, "Other files"))
    return "".join(parts)


def _weights_html(run: RunFolder, file: Path) -> str:
    names = names_of(file)
    reading = "being read"
    rows = [
        ("Path", f"<code>{esc(file)}</code>"),
        ("Size", esc(size_of(file))),
        ("SHA-256", f"<code>{esc(names.sha256 if names else reading)}</code>"),
        ("AutoV2", f"<code>{esc(names.autov2 if names else reading)}</code> (how sites such as Civitai find a file)"),
        ("sshs_model_hash", f"<code>{esc(names.model_hash or 'none' if names else reading)}</code> (kohya's)"),
    ]
    facts = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    link = _link(run, file, f"Download {file.name}")
    return f"<section><h4>{esc(file.name)}</h4><p>{link}</p><dl>{facts}</dl></section>"


def _link(run: RunFolder, file: Path, text: str) -> str:
    return f'<a href="{esc(export_url(run, file))}" download>{esc(text)}</a>'


def _kind_of(run: RunFolder, file: Path) -> str:
    if file.parent != run.exports:
        return "embeddings of the trigger word" if file.parent.name.endswith("-embedding") else "a part of a model"
    return next((kind for ending, kind in _KINDS.items() if file.name.endswith(ending)), "")


def size_of(file: Path) -> str:
    return size_in_words(file.stat().st_size)


def size_in_words(count: float) -> str:
    """Of bytes, as disks count them: 1 MB is a million."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000 or unit == "MB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError


def verified_html(run: RunFolder) -> str:
    """Of each file how near it is to what was trained, and what each client does with it."""
    return "".join(_found_html(run, found) for found in sorted(run.exports.glob(f"*{VERIFIED}")))


def _found_html(run: RunFolder, found: Path) -> str:
    """What was found of the files of one export that are still there."""
    try:
        reports = read_json(found)["files"]
        return "".join(_report_html(run, report) for report in reports if (run.exports / report["file"]).is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return notice("it cannot be read, so nothing is known of its files", "Export again.", "warning", found.name)


def _report_html(run: RunFolder, report: dict[str, Any]) -> str:
    file = run.exports / report["file"]
    names = names_of(file)
    changed = names is not None and names.sha256 != report["hashes"]["sha256"]
    warning = notice("the file was changed since it was verified", "Export it again.", "warning", file.name)
    rows = [
        (
            esc(client["client"]),
            f"{'✓' if client['reading'] == 'same' else '✕'} {esc(_SAID[client['reading']])}",
            esc(client["why"] or f"it finds {client['layers']} of {client['of']} layers"),
        )
        for client in report["clients"]
    ]
    own = "This file is for diffusers and PEFT. For all others take the one with kohya's names. "
    told = (own if report["format"] == "diffusers" else "") + compared(report["verification"])
    return f"<h4>{esc(file.name)}</h4>{warning if changed else ''}<p>{esc(told)}</p>" + table(
        ["Client", "What it does with the file", "Because"], rows
    )


def compared(verification: dict[str, Any] | None) -> str:
    """How near a file came to the model in memory, in a sentence."""
    if not verification:
        return "It was not compared with the trained model."
    answers = max((answer["error"] for answer in verification["answers"].values()), default=0.0)
    return (
        "Loaded back and compared with the trained model: largest difference "
        f"{_percent(verification['weight_error'])} of a layer's change ({_percent(verification['weight_tolerance'])} "
        f"is allowed), and {_percent(answers)} of what it changes in the model's answers "
        f"({_percent(verification['answer_tolerance'])})."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
