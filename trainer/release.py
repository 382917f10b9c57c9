"""The files to share of one checkpoint of a run: LoRA files or whole models, with card, thumbnail, grid and bundle.

What `[export]` says holds here, at the end of a run and later on. If new tokens were trained, their embeddings are a
file of their own, because most clients read them only so.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import __version__
from .adapter import reads_tokens, strength
from .baking import bake
from .bases import BaseInfo, FamilyName
from .clients.reading import read_by_clients
from .config import RunConfig
from .delta import Changes
from .errors import ExportError, UserError
from .events import PlanMade
from .export import Exported, Precision, export, trained_changes
from .fewbits import kinds_in, load_in_few_bits
from .files import atomic_file, write_text
from .formats import Format, formats_of
from .interpolation import scaled
from .jobs import VERIFIED, RunFolder, preview_files
from .lorafile import LoraFile
from .memory import where_it_fits
from .models import Base
from .pivotal import token_embeddings
from .sample import Drawing, before_after_grid, drawn_like
from .sharing.bundle import bundle as write_bundle
from .sharing.card import embedding_folder, write_beside
from .sharing.facts import AS_TRAINED, Facts, FolderFacts, Preview, Thumbnail, base_name
from .sharing.pictures import png, preview_text
from .sharing.usage import embedding_file, is_whole_model
from .story import Story
from .strengths import Strengths
from .wholemodel import save_checkpoint_file, save_model_folder


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a run, on a live base."""

    run: RunFolder
    config: RunConfig
    base: Base
    step: int
    images: int
    """Images seen up to this step."""


def release(
    trained: Trained,
    name: str,
    folder: Path,
    formats: Sequence[Format] = (),
    precision: Precision | None = None,
    bake_to: int = 0,
    strengths: Strengths = AS_TRAINED,
    bundle: bool = False,
    thumbnail: Thumbnail | None = None,
    changes: Changes | None = None,
    merged_from: Sequence[str] = (),
) -> list[Path]:
    """Write and verify the files, and return all of them, those with weights first.

    What is not given is as the run's `[export]` says; where that names no formats, all there are. `changes` stand in
    place of what the live adapters change, and `merged_from` says of what they were made. With `bake_to`, a plain LoRA
    of that rank is made of whatever it is, and the file holds it at `strengths`; the name says so:
    `<name>-baked32-strength0.8.safetensors`. Card, sidecar, thumbnail (the first preview, if no other was chosen)
    and grid stand beside the first file, and what was found of the files, by client, in `<name>-verified.json`;
    embeddings of new tokens in `<name>-embedding/`, as `<trigger>.safetensors`. With `bundle`, all of it lies in
    `<name>.zip` too.

    Raises:
        UserError: if what was trained cannot be had at these strengths.
        ExportError: if a file on disk is not the same as the trained model, after the other formats were written.
    """
    settings, base = trained.config.export, trained.base
    facts = replace(facts_of(trained, name), merged_from=tuple(merged_from), thumbnail=thumbnail)
    is_plain = bool(bake_to) or changes is not None
    facts, changes = _derived(base, facts, changes, bake_to, strengths)
    wanted = formats or settings.formats
    weights, reports, refused = [], [], []
    for format in formats_of(trained.config, is_plain):
        try:
            if format in wanted or not wanted:
                written = _write(base, folder, format, facts, precision or settings.precision, changes)
                weights.append(written.path if isinstance(written, Exported) else written)
                reports += [_report(written, base)] if isinstance(written, Exported) else []
        except ExportError as error:  # what can be written is
            refused += error.problems
    if refused:
        raise ExportError.of(refused)
    if file := embedding_file(facts):
        weights.append(write_embedding(base, folder / embedding_folder(f"{facts.name}.safetensors") / file))
    files = weights + write_beside(weights[0], facts, base.info)
    if reports:
        files.append(folder / f"{facts.name}{VERIFIED}")
        write_text(files[-1], json.dumps({"files": reports}, indent=2) + "\n")
    if grid := preview_grid(trained, facts):
        path = folder / f"{facts.name}-grid.png"
        with atomic_file(path) as temporary:
            temporary.write_bytes(png(grid, preview_text(facts, facts.previews)))
        files.append(path)
    if bundle or settings.bundle:
        files.append(write_bundle(files, facts, base.info, folder / f"{facts.name}.zip"))
    return files


def release_file(
    trained: Trained,
    path: Path,
    bake_to: int = 0,
    strengths: Strengths = AS_TRAINED,
    changes: Changes | None = None,
    merged_from: Sequence[str] = (),
) -> Exported | Path:
    """Write and verify one file alone, of what clients read and under a name of one's own, as `release` does with all;
    of a whole model, its path is given.

    Raises:
        UserError: if what was trained cannot be had at these strengths, or new tokens were, for they are a second file.
        ExportError: if the file on disk is not the same as the trained model.
    """
    refuse_second_file(trained.config, path)
    facts = replace(facts_of(trained, path.stem), merged_from=tuple(merged_from))
    format = formats_of(trained.config, bool(bake_to) or changes is not None)[0]
    facts, changes = _derived(trained.base, facts, changes, bake_to, strengths)
    facts = replace(facts, name=path.stem)
    return _write(trained.base, path.parent, format, facts, trained.config.export.precision, changes)


def refuse_second_file(config: RunConfig, path: Path) -> None:
    """What a run trained must fit into one file."""
    if config.adapter.new_tokens:
        what = "new tokens were trained, whose embeddings are a file of their own"
        raise UserError(what, str(path), "Write all files, into a folder: lorasmith export.")


def _derived(
    base: Base, facts: Facts, changes: Changes | None, bake_to: int, strengths: Strengths
) -> tuple[Facts, Changes | None]:
    """What is known of what is written, and its changes; None for those of the live model, as they were trained."""
    if bake_to:
        changes, baked = bake(base, trained_changes(base) if changes is None else changes, bake_to)
        facts = replace(facts, name=f"{facts.name}-baked{bake_to}", baked=baked)
    if strengths != AS_TRAINED:
        changes = None if is_whole_model(facts) else scaled(base, strengths, changes)
        has_embedding = reads_tokens(base, strengths)
        name = facts.name + suffix_of(strengths)
        facts = replace(facts, name=name, strengths=strengths, has_embedding=has_embedding)
    return facts, changes


def _report(exported: Exported, base: Base) -> dict[str, Any]:
    """How near a file is to what was trained, and what each client makes of it."""
    readings = read_by_clients(LoraFile.open(exported.path), base)
    facts = asdict(exported)
    clients = [asdict(reading) | {"unused": len(reading.unused)} for reading in readings]
    return {"file": facts.pop("path").name, **facts, "clients": clients}


def suffix_of(strengths: Strengths) -> str:
    """What a file's name says of strengths: `-strength0.8`, `-strength1-unet.down_blocks0.5`; long ones by a hash."""
    words = "-".join([f"{strengths.everywhere:g}", *(f"{block}{value:g}" for block, value in strengths.blocks)])
    plain = re.sub(r"[^\w.-]+", "_", words)
    return f"-strength{plain if len(plain) <= _LONGEST_SUFFIX else hashlib.sha256(words.encode()).hexdigest()[:8]}"


_LONGEST_SUFFIX = 60


def _write(
    base: Base, folder: Path, format: Format, facts: Facts, precision: Precision, changes: Changes | None
) -> Exported | Path:
    """One file or folder, verified; of a whole model, its path."""
    name, lora = facts.name, not is_whole_model(facts)
    path = folder / (
        f"{name}.safetensors" if format != "diffusers" else f"{name}-diffusers{'.safetensors' if lora else ''}"
    )
    if format in ("kohya", "diffusers") and lora:
        return where_it_fits(base, lambda: export(base, path, facts, _load_like(base), format, precision, changes))
    with strength(base, facts.strengths):
        if format == "ldm":
            save_checkpoint_file(base, path, precision)
        else:
            save_model_folder(base, path, precision)
    return path


def _load_like(base: Base) -> Callable[[], Base]:
    """Loads the same base anew, in the same precision, where it is now."""
    return partial(load_in_few_bits, base.info, kinds_in(base), base.dtype, base.device)


_EMBEDDINGS: dict[FamilyName, dict[str, str]] = {
    "sd1": {"text_encoder": "emb_params"},
    "sd2": {"text_encoder": "emb_params"},
    "sdxl": {"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
}
"""What clients call the vectors of each text encoder."""


def write_embedding(base: Base, path: Path) -> Path:
    """Write the vectors of new tokens, (tokens, width) in fp32, and read them back.

    Raises:
        ExportError: if they hold NaN or infinity, or the file is not the same.
    """
    names = _EMBEDDINGS[base.info.family]
    vectors = {names[part]: vector.float().cpu().contiguous() for part, vector in token_embeddings(base).items()}
    if not all(vector.isfinite().all() for vector in vectors.values()):
        fix = "Export an earlier checkpoint; train with a lower optimizer.token_lr."
        raise ExportError("the embeddings of the new tokens hold NaN or infinity", path.name, fix)
    with atomic_file(path) as temporary:
        save_file(vectors, temporary, {"lorasmith_version": __version__})
        if not _holds(temporary, vectors):
            raise ExportError("is not what was written", path.name, "Export it again, to another disk.")
    return path


def _holds(path: Path, vectors: Mapping[str, Tensor]) -> bool:
    """Whether a file holds these; nothing of it stays open, because Windows renames no open file."""
    read = load_file(path)
    return read.keys() == vectors.keys() and all(torch.equal(read[name], vectors[name]) for name in vectors)


def facts_of(trained: Trained, name: str) -> Facts:
    """What is known of a run at one of its steps, from what it wrote down."""
    story = Story(trained.run.events)
    story.refresh()
    taken = story.steps.before(trained.step + 1)
    recent = story.steps.loss[max(0, taken - _RECENT) : taken]
    planned = story.plan or PlanMade(0, 0)
    dataset, shows = planned.plan.get("dataset", {}), planned.plan.get("shows_per_image")
    tagged: dict[str, Any] = dataset.get("tag_frequency", {})
    paths: dict[Any, str] = {Path(data.path).name: data.path for data in trained.config.data}
    return Facts(
        name=name,
        config=trained.config,
        folders=tuple(
            FolderFacts(paths.get(folder, str(folder)), n, repeats, trigger)
            for folder, n, repeats, trigger in dataset.get("folders", [])
        ),
        buckets={(width, height): images for width, height, images in dataset.get("buckets", [])},
        tag_frequency={paths.get(name, name): tags for name, tags in tagged.items()},
        steps=trained.step,
        planned_steps=planned.steps or None,
        images_seen=trained.images,
        epochs=shows * trained.images / planned.images if shows else None,
        started=story.started,
        finished=story.steps.times[taken - 1] if taken else None,
        loss=sum(recent) / len(recent) if recent else None,
        previews=tuple(previews_in(trained.run.samples(trained.step), trained.base.info)),
    )


_RECENT = 50  # steps whose mean loss is the final loss


def previews_in(folder: Path, info: BaseInfo) -> list[Preview]:
    """The previews of one step, each with what its file says of it; pictures that do not say it are left out."""
    previews = (_preview(file, number, base_name(info)) for number, file in enumerate(preview_files(folder)))
    return [preview for preview in previews if preview]


def _preview(file: Path, number: int, base: str) -> Preview | None:
    """None if it was saved anew by a program that drops what a picture says of itself."""
    with Image.open(file) as picture:
        picture.load()
        told: Any = picture.info
        if "positive_prompt" not in told:
            return None
        drawing = Drawing(
            told["negative_prompt"],
            int(told["seed"]) - number,
            int(told["steps"]),
            float(told["guidance"]),
            int(told["size"].partition("x")[0]),
        )
        return Preview(picture.convert("RGB"), told["positive_prompt"], number, drawing, base)


def preview_grid(trained: Trained, facts: Facts) -> Image.Image | None:
    """The previews of the untouched base and of a step, side by side; None if they cannot be compared, or if they show
    something else than the file."""
    before, after = trained.run.samples(0), trained.run.samples(trained.step)
    if not facts.previews or not facts.is_as_trained or drawn_like(before) != drawn_like(after):
        return None
    labels = [facts.told_prompt(preview.prompt) or f"prompt {preview.number + 1}" for preview in facts.previews]
    title = f"{facts.title}, step {trained.step}"
    what = "as it was trained" if is_whole_model(facts) else "with the LoRA"
    untouched = [preview.picture for preview in previews_in(before, trained.base.info)]
    tuned = [preview.picture for preview in facts.previews]
    return before_after_grid(untouched, tuned, labels, title, columns=2, side=256, after_is=what)
