"""The tensor file of a checkpoint: written and verified in parts, by one rank or several."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from helpers.small_models import random_weights

from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.formats.safetensors_writer import SINGLE
from btm_scale.checkpoint.formats.tensors import TensorSpec
from btm_scale.train.state_file import PartWriter, part_digest

TENSORS = {name: value.float() for name, value in random_weights(3).items() if value.is_floating_point()}
SPECS = {name: TensorSpec.of(value) for name, value in TENSORS.items()}
RANKS = 3


def write(folder: Path, ranks: int) -> list[str]:
    """Write the file as `ranks` ranks do, and return their digests."""
    writers = [PartWriter(folder, SPECS, index, ranks) for index in range(ranks)]
    for name in reversed(TENSORS):  # in any order
        for writer in writers:
            writer.write(name, TENSORS[name])
    digests = [writer.finish() for writer in writers]
    writers[0].publish()
    return digests


@pytest.mark.parametrize("ranks", [1, RANKS, 64])
def test_several_ranks_write_the_same_file_as_one(ranks: int, tmp_path: Path) -> None:
    write(tmp_path / "one", 1)
    digests = write(tmp_path / "several", ranks)
    assert (tmp_path / "several" / SINGLE).read_bytes() == (tmp_path / "one" / SINGLE).read_bytes()
    assert digests == [part_digest(tmp_path / "several", index, ranks) for index in range(ranks)]
    with SafetensorsModel(tmp_path / "several") as stored:
        assert all(torch.equal(stored.read(name), value) for name, value in TENSORS.items())


def test_the_bytes_are_hashed_while_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("written bytes are read again"))
    write(tmp_path, RANKS)


def test_a_flipped_byte_anywhere_is_in_exactly_one_part(tmp_path: Path) -> None:
    digests = write(tmp_path, RANKS)
    file = tmp_path / SINGLE
    original = file.read_bytes()
    start = 8 + int.from_bytes(original[:8], "little")
    damaged = set()
    for at in range(start, len(original), 97):
        file.write_bytes(original[:at] + bytes([original[at] ^ 1]) + original[at + 1 :])
        wrong = [index for index in range(RANKS) if part_digest(tmp_path, index, RANKS) != digests[index]]
        assert len(wrong) == 1
        damaged |= set(wrong)
    assert damaged == set(range(RANKS))


def test_a_damaged_header_and_a_wrong_size_are_found(tmp_path: Path) -> None:
    [digest] = write(tmp_path, 1)
    file = tmp_path / SINGLE
    original = file.read_bytes()
    at = original.index(b"F32")
    for content in (original[:at] + b"I32" + original[at + 3 :], original[:-1], original + b"\0", original[:5], b""):
        file.write_bytes(content)
        try:
            assert part_digest(tmp_path, 0, 1) != digest
        except (OSError, ValueError, KeyError, TypeError):
            continue
