"""Measures what leaks: pictures of neutral prompts without and with the trigger, against the training images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean

import torch
from torch import Tensor

from ...datasets.captions import with_trigger
from ...datasets.workers import Progress
from ..errors import UserError
from ..jobs import RunFolder
from ..painting.orders import Cell, WallOrder
from ..painting.studio import Studio
from .content import FEW, ContentScale
from .eye import Eye, side_of
from .features import Features
from .leaks import PROMPTS, Captions, LeakPicture, Leaks, Uninvited, Unnamed, leak_cells, leak_order
from .neutral import neutral_prompts, words_of
from .style import StyleScale
from .training import TrainingImages, training_images

LEAST = 0.25
"""Style with the trigger. What has less of it has not learned it yet, and a share of nothing tells nothing."""
HARDLY, PARTLY = 0.2, 0.5
"""Up to here of the style with the trigger hardly anything leaks, and up to there a part."""
CHANCE = 0.1
"""One report in so many names a word, or images, for no reason but chance."""
_GROUPS = 5
_MAD = 1.4826
"""Deviations of normal numbers in their median distance from the median."""


def find_leaks(
    run: RunFolder,
    studio: Studio,
    step: int | None = None,
    strength: float = 1.0,
    prompts: Sequence[str] = (),
    count: int = PROMPTS,
    seed: int | None = None,
    progress: Progress | None = None,
) -> tuple[WallOrder, Leaks]:
    """Draw neutral prompts without and with the trigger, and measure them; at most `count` subjects that no caption
    names, if no prompts are given. What was drawn before is not drawn again; `progress` counts what is.

    Raises:
        RunError: if the checkpoint is not there, or the base has changed.
        UserError: if the run has no trigger, or its images are not there, or no neutral prompt is left.
    """
    config, images = run.read_config(), training_images(run)
    texts = list(dict.fromkeys(prompts)) or neutral_prompts(config.base.model, images.captions, [config.trigger], count)
    if not texts:
        what = "the captions name something of each subject that could be drawn"
        raise UserError(what, str(run.path), "Give others: --prompt TEXT, for things that no image shows.")
    order = leak_order(run, step, strength, texts, seed)
    files = order.files()
    missing = sum(not file.is_file() for file in files.values())
    done = iter(range(1, missing + 1))
    studio.draw(order, files, lambda: progress(next(done), missing) if progress else None)
    studio.prepare(order)
    pairs = [(text, with_trigger(text, config.trigger)) for text in texts]
    return order, _Case.of(order, pairs, images, files, Eye(studio.vae)).leaks()


@dataclass(frozen=True, eq=False)
class _Case:
    """Features of the four kinds of pictures, prompt by prompt, and of the training images."""

    order: WallOrder
    prompts: Sequence[tuple[str, str]]
    images: TrainingImages
    trigger: str
    base: Features
    without: Features
    word: Features
    asked: Features
    style: StyleScale
    content: ContentScale

    @classmethod
    def of(
        cls,
        order: WallOrder,
        prompts: Sequence[tuple[str, str]],
        images: TrainingImages,
        files: dict[Cell, Path],
        eye: Eye,
    ) -> _Case:
        kinds = zip(*(leak_cells(order, *pair) for pair in prompts), strict=True)
        base, without, word, asked = (eye.drawn([files[cell] for cell in cells]) for cells in kinds)
        training = eye.true(images, side_of(next(iter(files.values()))))
        trigger = RunFolder(Path(order.run)).read_config().trigger
        style, content = StyleScale.fit(base, training), ContentScale.fit(base, training)
        return cls(order, prompts, images, trigger, base, without, word, asked, style, content)

    def leaks(self) -> Leaks:
        without, asked, word = (self._gained(kind) for kind in (self.without, self.asked, self.word))
        share, error = leaked(without, asked)
        is_known = self.style.is_known and fmean(asked) >= LEAST
        names = [example.name for example in self.images.examples]
        words = [words_of(caption, [self.trigger]) for caption in self.images.captions]
        moved = self.content.agreement(self.without) - self.content.agreement(self.base)
        towards = (moved - moved.mean(0)).argmax(1).tolist() if len(moved) > 1 else moved.argmax(1).tolist()
        uninvited, looked_at = uninvited_words(moved.mean(0), words)
        [step], (_, strength), [seed] = self.order.steps, self.order.strengths, self.order.seeds
        return Leaks(
            step=step,
            strength=strength,
            trigger=self.trigger,
            seed=seed,
            without=fmean(without),
            with_trigger=fmean(asked),
            word=fmean(word),
            leak=share if is_known else None,
            error=error if is_known else None,
            sentence=leak_sentence(self.style.is_known, fmean(without), fmean(asked), fmean(word), share, error),
            pictures=tuple(
                LeakPicture(prompt, triggered, mine, called, by_word, names[nearest])
                for (prompt, triggered), mine, called, by_word, nearest in zip(
                    self.prompts, without, asked, word, towards, strict=True
                )
            ),
            uninvited=uninvited,
            words=looked_at,
            captions=unsaid(self.content.training @ self.content.training.T, words, names, self.images.captions),
            images=len(self.images.examples),
        )

    def _gained(self, pictures: Features) -> list[float]:
        """All against the base's picture of the prompt without the trigger, so that they start at the same place."""
        return self.style.gained(pictures, self.base).tolist()


def leaked(without: Sequence[float], asked: Sequence[float]) -> tuple[float, float | None]:
    """The share of the mean style that comes without the trigger, and its standard error by the jackknife (Quenouille
    1956): how much it changes as each prompt is left out; None of a single one."""
    pairs = list(zip(without, asked, strict=True))
    share = _ratio(pairs)
    if len(pairs) < 2:
        return share, None
    others = [_ratio(pairs[:row] + pairs[row + 1 :]) for row in range(len(pairs))]
    middle = fmean(others)
    return share, math.sqrt((len(pairs) - 1) / len(pairs) * sum((other - middle) ** 2 for other in others))


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    asked = fmean(one for _, one in pairs)
    return fmean(one for one, _ in pairs) / asked if asked else 0.0


def uninvited_words(moved: Tensor, words: Sequence[frozenset[str]]) -> tuple[tuple[Uninvited, ...], int]:
    """Words whose images the pictures have come nearer to than lots would show, and how many words were looked at.

    `moved` (T) is by how much more the pictures agree with each training image than the base's do. A word counts that
    two images or more have, and two or more have not. Of n images drawn by lot the mean has the variance
    s^2 (T - n) / (n (T - 1)); taken for normal, the limit is what the largest of all words passes in one report in ten.
    """
    total = len(words)
    if total < FEW:
        return (), 0
    holding = {
        word: [row for row, each in enumerate(words) if word in each] for word in sorted(frozenset().union(*words))
    }
    counted = {word: rows for word, rows in holding.items() if 2 <= len(rows) <= total - 2}
    middle, variance = float(moved.mean()), float(moved.var(correction=0))
    if not counted or not variance:
        return (), len(counted)
    limit = NormalDist().inv_cdf(1 - CHANCE / len(counted))
    found = []
    for word, rows in counted.items():
        lots = math.sqrt(variance * (total - len(rows)) / (len(rows) * (total - 1)))
        found.append(Uninvited(word, len(rows), (float(moved[rows].mean()) - middle) / lots))
    far = [one for one in found if one.deviations > limit]
    return tuple(sorted(far, key=lambda one: -one.deviations)), len(counted)


def unsaid(
    agreement: Tensor, words: Sequence[frozenset[str]], names: Sequence[str], captions: Sequence[str]
) -> Captions:
    """What captions could say and do not; `agreement` (T, T) is how alike what stands where is in each two images."""
    everywhere = frozenset.intersection(*words) if len(words) > 1 else frozenset[str]()
    own = [each - everywhere for each in words]
    empty = [name for name, each in zip(names, own, strict=True) if not each]
    groups = list(_alike(agreement, own)) if len(own) >= FEW else []
    unnamed = [
        Unnamed(tuple(names[row] for row in rows), tuple(captions[row] for row in rows)) for rows in groups[:_GROUPS]
    ]
    return Captions(tuple(sorted(everywhere)), tuple(empty), tuple(unnamed))


def _alike(agreement: Tensor, own: Sequence[frozenset[str]]) -> Iterator[tuple[int, int]]:
    """Two images that agree more than the most alike of all pairs would in one report in ten, if they were alike by
    chance, and whose captions share no word; the most alike first. Median and median distance are the scale, because
    images that are alike for a reason would widen any other."""
    first, second = torch.triu_indices(len(own), len(own), 1)
    pairs = agreement[first, second]
    middle = pairs.median()
    spread = _MAD * float((pairs - middle).abs().median())
    limit = float(middle) + NormalDist().inv_cdf(1 - CHANCE / len(pairs)) * spread
    for place in pairs.argsort(descending=True).tolist():
        one, other = int(first[place]), int(second[place])
        if float(pairs[place]) <= limit:
            return
        if not own[one] & own[other]:
            yield one, other


def leak_sentence(is_known: bool, without: float, asked: float, word: float, share: float, error: float | None) -> str:
    """What was measured, in words: styles without and with the trigger, and of the base with the trigger."""
    if not is_known:
        return "What leaks cannot be told: the base draws these prompts in the style already."
    if asked < LEAST:
        return (
            f"What leaks cannot be told: with the trigger the pictures have {asked:.2f} of the style, too little to be "
            "a share of. Train longer, or take a later checkpoint or a higher strength."
        )
    how = "Hardly anything leaks" if share <= HARDLY else "A part leaks" if share <= PARTLY else "The style leaks"
    about = f" (± {error:.2f})" if error is not None else ""
    told = f"{how}: without the trigger the pictures have {without:.2f} of the style, with it {asked:.2f}, a share of "
    told += f"{share:.2f}{about}."
    if word >= LEAST:
        told += f" The trigger by itself gives the untouched base {word:.2f} of it: the base knows the word already."
    return told
