"""diffusers, any version: a pipeline as `from_pretrained` gives it, and `load_lora_weights`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asking import Parts, run
from diffusers import DiffusionPipeline


@contextmanager
def applied(base: Path, file: Path, family: str) -> Iterator[Parts]:
    del family  # model_index.json says it
    pipeline: Any = DiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    names = [name for name in ("text_encoder", "text_encoder_2") if hasattr(pipeline, name)]
    yield pipeline.unet, {name: getattr(pipeline, name) for name in names}


if __name__ == "__main__":
    run(applied)
