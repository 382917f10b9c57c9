"""One LoRA of several, or of one at other strengths: the sum of all changes, in a file that every client loads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...datasets.workers import Progress
from .. import __version__
from ..baking import Losses
from ..delta import Delta, baked_sum, joined
from ..errors import UserError
from ..export import Precision
from ..keys import Format
from ..sharing.facts import BakedFacts, Facts, FolderFacts, last_part, unique
from ..sharing.metadata import Shape, as_text, baking, hashes, modelspec, network, training
from ..strengths import AS_TRAINED, Strengths
from ..tensorfile import TensorWriter
from .resizing import alpha_for, require_goal
from .sources import Source, Sources, layers, read_sources
from .writing import Written, believable, common_alphas, header_of, lora_writer, require_diffusers, require_names

Parts = dict[str, dict[str, list[tuple[Delta, float]]]]
"""By component and layer, the changes that are added up, each with its strength."""
_RANK = "Give --rank or --energy, which makes a plain LoRA of any kind."


def merge_loras(
    sources: Sequence[tuple[Path, Strengths]],
    target: Path,
    rank: int = 0,
    energy: float = 0.0,
    format: Format = "kohya",
    base: str = "",
    precision: Precision = "fp16",
    progress: Progress | None = None,
) -> Written:
    """Write the sum of all files' changes, each times its strength; layers at strength 0 are left out.

    Without rank and energy nothing is lost: of several plain LoRAs the factors are put side by side, so that their
    ranks add up, and one file of any kind keeps its form. With one of them, the sum is brought to the nearest plain
    LoRA of that rank, as `resize` does it with one file.

    `base` is the model that all were made for. A DoRA that is brought to a rank needs its weights; for all others the
    published model of the files' family is taken if none is named.

    Raises:
        UserError: if a file cannot be read, if they are of different families or for a base that cannot be told, if a
            kind cannot be added without a rank, if a block holds no layer, or if no change is left.
        ExportError: if what was written is not what was meant.
    """
    if rank or energy:
        require_goal(rank, energy)
    read = read_sources([path for path, _ in sources], base)
    strengths = [own for _, own in sources]
    parts = _parts(read, strengths)
    for source, own in zip(read.files, strengths, strict=True):
        require_names(source.file.path, read.base, _kept(source, own))
    if rank or energy:
        read.require_weights()
        alphas = {c: alpha_for(read, c, ([d for d, _ in own] for own in x.values()), rank) for c, x in parts.items()}
    else:
        _require_exact(read.files, strengths, format)
        alphas = _common_alphas(parts)
    losses, total = Losses(), sum(len(own) for own in parts.values())
    with lora_writer(target, read.base, format, alphas) as writer:
        every = [(component, summands) for component, own in parts.items() for summands in own.values()]
        for done, (component, summands) in enumerate(every, start=1):
            if rank or energy:
                weight = read.weight(component, [delta for delta, _ in summands])
                made = baked_sum(summands, weight, rank, energy)
                losses.add(component, made)
                writer.add(component, made.delta, precision)
            else:
                writer.add(component, _exact(summands), precision)
            if progress:
                progress(done, total)

        def header(tensors: TensorWriter) -> dict[str, str]:
            facts = BakedFacts(max(writer.shape.ranks), losses.shares) if losses.shares else None
            return _header(read, strengths, target, writer.shape, facts, tensors)

        return writer.finish(header, losses.shares)


# ---------------------------------------------------------------------------------------------------------------------
# changes


def _kept(source: Source, strengths: Strengths) -> dict[str, list[Delta]]:
    """The changes that are not left out."""
    return {
        component: kept
        for component, own in source.changes.items()
        if (kept := [delta for delta in own if strengths.of(component, delta.name)])
    }


def _parts(read: Sources, strengths: Sequence[Strengths]) -> Parts:
    parts: Parts = {}
    for source, own in zip(read.files, strengths, strict=True):
        names = [(component, delta.name) for component, delta in layers(source.changes)]
        own.refuse_idle(names)
        own.refuse_nothing(names)
        for component, delta in layers(_kept(source, own)):
            summands = parts.setdefault(component, {}).setdefault(delta.name, [])
            summands.append((delta, own.of(component, delta.name)))
    return parts


def _require_exact(files: Sequence[Source], strengths: Sequence[Strengths], format: Format) -> None:
    """Without a rank, several files must be plain LoRAs, and a DoRA can only stay what it is."""
    for source, own in zip(files, strengths, strict=True):
        kept = _kept(source, own)
        forms = {delta.form for _, delta in layers(kept)}
        if len(files) > 1 and (odd := sorted(forms - {"lora"})):
            what = f"holds what is a {odd[0]}, which cannot be added to other files without a loss"
            raise UserError(what, str(source.file.path), _RANK)
        scaled = any(own.of(component, d.name) != 1 for component, d in layers(kept) if d.form == "dora")
        if scaled:
            what = "is a DoRA, which at another strength is none"
            raise UserError(what, str(source.file.path), f"{_RANK} It needs --base.")
        if format == "diffusers":
            require_diffusers(source.file.path, kept)


def _exact(summands: Sequence[tuple[Delta, float]]) -> Delta:
    """The sum, with nothing lost: one change in its own form, several side by side."""
    if len(summands) > 1 and (side_by_side := joined(summands)):
        return side_by_side
    ((delta, strength),) = summands
    return delta if strength == 1 else delta.times(strength)


def _common_alphas(parts: Parts) -> dict[str, float]:
    """Those of the sums' factors: for several side by side, their rank."""
    return common_alphas({component: [_shell(own) for own in x.values()] for component, x in parts.items()})


def _shell(summands: Sequence[tuple[Delta, float]]) -> Delta:
    """What stands for a sum whose factors are not computed yet: its form and alpha."""
    first = summands[0][0]
    rank = sum(delta.rank for delta, _ in summands)
    return first if len(summands) == 1 else Delta(first.name, first.tensors, float(rank))


# ---------------------------------------------------------------------------------------------------------------------
# what the file says


def _header(
    read: Sources,
    strengths: Sequence[Strengths],
    target: Path,
    shape: Shape,
    facts: BakedFacts | None,
    tensors: TensorWriter,
) -> dict[str, str]:
    """One file at other strengths is still that file; several are none of them, and say only what all say alike."""
    said = [believable(source.file.metadata, read.info) for source in read.files]
    merged = as_text({"lorasmith_merged": [_named(*pair) for pair in zip(read.files, strengths, strict=True)]})
    if len(said) == 1:
        same = {key: value for key, value in said[0].items() if strengths[0] == AS_TRAINED or key not in _OF_STRENGTH}
        spec = {"modelspec.merged_from": read.files[0].file.path.stem} if "modelspec.title" in same else {}
        return header_of(same, target, read.info, shape, facts, tensors) | merged | spec
    titles = tuple(dict.fromkeys(source.file.path.stem for source in read.files))
    triggers = tuple(FolderFacts("", 0, trigger=word) for word in _triggers(said))
    merge = Facts(target.stem, folders=triggers, merged_from=titles)
    known, kohya = training(merge, read.info, shape), _alike(said, _OF_BASE)
    kohya = {key: known[key] for key in _OF_FILE} | kohya | merged
    kohya |= as_text(
        {
            "ss_output_name": target.stem,
            "ss_sd_model_name": last_part(kohya["ss_sd_model_name"]) if "ss_sd_model_name" in kohya else None,
            "ss_tag_frequency": _tags(said),
            **network(shape),
            **(baking(facts) if facts else {}),
            "lorasmith_version": __version__,
        }
    )
    digest = tensors.digest()
    spec = modelspec(merge, read.info, digest)
    unknown = _LICENSE if read.named else (*_LICENSE, *_ASSUMED)
    spec = {key: value for key, value in spec.items() if key not in unknown} | _alike(said, _OF_SPEC)
    return kohya | hashes(tensors, kohya, digest) | spec


_OF_FILE = ("ss_base_model_version", "ss_v2")
_OF_BASE = (*_OF_FILE, "ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash", "ss_vae_name", "ss_clip_skip")
_SPEC_OF_BASE = ("architecture", "implementation", "resolution", "prediction_type", "encoder_layer", "license")
_OF_SPEC = tuple(f"modelspec.{name}" for name in _SPEC_OF_BASE)
_LICENSE = ("modelspec.license",)
"""Only the authors can give one."""
_ASSUMED = ("modelspec.resolution", "modelspec.prediction_type", "modelspec.usage_hint")
"""What differs between models of one family, and is not known of one that was not named."""
_OF_STRENGTH = ("lorasmith_preferred_weight", "modelspec.usage_hint")
"""What holds at the strength a file had."""


def _named(source: Source, strengths: Strengths) -> dict[str, Any]:
    """A file by its name and AutoV3, and how strongly it acts."""
    file = source.file
    blocks = {"blocks": dict(strengths.blocks)} if strengths.blocks else {}
    return {"name": file.path.stem, "strength": strengths.everywhere, **blocks, "hash": file.hashes.autov3}


def _alike(said: Sequence[Mapping[str, str]], keys: Sequence[str]) -> dict[str, str]:
    """What all files say in the same words."""
    first, *others = said
    return {key: first[key] for key in keys if key in first and all(own.get(key) == first[key] for own in others)}


def _triggers(said: Sequence[Mapping[str, str]]) -> list[str]:
    """All words that call what was trained, each once."""
    words = [word.strip() for own in said for word in own.get("modelspec.trigger_phrase", "").split(",")]
    return list(dict.fromkeys(word for word in words if word))


def _tags(said: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """How often each tag was in each folder of images, under distinct names of folders; A1111 counts with whole
    numbers, so what is no such table is not passed on."""
    found = [folder for own in said for folder in _table(own.get("ss_tag_frequency", "")).items()]
    sound = [(name, tags) for name, tags in found if isinstance(tags, dict) and _counts(tags)]
    return dict(zip(unique(name for name, _ in sound), (tags for _, tags in sound), strict=True))


def _table(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _counts(tags: Mapping[str, Any]) -> bool:
    return all(type(count) is int for count in tags.values())
