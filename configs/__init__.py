"""Recipes in TOML, shipped with the package. Each header says hardware, minutes and the expected result."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import tomlkit


def recipe_names() -> list[str]:
    """The shipped recipes, sorted."""
    return sorted(file.name.removesuffix(".toml") for file in files(__name__).iterdir() if file.name.endswith(".toml"))


def recipe_for(base: str, family: str, prediction: str) -> str:
    """The recipe to start from, for a base as it was named, and the family and prediction it was found to have."""
    if base == "pocket":
        return "demo"
    return "style-sdxl-v" if (family, prediction) == ("sdxl", "v_prediction") else f"style-{family}"


def recipe_text(name: str) -> str:
    """A recipe as it is written, with its header."""
    return files(__name__).joinpath(f"{name}.toml").read_text(encoding="utf-8")


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe's tables."""
    return tomlkit.parse(recipe_text(name)).unwrap()
