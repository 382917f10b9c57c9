"""`python -m tools.pocket`: make the embedded base from public pictures, in stages that are not done twice.

pictures -> VAE -> UNet and text encoder with random weights -> captions -> training -> a diffusers folder
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer
from diffusers import AutoencoderKL
from torch import Tensor

from lorasmith.trainer.configfile import merge, read_config, read_toml, to_toml, validate
from lorasmith.trainer.console import Reporter, print_plan
from lorasmith.trainer.files import atomic_folder, write_text
from lorasmith.trainer.jobs import RunFolder
from lorasmith.trainer.plan import make_plan
from lorasmith.trainer.run import resume, train

from .sources import Emoji, Sources
from .untrained import write_untrained
from .vae import new_vae, train_decoder, train_vae
from .world import PREFIX, SHOWN, choose_world, write_datasets

SEED = 0
NAME = "pocket"
VAE_STEPS = 2400
CAPTION_DROPOUT = 0.1


def main(
    folder: Annotated[Path, typer.Option(help="Where all is made, and kept between calls.")] = Path(".cache/pocket"),
    start: Annotated[
        Path | None, typer.Option(help="A pocket base to go on from; random weights if not given.")
    ] = None,
    vae_steps: Annotated[
        int, typer.Option(help="Steps of the VAE, or of its decoder, of 16 pictures each.")
    ] = VAE_STEPS,
    images: Annotated[int, typer.Option(help="Images that the UNet sees; 0: as in pocket.toml.")] = 0,
) -> None:
    """Make the pocket base in FOLDER/pocket. One to two hours on two CPU cores; an interrupted run goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "start").exists() and (start or images or vae_steps != VAE_STEPS):
        raise typer.BadParameter(f"{folder} goes on with what it was begun with; name another --folder, or no option")
    sources = Sources(folder)
    world = choose_world(sources)
    if not (folder / "start").exists():
        with atomic_folder(folder / "start") as temporary:
            make_start(temporary, start, sources.all_pictures(), vae_steps)
    trained = train_all(write_config(sources, world, folder, images), RunFolder(folder / "runs" / NAME))
    if trained:
        collect(trained, world, folder / NAME)
        print(f"{folder / NAME}: measure it with: python -m tools.pocket.measure {folder / NAME}")


def make_start(folder: Path, start: Path | None, pictures: Tensor, steps: int) -> None:
    """What the training goes on from: an earlier base whose decoder learned more, or a VAE and random weights."""
    if start:
        shutil.copytree(start, folder, dirs_exist_ok=True)
        vae = AutoencoderKL.from_pretrained(start / "vae").float()
        train_decoder(vae, pictures, steps, SEED, print)
        vae.half().save_pretrained(folder / "vae")
    else:
        vae = new_vae(SEED)
        train_vae(vae, pictures, steps, SEED, print)
        write_untrained(folder, vae, SEED)


def write_config(sources: Sources, world: list[Emoji], folder: Path, images: int) -> Path:
    """The captioned folders of images, and the complete configuration of the training run."""
    sets = write_datasets(sources, world, folder / "images", SEED)
    data = [{"path": str(path.absolute()), "weight": SHOWN[path.name]} for path in sets]
    given = {
        "name": NAME,
        "runs": str((folder / "runs").absolute()),
        "base": {"model": str((folder / "start").absolute())},
        "data": [table | {"caption_dropout": CAPTION_DROPOUT} for table in data],
        **({"budget": {"images": images}} if images else {}),
    }
    config = folder / "pocket.toml"
    recipe = read_toml(Path(__file__).with_name("pocket.toml"))
    write_text(config, to_toml(validate(merge(recipe, given), source="tools/pocket/pocket.toml")))
    return config


def train_all(config: Path, folder: RunFolder) -> Path | None:
    """Train UNet and text encoder in a run as any other; the diffusers folder it exports, None if it was stopped."""
    exported = folder.exports / f"{NAME}-diffusers"
    if exported.exists():
        return exported
    with Reporter() as report:
        if folder.config.is_file():
            finished = resume(folder, [], report)
        else:
            plan = make_plan(read_config(config))
            print_plan(plan)
            finished = train(plan, report)
    return None if finished.stopped_by else exported


def collect(exported: Path, world: list[Emoji], folder: Path) -> None:
    """The base's folder: what was exported, and the list of what it was taught."""
    concepts = [[f"{PREFIX} {emoji.name}", emoji.file] for emoji in world]
    with atomic_folder(folder) as temporary:
        shutil.copytree(exported, temporary, dirs_exist_ok=True)
        lines = ",\n".join(json.dumps(concept, ensure_ascii=False) for concept in concepts)
        (temporary / "concepts.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    typer.run(main)
