"""The dataset doctor: what in a folder of images would spoil a training, each with its place and its fix.

`examine` looks at a folder. Every check is a function from items and measures to findings, with its thresholds beside
it. An error means that training would not start; a warning, that the result would be worse than it could be; a note,
that something is good to know.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..trainer.errors import Problem
from .captions import TRIGGER_PLACE, has_word, with_trigger
from .dataset import LEAST_SIDE, unfit
from .folder import Item
from .images import LAID_ON_WHITE, NOTHING_SHOWN
from .listing import Mapper, list_images, look_at
from .photometry import NORMAL_SIDE, Measures, measure
from .sidecars import Lines
from .tokens import CHUNK, is_common_word, weigh
from .workers import map_files

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
BLOCKED = 3
"""Exit code of `lorasmith check` where there is an error."""
Measured = Mapping[Path, Measures]
Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done, total)."""


@dataclass(frozen=True)
class Finding:
    """One thing that a check has found."""

    check: str
    severity: Severity
    where: str
    """A path below the folder, or the folder itself if it concerns the whole set."""
    what: str
    fix: str
    images: tuple[str, ...] = ()
    """The images that it is about, by their paths below the folder; of duplicates the one to keep comes first."""


@dataclass(frozen=True)
class TokenCounts:
    """The captions in tokens, with their trigger word."""

    captions: int
    longest: int
    longest_in: str
    chunks: dict[int, int]
    """How many captions take 1, 2, 3, ... chunks."""


@dataclass(frozen=True)
class Examination:
    """All that the doctor knows of a folder."""

    folder: Path
    lines: Lines
    items: list[Item]
    """The images that can be decoded."""
    problems: list[Problem]
    measures: dict[Path, Measures]
    findings: list[Finding]
    """The most severe first."""
    tokens: TokenCounts

    def count(self, severity: Severity) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def is_blocked(self) -> bool:
        return self.count("error") > 0

    def facts(self) -> dict[str, Any]:
        """For machines."""
        counts: dict[str, Any] = {f"{severity}s": self.count(severity) for severity in SEVERITIES}
        return {
            "folder": str(self.folder),
            "images": len(self.items),
            "findings": [asdict(finding) for finding in self.findings],
            "tokens": asdict(self.tokens),
            "summary": counts | {"blocked": self.is_blocked},
        }


@dataclass(frozen=True)
class Case:
    """What the checks look at."""

    folder: Path
    items: Sequence[Item]
    measures: Measured
    resolution: int
    trigger: str

    def name(self, item: Item) -> str:
        """The path below the folder, with forward slashes."""
        return item.path.relative_to(self.folder).as_posix()

    def names(self, items: Sequence[Item]) -> str:
        shown = ", ".join(self.name(item) for item in items[:_NAMES])
        return shown if len(items) <= _NAMES else f"{shown} and {len(items) - _NAMES} more"

    def about(self, items: Iterable[Item]) -> tuple[str, ...]:
        """All their names, as a finding has them."""
        return tuple(map(self.name, items))

    @property
    def captioned(self) -> list[Item]:
        return [item for item in self.items if any(item.captions)]


_NAMES = 5


def examine(
    folder: Path,
    resolution: int = 512,
    trigger: str = "",
    lines: Lines = "join",
    progress: Progress = lambda _what, _done, _total: None,
    mapper: Mapper = map_files,
) -> Examination:
    """Read, measure and check a folder; nothing in it is changed.

    Args:
        mapper: what reads the files; a `Memory`'s map spares those that it knows.

    Raises:
        UserError: if there is no such folder.
    """
    listing = list_images(folder, lines)
    found = look_at(listing, lambda done, total: progress("reading", done, total), mapper)
    paths = [item.path for item in found.items]
    measured = mapper(measure, paths, lambda done, total: progress("measuring", done, total))
    measures = dict(zip(paths, measured, strict=True))
    case = Case(folder, found.items, measures, resolution, trigger.strip())
    findings = [
        *unusable(case, [*found.problems, *unfit(found.items)]),
        *(finding for check in CHECKS for finding in check(case)),
    ]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))  # stable: checks stay in their order
    return Examination(folder, lines, found.items, found.problems, measures, findings, count_tokens(case))


# ---------------------------------------------------------------------------------------------------------------------
# files


def unusable(case: Case, problems: Sequence[Problem]) -> Iterator[Finding]:
    """What training refuses."""
    for problem in problems:
        place = Path(problem.where)
        inside = place.is_relative_to(case.folder) and place != case.folder
        where = place.relative_to(case.folder).as_posix() if inside else problem.where
        yield Finding("unusable", "error", where, problem.what, problem.fix)


def converted(case: Case) -> Iterator[Finding]:
    """What reading does to pictures, so that nobody wonders at what is trained."""
    for item in case.items:
        for note in item.notes:
            if note.startswith("rotated by EXIF"):
                check, fix = "rotated", "Nothing to do: it is trained as it is seen upright."
            elif note == LAID_ON_WHITE:
                check = "transparent"
                fix = 'Lay it on another ground yourself if white is wrong, or set data.mask = "alpha" to leave it out.'
            elif note == NOTHING_SHOWN:
                check, fix = "transparent", "Remove it: a plain white picture is all that would be learned of it."
            else:
                check, fix = "converted", "Nothing to do, if it looks right."
            yield Finding(check, "note", case.name(item), note, fix, case.about([item]))


# ---------------------------------------------------------------------------------------------------------------------
# duplicates

_LIKE = 31
"""Bits of 256 in which the hashes of near duplicates may differ. Smaller, recompressed or brighter copies differ by up
to 26, those with a small mark by about as much; pictures that are not related, by 100 or more. What was cropped by more
than 1 % on each side is not recognised."""
_COLOURS_LIKE, _BRIGHTNESS_LIKE = 10.0, 64.0
"""Mean difference of the patches, in levels of 255. The hash sees brightness only, and a blue heart is no red heart."""
_DETAILS_LIKE, _MARKED = 40.0, 10
"""All but so many of the 32 x 32 patches agree to so many levels, after a change of brightness and contrast. In copies
they agree to 26; where one of two drawn faces smiles, that is 86 or more."""


def same_files(items: Sequence[Item]) -> list[list[Item]]:
    """Groups of images whose files are the same, byte for byte."""
    return [group for group in _by_content(items) if len(group) > 1]


def _by_content(items: Sequence[Item]) -> list[list[Item]]:
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.sha256, []).append(item)
    return list(groups.values())


def alike(items: Sequence[Item], measures: Measured) -> list[list[Item]]:
    """Groups of images that show the same picture in different files, each with its largest first."""
    distinct = [first for first, *_ in _by_content(items)]
    group_of = {item.path: [item] for item in distinct}
    for one, other in _alike_pairs([measures[item.path] for item in distinct]):
        first, second = group_of[distinct[one].path], group_of[distinct[other].path]
        if first is not second:
            first += second
            group_of |= {item.path: first for item in second}
    groups = {id(group): group for group in group_of.values() if len(group) > 1}.values()
    return [sorted(group, key=lambda item: (-item.width * item.height, item.path)) for group in groups]


def _alike_pairs(measures: Sequence[Measures]) -> Iterator[tuple[int, int]]:
    """Indices of the pairs of pictures that look the same; each is compared with all later ones at once."""
    if not measures:
        return
    hashes = np.frombuffer(b"".join(m.likeness for m in measures), np.uint8).reshape(len(measures), -1)
    patches = np.frombuffer(b"".join(m.patches for m in measures), np.uint8).reshape(len(measures), -1, 3)
    for one in range(len(measures)):
        differing = _BITS[hashes[one] ^ hashes[one + 1 :]].sum(axis=1)
        for other in one + 1 + np.flatnonzero(differing <= _LIKE):
            if _patches_agree(patches[one].astype(np.float32), patches[other].astype(np.float32)):
                yield one, int(other)


def _patches_agree(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two pictures (patches, YCbCr) have the same colours, and the same brightness but for two numbers."""
    brightness, *colours = np.abs(one - other).mean(axis=0)
    if brightness > _BRIGHTNESS_LIKE or max(colours) > _COLOURS_LIKE:
        return False
    light, changed = one[:, 0] - one[:, 0].mean(), other[:, 0] - other[:, 0].mean()
    contrast = (light @ changed) / max(1.0, light @ light)
    return bool(np.sort(np.abs(contrast * light - changed))[-1 - _MARKED] <= _DETAILS_LIKE)


_BITS = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


def exact_duplicates(case: Case) -> Iterator[Finding]:
    for first, *others in same_files(case.items):
        what = f"is the same file as {case.names(others)}, so that it counts {len(others) + 1} times"
        fix = "Keep one; for more weight use data.weight."
        yield Finding("same file", "warning", case.name(first), what, fix, case.about(_best_first([first, *others])))


def _best_first(group: Sequence[Item]) -> list[Item]:
    """Those with a caption first, else in their order: with the one that is kept its words are kept."""
    return sorted(group, key=lambda item: not any(item.captions))


def near_duplicates(case: Case) -> Iterator[Finding]:
    for largest, *others in alike(case.items, case.measures):
        what = f"is nearly the same picture as {case.names(others)}"
        fix = "Keep the best one: what is seen more often is learned by heart, not as a style."
        images = case.about(_best_first([largest, *others]))
        yield Finding("same picture", "warning", case.name(largest), what, fix, images)


# ---------------------------------------------------------------------------------------------------------------------
# pixels

_ENLARGED = 1.1
"""By less, nobody sees it."""
_BLURRED = 1.4
"""Pixels of blur at the normal side. Sharp photographs and drawings have 0.3 to 0.6 (the highest was 0.74, a brick wall
in soft light); blurred by a Gaussian of 2 px they have 1.3 to 2.2, and enlarged four times as much."""
_MOSTLY = 0.5
"""Where more of the images than this share are soft, softness is the style."""
_BLOCKY = 1.8
"""Grey levels. Photographs saved as JPEG of quality 75 have at most 1.0, of quality 20 most have 2 to 3."""


def too_small(case: Case) -> Iterator[Finding]:
    """Images with fewer pixels than they are trained at; buckets have the area of the resolution squared."""
    for item in case.items:
        side = math.sqrt(item.width * item.height)
        enlarged = case.resolution / side
        if enlarged > _ENLARGED and min(item.width, item.height) >= LEAST_SIDE:
            what = f"is {item.width} x {item.height}; for {case.resolution} it is enlarged {enlarged:.3g} times"
            fix = f"Find a larger original, or train at data.resolution = {max(64, int(side) // 64 * 64)}."
            yield Finding("too small", "warning", case.name(item), what, fix, case.about([item]))


def blurred(case: Case) -> Iterator[Finding]:
    radii = {item.path: case.measures[item.path].blur or 0.0 for item in case.items}
    soft = [item for item in case.items if radii[item.path] > _BLURRED]
    if len(soft) > 2 and len(soft) > _MOSTLY * len(case.items):
        what = f"{len(soft)} of {len(case.items)} images are soft, blurred by {_BLURRED:g} px or more"
        fix = "If that is the style, there is nothing to do."
        yield Finding("blurred", "note", str(case.folder), what, fix, case.about(soft))
        return
    for item in soft:
        what = f"is blurred, by about {radii[item.path]:.1f} px even where it is sharpest (at {NORMAL_SIDE} px)"
        fix = "Take a sharper picture, or remove it."
        yield Finding("blurred", "warning", case.name(item), what, fix, case.about([item]))


def blocky(case: Case) -> Iterator[Finding]:
    for item in case.items:
        if (steps := case.measures[item.path].blocks) > _BLOCKY:
            what = f"shows the 8 x 8 blocks of strong JPEG compression (steps of {steps:.1f} grey levels)"
            fix = "Find the original, or remove it: the blocks would be learned with the style."
            yield Finding("JPEG blocks", "warning", case.name(item), what, fix, case.about([item]))


def bordered(case: Case) -> Iterator[Finding]:
    for item in case.items:
        if borders := case.measures[item.path].borders:
            fix = "Crop them off, or the style will have them too; --fix does it."
            what = f"has plain bars: {borders}"
            yield Finding("borders", "warning", case.name(item), what, fix, case.about([item]))


# ---------------------------------------------------------------------------------------------------------------------
# style

_ENOUGH_FOR_A_STYLE = 8
_UNLIKE = 4.5
"""Robust standard deviations, of which normally distributed values exceed it once in 150,000."""
_DIFFERENCES = (
    # of Tone, in its order: the least difference that an eye would call one, and what it is called, less and more
    (0.15, "darker", "brighter"),
    (0.08, "lower in contrast", "higher in contrast"),
    (0.15, "less colourful", "more colourful"),
    (0.15, "bluer", "redder"),
    (0.10, "more purple", "greener"),
    (0.15, "plainer", "richer in detail"),
)


def unlike_the_rest(case: Case) -> Iterator[Finding]:
    """Images whose tone lies far from the median, counted in median absolute deviations."""
    if len(case.items) < _ENOUGH_FOR_A_STYLE:
        return
    tones = np.array([astuple(case.measures[item.path].tone) for item in case.items])
    off = tones - np.median(tones, axis=0)
    scores = off / np.maximum(1.4826 * np.median(np.abs(off), axis=0), 1e-3)
    for item, differences, deviations in zip(case.items, off, scores, strict=True):
        words = [
            more if difference > 0 else less
            for difference, deviation, (least, less, more) in zip(differences, deviations, _DIFFERENCES, strict=True)
            if abs(deviation) > _UNLIKE and abs(difference) > least
        ]
        if words:
            fix = "Look at it: if it is not in the style, remove it."
            what = f"is much {' and '.join(words)} than the rest"
            yield Finding("unlike the rest", "warning", case.name(item), what, fix, case.about([item]))


# ---------------------------------------------------------------------------------------------------------------------
# captions

_SAME_CAPTION = 3
"""Images; two may well show the same thing."""
_CAPTION_FIX = "Write what it shows, or let a model do it: lorasmith caption."


def uncaptioned(case: Case) -> Iterator[Finding]:
    """Images without words; of a set that has none at all, one finding."""
    bare = [item for item in case.items if not any(item.captions)]
    if bare and len(bare) == len(case.items):
        learned = (
            f"so all they show is learned under the trigger {case.trigger!r}" if case.trigger else "and no trigger"
        )
        what = f"none of the {len(bare)} images has a caption, {learned}"
        severity = "note" if case.trigger else "warning"
        yield Finding("no caption", severity, str(case.folder), what, _CAPTION_FIX, case.about(bare))
        return
    for item in bare:
        what = "has no caption" if item.source == "none" else f"its caption in {item.source} is empty"
        yield Finding("no caption", "warning", case.name(item), what, _CAPTION_FIX, case.about([item]))


def captioned_alike(case: Case) -> Iterator[Finding]:
    """Captions that do not tell images apart."""
    groups: dict[tuple[str, ...], list[Item]] = {}
    for item in case.captioned:
        groups.setdefault(item.captions, []).append(item)
    for captions, group in groups.items():
        if len(group) < _SAME_CAPTION:
            continue
        source = ", the folder's name" if all(item.source == "folder name" for item in group) else ""
        what = (
            f"{len(group)} of {len(case.items)} images have the caption {captions[0]!r}{source} ({case.names(group)})"
        )
        fix = "Write what each shows: what captions do not name is learned as part of the style."
        yield Finding("same caption", "warning", str(case.folder), what, fix, case.about(group))


def too_long(case: Case) -> Iterator[Finding]:
    """Captions that a text encoder cannot read at once."""
    for item in case.captioned:
        weight = max((weigh(with_trigger(caption, case.trigger)) for caption in item.captions), key=lambda w: w.tokens)
        if weight.chunks > 1:
            what = (
                f"its caption has {weight.tokens} tokens, which training reads in {weight.chunks} chunks of {CHUNK}; "
                f"programs without chunks stop after '... {weight.start[-_TAIL:]}'"
            )
            fix = "Put what matters first, or shorten it."
            yield Finding("long caption", "note", case.name(item), what, fix, case.about([item]))


_TAIL = 30


def count_tokens(case: Case) -> TokenCounts:
    """How long the captions are for the text encoder."""
    weights = [
        (weigh(with_trigger(caption, case.trigger)), case.name(item))
        for item in case.captioned
        for caption in item.captions
    ]
    longest, name = max(((weight.tokens, name) for weight, name in weights), default=(0, ""))
    return TokenCounts(len(weights), longest, name, dict(sorted(Counter(w.chunks for w, _ in weights).items())))


# ---------------------------------------------------------------------------------------------------------------------
# words

_IN_MANY = 0.2
"""Share of the captions from which on an ordinary use of the trigger is no accident."""
_IN_NEARLY_ALL = 0.8
_ENOUGH_CAPTIONS = 6


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FILLERS = _words(
    "a an the and or but of in on at to for from by with without into onto over under between behind beside near next "
    "front left right top bottom up down out off is are was be been being has have had its his her their this that "
    "these those it he she they there as while very some one two three no not which who"
)
_KINDS_OF_PICTURES = _words(
    "photo photograph photography image picture pic painting illustration drawing sketch art artwork artstyle style "
    "styled render rendering icon emoji emoticon sticker logo print poster comic cartoon anime manga scan screenshot "
    "closeup close-up shot view scene background"
)
"""These name the style or the medium, which is what is to be learned, and no subject."""
_WORD = re.compile(r"[^\W_][\w'-]*[^\W_]")


def triggered(case: Case) -> Iterator[Finding]:
    """Whether the trigger stands in the captions, and whether it is a word that has a meaning already."""
    if not case.trigger:
        yield from _place_without_trigger(case)
        return
    captioned, trigger = case.captioned, case.trigger
    with_it = [item for item in captioned if any(_names_trigger(caption, trigger) for caption in item.captions)]
    if len(with_it) < len(captioned):
        what = f"{len(captioned) - len(with_it)} of {len(captioned)} captions lack the trigger {trigger!r}"
        fix = f"Nothing to do: training puts it first, or where a caption says {TRIGGER_PLACE}."
        without = [item for item in captioned if item not in with_it]
        yield Finding("trigger", "note", str(case.folder), what, fix, case.about(without))
    inside = [item for item in captioned if any(_used_as_a_word(caption, trigger) for caption in item.captions)]
    uses = f"; {len(inside)} of {len(captioned)} captions use it as an ordinary word" if inside else ""
    fix = "Take a word that does not exist, so that it means the style and nothing else."
    if all(map(is_common_word, trigger.split())):
        what = f"the trigger {trigger!r} already means something to the base, and mixes with the style{uses}"
        yield Finding("trigger", "warning", str(case.folder), what, fix, case.about(inside))
    elif _IN_MANY * len(captioned) <= len(inside) < _IN_NEARLY_ALL * len(captioned) and inside:
        what = f"{len(inside)} of {len(captioned)} captions use the trigger {trigger!r} as an ordinary word"
        yield Finding("trigger", "warning", str(case.folder), what, fix, case.about(inside))


def _place_without_trigger(case: Case) -> Iterator[Finding]:
    marked = [item for item in case.items if any(TRIGGER_PLACE in caption for caption in item.captions)]
    if marked:
        what = f"{len(marked)} captions hold {TRIGGER_PLACE} ({case.names(marked)}), and no trigger was given"
        fix = "Set data.trigger in the configuration."
        yield Finding("trigger", "note", str(case.folder), what, fix, case.about(marked))


def _names_trigger(caption: str, trigger: str) -> bool:
    return has_word(caption, trigger) or TRIGGER_PLACE in caption


def _used_as_a_word(caption: str, trigger: str) -> bool:
    return has_word(caption, trigger) and not caption.lower().startswith(trigger.lower())


def always_there(case: Case) -> Iterator[Finding]:
    """Words that stand in nearly every caption: the set shows one thing only, which will come with the style."""
    captioned = case.captioned
    if len(captioned) < _ENOUGH_CAPTIONS or len({item.captions for item in captioned}) == 1:
        return
    known = _FILLERS | _KINDS_OF_PICTURES | set(content_words(case.trigger)) | set(content_words(TRIGGER_PLACE))
    counts = Counter(word for item in captioned for word in set(content_words(" ".join(item.captions))) - known)
    for word, count in counts.most_common():
        if count < _IN_NEARLY_ALL * len(captioned):
            break
        what = f"{word!r} stands in {count} of {len(captioned)} captions, and will be learned as a part of the style"
        fix = "Add images of other things. If it names the style, leave it out of the captions."
        with_it = [item for item in captioned if word in content_words(" ".join(item.captions))]
        yield Finding("one subject", "warning", str(case.folder), what, fix, case.about(with_it))


def content_words(text: str) -> list[str]:
    """The words of a text in lower case, without those that only hold it together."""
    return [word for word in _WORD.findall(text.lower()) if word not in _FILLERS]


CHECKS: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    *(exact_duplicates, near_duplicates, too_small, blurred, blocky, bordered, unlike_the_rest),
    *(uncaptioned, captioned_alike, too_long, triggered, always_there, converted),
)
"""In the order in which they are told, within each severity."""
