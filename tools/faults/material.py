"""What all tries start from: a small base, some pictures, an unbroken run, and a run that was killed half-way."""

from __future__ import annotations

import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from safetensors.numpy import load_file

from lorasmith.trainer.configfile import validate, write_config
from lorasmith.trainer.jobs import RunFolder

from .processes import called
from .trial import NAME, Trial

STEPS = 8
KILLED_AT = 5
"""The step in which the run is killed that was not to end: one after a checkpoint, so that something is done again."""
_SIZES = [(32, 32), (32, 32), (48, 24), (48, 24)]
Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Material:
    """Folders that tries copy from."""

    folder: Path
    whole: Trial
    """A run that nothing has struck."""
    seconds: float
    """How long it took."""
    half: Trial
    """The same, killed half-way."""

    @classmethod
    def made(cls, folder: Path) -> Material:
        """Make it in an empty folder; takes as long as importing torch and two short runs."""
        called(_make_base, folder / "base")
        _draw_pictures(folder / "pictures")
        whole, half = (_begin(folder, folder / name) for name in ("whole", "half"))
        began = time.monotonic()
        code = whole.start("train", whole.file).wait()
        seconds = time.monotonic() - began
        assert code == 0, f"the unbroken run ended with {code}: {whole.said.read_text(encoding='utf-8')}"
        assert whole.run.status().step == STEPS, whole.run.status()
        process = half.start("train", half.file)
        process.until(half.told(lambda _: KILLED_AT in half.steps()))
        process.send(signal.SIGKILL)
        process.wait()
        assert KILLED_AT <= half.run.status().step < STEPS, half.run.status()
        return cls(folder, whole, seconds, half)

    def begin(self, place: Path) -> Trial:
        """A run that is to be trained; nothing has happened yet."""
        return _begin(self.folder, place)


def trained(run: RunFolder) -> Weights:
    """What a run holds at its last step."""
    return load_file(run.checkpoint(STEPS) / "adapter.safetensors")


def exported(run: RunFolder) -> dict[str, Weights]:
    """Its files to share."""
    return {file.name: load_file(file) for file in run.exports.glob("*.safetensors") if ".unverified." not in file.name}


def difference(found: Weights, meant: Weights, rounding: float = 0.0) -> str:
    """Where weights are not those that are meant, bit for bit or up to a rounding; empty if they are."""
    if found.keys() != meant.keys():
        return "other tensors"
    others = [name for name in meant if found[name].tobytes() != meant[name].tobytes()]
    apart = {name: float(np.abs(found[name].astype("f8") - meant[name].astype("f8")).max()) for name in others}
    worst = max(apart, key=apart.__getitem__, default="")
    if not worst or apart[worst] <= rounding:
        return ""
    return f"{len(apart)} of {len(meant)} tensors, {worst} by up to {apart[worst]:.3g}"


def _begin(folder: Path, place: Path) -> Trial:
    shutil.copytree(folder / "pictures", place / "pictures")
    trial = Trial(place)
    values = {
        "name": NAME,
        "runs": str(trial.runs),
        "base": {"model": str(folder / "base")},
        "data": [{"path": str(trial.pictures), "trigger": "trg", "caption_dropout": 0.2}],
        "adapter": {"rank": 2, "alpha": 2.0, "text_encoder": False},
        "budget": {"images": 2 * STEPS, "batch": 2},
        "optimizer": {"lr": 1e-3, "ema_decay": 0.9},
        "save": {"every": 2},
        "sample": {"every": 4, "steps": 2, "prompts": ["trg, emoji of thing", "trg, emoji of owl"]},
        "export": {"formats": ["kohya"]},
        "runtime": {"cache": str(trial.cache), "precision": "fp32"},
    }
    write_config(validate(values), trial.file)
    return trial


def _make_base(folder: Path) -> None:
    """That of the tests, with a text encoder that knows single letters alone: CLIP's own words take longer to load than
    all else."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from tests.tiny import make_sd1

    make_sd1(folder, layers_per_block=1)
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    shutil.rmtree(folder / "tokenizer")
    CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=77
    ).save_pretrained(folder / "tokenizer")
    config = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    config.vocab_size, end = len(words), len(words) - 1
    config.bos_token_id, config.eos_token_id, config.pad_token_id = end - 1, end, end
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")


def _draw_pictures(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, size in enumerate(_SIZES):
        picture = Image.new("RGB", size, (60 * number, 90, 255 - 60 * number))
        ImageDraw.Draw(picture).ellipse((4, 4, 20, 20), (255, 220, 50 * number))
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"emoji of thing {number}", encoding="utf-8")
