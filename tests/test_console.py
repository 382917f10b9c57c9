"""What the terminal shows of a plan and of events: the words of people as they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lorasmith.trainer import console
from lorasmith.trainer.bases import POCKET
from lorasmith.trainer.console import Reporter, length_sentence, print_plan
from lorasmith.trainer.events import AttentionChosen, Warned
from lorasmith.trainer.plan import make_plan


def test_codes_and_brackets_in_captions_and_names_are_shown_as_written(
    short_run, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (pictures / "picture 0.txt").write_text("an :owl: [bold]in ink[/]", encoding="utf-8")
    (pictures / "picture 1.png").rename(pictures / "a [red] :cat: 1.png")
    (pictures / "picture 1.txt").rename(pictures / "a [red] :cat: 1.txt")
    monkeypatch.chdir(pictures.parent)
    base = "base [blue] :dog:"
    shutil.copytree(POCKET, base)
    print_plan(make_plan(short_run(name="short", base={"model": base})))
    said = capsys.readouterr().out
    assert "an :owl: [bold]in ink[/]" in said
    assert "a [red] :cat: 1.png" in said
    assert base in said.splitlines()[0]


def test_a_warning_is_shown_as_written(capsys: pytest.CaptureFixture[str]):
    with Reporter() as report:
        report(Warned("look at [bold]:owl:[/].png"))
    assert capsys.readouterr().err == "warning: look at [bold]:owl:[/].png\n"


def test_kernels_of_attention_are_told_by_the_number_of_their_shapes(capsys: pytest.CaptureFixture[str]):
    kernels = ["flash", "sdpa", "flash"]
    probed = [{"shape": "a shape", "kernel": kernel, "milliseconds": {kernel: 0.5}} for kernel in kernels]
    known = [{"shape": "a shape", "kernel": kernel} for kernel in kernels]
    with Reporter() as report:
        report(AttentionChosen("a [red] card", probed))
        report(AttentionChosen("a [red] card", known))
    told = "attention on a [red] card: flash for 2, sdpa for 1 of 3 shapes"
    assert capsys.readouterr().err == f"{told}, the fastest by a probe\n{told}, as before\n"


def test_the_length_says_that_steps_may_be_smaller(short_run):
    """Seven pictures of three shapes: batches of 2 that hold 2, 1; 2; 2 of them."""
    plan = make_plan(short_run())
    average = plan.images / plan.steps
    assert 2 < average < 4
    assert length_sentence(plan).startswith(f"{plan.steps} steps of at most 4 images (on average {average:.3g}) = ")


def test_the_plan_tells_the_length(short_run, capsys: pytest.CaptureFixture[str]):
    plan = make_plan(short_run())
    print_plan(plan)
    assert f"length: {length_sentence(plan)}\n" in capsys.readouterr().out


def test_no_picture_is_made_of_a_code():
    for screen in (console.out, console.err):
        with screen.capture() as captured:
            screen.print(":owl:", markup=False)
        assert captured.get() == ":owl:\n"
