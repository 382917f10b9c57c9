"""What the fuzzers have found, each as small as it could be made: the target, what was wrong, the file."""

from __future__ import annotations

FINDINGS: tuple[tuple[str, str, bytes], ...] = (
    ("chosen", "nested too deep", b'{"step": ' + b"[" * 5000),
    ("owner", "nested too deep", b"[" * 5000),
    ("visit", "nested too deep", b"[" * 5000),
    ("remembered", "nested too deep", b"[" * 5000),
    ("errand", "nested too deep", b"[" * 5000),
    ("drawn", "nested too deep", b"[" * 5000),
    ("events", "nested too deep", b"[" * 5000 + b"\n"),
    ("waiting list", "nested too deep", b"[" * 5000),
    ("verified", "nested too deep", b"[" * 5000),
    ("state", "nested too deep", b"[" * 5000),
    ("journal", "nested too deep", b"[" * 5000),
    ("base folder", "nested too deep", b"[" * 5000),
    ("choices", "nested too deep", b"[" * 5000),
    ("card", "nested too deep", b"---\na: " + b"[" * 5000 + b"\n---\n"),
    ("card", "a picture without an address", b'---\nwidget: [{"text": "a"}]\n---\n<Gallery />'),
    ("chosen", "a step without end", b'{"step": 1e999, "strength": 1}'),
    ("errand", "no moment", b'{"pid": 1, "created": 2}'),
    ("errand", "a list", b'"created"'),
    ("verified", "no files", b"{}"),
    ("verified", "no hashes", b'{"files": [{"file": "r.safetensors"}]}'),
    ("verified", "not UTF-8", b"\xff"),
    (
        "verified",
        "a text for a number",
        b'{"files": [{"file": "r.safetensors", "hashes": {"sha256": "0"}, "format": "a", '
        b'"clients": [], "verification": {"weight_error": "x"}}]}',
    ),
    (
        "events",
        "a step that is none",
        b'{"time": 1, "type": "step", "step": "x", "images": 1, "loss": 1, "grad_norm": 1, "lr": {}, "seconds": 1}\n',
    ),
    ("captions in jsonl", "a number of 5000 digits", b'{"file_name": "a.png", "text": ' + b"9" * 5000 + b"}"),
    ("base folder", "a number of 5000 digits", b'{"in_channels": ' + b"9" * 5000 + b"}"),
    ("config", "nested too deep", b"a = " + b"[" * 5000),
    ("config", "a number of 5000 digits", b"a = " + b"9" * 5000),
    ("base pickle", "several disks", b"PK\x05\x06" + b"\xff" * 18),
    ("tokenizer settings", "a length that is a text", b'{"model_max_length": "x"}'),
    ("tokenizer settings", "no length", b"{}"),
    ("optimizer", "a pickle that takes from an empty stack", b"\x80\x02\x85."),
    ("optimizer", "a pickle of another protocol", b"\x80\x00."),
)
"""By the names of targets."""
