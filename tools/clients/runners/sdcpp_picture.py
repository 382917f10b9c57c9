"""stable-diffusion.cpp, through the wheel `cyllama`: one small picture of a checkpoint file, with a LoRA or without.

The job: `model` a checkpoint, `lora` a file or null, `out` a .ppm file, and `side` in pixels. What it logs about the
LoRA goes to stderr with the rest.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from cyllama.sd import (  # pyright: ignore[reportMissingImports]
    SDContext,
    SDContextParams,
    SDImageGenParams,
    set_log_callback,
)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    set_log_callback(lambda level, text: print(level, text, end="", file=sys.stderr))
    context = SDContextParams()
    context.model_path, context.n_threads = job["model"], int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    asked = SDImageGenParams()
    asked.prompt, asked.seed = "a photo of a red house by the sea, painted in oil", 1
    asked.width = asked.height = job["side"]
    asked.sample_params.sample_steps, asked.sample_params.cfg_scale = 2, 1.0
    if job["lora"]:
        asked.set_loras([{"path": job["lora"], "multiplier": 1.0}])
    [picture] = SDContext(context).generate_with_params(asked)
    picture.save_ppm(job["out"])


if __name__ == "__main__":
    main()
