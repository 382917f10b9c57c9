"""Stand-ins for packages that InvokeAI imports and its LoRA code does not use; import this before InvokeAI.

They are large or bring another torch. diffusers and transformers are imported first: those look at what is installed.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest.mock import MagicMock

from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

_LOADED = (StableDiffusionPipeline, CLIPTextModel)  # both libraries load their modules when a name is used


class _Absent(ModuleType):
    """A module that has every name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> MagicMock:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


for _name in ("cv2", "onnx", "onnxruntime", "spandrel", "torchvision", "torchvision.transforms"):
    sys.modules[_name] = _Absent(_name)
