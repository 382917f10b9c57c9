"""What stands beside a file: a model card for the Hub, a sidecar for A1111, Forge and InvokeAI, a picture."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bases import FAMILY_TITLES, BaseInfo, FamilyName
from .clients.table import FORM_OF, read_by
from .files import atomic_file, write_text
from .idle import LOW_RANK
from .metadata import Facts, embedding_file, flat, iso_date, last_part, license_of, usage_hint

if TYPE_CHECKING:
    from .delta import Form

_SIDECAR_VERSIONS: dict[FamilyName, str] = {"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL"}


def write_beside(file: Path, facts: Facts, info: BaseInfo) -> list[Path]:
    """Write `<name>.md`, `<name>.json` and, if there is a picture, `<name>.png`; returns their paths."""
    stem = file.name.removesuffix(".safetensors")
    card, sidecar, picture = (file.with_name(stem + ending) for ending in (".md", ".json", ".png"))
    write_text(card, model_card(facts, info, file.name, picture.name if facts.picture else None))
    write_text(sidecar, json.dumps(sidecar_of(facts, info), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    if facts.picture is None:
        return [card, sidecar]
    with atomic_file(picture) as temporary:
        flat(facts.picture).save(temporary, "PNG")
    return [card, sidecar, picture]


def sidecar_of(facts: Facts, info: BaseInfo) -> dict[str, Any]:
    """What A1111's and Forge's pages of extra networks show and insert."""
    what = "A fine-tuned" if is_whole_model(facts) else "A style LoRA for"
    return {
        "description": facts.description or f"{what} {FAMILY_TITLES[info.family]}.",
        "sd version": _SIDECAR_VERSIONS[info.family],
        "activation text": ", ".join(facts.triggers),
        "preferred weight": 1.0,
        "negative text": "",
        "notes": usage_hint(facts, info),
    }


def model_card(facts: Facts, info: BaseInfo, file: str, picture: str | None) -> str:
    """A README for the Hub: YAML front matter and a text; JSON values are valid YAML."""
    front = "\n".join(_yaml(key, value) for key, value in front_matter(facts, info, picture).items())
    return f"---\n{front}\n---\n\n" + "\n\n".join(_body(facts, info, file, picture)) + "\n"


def front_matter(facts: Facts, info: BaseInfo, picture: str | None) -> dict[str, Any]:
    """https://huggingface.co/docs/hub/model-cards: what is not known is left out."""
    kind = "stable-diffusion-xl" if info.family == "sdxl" else "stable-diffusion"
    prompt = next(iter(facts.triggers), facts.name)
    of_lora = [] if is_whole_model(facts) else ["lora", "template:sd-lora"]
    readable = is_whole_model(facts) or diffusers_file(facts, "") is not None
    of_library = ["diffusers"] if readable else []
    known = {
        "license": license_of(facts, info),
        "library_name": "diffusers" if readable else None,
        "pipeline_tag": "text-to-image",
        "base_model": hub_id(info),
        "base_model_relation": ("finetune" if is_whole_model(facts) else "adapter") if hub_id(info) else None,
        "instance_prompt": next(iter(facts.triggers), None),
        "tags": ["text-to-image", *of_library, *of_lora, kind, *(f"{kind}-{library}" for library in of_library)],
        "widget": [{"text": prompt, "output": {"url": picture}}] if picture else None,
    }
    return {key: value for key, value in known.items() if value}


def is_whole_model(facts: Facts) -> bool:
    """Whether the base's own weights were trained, so that the file is a whole model and no LoRA."""
    return facts.config is not None and facts.config.adapter.kind == "full"


def form_of(facts: Facts) -> Form:
    """The form of the file's changes."""
    return "lora" if facts.config is None or facts.baked else FORM_OF[facts.config.adapter.kind]


def diffusers_file(facts: Facts, file: str) -> str | None:
    """The file beside this one that diffusers reads, perhaps this one itself; None if there is none."""
    form = form_of(facts)
    if form == "lora":
        return file
    without_text = facts.config is not None and not facts.config.adapter.text_encoder
    own = f"{file.removesuffix('.safetensors').removesuffix('-diffusers')}-diffusers.safetensors"
    return own if form == "dora" and without_text else None


def hub_id(info: BaseInfo) -> str | None:
    """`owner/name` of a base from the Hub; None for a folder of this computer or a built-in base."""
    return info.model if info.source == info.model and re.fullmatch(r"[\w.-]+/[\w.-]+", info.model) else None


def _body(facts: Facts, info: BaseInfo, file: str, picture: str | None) -> list[str]:
    """The paragraphs of the card."""
    base = hub_id(info) or last_part(info.model)
    parts = [f"# {facts.name}"]
    if picture:
        parts.append("<Gallery />")
    what = "A fine-tuned" if is_whole_model(facts) else "A style LoRA for"
    parts.append(facts.description or f"{what} {FAMILY_TITLES[info.family]}, trained on `{base}`.")
    if hint := usage_hint(facts, info):
        parts.append(f"**Use.** {hint}")
    parts += [_snippet(facts, info, file, base)] if is_whole_model(facts) else _reading(facts, info, file, base)
    if rows := _training(facts):
        table = ["| training | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
        parts.append("\n".join(table))
    if license_of(facts, info) and not facts.license:
        parts.append(
            "The license is that of the base model's family; what is trained from a base is a derivative of it."
        )
    return parts


def _reading(facts: Facts, info: BaseInfo, file: str, base: str) -> Iterator[str]:
    """Which programs read a LoRA, if not all do, and how diffusers loads it, if it does."""
    form = form_of(facts)
    if facts.config is not None and form != "lora":
        readers = [client for client in read_by(form, "same") if client != "diffusers"]
        yield (
            f"**Kind.** The file is a {facts.config.adapter.kind}, which not all programs read as it was trained: "
            f"{', '.join(readers) or 'those that use LyCORIS'} do. A plain LoRA of it, for all others, is written by "
            f"`lorasmith bake {file} --rank 32`."
        )
    if readable := diffusers_file(facts, file):
        yield _snippet(facts, info, readable, base)


def _snippet(facts: Facts, info: BaseInfo, file: str, base: str) -> str:
    """How diffusers loads it."""
    pipeline = "StableDiffusionXLPipeline" if info.family == "sdxl" else "StableDiffusionPipeline"
    prompt = json.dumps(f"{', '.join(facts.triggers)} a lighthouse in a storm".strip(), ensure_ascii=False)
    embedded = "from lorasmith.trainer.bases import POCKET\n" if base == "pocket" and not is_whole_model(facts) else ""
    load = _embedding_lines(facts, info, file) + f"pipeline.load_lora_weights('.', weight_name={file!r})\n"
    source = "POCKET" if embedded else repr(base)
    if is_whole_model(facts):
        load, source = "", repr(file.removesuffix(".safetensors").removesuffix("-diffusers") + "-diffusers")
    return (
        "```python\n"
        f"from diffusers import {pipeline}\n{embedded}\n"
        f"pipeline = {pipeline}.from_pretrained({source})\n"
        f"{load}"
        f"image = pipeline({prompt}).images[0]\n"
        "```"
    )


def _embedding_lines(facts: Facts, info: BaseInfo, file: str) -> str:
    """How diffusers loads the embeddings of new tokens, where there are some."""
    if not (embedding := embedding_file(facts)):
        return ""
    path, token = f"{embedding_folder(file)}/{embedding}", facts.config.trigger if facts.config else ""
    if info.family != "sdxl":
        return f"pipeline.load_textual_inversion({path!r}, token={token!r})\n"
    lines = [f"vectors = safetensors.torch.load_file({path!r})"]
    for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
        parts = f"text_encoder=pipeline.text_encoder{suffix}, tokenizer=pipeline.tokenizer{suffix}"
        lines.append(f"pipeline.load_textual_inversion(vectors[{key!r}], token={token!r}, {parts})")
    return "\n".join(["import safetensors.torch", *lines, ""])


def embedding_folder(file: str) -> str:
    """Where a LoRA's embeddings lie, beside it: their file has the trigger's name, which those of others may have."""
    return file.removesuffix(".safetensors").removesuffix("-diffusers") + "-embedding"


def _training(facts: Facts) -> list[tuple[str, str]]:
    config, whole, baked = facts.config, is_whole_model(facts), facts.baked
    ranked = config is not None and config.adapter.kind in LOW_RANK
    lost = ", ".join(f"{share:.2%} of {component}" for component, share in baked.lost.items()) if baked else ""
    rows = [
        ("images", sum(folder.images for folder in facts.folders) or None),
        ("images seen", facts.images_seen),
        ("steps", facts.steps),
        ("kind", config.adapter.kind if config and not whole else None),
        ("rank, alpha", f"{config.adapter.rank}, {config.adapter.alpha:g}" if config and ranked else None),
        ("baked to rank", baked and baked.rank),
        ("change lost in that", lost or None),
        ("layers", config.adapter.targets if config and not whole else None),
        ("weights", ", ".join(config.adapter.train_only) or "all" if config and whole else None),
        ("learning rate", f"{config.optimizer.lr:g}" if config and config.adapter.unet else None),
        (
            "text encoder rate",
            f"{config.optimizer.text_encoder_lr:g}" if config and config.adapter.text_encoder else None,
        ),
        ("mean loss at the end", None if facts.loss is None else f"{facts.loss:.4g}"),
        ("date", None if facts.finished is None else iso_date(facts.finished)),
    ]
    return [(name, str(value)) for name, value in rows if value is not None]


def _yaml(key: str, value: Any) -> str:
    return f"{key}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}"
