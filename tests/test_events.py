"""`events.jsonl`: what is appended is read back, whatever happened to the last line."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from lorasmith.trainer.events import (
    AttentionChosen,
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
    Validated,
    Warned,
    read_events,
)

STEP = Step(
    step=3,
    images=12,
    loss=0.125,
    grad_norm=0.5,
    lr={"unet": 1e-4, "text_encoder": 5e-5},
    seconds=0.25,
    memory_mib=512.5,
)
ALL: list[Event] = [
    Phase("encoding images", 1, 4),
    PlanMade(10, 40, {"images": 4}, [{"name": "unet", "modules": 2}], {"sample": 5, "save": 0}),
    STEP,
    Sampled(0, "samples/step-000000", ["emoji of cat", "猫 \n second line"]),
    Validated(2, ["0-499", "500-999"], [0.25, 0.5], [0.125, 0.25], 2, 64, "ae0f"),
    Checkpointed(3, "checkpoints/step-000003"),
    AttentionChosen("a card", [{"shape": "1 x 8 heads", "kernel": "flash", "milliseconds": {"flash": 0.5}}]),
    Warned("a warning"),
    Failed("went wrong", 3, "Mend it.", ["runtime.precision=fp32"], ["optimizer.lr=1e-5"], 2),
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
        "validation",
        "checkpoint",
        "attention",
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
        "memory_mib": 512.5,
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


@pytest.mark.skipif(os.name == "nt", reason="the size of files cannot be limited on Windows")
def test_after_a_line_that_a_full_disk_has_torn_the_next_stands_on_its_own(tmp_path: Path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = log_of(tmp_path / "events.jsonl", [Warned("first")])
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        with pytest.raises(OSError, match="too large"):
            log.append(Warned("x" * 200))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "events.jsonl").stat().st_size == 100
    log.append(Warned("last"))
    assert events_of(tmp_path / "events.jsonl") == [Warned("first"), Warned("last")]


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
        '{"time": "noon", "type": "warning", "message": "x"}',
        "[1, 2]",
        '"text"',
        "3",
        "null",
        "",
        "not json",
        '{"time": 1.0, "type": ["warning"], "message": "x"}',
        '{"time": 1.0, "type": "stopped", "step": "x"}',
        '{"time": 1.0, "type": "stopped", "step": 1.5}',
        '{"time": 1.0, "type": "stopped", "step": -1}',
        '{"time": 1.0, "type": "stopped", "step": 9223372036854775808}',
        '{"time": 1.0, "type": "stopped", "step": 1e400}',
        '{"time": 1e400, "type": "stopped", "step": 1}',
        '{"time": 1.0, "type": "warning", "message": 3}',
        '{"time": 1.0, "type": "done", "step": 1, "exports": "x"}',
        '{"time": 1.0, "type": "plan", "steps": 1, "images": 1, "every": {"save": "x"}}',
        '{"time": 1.0, "type": "step", "step": 1, "images": 4, "loss": 1, "grad_norm": 1, "lr": 3, "seconds": 1}',
        '{"time": 1.0, "type": "step", "step": 1, "images": 4, "loss": [], "grad_norm": 1, "lr": {}, "seconds": 1}',
        "[" * 100_000,
        "\0" * 4096,
    ],
)
def test_a_line_that_is_no_known_record_is_passed_over(tmp_path: Path, line: str):
    path = tmp_path / "events.jsonl"
    log_of(path, [Warned("first")])
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    log_of(path, [Warned("last")])
    assert events_of(path) == [Warned("first"), Warned("last")]


def test_what_earlier_versions_did_not_tell_has_a_default(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    step = '{"time": 1.0, "type": "step", "step": 1, "images": 4, "loss": 1, "grad_norm": 1, "lr": {}, "seconds": 1}'
    path.write_text(f'{step}\n{{"time": 2.0, "type": "error", "message": "x", "step": 0}}\n', encoding="utf-8")
    assert events_of(path) == [Step(1, 4, 1, 1, {}, 1, 0.0), Failed("x")]


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
