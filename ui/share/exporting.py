"""Exports that are asked for in the page or by a program: what is wanted, the process that does it, how it ended."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ...trainer.config import ExportSection, RunConfig
from ...trainer.errors import RunError, TrainingError, UserError
from ...trainer.files import write_text
from ...trainer.formats import formats_of
from ...trainer.idle import LOW_RANK
from ...trainer.jobs import RunFolder
from ...trainer.jsonfile import parse_json, read_json
from ..context import Context
from ..html import esc, notice
from .errand import Errand, Stand, why_it_failed

PRECISIONS = ("fp16", "bf16", "fp32")


@dataclass(frozen=True)
class Wish:
    """What is wanted of `lorasmith export`. What is None is as the run's `[export]` says."""

    step: int = 0
    """The checkpoint; 0 is the newest."""
    formats: tuple[str, ...] = ()
    """Empty: all there are."""
    precision: str = "fp16"
    settings: tuple[tuple[str, Any], ...] = ()
    """Of `[export]`, by their keys: what is told with the files."""
    thumbnail: Path | None = None
    bake: int = 0
    """The rank of a plain LoRA to write instead; 0: none."""
    merged: float = 1.0
    """The strength that becomes a part of the file."""
    bundle: bool = False

    def arguments(self, run: RunFolder) -> list[str]:
        """Of the command line; the newest checkpoint of a run that has ended gets the plain name."""
        newest = max(run.saved_steps(), default=0)
        given = ["export", str(run.path), "--json", "--precision", self.precision]
        given += ["--step", str(self.step)] if self.step and (self.step != newest or run.owner_alive()) else []
        given += ["--format", ",".join(self.formats)] if self.formats else []
        given += ["--bake", str(self.bake)] if self.bake else []
        given += ["--strength", repr(self.merged)] if self.merged != 1 else []
        given += ["--thumbnail", str(self.thumbnail)] if self.thumbnail else []
        given += ["--bundle"] if self.bundle else []
        for key, value in self.settings:
            given += ["--set", f"export.{key}={json.dumps(value, ensure_ascii=False)}"]  # which is TOML too
        return given


def exports_of(run: RunFolder) -> Errand:
    """The exports of a run that were started from a page, one at a time."""
    return Errand(run.path / ".export", "an export of this run")


def start_export(context: Context, run: RunFolder, wish: Wish) -> None:
    """Start it. While a run is trained, the export leaves the GPU to it.

    Raises:
        RunError: if there is nothing to export, or an export of this run is under way.
        UserError: if a format is none of this run.
    """
    saved = run.saved_steps()
    if not saved or (wish.step and wish.step not in saved):
        there = ", ".join(map(str, saved)) or "none yet"
        what = f"has no checkpoint of step {wish.step}" if saved else "has no checkpoint yet"
        raise RunError(what, run.name, f"Checkpoints: {there}.")
    there = formats_of(run.read_config(), baked=bool(wish.bake))
    if unknown := [name for name in wish.formats if name not in there]:
        raise UserError(f"there is no format {unknown[0]!r} of this run", "formats", f"Formats: {', '.join(there)}.")
    if wish.precision not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise UserError(f"there is no precision {wish.precision!r}", "precision", f"Precisions: {known}.")
    environment = {"CUDA_VISIBLE_DEVICES": ""} if context.queue.running() else {}
    exports_of(run).start(wish.arguments(run), environment)
    write_text(_last_settings(run), json.dumps(dict(wish.settings), indent=2, ensure_ascii=False) + "\n")


def settings_of(run: RunFolder, config: RunConfig) -> ExportSection:
    """What was told with the last export from a page, over what the run's configuration says."""
    try:
        last = read_json(_last_settings(run))
        return ExportSection.model_validate(config.export.model_dump() | last)
    except (OSError, ValueError, TypeError):
        return config.export


def _last_settings(run: RunFolder) -> Path:
    return exports_of(run).folder / "settings.json"


def export_of(
    context: Context,
    name: str,
    step: int = 0,
    formats: tuple[str, ...] = (),
    precision: str = "fp16",
    strength: float = 1.0,
) -> dict[str, Any]:
    """Write the files of a checkpoint (0: the newest), verify them, and wait for it: their paths, what was lost in
    baking, and what was found of them. `strength` is what others are told to use; the file is as it was trained.

    Raises:
        RunError: if there is no such run or checkpoint, or if another export of it is under way.
        UserError: if a format or precision is unknown.
        TrainingError: if it failed, with what it said.
    """
    run = context.run(name)
    if run is None:
        raise RunError("there is no run of this name", name or "name", "See the runs with: lorasmith runs")
    start_export(context, run, Wish(step, tuple(formats), precision, (("strength", float(strength)),)))
    stand = exports_of(run).wait()
    if answer := answer_of(stand):
        return answer
    raise TrainingError(why_it_failed(stand).rstrip("."), run.name)


def answer_of(stand: Stand) -> dict[str, Any] | None:
    """What an export that succeeded has answered; None of any other."""
    try:
        answer = parse_json(stand.answer)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) and answer.get("written") else None


def export_html(stand: Stand) -> str:
    """How the last export stands, in words."""
    if stand.state == "none":
        return ""
    if stand.state == "running":
        since = time.strftime("%H:%M:%S", time.localtime(stand.started))
        return (
            f'<p role="status">Exporting since {since}: the base model is loaded, the files are written, loaded back, '
            "and compared with the trained model. It goes on if you close this page.</p>"
        )
    answer = answer_of(stand)
    if not answer:
        return notice("the export failed", why_it_failed(stand), where="export")
    written = [path.name for path in map(Path, answer["written"]) if path.suffix == ".safetensors" or path.is_dir()]
    told = f"Done in {stand.ended - stand.started:.0f} s: wrote and verified {', '.join(written)}."
    lost = [f"{share:.2%} of the change of the {part} was lost in baking." for part, share in answer["lost"].items()]
    return f'<p role="status"><strong>✓</strong> {esc(" ".join([told, *lost]))}</p>'


# ---------------------------------------------------------------------------------------------------------------------
# before it is written


def expected_size(run: RunFolder, config: RunConfig, step: int, precision: str, bake: int = 0) -> int | None:
    """About how many bytes one file will have; None if that cannot be told from what is on disk."""
    per_number = _BYTES[precision]
    kind, rank = config.adapter.kind, config.adapter.rank
    if kind in LOW_RANK and (not bake or kind == "lora"):
        try:
            counts = _counts(run.checkpoint(step) / "adapter.safetensors")
        except (OSError, SafetensorError):
            return None
        lengths = sum(count for key, count in counts.items() if "magnitude" in key)  # fp32 in any case
        factors = sum(counts.values()) - lengths
        scaled = factors * bake / rank if bake else factors
        return round(scaled * per_number + lengths * 4 + len(counts) * _BYTES_OF_A_KEY + _BYTES_OF_METADATA)
    known = run.exports / f"{run.name}.safetensors"  # from the end of the training
    if bake or not known.is_file():
        return None
    return round(known.stat().st_size * per_number / _BYTES[config.export.precision])


_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
_BYTES_OF_A_KEY, _BYTES_OF_METADATA = 160, 15_000


def _counts(file: Path) -> dict[str, int]:
    """How many numbers each tensor of a file has."""
    with safe_open(file, "np") as opened:
        return {key: math.prod(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
