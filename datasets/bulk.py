"""The same change to many captions: first a preview, then the change itself, which `journal.py` can undo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..trainer.errors import DataError, Problem
from .captions import has_word, split_tags, with_trigger
from .editing import Draft, Elsewhere, place_of, text_of
from .journal import Deed, carry_out
from .listing import Listing


@dataclass(frozen=True)
class Operation:
    """What is done to each caption."""

    what: str
    """As in `add the trigger 'mystyle'`."""
    change: Callable[[str], str]
    """One caption, in one line, to another."""
    by_line: bool = True
    """Whether each line of a caption file can be taken by itself; if not, files of several lines stay as they are."""


@dataclass(frozen=True)
class Edit:
    """One caption before and after."""

    name: str
    """Of the image."""
    before: str
    after: str


@dataclass(frozen=True)
class Preview:
    """What an operation would do to a folder."""

    what: str
    edits: list[Edit] = field(default_factory=list)
    left: list[Problem] = field(default_factory=list)
    """Captions that it concerns, but that cannot be changed here."""

    @property
    def sentence(self) -> str:
        count = len(self.edits)
        return f"Will change {count} caption{'' if count == 1 else 's'}: {self.what}."


# ---------------------------------------------------------------------------------------------------------------------
# operations


def add_trigger(trigger: str) -> Operation:
    """The trigger goes where a caption says `[trigger]`, or else first; a caption that has it stays."""
    word = _given(trigger, "the trigger word")
    return Operation(f"add the trigger {word!r}", lambda caption: with_trigger(caption, word), by_line=False)


def replace_text(find: str, by: str) -> Operation:
    """Each place where exactly this stands."""
    if not find:
        raise DataError("nothing was given to find", "find", "Type the text that is to be replaced.")
    return Operation(f"replace {find!r} by {by!r}", lambda caption: caption.replace(find, by))


def remove_tag(tag: str) -> Operation:
    """A whole tag between commas; case does not matter."""
    unwanted = _given(tag, "the tag").lower()

    def change(caption: str) -> str:
        tags = split_tags(caption, ",")
        kept = [tag for tag in tags if tag.lower() != unwanted]
        return ", ".join(kept) if len(kept) < len(tags) else caption

    return Operation(f"remove the tag {tag.strip()!r}", change)


def sort_tags(trigger: str = "") -> Operation:
    """By the alphabet; tags that hold the trigger stay first."""

    def change(caption: str) -> str:
        tags = split_tags(caption, ",")
        if len(tags) < 2:
            return caption
        in_order = sorted(tags, key=lambda tag: (not (trigger and has_word(tag, trigger)), tag.lower()))
        return ", ".join(in_order) if in_order != tags else caption

    return Operation("sort the tags", change, by_line=False)


def _given(text: str, what: str) -> str:
    if not text.strip():
        raise DataError(f"{what} was not given", "captions", f"Type {what} first.")
    return text.strip()


# ---------------------------------------------------------------------------------------------------------------------
# preview and change


def preview(listing: Listing, operation: Operation) -> Preview:
    """What an operation would change; nothing is written."""
    seen = Preview(operation.what)
    files = set()
    for image in listing.images:
        before = text_of(listing, image)
        lines = before.split("\n")
        after = "\n".join(operation.change(line) for line in lines)
        if after == before:
            continue
        place = place_of(listing, image)
        if isinstance(place, Elsewhere):
            seen.left.append(Problem(image.name, "its caption cannot be changed here", place.why))
        elif len(lines) > 1 and not operation.by_line:
            what = f"its caption has {len(lines)} lines"
            seen.left.append(Problem(image.name, what, "Change it by hand; what its lines are to each other is open."))
        elif place not in files:  # one file may serve several images
            files.add(place)
            seen.edits.append(Edit(image.name, before, after))
    return seen


def apply(listing: Listing, what: str, edits: Sequence[Edit]) -> int:
    """Make the changes of a preview; how many captions were changed.

    Raises:
        DataError: if one of the captions was changed since; then nothing is done.
    """
    draft = Draft(listing)
    for edit in edits:
        image = listing.image(edit.name)
        if image is None or text_of(listing, image) != edit.before:
            raise DataError("was changed since the preview, so that nothing was done", edit.name, "Preview it again.")
        draft.write(image, edit.after)
    if deed := Deed(what, draft.changes()):
        carry_out(listing.folder, deed)
    return len(edits)
