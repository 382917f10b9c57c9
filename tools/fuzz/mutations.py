"""Valid files made hostile: bytes flipped, cut, spliced and stuffed; numbers of lengths overwritten; and where a file
is JSON, or has a header of it, values replaced by what nobody expects there."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

_DEEP = 5000
HOSTILE_JSON = (
    *("null", "true", "0", "-1", "2.5", "1e999", "-Infinity", "NaN", "9" * 400, "9" * 5000, "1e-320", "4294967296"),
    *('""', '"\\u0000"', '"\\ud800"', '"../../../etc/passwd"', '"/etc/passwd"', '"<script>alert(1)</script>"'),
    *('"a; $(touch hacked) && `touch hacked` | \\n"', '"' + "a" * 5000 + '"', '"(\\\\w+\\\\.?)+!"', '"-1"', '"nan"'),
    *("[]", "{}", "[[]]", '{"a": {"a": 1}}', "[null]", '[1, "a", {}]', "[" * _DEEP + "]" * _DEEP),
    *('{"a":' * _DEEP + "1" + "}" * _DEEP, "[" * 900 + "]" * 900, "[" + "0," * 2000 + "0]"),
)
"""Values as they stand in a file, some of which Python cannot write."""
_HOSTILE_TEXT = (
    b"\0",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"[" * _DEEP,
    b"{a|" * 50,
    b"\r\n",
    b'"',
    b"../" * 20,
    b"9" * 5000,
)
_LENGTHS = (0, 1, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)
_MOST = 6  # changes of one file


def mutated(content: bytes, seeds: Sequence[bytes], random: Random) -> bytes:
    """A hostile version of a file; `seeds` are others of its kind."""
    if random.randrange(4) and (changed := _in_json(content, random)) is not None:
        return changed
    for _ in range(random.randint(1, _MOST)):
        content = random.choice(_CHANGES)(content, seeds, random)
    return content


# ---------------------------------------------------------------------------------------------------------------------
# bytes


def _flipped(content: bytes, _: Sequence[bytes], random: Random) -> bytes:
    at = _place(content, random)
    return content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :] if content else b""


def _cut(content: bytes, _: Sequence[bytes], random: Random) -> bytes:
    return content[: _place(content, random)]


def _without_block(content: bytes, _: Sequence[bytes], random: Random) -> bytes:
    at = _place(content, random)
    return content[:at] + content[at + random.choice((1, 4, 32)) :]


def _doubled(content: bytes, _: Sequence[bytes], random: Random) -> bytes:
    at = _place(content, random)
    return content[:at] + content[max(0, at - 64) : at] * random.choice((1, 2, 50)) + content[at:]


def _spliced(content: bytes, seeds: Sequence[bytes], random: Random) -> bytes:
    other = random.choice(seeds)
    return content[: _place(content, random)] + other[_place(other, random) :]


def _stuffed(content: bytes, _: Sequence[bytes], random: Random) -> bytes:
    at = _place(content, random)
    return content[:at] + random.choice(_HOSTILE_TEXT) + content[at:]


def _with_length(content: bytes, _: Sequence[bytes], random: Random) -> bytes:
    """A number of a header is overwritten, in either order of bytes."""
    at = _place(content, random)
    size, order = random.choice((("H", 2), ("I", 4), ("Q", 8))), random.choice("<>")
    number = struct.pack(order + size[0], random.choice(_LENGTHS) % (1 << 8 * size[1]))
    return content[:at] + number + content[at + size[1] :]


_CHANGES: tuple[Callable[[bytes, Sequence[bytes], Random], bytes], ...] = (
    *(_flipped, _cut, _without_block, _doubled, _spliced, _stuffed, _with_length),
)


def _place(content: bytes, random: Random) -> int:
    """Anywhere, but more often near the beginning or the end, where headers are."""
    if len(content) < 2:
        return 0
    near = min(len(content), 200)
    return random.choice(
        (random.randrange(len(content)), random.randrange(near), len(content) - 1 - random.randrange(near))
    )


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def _in_json(content: bytes, random: Random) -> bytes | None:
    """One value or key of a JSON file, of one of its lines, or of a `.safetensors` header made hostile; None if it is
    none of them."""
    if len(content) > 8 and content[8:9] == b"{":
        length = int.from_bytes(content[:8], "little")
        header = _hostile(content[8 : 8 + length], random)
        return None if header is None else struct.pack("<Q", len(header)) + header + content[8 + length :]
    if (whole := _hostile(content, random)) is not None:
        return whole
    lines = content.split(b"\n")
    number = random.randrange(len(lines))
    changed = _hostile(lines[number], random)
    return None if changed is None else b"\n".join([*lines[:number], changed, *lines[number + 1 :]])


def _hostile(text: bytes, random: Random) -> bytes | None:
    mark = "hostile value"
    try:
        changed = json.dumps(_replaced(json.loads(text), mark, random))
    except (ValueError, RecursionError):
        return None
    return changed.replace(f'"{mark}"', random.choice(HOSTILE_JSON), 1).encode("utf-8", "surrogatepass")


def _replaced(value: Any, mark: str, random: Random) -> Any:
    """Descend to a random place, and put the mark there; or take it away, or give it another key."""
    if not isinstance(value, dict | list) or not value or not random.randrange(6):
        nested = _embedded(value, random)
        return mark if nested is None else nested
    key = random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
    what = random.randrange(8)
    if what == 0:
        del value[key]
    elif what == 1 and isinstance(value, dict):
        value[random.choice(("", "\0", "a" * 3000, "..", "__proto__", "__metadata__", *list(value)))] = value.pop(key)
    else:
        value[key] = _replaced(value[key], mark, random)
    return value


def _embedded(value: Any, random: Random) -> str | None:
    """JSON within a text of JSON, as metadata hold it, made hostile itself."""
    if isinstance(value, str) and value.startswith(("{", "[")) and random.randrange(2):
        changed = _hostile(value.encode("utf-8", "surrogatepass"), random)
        return None if changed is None else changed.decode("utf-8", "surrogatepass")
    return None
