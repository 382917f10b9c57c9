"""`events.jsonl`: what is appended is read back, whatever happened to the last line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lorasmith.trainer.events import (
    Checkpointed,
    Done,
    Event,
    EventLog,
    Failed,
    Phase,
    PlanMade,
    Sampled,
    Step,
    Stopped,
    Warned,
    history,
    read_events,
)

STEP = Step(step=3, images=12, loss=0.125, grad_norm=0.5, lr={"unet": 1e-4, "text_encoder": 5e-5}, seconds=0.25)
ALL: list[Event] = [
    Phase("encoding images", 1, 4),
    PlanMade(10, 40, {"images": 4}, [{"name": "unet", "modules": 2}]),
    STEP,
    Sampled(0, "samples/step-000000", ["emoji of cat", "猫 \n second line"]),
    Checkpointed(3, "checkpoints/step-000003"),
    Warned("a warning"),
    Failed("went wrong", 3),
    Stopped(3),
    Done(10, ["exports/x.safetensors"]),
]


def log_of(path: Path, events: list[Event]) -> EventLog:
    log = EventLog(path)
    for event in events:
        log.append(event)
    return log


def events_of(path: Path) -> list[Event]:
    return [record.event for record in read_events(path)]


def refuse_constants(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def test_every_type_is_read_back_equal(tmp_path: Path):
    log_of(tmp_path / "events.jsonl", ALL)
    assert events_of(tmp_path / "events.jsonl") == ALL


def test_each_line_is_one_object_with_time_and_type(tmp_path: Path):
    log_of(tmp_path / "events.jsonl", ALL)
    content = (tmp_path / "events.jsonl").read_bytes()
    assert b"\r" not in content
    rows = [json.loads(line) for line in content.decode().split("\n")[:-1]]
    assert [row["type"] for row in rows] == [
        "phase",
        "plan",
        "step",
        "sample",
        "checkpoint",
        "warning",
        "error",
        "stopped",
        "done",
    ]
    assert all(isinstance(row["time"], float) for row in rows)
    assert rows[2] == {
        "time": rows[2]["time"],
        "type": "step",
        "step": 3,
        "images": 12,
        "loss": 0.125,
        "grad_norm": 0.5,
        "lr": {"unet": 1e-4, "text_encoder": 5e-5},
        "seconds": 0.25,
    }


def test_a_log_that_does_not_exist_is_empty(tmp_path: Path):
    assert events_of(tmp_path / "events.jsonl") == []


def test_opening_a_log_writes_nothing(tmp_path: Path):
    EventLog(tmp_path / "events.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_second_log_appends_to_the_first(tmp_path: Path):
    log_of(tmp_path / "events.jsonl", ALL[:2])
    log_of(tmp_path / "events.jsonl", ALL[2:])
    assert events_of(tmp_path / "events.jsonl") == ALL


@pytest.mark.parametrize("cut", [1, 2, 20], ids=["the newline", "a brace", "a piece"])
def test_a_torn_last_line_is_passed_over_while_it_is_the_last(tmp_path: Path, cut: int):
    path = tmp_path / "events.jsonl"
    log_of(path, [Warned("first"), STEP])
    path.write_bytes(path.read_bytes()[:-cut])
    assert events_of(path) == [Warned("first"), *([STEP] if cut == 1 else [])]


@pytest.mark.parametrize("cut", [1, 2, 20], ids=["the newline", "a brace", "a piece"])
def test_after_a_torn_line_the_next_record_stands_on_its_own(tmp_path: Path, cut: int):
    path = tmp_path / "events.jsonl"
    log_of(path, [Warned("first"), STEP])
    path.write_bytes(path.read_bytes()[:-cut])
    log_of(path, [Stopped(3)])
    assert events_of(path)[0] == Warned("first")
    assert events_of(path)[-1] == Stopped(3)


def test_a_line_torn_in_the_middle_of_a_letter_is_passed_over(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    log_of(path, [Warned("first")])
    with path.open("ab") as file:
        file.write('{"time": 1.0, "type": "warning", "message": "ü'.encode()[:-1])
    log_of(path, [Warned("last")])
    assert events_of(path) == [Warned("first"), Warned("last")]


@pytest.mark.parametrize(
    "line",
    [
        '{"time": 1.0, "type": "from the future", "step": 1}',
        '{"type": "warning", "message": "no time"}',
        '{"time": 1.0, "type": "checkpoint"}',
        '{"time": 1.0}',
        "[1, 2]",
        '"text"',
        "3",
        "null",
        "",
        "not json",
        '{"time": 1.0, "type": ["warning"], "message": "x"}',
    ],
)
def test_a_line_that_is_no_known_record_is_passed_over(tmp_path: Path, line: str):
    path = tmp_path / "events.jsonl"
    log_of(path, [Warned("first")])
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    log_of(path, [Warned("last")])
    assert events_of(path) == [Warned("first"), Warned("last")]


def test_fields_of_later_versions_are_passed_over(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"time": 1.5, "type": "stopped", "step": 4, "mood": "good"}\n', encoding="utf-8")
    [record] = read_events(path)
    assert (record.time, record.event) == (1.5, Stopped(4))


@pytest.mark.parametrize(
    "mark",
    ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r\n", '"', "\\"],
    ids=["line separator", "paragraph separator", "next line", "VT", "FF", "FS", "CRLF", "quote", "backslash"],
)
def test_a_message_with_any_line_break_is_one_record(tmp_path: Path, mark: str):
    """A caption or file name may hold one; a lost `error` record would make a failed run read as interrupted."""
    event = Failed(f"image a{mark}b.png is broken", 1)
    log_of(tmp_path / "events.jsonl", [event])
    assert events_of(tmp_path / "events.jsonl") == [event]


@pytest.mark.parametrize("norm", [float("inf"), float("nan")], ids=["infinite", "not a number"])
def test_a_norm_that_is_not_finite_leaves_a_line_other_programs_can_parse(tmp_path: Path, norm: float):
    """fp16 training begins with infinite norms while its loss scale settles."""
    path = tmp_path / "events.jsonl"
    log_of(path, [Step(1, 4, 0.5, norm, {"unet": 1e-4}, 0.1)])
    row = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constants)
    assert row["step"] == 1
    assert row["grad_norm"] is None
    [event] = events_of(path)
    assert isinstance(event, Step)
    assert math.isnan(event.grad_norm)


def test_a_half_letter_in_a_file_name_can_be_written(tmp_path: Path):
    """A file name that is not UTF-8 reaches Python as lone surrogates."""
    event = Failed("bad name \udcff.png", 1)
    log_of(tmp_path / "events.jsonl", [event])
    assert events_of(tmp_path / "events.jsonl") == [event]


# ---------------------------------------------------------------------------------------------------------------------
# history


def step(number: int, loss: float = 0.5) -> Step:
    return Step(number, 4 * number, loss, 0.5, {"unet": 1e-4}, 0.1)


def history_of(path: Path, *events: Event) -> list[Event]:
    log_of(path / "events.jsonl", list(events))
    return [record.event for record in history(path / "events.jsonl")]


def test_a_run_that_was_not_killed_has_all_of_its_records_as_history(tmp_path: Path):
    assert history_of(tmp_path, *ALL) == ALL


def test_a_step_that_comes_again_supersedes_all_from_it_on(tmp_path: Path):
    kept = [PlanMade(9, 36), Sampled(0, "s0", ["a"]), step(1), step(2), Checkpointed(2, "c2"), Sampled(2, "s2", ["a"])]
    undone = [step(3), step(4), Sampled(4, "s4", ["a"]), Checkpointed(4, "c4"), step(5)]
    again = [PlanMade(9, 36), step(3, 0.25), step(4, 0.25), Sampled(4, "s4", ["b"]), Checkpointed(4, "c4"), Done(4, [])]
    assert history_of(tmp_path, *kept, *undone, *again) == [*kept, *again]


def test_a_run_killed_twice_counts_each_step_once(tmp_path: Path):
    found = history_of(tmp_path, step(1), step(2), step(3), step(2, 0.25), step(3, 0.25), step(3, 0.125), step(4))
    assert found == [step(1), step(2, 0.25), step(3, 0.125), step(4)]


def test_a_run_begun_again_shows_the_untouched_base_once(tmp_path: Path):
    again = [Sampled(0, "s0", ["b"]), step(1, 0.25)]
    assert history_of(tmp_path, Sampled(0, "s0", ["a"]), step(1), step(2), *again) == again


def test_a_checkpoint_saved_twice_is_told_once(tmp_path: Path):
    found = history_of(tmp_path, step(1), Checkpointed(1, "c"), Stopped(1), Checkpointed(1, "c"))
    assert found == [step(1), Stopped(1), Checkpointed(1, "c")]


def test_the_history_of_no_log_is_empty(tmp_path: Path):
    assert history(tmp_path / "events.jsonl") == []
