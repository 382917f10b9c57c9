"""The example set and its style measure: honest, because what is measured was never trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lorasmith.datasets.folder import scan
from lorasmith.trainer.bases import POCKET, inspect_base
from lorasmith.trainer.demo import _true, measure_style, read_held_out
from lorasmith.trainer.encoder import pass_through
from lorasmith.trainer.example import EXAMPLES, STYLE, example_config
from lorasmith.trainer.jobs import free_name
from lorasmith.trainer.models import load_base
from lorasmith.trainer.sample import before_after_grid
from lorasmith.trainer.score import StyleMeasure, colour_layout, colour_layout_distance


@pytest.fixture(scope="module")
def base():
    return load_base(inspect_base("pocket"))


def test_the_example_set_is_what_it_says():
    items = scan(EXAMPLES / STYLE)
    assert len(items) == 32
    assert {(item.width, item.height) for item in items} == {(256, 256)}
    assert all(item.caption.startswith("emoji of ") and item.source == f"{item.path.stem}.txt" for item in items)
    assert (EXAMPLES / "LICENSE").is_file()
    assert (EXAMPLES / "ATTRIBUTION.md").is_file()


def test_held_out_concepts_are_known_to_the_base_and_never_trained():
    held_out = read_held_out()
    prompts = [prompt for prompt, _ in held_out]
    trained = {item.caption for item in scan(EXAMPLES / STYLE)}
    known = {prompt for prompt, _ in json.loads((POCKET / "concepts.json").read_text(encoding="utf-8"))}
    assert len(set(prompts)) == 32
    assert not trained & set(prompts)
    assert set(prompts) <= known
    assert all((EXAMPLES / "measure" / style / file).is_file() for style in ("base", "target") for _, file in held_out)


def test_the_measure_tells_true_pictures_apart_and_sees_a_restyled_one(base):
    """Given the true pictures of the target style as if a LoRA had drawn them, it must say so; and the reverse."""
    held_out = [file for _, file in read_held_out()]
    pictures = {style: pass_through(base.vae, _true(style, held_out)) for style in ("base", "target")}
    drawn = {style: [_picture(tensor) for tensor in tensors] for style, tensors in pictures.items()}

    learned = measure_style(base, drawn["base"], drawn["target"])
    assert learned.accuracy > 0.9
    assert learned.probability_base < 0.15
    assert learned.probability_lora > 0.85
    assert learned.layout_lora < 0.1 < learned.layout_base
    nothing = measure_style(base, drawn["base"], drawn["base"])
    assert nothing.style_gain == 0
    assert nothing.layout_change == 0


def test_the_measure_is_refused_without_pictures(base):
    from lorasmith.trainer.errors import UserError

    with pytest.raises(UserError, match="no pictures"):
        StyleMeasure.fit(base.vae, torch.zeros(0, 3, 64, 64), torch.zeros(0, 3, 64, 64))


def test_colour_layout_distance_of_white_and_black_is_one():
    white, black = torch.ones(2, 3, 64, 64), -torch.ones(2, 3, 64, 64)
    assert colour_layout(white).shape == (2, 3, 16, 16)
    assert colour_layout_distance(white, black).tolist() == [1, 1]
    assert colour_layout_distance(white, white).tolist() == [0, 0]


def test_a_second_demo_gets_a_name_of_its_own(tmp_path: Path):
    assert free_name(tmp_path, "ink") == "ink"
    (tmp_path / "ink").mkdir()
    (tmp_path / "ink-2").mkdir()
    assert free_name(tmp_path, "ink") == "ink-3"
    assert example_config(tmp_path).name == STYLE


def test_the_grid_shows_each_pair_where_its_label_is():
    red, blue = Image.new("RGB", (64, 64), "#ff0000"), Image.new("RGB", (64, 64), "#0000ff")
    grid = before_after_grid(
        [red] * 3, [blue] * 3, ["one", "two", "a label much too long for its place " * 3], "T", 2, 64
    )
    pixels = np.asarray(grid)
    assert (pixels == (255, 0, 0)).all(-1).sum() == 3 * 64 * 64
    assert (pixels == (0, 0, 255)).all(-1).sum() == 3 * 64 * 64


def _picture(tensor: torch.Tensor) -> Image.Image:
    pixels = ((tensor + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels)
