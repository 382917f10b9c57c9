"""InvokeAI: for which base it takes a file, as it does when one is added to its model manager.

The job is {"files": {name: path}}; for each file a line of JSON is printed: {"name", "base"}, null where it finds none.
"""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import invokeai_absent  # noqa: F401  # before InvokeAI, for what that imports
from invokeai.backend.model_manager.configs.factory import (  # pyright: ignore[reportMissingImports]
    ModelConfigFactory,
)

_FAMILIES = {"sd-1": "sd1", "sd-2": "sd2", "sdxl": "sdxl"}


def main() -> None:
    for name, file in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["files"].items():
        with redirect_stdout(sys.stderr):
            config = ModelConfigFactory.from_model_on_disk(Path(file), allow_unknown=False).config
        base = config and config.type.value == "lora" and _FAMILIES.get(config.base.value, config.base.value)
        print(json.dumps({"name": name, "base": base or None}), flush=True)


if __name__ == "__main__":
    main()
