"""The clients, what each should make of a file, and asking them: those that load into torch modules give answers."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import load_file

from lorasmith.trainer.anatomy import skeleton
from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.clients.reading import read_by_clients
from lorasmith.trainer.clients.table import COMPATIBILITY, Client, Reading
from lorasmith.trainer.delta import Form
from lorasmith.trainer.errors import UserError
from lorasmith.trainer.keys import Format
from lorasmith.trainer.lorafile import LoraFile

from .bases import ARCHITECTURE, FamilyName, Subject
from .cases import KINDS, Case, file_stem, write_published
from .places import CYLLAMA, INVOKEAI, LOG, OLDER, Place, Say, python_of, run_script
from .verdicts import Verdict, errors_of, reading_of

Readings = Mapping[tuple[str, Format], Mapping[str, Reading]]
"""What clients are expected to make of files, by kind and format."""


@dataclass(frozen=True)
class RealClient:
    """A program that reads LoRA files, at one version."""

    title: str
    place: Place | None
    """Where it is installed; None is this environment."""
    runner: str
    listed_as: Client | None
    """Its name among the clients that this project knows; LyCORIS, whose kinds these are, is not one of them."""

    def python(self, root: Path, say: Say) -> Path:
        return Path(sys.executable) if self.place is None else python_of(self.place, root, say)

    def expected(self, kind: str, format: Format, readings: Readings) -> Reading:
        """What `read_by_clients` says of such a file; of InvokeAI as if it found the base, for here it is told."""
        if self.listed_as is None:
            return "same" if format == "kohya" else "none"
        reading = readings[kind, format][self.listed_as]
        return "same" if self.place is INVOKEAI and format == "kohya" and reading == "none" else reading


CLIENTS = [
    RealClient(f"diffusers {version('diffusers')}", None, "diffusers_pipeline.py", "diffusers"),
    RealClient("diffusers 0.32.1", OLDER, "diffusers_pipeline.py", "diffusers"),
    RealClient("LyCORIS 4.1.3", OLDER, "lycoris_network.py", None),
    RealClient("InvokeAI 6.14.2", INVOKEAI, "invokeai_patcher.py", "InvokeAI"),
    RealClient("stable-diffusion.cpp (cyllama 0.7.0)", CYLLAMA, "sdcpp_picture.py", "stable-diffusion.cpp"),
]
DETECTION = "InvokeAI 6.14.2 finds the base"


def foresee(family: FamilyName, kinds: Sequence[str], folder: Path) -> Readings:
    """What this project says of files of these kinds for the published model, which are written into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    published = skeleton(inspect_base(f"random:{ARCHITECTURE[family]}"))
    readings: dict[tuple[str, Format], dict[str, Reading]] = {}
    for kind in kinds:
        for format in KINDS[kind].formats:
            file = folder / f"{file_stem(family, kind, format)}.safetensors"
            write_published(family, kind, format, file)
            found = read_by_clients(LoraFile.open(file), published)
            readings[kind, format] = {r.client: "other" if r.reading == "part" else r.reading for r in found}
    return readings


def ask(
    client: RealClient, python: Path, subject: Subject, cases: Sequence[Case], readings: Readings, folder: Path
) -> Iterator[Verdict]:
    """What a client makes of each file of a subject.

    Raises:
        UserError: if its process dies.
    """
    out = folder / "answers"
    out.mkdir(parents=True, exist_ok=True)
    files = {case.file.stem: str(case.file) for case in cases}
    job = {
        "base": str(subject.base),
        "family": subject.family,
        "given": str(subject.given),
        "threads": subject.threads,
        "out": str(out),
        "files": files,
    }
    lines = run_script(python, job, client.runner, folder)
    said = {str(line["name"]): line["refused"] for line in lines}
    if dead := [stem for stem in files if stem not in said]:
        raise UserError(f"died before it answered about {dead[0]}", client.title, f"See {folder / LOG}.")
    for case in cases:
        refusal = said[case.file.stem]
        known = case.family, case.kind, case.format, client.title
        expected = client.expected(case.kind, case.format, readings)
        if refusal is not None:
            yield Verdict(*known, "none", expected, {}, str(refusal))
            continue
        answers = load_file(out / f"{case.file.stem}.safetensors")
        errors = errors_of(answers, case.live, case.before)
        yield Verdict(*known, reading_of(answers, case.live, case.before), expected, errors)


def ask_detection(
    python: Path, family: FamilyName, readings: Readings, published: Path, folder: Path
) -> Iterator[Verdict]:
    """Whether InvokeAI finds out for which base the files of the published widths are."""
    files = {stem: published / f"{stem}.safetensors" for stem in (file_stem(family, *known) for known in readings)}
    job = {"files": {stem: str(file) for stem, file in files.items()}}
    lines = run_script(python, job, "invokeai_detection.py", folder)
    bases = {str(line["name"]): line["base"] for line in lines}
    if bases.keys() != files.keys():
        raise UserError("died before it had found the bases", DETECTION, f"See {folder / LOG}.")
    for (kind, format), stem in zip(readings, files, strict=True):
        base = bases[stem]
        found: Reading = "same" if base == family else "other" if base else "none"
        expected: Reading = "none" if readings[kind, format]["InvokeAI"] == "none" else "same"
        yield Verdict(family, kind, format, DETECTION, found, expected, {})


def slips(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Where the table of kinds says of a client what was found of no family, by the best file there is of a kind."""
    for client, (form, listed) in itertools.product(CLIENTS, COMPATIBILITY.items()):
        if (
            client.listed_as
            and (found := _readings_of(client, form, verdicts))
            and listed[client.listed_as] not in found
        ):
            told = f"says {listed[client.listed_as]} of {form} in {client.title}"
            yield f"the table of kinds {told}, and it was {' or '.join(sorted(found))}"


def _readings_of(client: RealClient, form: Form, verdicts: Sequence[Verdict]) -> set[Reading]:
    """The best reading of each family, if all kinds of the form were tried; a base that is not found is none."""
    kinds = {kind for kind in KINDS if KINDS[kind].form == form}
    own = [verdict for verdict in verdicts if verdict.client == client.title and verdict.kind in kinds]
    if {verdict.kind for verdict in own} != kinds:
        return set()
    not_offered = {v.file for v in verdicts if v.client == DETECTION and v.found != "same"}
    order: list[Reading] = ["same", "other", "none"]
    best: dict[str, Reading] = {}
    for verdict in own:
        lost = client.place is INVOKEAI and verdict.file in not_offered
        found: Reading = "none" if lost else verdict.found
        best[verdict.family] = min(best.get(verdict.family, "none"), found, key=order.index)
    return set(best.values())
