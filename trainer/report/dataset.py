"""The images a run was trained on: how many, with which captions, in which buckets; some of them as pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from ...datasets.captions import tags
from ...datasets.dataset import Example
from ...datasets.thumbnails import thumbnails_of
from ..sharing.pictures import data_uri
from .facts import RunFacts
from .words import Words, folded, missing, pairs, paragraph, section, table

PICTURES = 24
CAPTIONS = 500
_TAGS = 30


def dataset(facts: RunFacts) -> str:
    say = facts.say
    parts = [_counts(facts), *_buckets(facts), *_tags(facts)]
    if facts.images.lost:
        parts.append(missing(say(f"The images are not shown: {facts.images.lost}.")))
    else:
        parts += [_pictures(facts.images.examples, say), _captions(facts.images.examples, say)]
    return section("dataset", "Dataset", *parts)


def _counts(facts: RunFacts) -> str:
    plan, say, examples = facts.plan, facts.say, facts.images.examples
    count = plan.get("images") or len(examples)
    captioned = plan.get("captions", sum(bool(example.caption) for example in examples))
    sources = plan.get("caption_sources") or Counter(example.item.source.rpartition(".")[2] for example in examples)
    told = ", ".join(f"{number} from {source}" for source, number in sources.items())
    triggers = dict.fromkeys(data.trigger for data in facts.config.data if data.trigger and not data.regularization)
    rows = [
        ("Images", say(count) if count else ""),
        ("Captions used", say(f"{captioned} of {count}{f' ({told})' if told else ''}") if count else ""),
        ("Written by a machine", say(plan.get("machine_captions") or "")),
        ("Trigger", ", ".join(f"<bdi><code>{say(trigger)}</code></bdi>" for trigger in triggers) or "none"),
        ("Masked images", say(plan.get("masks") or "")),
        *((f"Set {say(one.get('name'))}", say(_share(one))) for one in _sets(plan)),
    ]
    return pairs(rows)


def _sets(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of which there is more to say than their number."""
    found = list(plan.get("data", []))
    return found if len(found) > 1 or any(one.get("views_per_image", 1) > 1 for one in found) else []


def _share(one: dict[str, Any]) -> str:
    """How much of the training one set of images is."""
    told = f"{one.get('images')} images, {one.get('share', 1):.0%} of what is shown"
    kind = f", regularisation at loss weight {one.get('loss_weight'):g}" if one.get("regularization") else ""
    views = f", each in {one.get('views_per_image')} views" if one.get("views_per_image", 1) > 1 else ""
    return told + kind + views


def _buckets(facts: RunFacts) -> Iterator[str]:
    buckets: dict[str, int] = facts.plan.get("buckets", {})
    if not buckets:
        yield missing("The buckets are settled when the run starts.")
        return
    cropped = [float(one.get("cropped_share", 0)) for one in facts.plan.get("placed", [])]
    rows = [(facts.say(size.replace("x", " x ")), facts.say(count)) for size, count in buckets.items()]
    yield table(("bucket, in pixels", "images"), rows, "numbers")
    if cropped:
        worst = f"{max(cropped):.0%} of its area" if max(cropped) >= 0.005 else "nothing"
        yield paragraph(f"The image that is cropped most loses {worst}.")


def _tags(facts: RunFacts) -> Iterator[str]:
    counted: Counter[str] = Counter()
    for of_folder in facts.plan.get("dataset", {}).get("tag_frequency", {}).values():
        counted.update(of_folder)
    triggers = {tag for data in facts.config.data for tag in tags(data.trigger)}
    shared = [(tag, count) for tag, count in counted.most_common(_TAGS) if count > 1 and tag not in triggers]
    if shared:
        words = " ".join(
            f'<li><bdi>{facts.say(tag)}</bdi> <span class="quiet">{count}</span></li>' for tag, count in shared
        )
        yield f'<h3>What captions share</h3><ul class="words">{words}</ul>'


def _pictures(examples: Sequence[Example], say: Words) -> str:
    """Some, spread evenly, each with its caption."""
    count = min(PICTURES, len(examples))
    shown = [examples[place * len(examples) // count] for place in range(count)]
    figures = []
    for example, small in zip(shown, thumbnails_of([example.item.path for example in shown]), strict=True):
        if small is not None:
            with Image.open(small) as picture:
                source = data_uri(picture)
            figures.append(
                f'<figure><img src="{source}" alt=""><figcaption><span class="quiet">{say(example.name)}</span> '
                f"<bdi>{say(example.caption) or 'no caption'}</bdi></figcaption></figure>"
            )
    some = f"{len(figures)} of {len(examples)} images" if len(figures) < len(examples) else "All images"
    return f'<h3>{some}</h3><div class="gallery">{"".join(figures)}</div>'


def _captions(examples: Sequence[Example], say: Words) -> str:
    rows = [
        (say(example.name), "<br>".join(f"<bdi>{say(caption)}</bdi>" for caption in dict.fromkeys(example.captions)))
        for example in examples[:CAPTIONS]
    ]
    rest = len(examples) - len(rows)
    more = paragraph(f"and {rest:,} more") if rest > 0 else ""
    return folded(f"All captions, as they were read ({len(examples):,})", table(("image", "caption"), rows) + more)
