"""The small world that the pocket base knows: which concepts, and the captions they are shown with."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPTokenizer

from lorasmith.trainer.bases import POCKET
from lorasmith.trainer.encoder import to_tensor
from lorasmith.trainer.example import EXAMPLES
from lorasmith.trainer.score import colour_layout_distance

from .sources import SIDE, Emoji, Sources

CONCEPTS = {
    "Smileys & Emotion": 70,
    "Animals & Nature": 115,
    "Food & Drink": 90,
    "Activities": 40,
    "Travel & Places": 85,
    "Objects": 90,
}
"""How many concepts each category gets: common ones, and few enough to be drawn well by so small a model."""
LEAST_DISTANCE = 0.05
"""A concept whose picture lies nearer than this to one that was taken before is left out: two names, one picture."""
SHEET = (
    """
grinning face with smiling eyes, crying face, angry face, winking face, smiling face with heart-shaped eyes, skull,
ghost, pile of poo, heavy black heart, broken heart, dog face, cat face, pig face, panda face, frog face, lion face,
penguin, owl, fish, octopus, crab, butterfly, honeybee, snail, turtle, tulip, sunflower, cactus, palm tree, mushroom,
banana, red apple, strawberry, watermelon, carrot, slice of pizza, hamburger, ice cream, birthday cake, hot beverage,
automobile, bicycle, airplane, rocket, sailboat, house building, soccer ball, umbrella with rain drops
""".replace("\n", " ")
    .strip()
    .split(", ")
)
"""The concepts of the contact sheet: faces, animals, plants, food, vehicles and objects that everyone can name."""
PREFIX = "emoji of"
STRAY_WORDS = 6
"""Caption sets in which a word without meaning stands first, so that a trigger word leaves the picture alone."""


def choose_world(sources: Sources) -> list[Emoji]:
    """The concepts, in Unicode's order.

    First those that the contact sheet and the style measure need; then of each category the oldest of each of its
    subcategories in turn, so that none is left out.
    """
    measured = {file.stem for file in (EXAMPLES / "measure" / "base").glob("*.webp")}
    everything = sources.emoji()
    needed = [e for e in everything if e.name in SHEET or Path(e.file).stem in measured]
    chosen: list[Emoji] = []
    pictures = torch.empty(0, 3, SIDE, SIDE)
    room = Counter(CONCEPTS)
    for emoji in [*needed, *in_turn(e for e in everything if e not in needed)]:
        picture = to_tensor([sources.noto(emoji.file)])
        alike = len(chosen) and colour_layout_distance(pictures, picture).min() < LEAST_DISTANCE
        if emoji in needed or (room[emoji.category] > 0 and not alike):
            chosen.append(emoji)
            pictures = torch.cat([pictures, picture])
            room[emoji.category] -= 1
    return sorted(chosen, key=lambda emoji: emoji.order)


def in_turn(emoji: Iterable[Emoji]) -> list[Emoji]:
    """The oldest of each subcategory, then the second oldest of each, and so on."""
    rows: dict[str, list[Emoji]] = {}
    for one in sorted(emoji, key=lambda e: (e.since, e.order)):
        rows.setdefault(one.subcategory, []).append(one)
    return [one for row in zip_longest(*rows.values()) for one in row if one]


def caption_sets(world: Sequence[Emoji], seed: int) -> dict[str, list[str]]:
    """A caption for each concept in each set: its name, other names for it, keywords, and words to be ignored."""
    draw = random.Random(seed)
    names = [emoji.name for emoji in world]
    others = Counter(emoji.short_name for emoji in world)
    aliases = [e.short_name if others[e.short_name] == 1 and e.short_name not in names else e.name for e in world]
    sets = {
        "name": [f"{PREFIX} {name}" for name in names],
        "alias": [f"{PREFIX} {alias}" for alias in aliases],
        "keywords": [", ".join([f"{PREFIX} {e.name}", *some_keywords(e, draw)]) for e in world],
    }
    spoken = {word for captions in sets.values() for caption in captions for word in caption.replace(",", "").split()}
    words = [word for word in stray_words() if word not in spoken]
    for number in range(STRAY_WORDS):
        sets[f"stray-{number}"] = [f"{draw.choice(words)} {PREFIX} {name}" for name in names]
    return sets


def some_keywords(emoji: Emoji, draw: random.Random) -> list[str]:
    """Up to three, as many as the text encoder has room for beside the name."""
    words = [keyword for keyword in emoji.keywords if keyword.replace(" ", "").isalpha()]
    return draw.sample(words, min(3, len(words), max(0, 7 - len(emoji.name.split()))))


SHOWN = {"name": 3.0, "alias": 1.0, "keywords": 1.0, **{f"stray-{number}": 0.5 for number in range(STRAY_WORDS)}}
"""How often each caption set is shown in an epoch."""


def stray_words() -> list[str]:
    """Whole lower-case words of three letters and more from the tokenizer's vocabulary, in its order."""
    vocabulary = CLIPTokenizer.from_pretrained(POCKET / "tokenizer").get_vocab()
    words = (
        token.removesuffix("</w>")
        for token in sorted(vocabulary, key=lambda t: vocabulary[t])
        if token.endswith("</w>")
    )
    return [word for word in words if len(word) >= 3 and word.isascii() and word.isalpha() and word.islower()]


def write_datasets(sources: Sources, world: Sequence[Emoji], folder: Path, seed: int) -> Iterator[Path]:
    """One folder of images with captions for each caption set; yields them as they are complete."""
    shutil.rmtree(folder, ignore_errors=True)
    pictures: list[Image.Image] = [sources.noto(emoji.file) for emoji in world]
    for name, captions in caption_sets(world, seed).items():
        (folder / name).mkdir(parents=True)
        for emoji, picture, caption in zip(world, pictures, captions, strict=True):
            file = folder / name / emoji.file
            picture.save(file)
            file.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
        yield folder / name
