"""What stands beside a file: a model card for the Hub, a sidecar for A1111, Forge and InvokeAI, a picture."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bases import FAMILY_TITLES, BaseInfo, FamilyName
from ..clients.table import FORM_OF, read_by
from ..files import atomic_file, write_text
from ..idle import LOW_RANK
from .facts import AS_TRAINED, Facts, Preview, base_name, hub_id
from .licenses import license_of, license_of_base
from .metadata import iso_date
from .pictures import png, preview_text
from .usage import embedding_file, hints, is_whole_model, recipe_of, recipe_sentence, usage_hint

if TYPE_CHECKING:
    from ..delta import Form

_SIDECAR_VERSIONS: dict[FamilyName, str] = {"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL"}
NO_PROMPT = "-"
"""What galleries of the Hub take for a picture without a prompt."""


def write_beside(file: Path, facts: Facts, info: BaseInfo) -> list[Path]:
    """Write `<name>.md`, `<name>.json` and, if there is a picture, `<name>.png`; returns their paths."""
    stem = file.name.removesuffix(".safetensors")
    card, sidecar, picture = (file.with_name(stem + ending) for ending in (".md", ".json", ".png"))
    shown = {picture.name: facts.picture_prompt or NO_PROMPT} if facts.picture else {}
    write_text(card, model_card(facts, info, file.name, shown))
    write_text(sidecar, json.dumps(sidecar_of(facts, info), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    if facts.picture is None:
        return [card, sidecar]
    with atomic_file(picture) as temporary:
        temporary.write_bytes(png(facts.picture, preview_text(facts, [facts.pictured] if facts.pictured else [])))
    return [card, sidecar, picture]


def prompt_of(facts: Facts, preview: Preview) -> str:
    """What a gallery says below a preview."""
    return facts.told_prompt(preview.prompt) or NO_PROMPT


def sidecar_of(facts: Facts, info: BaseInfo) -> dict[str, Any]:
    """What A1111's and Forge's pages of extra networks show and insert."""
    recipe = recipe_of(facts)
    return {
        "description": description_of(facts, info),
        "sd version": _SIDECAR_VERSIONS[info.family],
        "activation text": ", ".join(facts.triggers),
        "preferred weight": facts.recommended,
        "negative text": recipe.get("negative_prompt", ""),
        "notes": usage_hint(facts, info),
    }


def description_of(facts: Facts, info: BaseInfo) -> str:
    what = "A fine-tuned" if is_whole_model(facts) else "A style LoRA for"
    return facts.settings.description or f"{what} {FAMILY_TITLES[info.family]}."


def model_card(facts: Facts, info: BaseInfo, file: str, pictures: Mapping[str, str], grid: str = "") -> str:
    """A README for the Hub: YAML front matter and a text.

    `pictures` are the files of the gallery, relative to the card, each with what is said below it; `grid` likewise is a
    picture of previews without and with the LoRA.
    """
    front = "\n".join(_yaml(key, value) for key, value in front_matter(facts, info, pictures).items())
    return f"---\n{front}\n---\n\n" + "\n\n".join(_body(facts, info, file, bool(pictures), grid)) + "\n"


def front_matter(facts: Facts, info: BaseInfo, pictures: Mapping[str, str]) -> dict[str, Any]:
    """https://huggingface.co/docs/hub/model-cards: what is not known is left out."""
    kind = "stable-diffusion-xl" if info.family == "sdxl" else "stable-diffusion"
    of_lora = [] if is_whole_model(facts) else ["lora", "template:sd-lora"]
    readable = is_whole_model(facts) or diffusers_file(facts, "") is not None
    of_library = ["diffusers"] if readable else []
    given = ["text-to-image", *of_library, *of_lora, kind, *(f"{kind}-{library}" for library in of_library)]
    license = license_of(facts, info)
    is_other = license is not None and license.id == "other"
    known = {
        "license": license and license.id,
        "license_name": re.sub(r"[^a-z0-9.]+", "-", license.name.lower()).strip("-") if license and is_other else None,
        "license_link": "LICENSE.md" if is_other else None,
        "library_name": "diffusers" if readable else None,
        "pipeline_tag": "text-to-image",
        "base_model": hub_id(info),
        "base_model_relation": ("finetune" if is_whole_model(facts) else "adapter") if hub_id(info) else None,
        "instance_prompt": next(iter(facts.triggers), None),
        "tags": list(dict.fromkeys([*given, *facts.settings.tags])),
        "widget": [{"text": text, "output": {"url": url}} for url, text in pictures.items()],
    }
    return {key: value for key, value in known.items() if value}


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


def _body(facts: Facts, info: BaseInfo, file: str, has_gallery: bool, grid: str) -> Iterator[str]:
    """The paragraphs of the card: first what whoever wants to use it needs, last how it was made."""
    base = base_name(info)
    yield f"# {_line(facts.title)}"
    if has_gallery:
        yield "<Gallery />"
    yield description_of(facts, info)
    yield "\n".join(f"- **{name}:** {value}" for name, value in _essentials(facts, info, file, base))
    yield f"**Use.** {' '.join(hints(facts, info))}"
    yield from [_snippet(facts, info, file, base)] if is_whole_model(facts) else _reading(facts, info, file, base)
    if has_gallery and not facts.is_as_trained:
        yield "The pictures show what was trained, before the file was made from it."
    if has_gallery and facts.picture and not facts.pictured:
        yield "The first picture is none of the previews, and may have been drawn in another way."
    if recipe := recipe_sentence(facts):
        yield f"**Previews.** {recipe[0].upper()}{recipe[1:]}"
    if grid:
        yield f"![Previews of the base, and of the same prompts and seeds with what was trained]({grid})"
    if facts.tells_training and (rows := _training(facts)):
        yield "\n".join(["| training | |", "| --- | --- |", *(f"| {name} | {_cell(value)} |" for name, value in rows)])
    if license_of_base(info) and not facts.settings.license:
        yield "The license is that of the base model's family; what is trained from a base is a derivative of it."


def _essentials(facts: Facts, info: BaseInfo, file: str, base: str) -> Iterator[tuple[str, str]]:
    """What nobody can do without."""
    yield "File", f"`{file}`"
    if facts.triggers:
        yield "Trigger", ", ".join(f"`{trigger}`" for trigger in facts.triggers)
    if not is_whole_model(facts):
        yield "Strength", f"{facts.recommended:g}"
    yield "Base", f"[{base}](https://huggingface.co/{base})" if hub_id(info) else f"`{base}`"
    if facts.settings.author:
        yield "Author", _line(facts.settings.author)


def _reading(facts: Facts, info: BaseInfo, file: str, base: str) -> Iterator[str]:
    """Which programs read a LoRA, if not all do, and how diffusers loads it, if it does."""
    form = form_of(facts)
    if facts.config is not None and form != "lora":
        readers = [client for client in read_by(form, "same") if client != "diffusers"]
        yield (
            f"**Kind.** The file is a {facts.config.adapter.kind}, which not all programs read as it was trained: "
            f"{', '.join(readers) or 'those that use LyCORIS'} do. A plain LoRA of it, for all others, is written by "
            f"`lorasmith resize {file} --rank 32 --out FILE`."
        )
    if readable := diffusers_file(facts, file):
        yield _snippet(facts, info, readable, base)


def _snippet(facts: Facts, info: BaseInfo, file: str, base: str) -> str:
    """How diffusers loads it."""
    pipeline = "StableDiffusionXLPipeline" if info.family == "sdxl" else "StableDiffusionPipeline"
    prompt = json.dumps(f"{', '.join(facts.triggers)} a lighthouse in a storm".strip(), ensure_ascii=False)
    embedded = "from lorasmith.trainer.bases import POCKET\n" if base == "pocket" and not is_whole_model(facts) else ""
    load = _embedding_lines(facts, info, file)
    load += f"pipeline.load_lora_weights('.', weight_name={file!r})  # '.', or owner/name where it is on the Hub\n"
    if facts.recommended != 1:
        load += f"pipeline.fuse_lora(lora_scale={facts.recommended:g})\n"
    source, loader = "POCKET" if embedded else repr(base), "from_pretrained"
    if is_whole_model(facts):
        load, source = "", repr(file.removesuffix(".safetensors").removesuffix("-diffusers") + "-diffusers")
    elif base.endswith((".safetensors", ".ckpt")):
        loader = "from_single_file"
    return (
        "```python\n"
        f"from diffusers import {pipeline}\n{embedded}\n"
        f"pipeline = {pipeline}.{loader}({source})\n"
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
        ("strength of what was trained", None if facts.strengths == AS_TRAINED else facts.strengths),
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
    """JSON is YAML, but for a few letters that YAML takes for line breaks or refuses."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return f"{key}: {_NOT_YAML.sub(lambda letter: f'{chr(92)}u{ord(letter[0]):04x}', text)}"


_NOT_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def _line(text: str) -> str:
    """In one line of Markdown."""
    return " ".join(text.split())


def _cell(text: str) -> str:
    """In a table of Markdown."""
    return _line(text).replace("|", "\\|")
