"""What leaks, as pictures: a sheet, a part of an HTML page, and the page that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw

from ..painting.lettering import drawable, font_for, wrapped
from ..painting.orders import WallOrder
from ..sharing.pictures import data_uri
from .leaks import LeakPicture, Leaks, leak_cells

Say = Callable[[object], str]
"""Makes HTML of any text."""

COLUMNS = ("the base", "trained, no trigger", "the base, trigger", "trained, trigger")
_LIMITS = (
    "The style is measured as lorasmith compare measures it, by the base's own VAE: against the base's picture of the "
    "same prompt and noise, on the scale of which the training images are 1. It is quick to see a trace of the style. "
    "The error is that of these prompts; other subjects may leak more, or less.",
    "Which words come uninvited is told by what stands where in a picture, not by what it is: a colour, or a face that "
    "is drawn elsewhere, is not seen. So a word that is named here is a reason to look at the pictures, and that none "
    "is named is no proof.",
)

# ---------------------------------------------------------------------------------------------------------------------
# the sheet


_INK, _GREY, _GROUND, _LINE = "#1d1d1f", "#5f5f64", "#ffffff", "#e3e3e6"
_MARGIN, _GAP, _LEADING = 16, 6, 1.35
_SIDES = 128, 320  # smallest and largest side of a picture, in pixels
_TITLE, _TEXT, _NOTE = 22, 15, 13  # sizes of letters, in pixels


def leak_sheet(order: WallOrder, title: str, leaks: Leaks) -> Image.Image:
    """A row for each prompt: base and trained without the trigger, and both with it."""
    rows = [[_opened(file) for file in _files(order, one)] for one in leaks.pictures]
    side = min(max(rows[0][0].width, _SIDES[0]), _SIDES[1])
    step, width = side + _GAP, 4 * (side + _GAP) + 2 * _MARGIN
    high = side + _height(_NOTE) * 2 + 3 * _GAP
    told = _lines(leaks.sentence, _TEXT, width - 2 * _MARGIN)
    name = f"{title}, step {leaks.step} at strength {leaks.strength:g}: what leaks"
    heading = _lines(name, _TITLE, width - 2 * _MARGIN)
    below = _MARGIN + len(heading) * _height(_TITLE)
    top = below + len(told) * _height(_TEXT) + _GAP
    sheet = Image.new("RGB", (width, top + _height(_NOTE) * 2 + len(rows) * high), _GROUND)
    pen = ImageDraw.Draw(sheet)
    _write(pen, heading, _MARGIN, _TITLE)
    _write(pen, told, below, _TEXT)
    for column, name in enumerate(COLUMNS):
        _centred(pen, name, _MARGIN + column * step + side // 2, top, side, _GREY)
    top += 2 * _height(_NOTE)
    for number, (one, pictures) in enumerate(zip(leaks.pictures, rows, strict=True)):
        _write(pen, _lines(one.prompt, _NOTE, width - 2 * _MARGIN)[:1], top + number * high, _NOTE, _GREY)
        y = top + number * high + _height(_NOTE) + 2
        for column, (picture, style) in enumerate(zip(pictures, _styles(one), strict=True)):
            x = _MARGIN + column * step
            sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (x, y))
            pen.rectangle((x - 1, y - 1, x + side, y + side), outline=_LINE)
            _centred(pen, style, x + side // 2, y + side + 2, side, _INK)
    return sheet


def _styles(one: LeakPicture) -> list[str]:
    """What stands below the four pictures of a prompt."""
    return ["", *(f"style {style:z.2f}" for style in (one.style_without, one.style_word, one.style_with))]


def _files(order: WallOrder, one: LeakPicture) -> list[Path]:
    return [order.file(cell) for cell in leak_cells(order, one.prompt, one.with_trigger)]


def _opened(file: Path) -> Image.Image:
    with Image.open(file) as picture:
        return picture.convert("RGB")


def _height(size: int) -> int:
    return round(size * _LEADING)


def _lines(text: str, size: int, width: int) -> list[str]:
    font = font_for(text, size)
    return wrapped(drawable(text, font), font, width)


def _write(pen: ImageDraw.ImageDraw, lines: list[str], top: int, size: int, colour: str = _INK) -> None:
    for number, line in enumerate(lines):
        pen.text((_MARGIN, top + number * _height(size)), line, colour, font=font_for(line, size))


def _centred(pen: ImageDraw.ImageDraw, text: str, x: int, top: int, width: int, colour: str) -> None:
    for number, line in enumerate(_lines(text, _NOTE, width) if text else []):
        place = (x, top + number * _height(_NOTE))
        pen.text(place, line, colour, font=font_for(line, _NOTE), anchor="ma")


# ---------------------------------------------------------------------------------------------------------------------
# HTML


_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; max-width: 60rem; }
:root { color-scheme: light dark; }
table { border-collapse: collapse; } th, td { padding: 4px 10px 4px 0; text-align: left; vertical-align: top; }
th { font-weight: 400; max-width: 14rem; } td img { width: 128px; display: block; }
.scroll { overflow-x: auto; } .lead { font-size: 1.1rem; } .quiet { opacity: 0.75; } h2 { font-size: 1.1rem; }
"""


def leak_page(order: WallOrder, title: str, leaks: Leaks) -> str:
    """The whole page, with its pictures in it."""
    name = f"{escape(title)}: what leaks"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{_CSS}</style></head><body><h1>{name}</h1>"
        f"{leak_part(order, leaks, lambda text: escape(str(text)))}</body></html>\n"
    )


def leak_part(order: WallOrder, leaks: Leaks, say: Say) -> str:
    """A part of a page: the share, the pictures, what comes uninvited, and what captions leave unsaid."""
    what = f"Step {leaks.step} at strength {leaks.strength:g}, trigger {leaks.trigger}, seed {leaks.seed}."
    rows = "".join(_row(order, one, say) for one in leaks.pictures)
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("prompt", *COLUMNS))
    return (
        f'<p class="lead">{say(leaks.sentence)}</p><p class="quiet">{say(what)}</p>'
        f'<div class="scroll" tabindex="0"><table class="pictures"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
        f"<h3>What comes uninvited</h3>{_uninvited(leaks, say)}"
        f"<h3>What captions leave unsaid</h3>{''.join(_unsaid(leaks, say))}"
        + "".join(f'<p class="quiet">{say(limit)}</p>' for limit in _LIMITS)
    )


def _row(order: WallOrder, one: LeakPicture, say: Say) -> str:
    cells = []
    for file, style, name in zip(_files(order, one), _styles(one), COLUMNS, strict=True):
        picture = f'<img src="{data_uri(_opened(file))}" alt="{say(f"{one.prompt}: {name}")}">'
        cells.append(f'<td>{picture}<span class="scores">{style}</span></td>')
    nearer = f'<span class="quiet">nearer than before to {say(one.towards)}</span>'
    return f'<tr><th scope="row"><bdi>{say(one.prompt)}</bdi><br>{nearer}</th>{"".join(cells)}</tr>'


def _uninvited(leaks: Leaks, say: Say) -> str:
    looked_at = f"Of {leaks.words} words that some captions have and others have not" if leaks.words > 1 else _ONE_WORD
    if not leaks.words:
        return "<p>There are too few images, or too few words that some captions have and others have not.</p>"
    if not leaks.uninvited:
        return f"<p>{looked_at}, there is none whose images the pictures without the trigger have come nearer to.</p>"
    words = ", ".join(
        f"<strong><bdi>{say(one.word)}</bdi></strong> ({one.images} images, {one.deviations:.1f} deviations)"
        for one in leaks.uninvited
    )
    return f"<p>{looked_at}, the pictures without the trigger have come nearer to the images of: {words}.</p>"


def _unsaid(leaks: Leaks, say: Say) -> Iterator[str]:
    captions = leaks.captions
    if captions.everywhere:
        words = ", ".join(f"<bdi>{say(word)}</bdi>" for word in captions.everywhere)
        yield f"<p>Every caption has {words}: what that names cannot be told from the style.</p>"
    if captions.empty_of_words:
        names = say(", ".join(captions.empty_of_words[:_NAMED]))
        more = f" and {len(captions.empty_of_words) - _NAMED} more" if len(captions.empty_of_words) > _NAMED else ""
        yield f"<p>These captions say nothing else: {names}{more}. Say in words what each image shows.</p>"
    if captions.unnamed:
        yield "<p>These images look alike in what stands where, and their captions share no word that says how:</p><ul>"
        for group in captions.unnamed:
            both = zip(group.images, group.captions, strict=True)
            yield f"<li>{' and '.join(f'{say(name)} (<bdi>{say(text)}</bdi>)' for name, text in both)}</li>"
        yield "</ul><p>What is not named is learned as a part of the style. If they share a pose, a frame or a ground, "
        yield "name it in each of them.</p>"
    if not (captions.everywhere or captions.empty_of_words or captions.unnamed):
        yield "<p>Nothing was found that they lack.</p>"


_NAMED = 5
_ONE_WORD = "Of the one word that some captions have and others have not"
