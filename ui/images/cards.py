"""The images of a folder as cards, a page at a time: thumbnail, size, and the caption in a box that saves itself.

All cards of a page are one component, for Gradio takes half a second to make a hundred; `assets/cards.js` keeps those
that are there already, and sends what was written to `saving.py`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import gradio as gr

from ...datasets.editing import Elsewhere, place_of, sharers, text_of
from ...datasets.listing import Listed, Listing, list_images
from ...datasets.removal import remove_images
from ...datasets.thumbnails import size_of, thumbnails_of
from ...trainer.errors import LorasmithError
from ..context import FOLLOWING, QUIETLY, told
from ..html import esc, notice, picture, problems
from ..theme import ASSETS
from ..urls import thumbnail_url

PER_PAGE = 24
_LONGEST = 20_000
"""Characters of a caption; a model reads a few hundred at most."""
Show = Literal["All", "With problems", "No caption"]
SHOWN: tuple[Show, ...] = ("All", "With problems", "No caption")


@dataclass(frozen=True)
class View:
    """Which cards are seen."""

    folder: str = ""
    """Empty: none yet."""
    show: Show = "All"
    contains: str = ""
    """What the caption or the name holds."""
    only: tuple[str, ...] = ()
    """The images that a finding is about; empty: all."""
    troubled: frozenset[str] = frozenset()
    """The images that have problems, as of the newest examination when the filter was set."""
    version: int = 0
    """Counted up when files were changed by anything but the cards themselves."""

    @property
    def anew(self) -> View:
        return replace(self, version=self.version + 1)

    def of(self, **filters: Any) -> View:
        """Another choice of cards."""
        return replace(self, **{"only": (), **filters})


@dataclass(frozen=True)
class Place:
    """Which page is open, of which view."""

    view: View = View()
    page: int = 0

    def in_view(self, view: View) -> int:
        """The page to show of a view: the same where only files have changed, else the first."""
        return self.page if replace(view, version=0) == replace(self.view, version=0) else 0


def chosen(listing: Listing, view: View) -> list[Listed]:
    """The images of all pages of a view."""

    def fits(image: Listed) -> bool:
        if view.only and image.name not in view.only:
            return False
        if view.show == "No caption" and image.is_captioned:
            return False
        if view.show == "With problems" and image.name not in view.troubled:
            return False
        wanted = view.contains.strip().lower()
        return wanted in image.name.lower() or any(wanted in caption.lower() for caption in image.captions)

    return [image for image in listing.images if fits(image)]


def page_of(images: list[Listed], page: int) -> tuple[list[Listed], int, int]:
    """The images of one page, its number from 0, and how many pages there are; a page too far is the last."""
    pages = max(1, -(-len(images) // PER_PAGE))
    page = min(max(page, 0), pages - 1)
    return images[page * PER_PAGE : (page + 1) * PER_PAGE], page, pages


class Cards:
    """Components: the line that tells what is shown, the cards, and what turns the page, above and below them."""

    def __init__(self) -> None:
        with gr.Row(equal_height=True):
            self.line = gr.HTML(padding=False)
            self.everything = gr.Button("Show all images again", size="sm", scale=0, min_width=180, visible=False)
        above = Pager()
        self.grid = gr.HTML(
            [],
            html_template='<div class="cards"></div>',
            js_on_load=(ASSETS / "cards.js").read_text(encoding="utf-8"),
            padding=False,
        )
        self.pagers = (above, Pager())
        self.place = gr.State(Place())

    def listen(self, view: gr.State, done: gr.HTML) -> None:
        """Follow a view; what was removed is told in `done`."""
        shown: list[Any] = [self.line, self.everything, self.grid, self.place]
        shown += [part for pager in self.pagers for part in pager.parts]
        view.change(_shown, [view, self.place], shown, **FOLLOWING)
        self.everything.click(lambda now: now.of(), view, view, **QUIETLY)
        self.grid.discard(_remove, view, [view, done], **QUIETLY)
        for pager in self.pagers:
            for button, by in ((pager.previous, -1), (pager.next, 1)):
                button.click(partial(_shown, by=by), [view, self.place], shown, **QUIETLY)


class Pager:
    """Components that turn the page."""

    def __init__(self) -> None:
        with gr.Row(equal_height=True, visible=False) as self.row:
            self.previous = gr.Button("Previous page", size="sm", min_width=120)
            self.next = gr.Button("Next page", size="sm", min_width=120)
            self.where = gr.HTML(padding=False)

    @property
    def parts(self) -> list[Any]:
        """In the order in which `_turned` tells of them."""
        return [self.row, self.previous, self.next, self.where]


def _shown(view: View, place: Place, by: int = 0) -> list[Any]:
    """What all components show of a view, turned by so many pages."""
    try:
        listing = list_images(Path(view.folder)) if view.folder else None
    except LorasmithError as error:
        return [problems(error), *_nothing()]
    if listing is None:
        return ["", *_nothing()]
    images = chosen(listing, view)
    on_page, page, pages = page_of(images, place.in_view(view) + by)
    faces = zip(on_page, thumbnails_of([image.path for image in on_page]), strict=True)
    cards = [_card(listing, image, thumbnail, view) for image, thumbnail in faces]
    if following := [image.path for image in images[(page + 1) * PER_PAGE : (page + 2) * PER_PAGE]]:
        Thread(target=thumbnails_of, args=(following,), daemon=True).start()  # ready when the page is turned
    everything = gr.update(visible=bool(view.only))
    return [_line(images, page, pages), everything, cards, Place(view, page), *_turned(page, pages) * 2]


def _nothing() -> list[Any]:
    """What all components but the line show where there are no cards."""
    return [gr.update(visible=False), [], Place(), *_turned(0, 1) * 2]


def _line(images: list[Listed], page: int, pages: int) -> str:
    """What is shown, where it is not all."""
    first = page * PER_PAGE
    range_ = f"{first + 1} to {min(first + PER_PAGE, len(images))} of " if pages > 1 else ""
    what = f"Shown: {range_}{len(images)} image{'' if len(images) == 1 else 's'}."
    if not images:
        what = "No image is like that. Choose All, or empty the box."
    return f'<p class="quiet">{esc(what)}</p>'


def _turned(page: int, pages: int) -> list[Any]:
    """What a pager shows."""
    where = f'<p class="quiet">Page {page + 1} of {pages}</p>'
    buttons = [gr.update(interactive=page > 0), gr.update(interactive=page + 1 < pages)]
    return [gr.update(visible=pages > 1), *buttons, where]


@told
def _remove(view: View, event: gr.EventData) -> tuple[View, str]:
    name = str(event.name)
    remove_images(Path(view.folder), [name])
    return view.anew, notice(f"{name} was removed", "Undo brings it back.", "note")


def _card(listing: Listing, image: Listed, thumbnail: Path | None, view: View) -> dict[str, str]:
    """One card for `cards.js`; its key changes with all that it shows, so that it is made anew."""
    place, text = place_of(listing, image), text_of(listing, image)
    locked, box = isinstance(place, Elsewhere), f"caption-{_hash(image.name)}"
    why = f'<p class="quiet">{esc(place.why)}</p>' if isinstance(place, Elsewhere) else ""
    inside = (
        f"{_face(listing, image, thumbnail)}"
        f'<label for="{box}">Caption of {esc(image.name)}</label>{why}'
        f'<textarea id="{box}" rows="2" maxlength="{_LONGEST}"{" readonly" if locked else ""}>\n{esc(text)}</textarea>'
        f'<div class="said" role="status"></div>'
        f'<button type="button" class="remove">Remove {esc(image.path.name)}</button>'
    )
    key = _hash(f"{inside}\n{view.version}")
    names = f'data-folder="{esc(view.folder)}" data-name="{esc(image.name)}" data-key="{key}"'
    card = f'<article class="card" {names}>{inside}</article>'
    return {"folder": view.folder, "name": image.name, "key": key, "html": card}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _face(listing: Listing, image: Listed, thumbnail: Path | None) -> str:
    """Everything of a card that is only looked at."""
    size = size_of(image.path)
    seen = f"{size[0]} x {size[1]} px" if size else "cannot be read"
    alt = image.captions[0] or image.path.name
    shown = picture(thumbnail_url(thumbnail), alt) if thumbnail else "<p>No picture: the file cannot be read.</p>"
    notes = []
    if image.machine:
        notes.append("captioned by a model")
    if image.source == "folder name":
        notes.append(f"without a caption of its own, so it is called {image.captions[0]!r}, as its folder")
    if others := [other.path.name for other in sharers(listing, image)]:
        notes.append(f"its caption is also that of {', '.join(others)}")
    more = "".join(f"; {esc(note)}" for note in notes)
    about = f'{esc(image.name)}<br><span class="quiet">{seen}{more}</span>'
    return f"<figure>{shown}<figcaption>{about}</figcaption></figure>"
