"""LyCORIS: the network that `lycoris.kohya` makes of a file, put on a diffusers model as kohya's scripts do it.

LyCORIS finds a layer by the path of its module, and kohya's scripts have UNets of their own: of SDXL in the original
(sgm) tree, of SD 1 in diffusers'. So it gets a module that holds the very layers of the diffusers UNet under the names
of that tree, by LyCORIS' own table. (`lycoris.utils.merge` is not asked: in 4.1.3 it multiplies LoHa and LoKr with
alpha / rank twice.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asking import Parts, run
from diffusers import DiffusionPipeline
from lycoris.kohya import create_network_from_weights  # pyright: ignore[reportMissingImports]
from lycoris.utils import convert_diffusers_name_to_compvis  # pyright: ignore[reportMissingImports]
from torch import nn

_PREFIX = "lora_unet_"


@contextmanager
def applied(base: Path, file: Path, family: str) -> Iterator[Parts]:
    pipeline: Any = DiffusionPipeline.from_pretrained(base)
    names = [name for name in ("text_encoder", "text_encoder_2") if hasattr(pipeline, name)]
    encoders = {name: getattr(pipeline, name) for name in names}
    texts = list(encoders.values()) if family == "sdxl" else pipeline.text_encoder
    unet = _as_kohya_has_it(pipeline.unet, family)
    network, _ = create_network_from_weights(1.0, str(file), None, texts, unet)
    network.apply_to(texts, unet, True, True)
    yield pipeline.unet, encoders


def _as_kohya_has_it(unet: nn.Module, family: str) -> nn.Module:
    """The layers of a UNet, flat, under the names that they have in kohya's."""
    layers = nn.Module()
    for path, layer in unet.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            name = _PREFIX + path.replace(".", "_")
            name = convert_diffusers_name_to_compvis(name) if family == "sdxl" else name
            layers.add_module(name.removeprefix(_PREFIX), layer)
    return layers


if __name__ == "__main__":
    run(applied)
