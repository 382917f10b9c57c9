"""What is wrong with what a LoRA file says of itself: that clients hide it, break off at it, or go astray by it.

Nobody scales by metadata. But A1111 and Forge choose by it which files they offer, tools for resizing and merging trust
it, and it goes along wherever the file is shared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from ..architectures import FAMILY_TITLES
from ..lorafile import family_said
from ..tensorheader import shown
from .finding import Case, Finding, found

_ANEW = "Write it anew with lorasmith convert."
_LARGE = 1_000_000  # characters; a thumbnail takes about 20,000
_ALPHA_OFF = 1e-3  # as a share: what rounding in the name of an alpha may do


def metadata_findings(case: Case) -> Iterator[Finding]:
    """All that the metadata tell, next to what the tensors do."""
    metadata = case.file.metadata
    yield from _peft(case)
    yield from _family(case)
    yield from _network(case)
    yield from _structures(metadata)
    yield from _beginning(case)
    yield from _hashes(case)
    yield from _private(metadata)
    yield from _name(case)
    large = [key for key, value in metadata.items() if len(value) > _LARGE]
    yield from found("note", large, "is longer than a million characters; clients read it whenever they list files")


def _peft(case: Case) -> Iterator[Finding]:
    """PEFT's configuration, where diffusers looks for lengths that are no tensors."""
    if "lora_adapter_metadata" not in case.file.metadata:
        return
    if any(".alpha" in key for key in case.file.shapes):
        what = "stands beside alphas, and diffusers refuses a file with both"
        yield Finding("error", "lora_adapter_metadata", what, _ANEW)
    else:
        what = "the strength of the change (alpha) stands here alone, where only diffusers reads it"
        yield Finding("warning", "lora_adapter_metadata", what, _ANEW)


def _family(case: Case) -> Iterator[Finding]:
    """By which models A1111 and Forge offer a file: any metadata without these words mean SD 1 to them."""
    metadata, family = case.file.metadata, case.family
    if not metadata or family is None:
        return
    version, v2 = metadata.get("ss_base_model_version", ""), metadata.get("ss_v2", "")
    shown_for = "sdxl" if version.startswith("sdxl_") else "sd2" if v2 == "True" else "sd1"
    title = FAMILY_TITLES[family]
    if shown_for != family:
        where = "ss_v2" if family == "sd2" else "ss_base_model_version"
        said = f"is {shown(metadata[where])}" if where in metadata else "is missing"
        what = f"{said}, so that A1111 and Forge do not list the file while {title} is loaded"
        yield Finding("warning", where, what, _ANEW)
    told = family_said(metadata)
    if told and told != family:
        what = f"says that the file is for {FAMILY_TITLES[told]}, and it is for {title}"
        yield Finding("warning", "ss_base_model_version or modelspec.architecture", what, _ANEW)


def _network(case: Case) -> Iterator[Finding]:
    """Rank and alpha as they are said, next to those of the tensors."""
    ranked = [layer for layer in case.layers if layer.rank]
    ranks = {float(layer.rank) for layer in ranked}
    alphas = {case.alphas.get(layer.name, float(layer.rank)) for layer in ranked}
    for key, there in (("ss_network_dim", ranks), ("ss_network_alpha", alphas)):
        said = _number(case.file.metadata.get(key, ""))
        if said is not None and there and not any(abs(said - value) <= _ALPHA_OFF * abs(value) for value in there):
            values = ", ".join(f"{value:g}" for value in sorted(there)[:3])
            what = (
                f"is {said:g}, and the tensors have {values}: clients go by these, tools that resize and merge do not"
            )
            yield Finding("warning", key, what, _ANEW)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# ---------------------------------------------------------------------------------------------------------------------
# what clients read


_STRUCTURES: dict[str, type] = {
    "ss_tag_frequency": dict,
    "ss_dataset_dirs": dict,
    "ss_bucket_info": dict,
    "ss_datasets": list,
}


def _structures(metadata: Mapping[str, str]) -> Iterator[Finding]:
    """JSON that is parsed to show tags, folders and sizes."""
    for key, kind in _STRUCTURES.items():
        if key not in metadata or metadata[key] == "None":
            continue
        value = _strict(metadata[key])
        if not isinstance(value, kind):
            name = "an object" if kind is dict else "a list"
            what = f"is not {name} in strict JSON: A1111's panel of the file breaks off, CivitAI drops all metadata"
            yield Finding("warning", key, what, "Remove it: clients that read it stumble.")
        elif key == "ss_tag_frequency" and not all(isinstance(tags, dict) and _counts(tags) for tags in value.values()):
            what = "does not count each folder's tags in whole numbers, which A1111's panel of the file adds up"
            yield Finding("warning", key, what, "Remove it: clients that read it stumble.")
    started = metadata.get("ss_training_started_at", "0")
    if _number(started) is None:
        what = f"is {shown(started)}, no number of seconds, at which A1111's panel of the file breaks off"
        yield Finding("warning", "ss_training_started_at", what, "Remove it.")


def _counts(tags: Mapping[str, Any]) -> bool:
    return all(type(count) is int for count in tags.values())


def _strict(text: str) -> Any:
    """What JSON says; None if it is none, which NaN and Infinity are not part of."""
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return None


def _no_number(word: str) -> NoReturn:
    raise ValueError(word)


def _beginning(case: Case) -> Iterator[Finding]:
    with case.file.path.open("rb") as file:
        if file.read(10)[8:] not in (b'{"', b"{}"):
            what = 'does not begin with {", which A1111 asks for'
            yield Finding("warning", "the header", what, _ANEW)


def _hashes(case: Case) -> Iterator[Finding]:
    """Hashes by which A1111, Forge and CivitAI know the file."""
    for key in ("sshs_model_hash", "modelspec.hash_sha256"):
        said = case.file.metadata.get(key, "")
        if said and said.lower().removeprefix("0x") != case.file.hashes.tensors:
            what = "is not the hash of these tensors: they were changed after it was written"
            yield Finding("warning", key, what, "Ask for the file as it came from its trainer.")


# ---------------------------------------------------------------------------------------------------------------------
# what is told of its maker


_PLACE = re.compile(
    r"(?<![\w/.:])(?:[A-Za-z]:[\\/]+|/(?:home|Users|root|mnt|media|workspace|content|kaggle|notebooks|opt|var|tmp)/)"
    r"[^\"',;\n\]}]*|\\\\[\w.-]+\\[^\"',;\n\]}]*"
)
_USER = re.compile(r"(?:[\\/]|^)(?:home|Users)[\\/]+([^\\/\"']+)", re.IGNORECASE)


def _private(metadata: Mapping[str, str]) -> Iterator[Finding]:
    """Paths of a computer, perhaps with its user's name."""
    places = {key: place[0] for key, value in metadata.items() if (place := _PLACE.search(value))}
    users = {user[1] for value in metadata.values() if _PLACE.search(value) and (user := _USER.search(value))}
    if places:
        first = next(iter(places.values()))
        named = f", and the user's name ({shown(', '.join(sorted(users)))})" if users else ""
        what = f"tells paths on the computer of whoever made it ({shown(first)}){named}"
        yield from found("warning", list(places), what, "Remove it before you share the file.", "parts of the metadata")


def _name(case: Case) -> Iterator[Finding]:
    """A1111 and Forge write the name of the metadata into prompts."""
    said, stem = case.file.metadata.get("ss_output_name", ""), case.file.path.stem
    if said and said != stem:
        what = f"is {shown(said)}, which A1111 and Forge write into prompts in place of the file's name"
        yield Finding("note", "ss_output_name", what, "Call the file so, or write it anew.")
