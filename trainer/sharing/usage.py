"""How a file is to be used, in words: what its tensors cannot say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..bases import BaseInfo, FamilyName
from .facts import Facts, last_part

SAMPLER = "DDIM"
"""That of the previews (Song et al. 2021), without noise between the steps."""
ENCODER_LAYER: dict[FamilyName, str] = {"sd1": "1", "sd2": "1", "sdxl": "2"}
"""Counted from the end: SD 1 and SD 2 are conditioned on the text encoder's last layer, SDXL on the last but one."""


def usage_hint(facts: Facts, info: BaseInfo) -> str:
    """What a person has to do to get what was trained, and how the previews were drawn."""
    previews = recipe_sentence(facts)
    return " ".join([*hints(facts, info), *([f"The previews: {previews}"] if previews else [])])


def hints(facts: Facts, info: BaseInfo) -> Iterator[str]:
    """One sentence for each thing that has to be done."""
    if facts.triggers:
        yield f"Write {', '.join(facts.triggers)} in the prompt."
    if not is_whole_model(facts):
        yield f"Use it at strength {facts.recommended:g}."
    if embedding := embedding_file(facts):
        yield f"It needs the embedding {embedding} as well: load that beside it."
    if info.merges:
        merged = ", ".join(f"{last_part(file)} at {strength:g}" for file, strength in info.merges)
        yield f"It was trained with {merged} on: load that beside it."
    if info.family != "sdxl":
        yield "Use clip skip 1."
    if info.prediction == "v_prediction":
        yield "The base predicts v: choose v-prediction in the client."
    if info.zero_terminal_snr:
        yield "The base ends in pure noise: switch zero-terminal SNR on in clients that ask."


def recipe_sentence(facts: Facts) -> str:
    """How the previews were drawn, in words; empty if that is not known or not told."""
    if not (recipe := recipe_of(facts)):
        return ""
    return (
        f"sampler {recipe['sampler']}, {recipe['steps']} steps, guidance {recipe['guidance']:g}, {recipe['size']}, "
        f"strength {recipe['strength']:g}, seed {recipe['seed']} for the first and one more for each further one, "
        f"negative prompt: {recipe['negative_prompt'] or 'none'}."
    )


def recipe_of(facts: Facts) -> dict[str, Any]:
    """How the previews were drawn; empty if there are none, or if they show something else than the file."""
    if not facts.previews or not facts.is_as_trained or not facts.tells_training:
        return {}
    drawing = facts.previews[0].drawing
    return {
        "sampler": SAMPLER,
        "steps": drawing.steps,
        "guidance": drawing.guidance,
        "seed": drawing.seed,
        "size": f"{drawing.size}x{drawing.size}",
        "negative_prompt": drawing.negative_prompt,
        "strength": 1.0,
    }


def embedding_file(facts: Facts) -> str:
    """The name of the file with the trigger's embeddings, if new tokens were trained; clients take its stem for the
    word. Empty if there is none."""
    if facts.config is None or not facts.config.adapter.new_tokens or not facts.has_embedding:
        return ""
    return re.sub(r"[^\w .-]", "_", facts.config.trigger) + ".safetensors"


def is_whole_model(facts: Facts) -> bool:
    """Whether the base's own weights were trained, so that the file is a whole model and no LoRA."""
    return facts.config is not None and facts.config.adapter.kind == "full"
