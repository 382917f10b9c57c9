"""Each kind of file that may come from anybody, and the product's own readers of it.

A target is asked by `Target.meet`: its readers may read the bytes, or refuse them by an error that names the place and
the fix. Anything else is a finding: another exception, a warning, an error without a place or a fix.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from lorasmith.datasets.editing import Draft, text_of
from lorasmith.datasets.folder import look
from lorasmith.datasets.images import UnreadableImageError, read_alpha, read_grey, read_rgb
from lorasmith.datasets.journal import last_deed
from lorasmith.datasets.listing import list_images
from lorasmith.datasets.masks import read_mask_facts
from lorasmith.datasets.thumbnails import size_of, thumbnail_of
from lorasmith.datasets.unpack import as_folder
from lorasmith.trainer.anatomy import skeleton
from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.checkpoint import load_checkpoint
from lorasmith.trainer.clients.reading import read_by_clients
from lorasmith.trainer.configfile import read_with_provenance
from lorasmith.trainer.diagnosis.findings import findings
from lorasmith.trainer.diagnosis.inspection import inspect
from lorasmith.trainer.errors import LorasmithError, Problem
from lorasmith.trainer.events import read_events
from lorasmith.trainer.jobs import RunFolder, find_runs
from lorasmith.trainer.lorafile import LoraFile
from lorasmith.trainer.loraread import read_lora
from lorasmith.trainer.models import Base, saved_tokenizer
from lorasmith.trainer.painting.easel import Easel
from lorasmith.trainer.painting.orders import read_order, saved_base
from lorasmith.trainer.preferences.ratings import Ratings
from lorasmith.trainer.queue import Queue
from lorasmith.trainer.report.page import report_of
from lorasmith.trainer.singlefile import read_single_file, read_vae_file
from lorasmith.trainer.verify import plain_size
from lorasmith.trainer.waiting import read_waiting
from lorasmith.ui.compare.choices import Choices
from lorasmith.ui.images.visit import Visit
from lorasmith.ui.share.card import card_html
from lorasmith.ui.share.errand import Errand
from lorasmith.ui.share.exported import files_html, verified_html
from lorasmith.ui.share.exporting import exports_of, settings_of
from lorasmith.ui.share.remembered import remembered
from lorasmith.ui.train.draft import from_text

from . import seeds


class WordlessError(AssertionError):
    """An error of ours that does not say what, where and how to mend it."""


@dataclass(frozen=True)
class Target:
    """One kind of file."""

    name: str
    file: str
    """The name, perhaps with folders, under which the bytes are put."""
    read: Callable[[Path], object]
    """Reads that file."""
    seeds: Callable[[Path], dict[str, bytes]]
    """Valid files by a name, made in an empty folder."""
    around: Callable[[Path], object] | None = None
    """Puts into the folder what lies beside the file; once."""

    def prepare(self, folder: Path) -> Path:
        """The place of the file, in a folder in which everything else is there."""
        if self.around:
            self.around(folder)
        path = folder / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def meet(self, path: Path, content: bytes) -> None:
        """Read these bytes.

        Raises:
            WordlessError: if they are refused without a place or a fix.
            Exception: whatever else the readers let out.
        """
        path.write_bytes(content)
        with _refused_in_words():
            self.read(path)


@contextmanager
def _refused_in_words() -> Iterator[None]:
    try:
        yield
    except LorasmithError as error:
        _require_words(error.problems)


def _require_words(problems: list[Problem]) -> None:
    for problem in problems:
        if not (problem.what and problem.where and problem.fix):
            raise WordlessError(f"{problem!r} does not tell what, where and how to mend it")


# ---------------------------------------------------------------------------------------------------------------------
# weights


def _lora(path: Path) -> None:
    """All that `lorasmith inspect`, `examine` and `train` read, each by itself: one may refuse what another reads."""
    with _refused_in_words():
        json.dumps(inspect(path), allow_nan=False).encode()
    with _refused_in_words():
        base, file = _pocket(), LoraFile.open(path)
        "\n".join(map(str, findings(file, base))).encode()
        json.dumps([asdict(reading) for reading in read_by_clients(file, base)]).encode()
        for deltas in read_lora(path, base.components, base.info.family).values():
            for delta in deltas:
                _ = plain_size(delta) if delta.is_plain else delta.form


@cache
def _pocket() -> Base:
    return skeleton(inspect_base("pocket"))


def _base(path: Path) -> None:
    with _refused_in_words():
        read_vae_file(path, "base.vae")
    with _refused_in_words():
        read_single_file(path, "base.model")
    skeleton(inspect_base(str(path)))


def _base_folder(path: Path) -> None:
    info = inspect_base(str(path.parents[1]))
    _ = info.identity
    skeleton(info)


def _tokenizer(path: Path) -> None:
    saved_tokenizer(inspect_base(str(path.parents[1])), "tokenizer")("a cat, 😀 and a dog")


def _checkpoint(path: Path) -> None:
    load_checkpoint(path.parent)


# ---------------------------------------------------------------------------------------------------------------------
# images and captions


def _image(path: Path) -> None:
    size_of(path)
    for read in (read_rgb, read_alpha, read_grey):
        try:
            read(path)
        except UnreadableImageError as error:
            if not str(error):
                raise WordlessError(f"{read.__name__} does not say why the image is unreadable") from error
    read_mask_facts(path)
    if thumbnail := thumbnail_of(path):
        thumbnail.unlink()


def _captions(path: Path) -> None:
    """The folder as training reads it and as the page lists it, and a caption that is written anew."""
    found = look(path.parent, "variants")
    _require_words(found.problems)
    listing = list_images(path.parent)
    for image in listing.images:
        text_of(listing, image)
        with _refused_in_words():
            draft = Draft(listing)
            draft.write(image, "another")
            draft.changes()
    last_deed(path.parent)


def _unpacked(path: Path) -> None:
    cache = path.with_name("cache")
    try:
        folder = as_folder(str(path), cache)
        if not all(file.resolve().is_relative_to(folder.resolve()) for file in folder.rglob("*")):
            raise AssertionError("something was unpacked outside of its folder")
    finally:
        shutil.rmtree(cache, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# what a run folder holds, which may be somebody else's


def _config(path: Path) -> None:
    with _refused_in_words():
        from_text(path.read_text(encoding="utf-8", errors="replace"))
    read_with_provenance(path)


def _run(path: Path) -> None:
    """Everything that pages and commands tell of a run."""
    runs = next(folder for folder in path.parents if folder.name == "runs")
    run, queue, easel = RunFolder(runs / "r"), Queue(runs), Easel(runs)
    for found in find_runs(runs):
        status = found.status()
        json.dumps([status.sentence, status.is_active], allow_nan=False).encode()
    list(read_events(run.events))
    _ = run.chosen, run.saved_steps(), queue.waiting(), queue.running(), queue.worker.alive(), read_waiting(runs)
    Choices.remembered(run)
    Visit.last(runs)
    remembered(runs, "user")
    exports_of(run).stand()
    Errand(runs / ".errand", "an errand").stand()
    files_html(run)
    verified_html(run)
    for card in run.exports.glob("*.md"):
        card_html(run, card)
    for ticket in easel.tickets():
        ticket.told()
        ticket.state()
        with _refused_in_words():
            ticket.order()
    with _refused_in_words():
        read_order(path.read_text(encoding="utf-8", errors="replace"))
    with _refused_in_words():
        saved_base(run, 2)
    with _refused_in_words():
        settings_of(run, run.read_config())
    with _refused_in_words():
        Ratings.of(run).standing()


def _reported(path: Path) -> None:
    """The page that tells all of a run, whatever one of its files holds."""
    run = RunFolder(next(folder for folder in path.parents if folder.parent.name == "runs"))
    with _refused_in_words():
        report_of(run).encode()


_TICKET = f"{1:020d}-{0:08x}"
_RUN = "runs/r/"
_OF_A_RUN: dict[str, str] = {
    "events": _RUN + "events.jsonl",
    "chosen": _RUN + "chosen.json",
    "ratings": _RUN + "ratings/ratings.jsonl",
    "leaks": _RUN + "compare/leaks-0.json",
    "owner": _RUN + "trainer.json",
    "state": _RUN + "checkpoints/step-000002/state.json",
    "choices": _RUN + "compare/order.json",
    "verified": _RUN + "exports/r-verified.json",
    "card": _RUN + "exports/r.md",
    "export settings": _RUN + ".export/settings.json",
    "export process": _RUN + ".export/process.json",
    "waiting list": "runs/.queue.json",
    "visit": "runs/.images.json",
    "remembered": "runs/.share.json",
    "errand": "runs/.errand/process.json",
    "order": f"runs/.painter/{_TICKET}.order.json",
    "drawn": f"runs/.painter/{_TICKET}.state.json",
}
"""Names of small files of a folder of runs, to their places."""

TARGETS = {
    target.name: target
    for target in (
        Target("lora", "a.safetensors", _lora, seeds.loras),
        Target("base file", "a.safetensors", _base, seeds.base_files),
        Target("base pickle", "a.ckpt", _base, seeds.base_pickles),
        Target("base folder", "base/unet/config.json", _base_folder, seeds.base_configs, seeds.base_folder),
        Target("tokenizer", "base/tokenizer/vocab.json", _tokenizer, seeds.vocabularies, seeds.base_folder),
        Target("merges", "base/tokenizer/merges.txt", _tokenizer, seeds.merges, seeds.base_folder),
        Target(
            "tokenizer settings",
            "base/tokenizer/tokenizer_config.json",
            _tokenizer,
            seeds.tokenizer_settings,
            seeds.base_folder,
        ),
        Target("optimizer", "c/step-000002/optimizer.pt", _checkpoint, seeds.optimizers, seeds.checkpoint),
        Target("image", "a.png", _image, seeds.images),
        Target("photo", "a.jpg", _image, seeds.images),
        Target("caption", "photos/a.txt", _captions, seeds.captions, seeds.photos),
        Target("caption in json", "photos/a.json", _captions, seeds.captions_in_json, seeds.photos),
        Target("captions in jsonl", "photos/metadata.jsonl", _captions, seeds.captions_in_jsonl, seeds.photos),
        Target("captions in csv", "photos/metadata.csv", _captions, seeds.captions_in_csv, seeds.photos),
        Target("journal", "photos/.lorasmith-undo.json", _captions, seeds.journals, seeds.photos),
        Target("archive", "a.zip", _unpacked, seeds.archives),
        Target("table", "a.parquet", _unpacked, seeds.tables),
        Target("config", "a.toml", _config, seeds.configs),
        *(
            Target(name, place, _run, getattr(seeds, f"of_{name.replace(' ', '_')}"), seeds.runs)
            for name, place in _OF_A_RUN.items()
        ),
        *(
            Target(f"{name} in a report", _OF_A_RUN[name], _reported, seeds_of, seeds.runs)
            for name, seeds_of in (("events", seeds.of_events), ("leaks", seeds.of_leaks))
        ),
    )
}
"""By name."""
