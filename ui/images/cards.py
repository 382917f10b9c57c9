"""The images of a folder as cards, a page at a time: thumbnail, size, and the caption in a box that saves itself."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import gradio as gr

from ...datasets.editing import ChangedMeanwhileError, Elsewhere, place_of, save_caption, sharers, text_of
from ...datasets.listing import Listed, Listing, list_images
from ...datasets.removal import remove_images
from ...datasets.thumbnails import size_of, thumbnails_of
from ...trainer.errors import LorasmithError
from ..context import IN_TURN, QUIETLY, told
from ..html import esc, notice, picture, problems
from ..urls import thumbnail_url

PER_PAGE = 24
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
    page: int = 0
    version: int = 0
    """Counted up when files were changed by anything but the cards themselves."""

    @property
    def anew(self) -> View:
        return replace(self, version=self.version + 1)

    def of(self, **filters: Any) -> View:
        """Another choice of cards, from its first page on."""
        return replace(self, **{"only": (), "page": 0, **filters})


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


def save(folder: str, name: str, text: str, shown: str) -> list[Any]:
    """What a card says, its box, and what stands on the disk; of a caption that was left by the cursor."""
    try:
        written = save_caption(Path(folder), name, shown, text)
    except ChangedMeanwhileError as error:
        what = f"It was changed elsewhere meanwhile, so yours was not saved. You wrote: {text.strip()}"
        return [notice(what, "The box shows what stands there now.", "warning"), error.now, error.now]
    except LorasmithError as error:
        return [problems(error), gr.skip(), gr.skip()]
    except OSError as error:
        what = f"It could not be saved ({error.strerror or error})"
        fix = "Look at the room and the permissions there, then leave the box again."
        return [notice(what, fix), gr.skip(), gr.skip()]
    if not written:
        return [gr.skip()] * 3
    listing = list_images(Path(folder))
    image = listing.image(name)
    return ['<span class="saved">✓ Saved</span>', gr.skip(), text_of(listing, image) if image else text]


def show_cards(view: gr.State, done: gr.HTML) -> None:
    """The cards of a view; what was removed is told in `done`."""

    @gr.render(view, **IN_TURN)
    def cards(seen: View) -> None:
        if not seen.folder:
            return
        try:
            listing = list_images(Path(seen.folder))
        except LorasmithError as error:
            gr.HTML(problems(error))
            return
        images = chosen(listing, seen)
        on_page, page, pages = page_of(images, seen.page)
        _line(seen, images, page, pages, view)
        with gr.Row(elem_classes="cards"):
            for image, thumbnail in zip(on_page, thumbnails_of([image.path for image in on_page]), strict=True):
                _card(listing, image, thumbnail, seen, view, done)
        if pages > 1:
            _pager(page, pages, view)
        if following := [image.path for image in images[(page + 1) * PER_PAGE : (page + 2) * PER_PAGE]]:
            Thread(target=thumbnails_of, args=(following,), daemon=True).start()  # ready when the page is turned


def _line(seen: View, images: list[Listed], page: int, pages: int, view: gr.State) -> None:
    """What is shown, where it is not all."""
    first = page * PER_PAGE
    range_ = f"{first + 1} to {min(first + PER_PAGE, len(images))} of " if pages > 1 else ""
    what = f"Shown: {range_}{len(images)} image{'' if len(images) == 1 else 's'}."
    if not images:
        what = "No image is like that. Choose All, or empty the box."
    with gr.Row(equal_height=True):
        gr.HTML(f'<p class="quiet">{esc(what)}</p>', padding=False)
        if seen.only:
            everything = gr.Button("Show all images again", size="sm", scale=0, min_width=180)
            everything.click(lambda now: now.of(), view, view, **QUIETLY)
    if pages > 1:
        _pager(page, pages, view)


def _pager(page: int, pages: int, view: gr.State) -> None:
    with gr.Row(equal_height=True):
        for label, to, possible in (
            ("Previous page", page - 1, page > 0),
            ("Next page", page + 1, page + 1 < pages),
        ):
            button = gr.Button(label, size="sm", interactive=possible, min_width=120)
            button.click(partial(_turn, to), view, view, **QUIETLY)
        gr.HTML(f'<p class="quiet">Page {page + 1} of {pages}</p>', padding=False)


def _turn(page: int, seen: View) -> View:
    return replace(seen, page=page)


def _card(listing: Listing, image: Listed, thumbnail: Path | None, seen: View, view: gr.State, done: gr.HTML) -> None:
    place, text = place_of(listing, image), text_of(listing, image)
    locked = isinstance(place, Elsewhere)
    key = hashlib.sha256(f"{seen.folder}\n{image.name}\n{text}\n{seen.version}".encode()).hexdigest()[:16]
    with gr.Column(min_width=220, elem_classes="card"):
        gr.HTML(_face(listing, image, thumbnail), padding=False)
        box = gr.Textbox(
            text,
            label=f"Caption of {image.name}",
            info=place.why if locked else None,
            lines=2,
            max_lines=8,
            interactive=not locked,
            key=f"box {key}",
        )
        on_disk = gr.State(text)
        said = gr.HTML(elem_classes="said", padding=False)
        remove = gr.Button(f"Remove {image.path.name}", size="sm", key=f"remove {key}")
    if not locked:
        box.blur(partial(save, seen.folder, image.name), [box, on_disk], [said, box, on_disk], **QUIETLY)
    remove.click(partial(_remove, seen.folder, image.name), view, [view, done], **QUIETLY)


@told
def _remove(folder: str, name: str, seen: View) -> tuple[View, str]:
    remove_images(Path(folder), [name])
    return seen.anew, notice(f"{name} was removed", "Undo brings it back.", "note")


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
