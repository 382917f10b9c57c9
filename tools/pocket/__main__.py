"""`python -m tools.pocket`: make the embedded base from public pictures, in stages that are kept and not done twice.

pictures -> VAE -> UNet and text encoder with random weights -> captions -> training -> a diffusers folder -> its measure
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL

from lorasmith.trainer import run
from lorasmith.trainer.configfile import merge, read_toml, to_toml, validate
from lorasmith.trainer.console import Reporter, print_plan
from lorasmith.trainer.files import atomic_folder, write_text
from lorasmith.trainer.jobs import RunFolder
from lorasmith.trainer.plan import make_plan

from .sources import Emoji, Sources
from .untrained import write_untrained
from .vae import train_vae
from .world import PREFIX, SHOWN, choose_world, write_datasets

SEED = 0
NAME = "pocket"
CAPTION_DROPOUT = 0.1


def main(
    folder: Annotated[Path, typer.Option(help="Where everything is made, and kept between calls.")] = Path("build/pocket"),
    vae_steps: Annotated[int, typer.Option(help="Steps of the VAE, of 16 pictures each.")] = 1900,
    images: Annotated[int, typer.Option(help="Images the UNet sees; 0: as in pocket.toml.")] = 0,
) -> None:
    """Make the pocket base. About two hours on two CPU cores; a stage that is complete is not repeated."""
    sources = Sources(folder)
    world = choose_world(sources)
    vae = make_vae(sources, folder / "vae", vae_steps)
    if not (folder / "untrained").exists():
        with atomic_folder(folder / "untrained") as temporary:
            write_untrained(temporary, vae, SEED)
    config = write_config(sources, world, folder, images)
    train(config, RunFolder(folder / "runs" / NAME))


def train(config: Path, folder: RunFolder) -> None:
    ...


def make_vae(sources: Sources, folder: Path, steps: int) -> AutoencoderKL:
    """The trained VAE; trained now if it is not there."""
    if not folder.exists():
        vae = train_vae(sources.all_pictures(), steps, SEED, print)
        with atomic_folder(folder) as temporary:
            vae.save_pretrained(temporary)
    return AutoencoderKL.from_pretrained(folder)


def write_config(sources: Sources, world: list[Emoji], folder: Path, images: int) -> Path:
    """The captioned folders of images, and the complete configuration of the training run."""
    sets = list(write_datasets(sources, world, folder / "images", SEED))
    given = {
        "name": NAME,
        "runs": str((folder / "runs").absolute()),
        "base": {"model": str((folder / "untrained").absolute())},
        "data": [
            {"path": str(path.absolute()), "weight": SHOWN[path.name], "caption_dropout": CAPTION_DROPOUT} for path in sets
        ],
        **({"budget": {"images": images}} if images else {}),
    }
    config = folder / "pocket.toml"
    recipe = read_toml(Path(__file__).with_name("pocket.toml"))
    write_text(config, to_toml(validate(merge(recipe, given), source="tools/pocket/pocket.toml")))
    return config
