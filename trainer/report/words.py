"""How text gets on the page: escaped, and without where things lie on this computer, unless that is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ..config import RunConfig
from ..jobs import RunFolder
from ..sharing.facts import last_part

_PATH = re.compile(r"(?<![\w.:/\\~$-])(?:[A-Za-z]:[\\/]|\\\\|~?/)[^\s\"'<>|;,()]*[\\/][^\s\"'<>|;,()]*")
"""An absolute path of any system with a folder in it. Where a path has blanks, it ends at the first."""
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")
_SOMEWHERE = "…"


@dataclass(frozen=True)
class Words:
    """Makes HTML of any text. All that comes from files, settings or a person goes through here, and only here."""

    places: tuple[str, ...] = ()
    """What is known to lie on this computer, the longest first: of these also what has blanks in it."""
    shows_paths: bool = False

    @classmethod
    def of(cls, run: RunFolder, config: RunConfig, shows_paths: bool) -> Words:
        places = {str(run.path), str(run.path.parent), *_places_in(config), *map(str, _homes())}
        absolute = (place for place in places if Path(place).is_absolute() and len(Path(place).parts) > 1)
        return cls(tuple(sorted(absolute, key=len, reverse=True)), shows_paths)

    def __call__(self, text: object) -> str:
        """For a place between tags, or inside a quoted attribute."""
        return escape(self.plain(text))

    def prose(self, text: str) -> str:
        """Of a text of our own, in which code stands between backticks."""
        return re.sub("`([^`]+)`", r"<code>\1</code>", self(text))

    def plain(self, text: object) -> str:
        """As it may be told, not yet escaped: of a path its last part, and nothing that cannot be printed."""
        told = str(text).encode("utf-8", "replace").decode()
        told = _UNPRINTABLE.sub("\ufffd", told)
        if self.shows_paths:
            return told
        for place in self.places:
            told = told.replace(place, last_part(place, _SOMEWHERE))
        return _PATH.sub(lambda path: last_part(path[0], _SOMEWHERE), told)


def _places_in(config: RunConfig) -> Iterable[str]:
    named = [config.runs, config.base.model, config.base.vae, config.adapter.start_from, config.runtime.cache]
    merged = [merge.rpartition(":")[0] for merge in config.base.merge]
    return [*named, *merged, *(data.path.partition("?")[0].removeprefix("hf:") for data in config.data)]


def _homes() -> Iterable[Path]:
    try:
        return [Path.home()]
    except RuntimeError:
        return []


# ---------------------------------------------------------------------------------------------------------------------
# pieces of a page; what they are given is HTML already


def section(name: str, title: str, *parts: str) -> str:
    """A part of the page that a link leads to."""
    return f'<section id="{name}"><h2>{title}</h2>{"".join(parts)}</section>'


def missing(told: str) -> str:
    """In place of what is not there, what it would be and how to get it."""
    return f'<p class="missing">{told}</p>'


def paragraph(told: str) -> str:
    return f"<p>{told}</p>"


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values, side by side where there is room."""
    return f"<dl>{''.join(f'<div><dt>{name}</dt><dd>{value}</dd></div>' for name, value in rows if value)}</dl>"


def table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """A table that scrolls by itself where the page is narrow; the first cell of a row names it."""
    heads = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{value}</td>" for value in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def folded(title: str, content: str) -> str:
    """What few people want to see at once; it is printed all the same."""
    return f"<details><summary>{title}</summary>{content}</details>"
