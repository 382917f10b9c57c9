"""Where a layer or weight is: its path as people write it, and the blocks that hold it.

A path is that of diffusers and transformers after the component's name: `unet.up_blocks.1`,
`text_encoder.encoder.layers.0`.
In the name of a block, a `*` stands for anything: `unet.*.attentions` are all of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from .errors import ConfigError, Problem


def path_of(component: str, name: str) -> str:
    """A parameter's path as people write it; transformers has a `text_model.` in it in some versions only."""
    return f"{component}.{name.removeprefix('text_model.')}"


def lies_in(path: str, block: str) -> bool:
    """Whether a parameter is part of a block, whose name may be a pattern."""
    return fnmatchcase(path, block) or fnmatchcase(path, f"{block}.*")


def blocks(paths: Sequence[str]) -> list[str]:
    """The blocks that can be named, without what is inside them: `unet.conv_in`, `unet.down_blocks.0`, ..."""
    return list(dict.fromkeys(re.sub(r"^(\w+\.(?:encoder\.layers|\w+)(?:\.\d+)?).*", r"\1", path) for path in paths))


def refuse_idle(setting: str, names: Sequence[str], paths: Sequence[str]) -> None:
    """Every block that is named has to be there.

    Raises:
        ConfigError: for all that are not. A `{}` in the setting's name is the number of the block.
    """
    fix = f"Blocks are: {', '.join(blocks(paths))}."
    idle = [(setting.format(n), name) for n, name in enumerate(names) if not any(lies_in(p, name) for p in paths)]
    if idle:
        raise ConfigError.of(Problem(where, f"{name} is no block of what is trained", fix) for where, name in idle)
