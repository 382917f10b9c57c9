"""A caption that was left in a card: written to the disk, and what the card says then."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel

from ...datasets.editing import ChangedMeanwhileError, save_caption, text_of
from ...datasets.listing import list_images
from ...trainer.errors import LorasmithError
from ..context import Context
from ..html import notice, problems


def _with_code(text: str) -> str:
    """A text that a file can hold: JSON can name halves of characters."""
    text.encode()
    return text


Text = Annotated[str, AfterValidator(_with_code)]


class Left(BaseModel):
    """What the browser sends of a box that the cursor has left."""

    folder: Text
    name: Text
    """Of the image, as in `Listed`."""
    text: Text
    shown: Text
    """What stood in the box when the person began."""


class Answer(BaseModel):
    """What the card makes of it."""

    said: str = ""
    """HTML."""
    shown: str
    """What stands on the disk, as far as the card knows."""
    text: str | None = None
    """What the box is to show instead of what was written."""


def save(context: Context, left: Left) -> Answer:
    """Write it, if it is new and nobody else has changed it meanwhile."""
    try:
        return _saved(context.path(left.folder), left)
    except ChangedMeanwhileError as error:
        what = f"It was changed elsewhere meanwhile, so yours was not saved. You wrote: {left.text.strip()}"
        said = notice(what, "The box shows what stands there now.", "warning")
        return Answer(said=said, shown=error.now, text=error.now)
    except LorasmithError as error:
        return Answer(said=problems(error), shown=left.shown)
    except OSError as error:
        what = f"It could not be saved ({error.strerror or error})"
        fix = "Look at the room and the permissions there, then leave the box again."
        return Answer(said=notice(what, fix), shown=left.shown)


def _saved(folder: Path, left: Left) -> Answer:
    if not save_caption(folder, left.name, left.shown, left.text):
        return Answer(shown=left.shown)
    listing = list_images(folder)
    image = listing.image(left.name)
    return Answer(said='<span class="saved">✓ Saved</span>', shown=text_of(listing, image) if image else left.text)
