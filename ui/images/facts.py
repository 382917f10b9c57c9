"""What is known of a folder of images, in words: how many there are, what its trigger word means, how they are cut."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...datasets.buckets import BucketRules, fit
from ...datasets.captions import TRIGGER_PLACE, has_word
from ...datasets.checks import Examination
from ...datasets.folder import Item
from ...datasets.listing import Listing
from ...datasets.tokens import is_common_word
from ..html import esc, notice, table
from .checkups import Checkup

EXAMPLE_SIDE = 64
"""What the pocket base draws, for which the example is made."""
SIDES = (EXAMPLE_SIDE, 256, 512, 768, 1024)
"""Resolutions that the bases of today are trained at."""
_STEP_POCKET, _STEP, _STEP_SDXL = 16, 64, 32
_CROPPED = 0.1
_NAMED = 10
_LONGEST_TRIGGER = 12
_ANY_FOLDER = {"", "images", "image", "photos", "pictures", "dataset", "data", "train", "training", "img", "imgs"}
"""Names that say nothing of what is in a folder."""


def many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def summary(listing: Listing, checkup: Checkup) -> str:
    """One line: images, captions, problems, largest and smallest."""
    images = listing.images
    if not images:
        return "".join(notice(problem.what, problem.fix, where=problem.where) for problem in listing.problems)
    captioned = sum(image.is_captioned for image in images)
    parts = [f"{many(len(images), 'image')}, {many(captioned, 'caption')}"]
    examination = checkup.examination
    if examination and not checkup.doing:
        parts[0] += f", {many(len(problems_of(examination)), 'problem')}"
    sentence = f"{parts[0]}."
    if examination and examination.items:
        largest, smallest = sizes = _extremes(examination.items)
        sentence += f" Largest {largest}, smallest {smallest}." if len(set(sizes)) > 1 else f" All are {largest}."
    if checkup.doing:
        sentence += f" Looking for problems: {checkup.doing}."
    where = f'<p class="quiet">They are in <code>{esc(listing.folder)}</code>.</p>'
    return f'<p class="summary"><strong>{esc(sentence)}</strong></p>{where}'


def problems_of(examination: Examination) -> list:
    """Findings that something should be done about; notes are only good to know."""
    return [finding for finding in examination.findings if finding.severity != "note"]


def _extremes(items: Sequence[Item]) -> tuple[str, str]:
    by_area = sorted(items, key=lambda item: item.width * item.height)
    return _size(by_area[-1]), _size(by_area[0])


def _size(item: Item) -> str:
    return f"{item.width} x {item.height}"


# ---------------------------------------------------------------------------------------------------------------------
# the trigger word


def trigger_check(listing: Listing, trigger: str) -> str:
    """Whether a trigger word is a good one, and how many captions have it."""
    trigger = trigger.strip()
    if not trigger:
        return (
            '<p class="quiet">Without a trigger word the style is always on. Most people give one, and '
            "switch the style on by it.</p>"
        )
    captions = [" ".join(image.captions) for image in listing.images if image.is_captioned]
    holding = sum(has_word(caption, trigger) or TRIGGER_PLACE in caption for caption in captions)
    counted = f"{holding} of {many(len(captions), 'caption')} {'has' if holding == 1 else 'have'} it."
    if holding < len(captions):
        counted += " Training puts it first in the others; the files need not have it."
    if all(map(is_common_word, trigger.split())):
        fix = "Take a word that does not exist, so that it means your images and nothing else."
        return notice(f"{trigger!r} is a common word, which already means something to every base", fix, "warning")
    return f'<p class="quiet">A rare word, so it can mean your images only. {esc(counted)}</p>'


def suggested_trigger(folder: Path) -> str:
    """A word that does not exist, made from a folder's name."""
    name = re.sub(r"^\d+_", "", folder.name).lower()
    letters = re.sub(r"[^a-z]", "", name)[:_LONGEST_TRIGGER]
    letters = "mystyle" if letters in _ANY_FOLDER else letters
    for word in (letters, _without_inner_vowels(letters), f"{letters}x", f"{letters}xq"):
        if len(word) > 2 and not is_common_word(word):
            return word
    return f"{letters}xqz"


def _without_inner_vowels(word: str) -> str:
    return word[:1] + re.sub(r"[aeiou]", "", word[1:])


# ---------------------------------------------------------------------------------------------------------------------
# buckets


def bucket_table(items: Iterable[Item], resolution: int) -> str:
    """How many images go to each size, and which lose more than a tenth of themselves."""
    step = _STEP_POCKET if resolution == EXAMPLE_SIDE else _STEP_SDXL if resolution > 768 else _STEP
    rules = BucketRules(step)
    fits = {item: fit(item.width, item.height, resolution, rules) for item in items}
    if not fits:
        return '<p class="quiet">There is no image yet that could be trained on.</p>'
    counts = Counter(fitted.bucket for fitted in fits.values())
    rows = [(f"{width} x {height} px", str(count)) for (width, height), count in counts.most_common()]
    cropped = [(item.path.name, fitted.cropped_share) for item, fitted in fits.items()]
    cropped = sorted((pair for pair in cropped if pair[1] > _CROPPED), key=lambda pair: -pair[1])
    told = ", ".join(f"{name} ({share:.0%})" for name, share in cropped[:_NAMED])
    more = f" and {len(cropped) - _NAMED} more" if len(cropped) > _NAMED else ""
    lost = f"More than 10 % of these is cut off: {told}{more}." if cropped else "No image loses more than 10 %."
    what = "Each image is brought to the size nearest to its shape, without distortion; what does not fit is cut off."
    return f'<p class="quiet">{what}</p>{table(["Size", "Images"], rows)}<p>{esc(lost)}</p>'
