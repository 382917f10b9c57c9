"""InvokeAI: its loader reads the file, and its patcher puts it on the parts of a diffusers model.

As its nodes do it, with the prefixes that they name. Weights are patched directly, as on a GPU; the base is named, as
a person can in its model manager (`invokeai_detection.py` asks what it finds out by itself).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import invokeai_absent  # noqa: F401  # before InvokeAI, for what that imports
import torch
from asking import Parts, run
from diffusers import UNet2DConditionModel
from invokeai.backend.model_manager.load.model_cache.torch_module_autocast import (  # pyright: ignore[reportMissingImports]
    torch_module_autocast,
)
from invokeai.backend.model_manager.load.model_loaders.lora import LoRALoader  # pyright: ignore[reportMissingImports]
from invokeai.backend.model_manager.taxonomy import (  # pyright: ignore[reportMissingImports]
    BaseModelType,
    ModelFormat,
)
from invokeai.backend.patches.layer_patcher import LayerPatcher  # pyright: ignore[reportMissingImports]
from transformers import CLIPTextModel, CLIPTextModelWithProjection

_BASES = {"sd1": BaseModelType.StableDiffusion1, "sdxl": BaseModelType.StableDiffusionXL}
_ENCODERS = {
    "sd1": {"text_encoder": (CLIPTextModel, "lora_te_")},
    "sdxl": {
        "text_encoder": (CLIPTextModel, "lora_te1_"),
        "text_encoder_2": (CLIPTextModelWithProjection, "lora_te2_"),
    },
}


@contextmanager
def applied(base: Path, file: Path, family: str) -> Iterator[Parts]:
    loader = LoRALoader.__new__(LoRALoader)  # what its constructor takes is of the cache and the server
    loader._model_base, loader._torch_dtype = _BASES[family], torch.float32
    patch = loader._load_model(SimpleNamespace(path=str(file), format=ModelFormat.LyCORIS))
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    encoders, prefixes = {}, {"unet": "lora_unet_"}
    for name, (kind, prefix) in _ENCODERS[family].items():
        encoders[name], prefixes[name] = kind.from_pretrained(base / name), prefix
    with ExitStack() as stack:
        for name, module in {"unet": unet, **encoders}.items():
            torch_module_autocast.apply_custom_layers_to_model(module)
            stack.enter_context(
                LayerPatcher.apply_smart_model_patches(
                    model=module,
                    patches=[(patch, 1.0)],
                    prefix=prefixes[name],
                    dtype=torch.float32,
                    force_direct_patching=True,
                )
            )
        yield unet, encoders


if __name__ == "__main__":
    run(applied)
