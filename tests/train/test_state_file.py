"""The tensor file of a checkpoint: written and verified in parts, by one rank or several."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path

import pytest
import torch
from helpers.small_models import random_weights

from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.formats.safetensors_writer import SINGLE, ShardedWriter
from btm_scale.checkpoint.formats.tensors import TensorSpec, as_bytes
from btm_scale.train.pieces import Span
from btm_scale.train.state_file import PartWriter, WrittenPart, equal_part_digest, part_digest, require_complete

KINDS = ("master", "exp_avg")
BY_KIND = {
    kind: {name: value.float() for name, value in random_weights(seed).items() if value.is_floating_point()}
    for seed, kind in enumerate(KINDS)
}
TENSORS = {f"{kind}/{name}": value for kind, tensors in BY_KIND.items() for name, value in tensors.items()}
SPECS = {name: TensorSpec.of(value) for name, value in TENSORS.items()}
RANKS = 3


def span_of(size: torch.Size, index: int, ranks: int) -> Span:
    """Return a rank's columns of a matrix, or its range of a vector."""
    rows, columns = size if len(size) == 2 else (1, *size)
    start, stop = columns * index // ranks, columns * (index + 1) // ranks
    return Span.of_runs(start, stop - start, rows, columns)


def write(folder: Path, ranks: int, *, leave_out: int | None = None) -> list[WrittenPart]:
    """Write the file as `ranks` ranks do, and return their parts; `leave_out` writes no vectors."""
    writers = [PartWriter(folder, SPECS, creates=index == 0) for index in range(ranks)]
    for name, value in reversed(BY_KIND["master"].items()):  # in any order
        for index, writer in enumerate(writers):
            span = span_of(value.shape, index, ranks)
            if span.elements and (index != leave_out or value.dim() == 2):
                at = [start + i for start in span.starts for i in range(span.length)]
                writer.write(name, span, {kind: BY_KIND[kind][name].reshape(-1)[at].split(5) for kind in KINDS})
    parts = [writer.finish() for writer in writers]
    writers[0].publish(parts)
    return parts


def is_intact(folder: Path, parts: list[WrittenPart], index: int) -> bool:
    return part_digest(folder, parts[index], is_first=index == 0) == parts[index].sha256


@pytest.mark.parametrize("ranks", [1, RANKS, 64])
def test_several_ranks_write_the_same_file_as_one(ranks: int, tmp_path: Path) -> None:
    write(tmp_path / "one", 1)
    parts = write(tmp_path / "several", ranks)
    assert (tmp_path / "several" / SINGLE).read_bytes() == (tmp_path / "one" / SINGLE).read_bytes()
    assert all(is_intact(tmp_path / "several", parts, index) for index in range(ranks))
    with SafetensorsModel(tmp_path / "several") as stored:
        assert all(torch.equal(stored.read(name), value) for name, value in TENSORS.items())


def test_a_file_that_lacks_a_part_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"2 tensors are incomplete, the first is 'master/model\.norm\.weight'"):
        write(tmp_path, RANKS, leave_out=1)
    assert not (tmp_path / SINGLE).exists()


def test_the_bytes_are_hashed_while_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, plain = [0], os.pread

    def counted(descriptor: int, size: int, position: int) -> bytes:
        data = plain(descriptor, size, position)
        read[0] = max(read[0], position + len(data))
        return data

    monkeypatch.setattr(os, "pread", counted)
    write(tmp_path, RANKS)
    header = (tmp_path / SINGLE).read_bytes()[:8]
    assert read[0] == 8 + int.from_bytes(header, "little")  # nothing but the header


def test_a_flipped_byte_anywhere_is_in_exactly_one_part(tmp_path: Path) -> None:
    parts = write(tmp_path, RANKS)
    file = tmp_path / SINGLE
    original = file.read_bytes()
    start = 8 + int.from_bytes(original[:8], "little")
    damaged = set()
    for at in range(start, len(original), 97):
        file.write_bytes(original[:at] + bytes([original[at] ^ 1]) + original[at + 1 :])
        wrong = [index for index in range(RANKS) if not is_intact(tmp_path, parts, index)]
        assert len(wrong) == 1
        damaged |= set(wrong)
    assert damaged == set(range(RANKS))


def test_a_damaged_header_and_a_wrong_size_are_found(tmp_path: Path) -> None:
    parts = write(tmp_path, 1)
    file = tmp_path / SINGLE
    original = file.read_bytes()
    at = original.index(b"F32")
    for content in (original[:at] + b"I32" + original[at + 3 :], original[:-1], original + b"\0", original[:5], b""):
        file.write_bytes(content)
        try:
            assert not is_intact(tmp_path, parts, 0)
        except (OSError, ValueError, KeyError, TypeError):
            continue


@pytest.mark.parametrize(
    "spans",
    [
        ("0+0*99999999999999/0",),
        ("0+1*99999999999999/0",),
        ("0+99999999999999",),
        ("0+1", "0+1"),
        (),
        ("99999999999999+1",),
    ],
)
def test_spans_that_are_not_the_elements_of_a_tensor_are_refused_before_they_are_read(
    spans: tuple[str, ...], tmp_path: Path
) -> None:
    """A hostile `state.json` would keep every rank reading for years."""
    (part,) = write(tmp_path, 1)
    require_complete(tmp_path, [part])
    hostile = part.model_copy(update={"spans": part.spans | {"model.norm.weight": spans}})
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"model\.norm\.weight|not a span"):
        require_complete(tmp_path, [hostile])
    with contextlib.suppress(ValueError):
        part_digest(tmp_path, hostile, is_first=True)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b"[]",
        b'{"master/a": 3}',
        b'{"master/a": {"data_offsets": [-8, 4]}}',
        b'{"a": {"data_offsets": [4, 0]}}',
    ],
    ids=lambda header: header[:40].decode(),
)
def test_a_hostile_header_is_damage(header: bytes, tmp_path: Path) -> None:
    parts = write(tmp_path, 1)
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    for verify in (lambda: part_digest(tmp_path, parts[0], is_first=True), lambda: equal_part_digest(tmp_path, 0, 1)):
        with pytest.raises(ValueError, match=r"header|deeply"):
            verify()


def test_the_digests_of_schema_2_cover_equal_ranges_of_every_tensor(tmp_path: Path) -> None:
    with ShardedWriter(tmp_path, SPECS, max_shard_bytes=float("inf")) as file:
        header = file.header
        for name, value in TENSORS.items():
            file.write(name, value)
    for index in range(RANKS):
        digest = hashlib.sha256(hashlib.sha256(header).digest() if index == 0 else b"")
        for value in TENSORS.values():
            size = value.numel()
            piece = value.reshape(-1)[size * index // RANKS : size * (index + 1) // RANKS].clone()
            digest.update(hashlib.sha256(as_bytes(piece)).digest())
        assert equal_part_digest(tmp_path, index, RANKS) == digest.hexdigest()
