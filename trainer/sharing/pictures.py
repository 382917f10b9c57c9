"""Pictures that go with a file: its thumbnail, its previews, and the grid; each says in its text how it was drawn.

The text is A1111's `parameters`, which its page "PNG Info" and most galleries read, and JSON under `lorasmith`. There
is no `prompt` and no `workflow`, which ComfyUI takes for graphs of its own.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ...datasets.images import DECODING_ERRORS, UnreadableImageError, formats_here, read_rgb
from ..errors import UserError, first_line
from .facts import Facts, Preview, Thumbnail
from .usage import SAMPLER

THUMBNAIL_SIDE = 256
_NAME_A_PICTURE = "Name a picture: a preview of the run, a cell of its wall, or one of your own."


def read_thumbnail(file: Path, previews: Path) -> Thumbnail:
    """Any picture; `previews` is the folder of those of the step, which it may be one of.

    Raises:
        UserError: if it is no picture, or cannot be read.
    """
    if not file.is_file():
        raise UserError("no such file", str(file), _NAME_A_PICTURE)
    try:
        picture, _ = read_rgb(file)
        with Image.open(file, formats=formats_here()) as opened:
            prompt = str(opened.info.get("positive_prompt", ""))
    except (UnreadableImageError, *DECODING_ERRORS) as error:
        raise UserError(f"is no picture that can be read ({first_line(error)})", str(file), _NAME_A_PICTURE) from error
    is_preview = file.stem.isdecimal() and file.resolve().parent == previews.resolve()
    return Thumbnail(picture, prompt, int(file.stem) if is_preview else None)


def data_uri(picture: Image.Image) -> str:
    """A JPEG of at most 256 pixels a side, as `data:image/jpeg;base64,...`."""
    small = flat(picture)
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def flat(picture: Image.Image) -> Image.Image:
    """A fresh RGB copy on white, without anything that was attached to the picture."""
    layer = picture.convert("RGBA")
    copy = Image.new("RGB", picture.size, "white")
    copy.paste(layer, mask=layer.getchannel("A"))
    return copy


def png(picture: Image.Image, text: Mapping[str, str]) -> bytes:
    """A PNG with text in it; nothing else that was attached to the picture."""
    info, buffer = PngInfo(), io.BytesIO()
    for name, value in text.items():
        info.add_itxt(name, value)
    flat(picture).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def preview_text(facts: Facts, previews: Sequence[Preview], autov3: str = "") -> dict[str, str]:
    """How one preview was drawn, or several that stand in a grid; without the prompts that must not be told. Nothing if
    they show something else than the file.

    `autov3` is the hash by which galleries find the LoRA. A1111 reads the first preview, all are in the JSON.
    """
    if not facts.tells_training or not facts.is_as_trained or not previews:
        return {}
    prompts = [facts.told_prompt(preview.prompt) for preview in previews]
    told = {
        "lora": facts.name,
        "base": previews[0].base,
        "sampler": SAMPLER,
        "steps": previews[0].drawing.steps,
        "guidance": previews[0].drawing.guidance,
        "size": previews[0].drawing.size,
        "negative_prompt": previews[0].drawing.negative_prompt,
        "pictures": [
            {"seed": preview.seed, **({"prompt": prompt} if prompt else {})}
            for preview, prompt in zip(previews, prompts, strict=True)
        ],
    }
    return {"parameters": _parameters(facts, previews[0], autov3), "lorasmith": json.dumps(told, allow_nan=False)}


def _parameters(facts: Facts, preview: Preview, autov3: str) -> str:
    """As A1111 writes it, so that it draws the same picture with the same base and LoRA.

    A prompt that must not be told leaves its place to the LoRA alone.
    """
    prompt = facts.told_prompt(preview.prompt)
    called = [prompt] if prompt else []
    if autov3:
        called.append(f"<lora:{facts.name}:1>")
    text = preview.drawing.parameters(" ".join(called), preview.number, preview.base)
    return text + (f', Lora hashes: "{facts.name}: {autov3}"' if autov3 else "")
