"""What the runners share: for each file, a base loaded anew, the client's own way to put the file on, and questions.

A runner is a script for a client's own environment; beside it this module needs torch and safetensors alone. It is
called with a job (JSON): `base` a diffusers folder, `family`, `given` the inputs, `threads` to work in, `out` a folder
for answers, `files` {name: path}. For each file it prints a line of JSON: {"name", "refused"}, where `refused` is what
the client said, or null when `out/name.safetensors` holds the answers. All else that a client prints goes to stderr.
"""

from __future__ import annotations

import json
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Parts = tuple[Any, dict[str, Any]]
"""The UNet, and the text encoders by the names that diffusers gives them."""
Applied = Callable[[Path, Path, str], AbstractContextManager[Parts]]
"""(folder of the base, LoRA file, family) to the parts with the file's effect, for as long as the context lasts."""


@torch.no_grad()
def answers(unet: Any, text_encoders: Mapping[str, Any], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What each part answers to given inputs, flat and fp32; the UNet's conditions are given, so parts are apart.

    `given`: `latents` (1, 4, h, w), `timestep` (1,), `hidden` (1, 77, width), `ids` (1, 77), and for SDXL `pooled`
    (1, width) and `sizes` (1, 6).
    """
    is_xl = "pooled" in given
    added = {"text_embeds": given["pooled"], "time_ids": given["sizes"]} if is_xl else None
    predicted = unet(given["latents"], given["timestep"], given["hidden"], added_cond_kwargs=added).sample
    said = {"unet": predicted.flatten()}
    for name, encoder in text_encoders.items():
        output = encoder(given["ids"], output_hidden_states=True)
        said[name] = (output.hidden_states[-2] if is_xl else output.last_hidden_state).flatten()
        if name == "text_encoder_2":
            said[name] = torch.cat([said[name], output.text_embeds.flatten()])
    return {name: answer.float().contiguous() for name, answer in said.items()}


def run(applied: Applied) -> None:
    """Carry out the job that the command line names."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    given = load_file(job["given"])
    for name, file in job["files"].items():
        refused = None
        try:
            with redirect_stdout(sys.stderr), applied(Path(job["base"]), Path(file), job["family"]) as parts:
                save_file(answers(*parts, given), Path(job["out"]) / f"{name}.safetensors")
        except Exception as error:  # whatever a client raises is its refusal of this file
            traceback.print_exc()
            refused = textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" ...")
        print(json.dumps({"name": name, "refused": refused}), flush=True)
