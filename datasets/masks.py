"""Loss masks: grey pictures in a `mask/` folder, white where the image is to be learned, black where it is not.

The mask of `cat.jpg` is `mask/cat.png` beside it, or `mask/` in a folder above with the same folders below.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..trainer.errors import Problem
from ..trainer.files import sha256_of
from .images import UnreadableImageError, read_grey

MaskFrom = Literal["files", "alpha", "none"]
"""Where masks come from: `mask/` folders where there are some, the images' own transparency, or nowhere."""

FOLDERS = ("mask", "masks")
_SUFFIX = "-masklabel"  # OneTrainer's, which keeps masks beside their images
_SAME_SHAPE = 0.02


@dataclass(frozen=True)
class Mask:
    """A mask's file as it was found."""

    path: Path
    sha256: str
    width: int
    height: int
    brightest: int
    """0 to 255; a mask of 0 leaves nothing to learn."""


def is_mask(folder: Path, file: Path) -> bool:
    """Whether a picture lies in a `mask/` folder below the given one, or is named as a mask."""
    below = file.relative_to(folder).parent.parts
    return any(part.lower() in FOLDERS for part in below) or file.stem.endswith(_SUFFIX)


def masks_by_image(
    folder: Path, images: Iterable[Path], files: Sequence[Path], problems: list[Problem]
) -> dict[Path, Path]:
    """The mask file of each image that has one; a mask without an image, and a second one, is a problem."""
    stems: dict[Path, list[Path]] = {}
    for image in images:
        stems.setdefault(image.with_suffix(""), []).append(image)
    found: dict[Path, Path] = {}
    for file in files:
        owners = stems.get(owner(folder, file), [])
        if not owners:
            fix = 'Give it the name of its image. If it is a picture to train on, set data.mask = "none".'
            problems.append(Problem(str(file), "is a mask without an image", fix))
        for image in owners:
            if image in found:
                what = f"{image.name} has the mask {found[image].name} already"
                problems.append(Problem(str(file), what, "Keep one of the two."))
            found.setdefault(image, file)
    return found


def owner(folder: Path, mask: Path) -> Path:
    """The path, without suffix, of the image that a mask belongs to."""
    below = [part for part in mask.relative_to(folder).parent.parts if part.lower() not in FOLDERS]
    return folder.joinpath(*below, mask.stem.removesuffix(_SUFFIX))


def masks_taken_for_pictures(folder: Path, images: Sequence[Path]) -> Iterator[Problem]:
    """Where masks are not read: folders of them, which would be trained as pictures."""
    stems = {image.with_suffix("") for image in images if not is_mask(folder, image)}
    masks = [image for image in images if is_mask(folder, image) and owner(folder, image) in stems]
    for parent in sorted({mask.parent for mask in masks}):
        count = sum(mask.parent == parent for mask in masks)
        what = f"holds {count} masks of images, which would be trained as pictures"
        yield Problem(str(parent), what, 'Set data.mask = "files", or move it elsewhere.')


def read_mask_facts(file: Path) -> Mask | Problem:
    """What is known of a mask's file; importable, for worker processes."""
    try:
        sha256, picture = sha256_of(file), read_grey(file)
    except (UnreadableImageError, OSError) as error:
        return Problem(str(file), f"cannot be read as a mask ({error})", "Save it again or remove it.")
    return Mask(file, sha256, picture.width, picture.height, int(picture.getextrema()[1]))  # pyright: ignore


def check_mask(mask: Mask, width: int, height: int, unmasked_weight: float = 0.0) -> Problem | None:
    """What is wrong with a mask for an image of this upright size."""
    if mask.brightest == 0 and unmasked_weight == 0:
        what = "is black everywhere, so its image would teach nothing"
        return Problem(str(mask.path), what, "Remove the image, or set data.unmasked_weight.")
    if abs(mask.width * height - mask.height * width) > _SAME_SHAPE * mask.width * height:
        what = f"is {mask.width} x {mask.height}, another shape than its image, which is {width} x {height}"
        return Problem(str(mask.path), what, "Make it anew for the image as it is seen upright.")
    return None


def sound_masks(
    by_image: Mapping[Path, Path], facts: Mapping[Path, Mask | Problem], problems: list[Problem]
) -> dict[Path, Mask]:
    """The masks that can be read, by image; the others are problems."""
    unreadable = [fact for fact in facts.values() if isinstance(fact, Problem)]
    problems += unreadable
    return {image: fact for image, file in by_image.items() if isinstance(fact := facts[file], Mask)}
