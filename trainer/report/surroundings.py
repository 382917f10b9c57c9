"""Where and how a run was made, and the command that makes it again."""

from __future__ import annotations

import platform
import shlex
from contextlib import suppress

import psutil

from ..configfile import to_toml
from ..doctor import versions
from ..errors import UserError
from ..jobs import free_name
from ..tensorheader import read_header
from .facts import RunFacts
from .words import folded, missing, pairs, paragraph, section


def environment(facts: RunFacts) -> str:
    say = facts.say
    rows = [
        ("Exported by", say(_exported_by(facts))),
        *((say(name), say(version)) for name, version in versions().items()),
        ("processor", say(f"{platform.processor() or platform.machine()}, {psutil.cpu_count()} threads")),
        ("memory", say(f"{psutil.virtual_memory().total / 2**30:.1f} GiB")),
        ("GPU", say(", ".join(_cards()) or "no NVIDIA GPU")),
    ]
    where = "Of this computer as the report was written, which need not be where the run was trained."
    return section("environment", "Environment", paragraph(where), pairs(rows))


def _exported_by(facts: RunFacts) -> str:
    """The version of Lorasmith that the exported files name."""
    for file in sorted(facts.run.exports.glob("*.safetensors")):
        with suppress(UserError, OSError):
            if version := read_header(file).metadata.get("lorasmith_version"):
                return f"Lorasmith {version}"
    return ""


def _cards() -> list[str]:
    """Names of NVIDIA's; torch, which knows others too, takes seconds to come."""
    import pynvml

    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    return []


# ---------------------------------------------------------------------------------------------------------------------


def repeat(facts: RunFacts) -> str:
    say, run = facts.say, facts.run
    shown = "" if say.shows_paths else " Paths in it are shortened here; the file has them."
    return section(
        "repeat",
        "To repeat it",
        f"<pre><code>{say(_command(facts))}</code></pre>",
        paragraph(
            "The run's own configuration is complete: every value is spelled out, and all that is random follows from "
            "its seed. On a CPU, the same versions make the same file bit for bit; on a GPU nearly."
        ),
        _hashes(facts),
        folded(f"config.toml of {say(run.name)}.{shown}", f"<pre>{say(to_toml(facts.config, comments=False))}</pre>"),
    )


def _command(facts: RunFacts) -> str:
    run, count = facts.run, facts.processes
    file = str(run.config) if facts.say.shows_paths else f"{run.path.parent.name}/{run.name}/config.toml"
    start = f"accelerate launch --num_processes {count} -m lorasmith.trainer.cli" if count > 1 else "lorasmith"
    return f"{start} train {shlex.quote(file)} --set {shlex.quote(f'name={free_name(run.path.parent, run.name)}')}"


def _hashes(facts: RunFacts) -> str:
    """By which a repeat can be told to start from the same."""
    names = {"base": "Weights of the base", "dataset": "Images and captions", "config": "Settings that decide"}
    found = [(named, facts.state.get(key)) for key, named in names.items()]
    rows = [(named, f"<code>{facts.say(value)}</code>") for named, value in found if value]
    return pairs(rows) if rows else missing("What it starts from is hashed with its first checkpoint.")
