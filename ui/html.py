"""Pieces of HTML. All text goes through `esc`: a caption or a file's metadata is shown as text, whatever it holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Literal

from ..trainer.errors import LorasmithError

Kind = Literal["error", "warning", "note"]
_WORDS: dict[Kind, str] = {"error": "Problem", "warning": "Look", "note": "Note"}

_SIGNS = {
    "training": "▶",
    "sampling": "▶",
    "saving": "▶",
    "exporting": "▶",
    "preparing": "▶",
    "queued": "…",
    "done": "✓",
    "stopped": "❚❚",
    "interrupted": "!",
    "failed": "✕",
    "new": "○",
}


def esc(text: object) -> str:
    """Any text, for a place between tags or inside a quoted attribute."""
    return escape(str(text), quote=True)


def chip(state: str) -> str:
    """A run's state by sign and word; colour only repeats it."""
    return (
        f'<span class="chip {esc(state)}"><span aria-hidden="true">{_SIGNS.get(state, "")}</span> {esc(state)}</span>'
    )


def notice(what: str, fix: str = "", kind: Kind = "error", where: str = "") -> str:
    """Something to look at, with its place and what to do about it."""
    place = f'<span class="where">{esc(where)}: </span>' if where else ""
    mend = f' <span class="fix">{esc(fix)}</span>' if fix else ""
    role = ' role="alert"' if kind == "error" else ""
    return f'<div class="notice {kind}"{role}><strong>{_WORDS[kind]}.</strong> {place}{esc(sentence(what))}{mend}</div>'


def problems(error: LorasmithError) -> str:
    """All that an error tells, each problem by itself."""
    return "".join(notice(problem.what, problem.fix, where=problem.where) for problem in error.problems)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", kind: str = "") -> str:
    """A table; cells of `rows` are HTML already, and the first of a row names it."""
    title = f"<caption>{esc(caption)}</caption>" if caption else ""
    heads = "".join(f'<th scope="col">{esc(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="{esc(kind)}">{title}<thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def picture(url: str, alt: str, side: int = 0) -> str:
    """A picture that is loaded when it comes into view."""
    size = f' width="{side}" height="{side}"' if side else ""
    return f'<img src="{esc(url)}" alt="{esc(alt)}" loading="lazy"{size}>'


def cell(url: str, alt: str, side: int = 0) -> str:
    """A picture of a table of class `grid`: arrows move between them, Enter or a click shows it in full size."""
    return f'<a class="cell" href="{esc(url)}">{picture(url, alt, side)}</a>'


def sentence(text: str) -> str:
    """With a full stop at its end, unless it ends already."""
    text = text.strip()
    return text if text.endswith((".", "!", "?", ":")) else f"{text}."
