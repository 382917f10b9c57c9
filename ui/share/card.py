"""A model card as a page shows it: its Markdown becomes HTML, and what is HTML in it, or asks for pictures of others,
stays text. Titles, captions and descriptions may hold anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

from ...trainer.jobs import RunFolder
from ...trainer.jsonfile import parse_json
from ..html import esc, picture, table
from ..urls import picture_url

CSS = """
  article { border: 1px solid var(--line); border-radius: 6px; padding: 0.5rem 1rem; overflow-wrap: anywhere; }
  article .gallery { display: flex; flex-wrap: wrap; gap: 0.75rem; }
  article figure { margin: 0.5rem 0; max-width: 100%; }
  article figure img { max-width: 100%; height: auto; }
  article .gallery img { width: 160px; }
  article figcaption { color: var(--quiet); max-width: 30rem; }
  article p, article ul, article table { margin: 0.5rem 0; }
  article td, article th { padding: 0.1rem 0.75rem 0.1rem 0; text-align: left; }
  article pre { overflow-x: auto; padding: 0.5rem; background: var(--ground); border: 1px solid var(--line); }
  article ul { padding-left: 1.25rem; list-style: disc; }
"""
"""Of the component that shows the card; it holds for what is in it only."""
_GALLERY = "<Gallery />"
"""Where the Hub shows the pictures that the head names."""
_GRID = "Previews of the base, and of the same prompts and seeds with what was trained"
_DEEPER = 2
"""A page has one heading of the first level, which is not the card's."""


def card_html(run: RunFolder, card: Path) -> str:
    """The card with its head as a table, and the pictures that lie beside it; the grid as well, which the card of a
    bundle names."""
    head, text = parts_of(card.read_text(encoding="utf-8", errors="replace"))
    gallery = "".join(_figure(_beside(run, card, name), words) for name, words in _pictures_of(head.pop("widget", [])))
    before, mark, after = text.partition(_GALLERY)
    body = _rendered(before, run, card) + (f'<div class="gallery">{gallery}</div>' if mark else "")
    body += _rendered(after, run, card)
    grid = f"{card.stem}-grid.png"
    if grid not in text and (address := _beside(run, card, grid)):
        body += _figure(address, _GRID)
    rows = [(esc(key), esc(_in_words(value))) for key, value in head.items()]
    told = table(["Key", "Value"], rows, "What the head of the card tells the Hub") if rows else ""
    return f"<article>{body}</article>{told}"


def parts_of(card: str) -> tuple[dict[str, Any], str]:
    """The head of a card, whose values are JSON, and its text."""
    if not card.startswith("---\n"):
        return {}, card
    head, _, text = card.removeprefix("---\n").partition("\n---\n")
    values: dict[str, Any] = {}
    for line in head.splitlines():
        key, _, value = line.partition(": ")
        try:
            values[key] = parse_json(value)
        except ValueError:  # a person has edited it
            values[key] = value
    return values, text


def _pictures_of(widget: Any) -> Iterator[tuple[str, str]]:
    """(file, text) of what a head says of pictures; a person may have edited it."""
    for entry in widget if isinstance(widget, list) else []:
        match entry:
            case {"output": {"url": str(name)}}:
                yield name, str(entry.get("text", ""))
            case _:
                pass


def _rendered(text: str, run: RunFolder, card: Path) -> str:
    """The text as HTML, which holds no HTML of its own."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    markdown.add_render_rule("image", _shows(lambda name: _beside(run, card, name)))
    tokens = markdown.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1:]) + _DEEPER, 6)}"
    return markdown.renderer.render(tokens, markdown.options, {})


def _shows(address: Callable[[str], str]) -> Callable[..., str]:
    """How a picture is drawn: only one that lies beside the card."""

    def image(renderer: Any, tokens: Sequence[Token], number: int, options: Any, env: Any) -> str:
        del renderer, options, env
        token = tokens[number]
        return _figure(address(str(token.attrs.get("src", ""))), token.content)

    return image


def _figure(url: str, text: str) -> str:
    """Without an address, what the picture shows in words."""
    if not url:
        return f"[{esc(text or 'a picture')}]"
    return f"<figure>{picture(url, text)}<figcaption>{esc(text)}</figcaption></figure>"


def _beside(run: RunFolder, card: Path, name: str) -> str:
    """The address of a picture beside the card; empty if there is none of this name."""
    is_there = name == Path(name).name and name.endswith(".png") and (card.parent / name).is_file()
    return picture_url(run, card.parent / name) if is_there else ""


def _in_words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
