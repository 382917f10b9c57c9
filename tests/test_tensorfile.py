"""Files written tensor by tensor are those that the safetensors library writes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from lorasmith.trainer.errors import UserError
from lorasmith.trainer.tensorfile import DTYPE_NAMES, tensor_writer

TENSORS = {
    **{f"of {name}": torch.ones(3, 5).to(dtype) for dtype, name in DTYPE_NAMES.items()},
    "ä.b": torch.randn(7, 2),
    "b.alpha": torch.tensor(4.0),
    "nothing": torch.zeros(0, 4),
    "large": torch.randn(600, 700).half(),
}
METADATA = {"z": "é", "a": '{"x": 1}'}


def header_of(file: bytes) -> list[tuple[str, object]]:
    """In the file's order, but for the metadata, which the library writes in any."""
    return list(json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")]).items())


@pytest.mark.parametrize("metadata", [METADATA, {}])
def test_byte_by_byte_as_the_library(tmp_path: Path, metadata: dict[str, str]):
    whole = save(TENSORS, metadata or None)
    with tensor_writer(tmp_path) as writer:
        for key, tensor in reversed(TENSORS.items()):
            writer.add(key, tensor)
        writer.write(tmp_path / "x.safetensors", metadata)
        body = whole[8 + int.from_bytes(whole[:8], "little") :]
        assert writer.digest() == hashlib.sha256(body).hexdigest()
        assert writer.size == len(body)
        assert writer.legacy_hash(metadata) == hashlib.sha256(whole[0x100000:0x110000]).hexdigest()[:8]
    written = (tmp_path / "x.safetensors").read_bytes()
    assert header_of(written) == header_of(whole)
    assert (len(written), written[-len(body) :]) == (len(whole), body)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_views_and_transposed_tensors_are_written_as_they_read(tmp_path: Path):
    wide = torch.arange(12.0).view(3, 4)
    with tensor_writer(tmp_path) as writer:
        writer.add("turned", wide.T)
        writer.add("row", wide[1])
        writer.write(tmp_path / "x.safetensors", {})
    read = load_file(tmp_path / "x.safetensors")
    assert torch.equal(read["turned"], wide.T)
    assert torch.equal(read["row"], wide[1])


def test_nothing_is_written_twice_or_under_another_ending(tmp_path: Path):
    with tensor_writer(tmp_path) as writer:
        writer.add("x", torch.ones(1))
        with pytest.raises(ValueError, match="cannot be added"):
            writer.add("x", torch.ones(1))
        with pytest.raises(UserError, match="does not end in"):
            writer.write(tmp_path / "x.bin", {})
    assert not list(tmp_path.iterdir())
