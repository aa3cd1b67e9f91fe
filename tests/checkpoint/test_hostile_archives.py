"""Hostile archives and pickles: bytes of another entry, bombs, and calls that change functions of the process."""

from __future__ import annotations

import io
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from btm_scale.checkpoint.formats import pickles, unpickler
from btm_scale.checkpoint.formats.pickles import load_pickle, load_plain_pickle
from btm_scale.errors import CheckpointError

Edit = Callable[[str, bytes], bytes]


def saved(path: Path, content: object) -> bytes:
    torch.save(content, path)
    return path.read_bytes()


def rewritten(path: Path, edit: Edit, method: int = zipfile.ZIP_STORED) -> None:
    """Write an archive again with its entries edited, as valid as before."""
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old:
        entries = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, "w", method) as new:
        for name, data in entries.items():
            new.writestr(name, edit(name.partition("/")[2], data))


def two_tensors(path: Path) -> None:
    torch.save({"a": torch.zeros(4), "b": torch.arange(1.0, 101.0)}, path)


def refused(path: Path, problem: str) -> None:
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=problem) as error:
        load_pickle(path)
    assert str(path) in str(error.value)
    assert time.perf_counter() - started < 5


def test_a_storage_that_claims_more_elements_than_its_entry_has_is_refused(tmp_path: Path) -> None:
    two_tensors(tmp_path / "a.pt")

    def longer(name: str, data: bytes) -> bytes:
        # The storage and the shape of `a`, so that both agree: 40 elements instead of 4.
        return data.replace(b"K\x04t", b"K(t").replace(b"K\x04\x85", b"K(\x85") if name == "data.pkl" else data

    rewritten(tmp_path / "a.pt", longer)
    refused(tmp_path / "a.pt", "storage '0' has 16 bytes; 40 elements of torch.float32 need 160")


@pytest.mark.parametrize("field", [20, 24, 42])
def test_an_entry_whose_directory_reaches_into_its_neighbour_is_refused(tmp_path: Path, field: int) -> None:
    path = tmp_path / "a.pt"
    two_tensors(path)
    raw = bytearray(path.read_bytes())
    entry = raw.index(b"/data/0", raw.index(b"PK\1\2")) - len("a") - 46
    other = raw.index(b"/data/1", raw.index(b"PK\1\2")) - len("a") - 46
    assert raw[entry : entry + 4] == b"PK\1\2"
    if field == 42:  # the neighbour's offset
        raw[entry + 42 : entry + 46] = raw[other + 42 : other + 46]
    else:
        raw[entry + field : entry + field + 4] = struct.pack("<I", 400)
    path.write_bytes(raw)
    refused(path, "extends past its end|overlap|differs from the archive's directory|has a header that differs")


@pytest.mark.parametrize(
    ("signature", "field", "value", "problem"),
    [
        (b"PK\5\6", 4, 1, "several disks"),
        (b"PK\1\2", 34, 7, "several disks"),
        (b"PK\1\2", 8, 32, "compressed or encrypted"),
        (b"PK\1\2", 10, 99, "compressed or encrypted"),
        (b"PK\1\2", 30, 0xFFFF, "too short for its last entry"),
        (b"PK\5\6", 8, 1, "as long as"),
        (b"PK\5\6", 16, 1, "is not where"),
    ],
)
def test_a_header_that_torch_refuses_is_refused(
    tmp_path: Path, signature: bytes, field: int, value: int, problem: str
) -> None:
    path = tmp_path / "a.pt"
    two_tensors(path)
    rewritten(path, lambda name, data: data)  # without the zip64 record, which takes precedence
    raw = bytearray(path.read_bytes())
    place = raw.rindex(signature) + field
    raw[place : place + 2] = struct.pack("<H", value)
    path.write_bytes(raw)
    with pytest.raises(RuntimeError):
        torch.load(path)
    refused(path, problem)


def test_a_tensor_with_too_many_arguments_is_refused(tmp_path: Path) -> None:
    two_tensors(tmp_path / "a.pt")
    rewritten(tmp_path / "a.pt", lambda name, data: data.replace(b"\x89c", b"\x89\x89\x89c", 1))
    refused(tmp_path / "a.pt", "positional arguments")


def test_a_negation_that_was_not_resolved_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch._neg_view(torch.ones(2))}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "pending operation")


def test_two_entries_of_one_name_and_entries_of_two_folders_are_refused(tmp_path: Path) -> None:
    for name in ("a/data/0", "b/data/0"):
        two_tensors(tmp_path / "a.pt")
        with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive, pytest.warns() if name[0] == "a" else _nothing():
            archive.writestr(name, bytes(16))
        refused(tmp_path / "a.pt", "several folders, or several entries of one name")


class _nothing:  # noqa: N801
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def test_compressed_entries_are_refused_however_far_they_expand(tmp_path: Path) -> None:
    two_tensors(tmp_path / "a.pt")
    rewritten(tmp_path / "a.pt", lambda name, data: data + bytes(50_000_000), zipfile.ZIP_DEFLATED)
    refused(tmp_path / "a.pt", "is compressed or encrypted")


def test_big_endian_numbers_are_refused(tmp_path: Path) -> None:
    two_tensors(tmp_path / "a.pt")
    rewritten(tmp_path / "a.pt", lambda name, data: b"big" if name == "byteorder" else data)
    refused(tmp_path / "a.pt", "big-endian")


def test_a_storage_of_an_unknown_type_is_not_taken_for_bytes(tmp_path: Path) -> None:
    two_tensors(tmp_path / "a.pt")
    rewritten(tmp_path / "a.pt", lambda name, data: data.replace(b"FloatStorage", b"BloatStorage"))
    refused(tmp_path / "a.pt", r"storage of the unknown type torch\.BloatStorage")


def test_one_storage_cannot_have_two_dtypes(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(4.0), "b": torch.arange(4).int()}, tmp_path / "a.pt")
    one_key = b"X\x01\x00\x00\x001"
    rewritten(tmp_path / "a.pt", lambda name, data: data.replace(one_key, one_key[:-1] + b"0"))
    refused(tmp_path / "a.pt", "describes storage '0' in two ways")


def test_a_tensor_that_repeats_one_element_a_billion_times_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(1 << 15, 1 << 15)}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "whose strides repeat 1 elements")
    torch.save({"a": torch.arange(3).expand(5, 3)}, tmp_path / "a.pt")
    assert load_pickle(tmp_path / "a.pt")["a"].read().equal(torch.arange(3).expand(5, 3))


HASHED = b"}" + b")" + b"2\x86" * 60 + b"K\x01s"  # a key that is a tuple of itself twice, 60 times
BOMBS = {
    "a key whose hash takes 2^60 steps": HASHED,
    "a set member of that kind": b"\x8f(" + b")" + b"2\x86" * 60 + b"\x90",
    "a frozenset of that kind": b"(" + b")" + b"2\x86" * 60 + b"\x91",
    "a dict of that kind": b"()" + b"2\x86" * 60 + b"Nd",
    "a key that is nested very deeply": b"})" + b"\x85" * 90_000 + b"K\x01s",
    "a bytearray of 8 GB": b"\x96" + struct.pack("<Q", 1 << 33),
    "a bytearray of 8 GB by its class": b"cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x02\x85R",
    "bytes of 1 TB": b"\x8e" + struct.pack("<Q", 1 << 40),
    "more lists than fit": b"]" * 100_000,
    "more objects than fit": b"cx\ny\nq\0" + b"h\0)R" * 100_000,
    "more instructions than fit": b"N0" * 200_000,
    "an extension": b"\x82\x01",
    "a number of a million digits": b"L" + b"9" * 1_000_000 + b"L\n",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_in_a_pickle_ends_in_a_message(tmp_path: Path, bomb: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unpickler._MAX_OBJECTS * 200 < 1 << 30  # bytes
    monkeypatch.setattr(unpickler, "_MAX_OBJECTS", 95_000)
    monkeypatch.setattr(unpickler, "_MAX_INSTRUCTIONS", 300_000)
    two_tensors(tmp_path / "a.pt")
    rewritten(tmp_path / "a.pt", lambda name, data: b"\x80\4" + bomb + b"." if name == "data.pkl" else data)
    started = time.perf_counter()
    with pytest.raises(CheckpointError):
        load_pickle(tmp_path / "a.pt")
    (tmp_path / "plain").write_bytes(b"\x80\4" + bomb + b".")
    with pytest.raises(CheckpointError):
        load_plain_pickle(tmp_path / "plain")
    assert time.perf_counter() - started < 10


def test_a_memo_of_four_billion_places_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"\x80\2}r\xff\xff\xff\xff.")
    assert load_plain_pickle(tmp_path / "plain") == {}


def test_a_pickle_cannot_change_a_function_of_this_process(tmp_path: Path) -> None:
    before = pickles._rebuild_tensor.__defaults__, pickles._rebuild_tensor.__kwdefaults__
    state = b"N}X\x0c\x00\x00\x00__defaults__(K\x01K\x02tsX\x0e\x00\x00\x00__kwdefaults__}s\x86b"
    two_tensors(tmp_path / "a.pt")
    attack = b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n" + state + b"."
    rewritten(tmp_path / "a.pt", lambda name, data: attack if name == "data.pkl" else data)
    refused(tmp_path / "a.pt", "cannot be read")
    assert (pickles._rebuild_tensor.__defaults__, pickles._rebuild_tensor.__kwdefaults__) == before


def test_what_torch_saves_beside_tensors_is_still_read(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 3)
    content = {
        "module": model.state_dict(),
        "sizes": [torch.Size([3, 2])],
        "set": {1, 2},
        "frozen": frozenset("ab"),
        "bytes": b"\x00\xff",
        "key": {("a", 1): 2, 3: 4},
        "dtype": torch.bfloat16,
        "range": slice(1, 2),
    }
    for protocol in (2, 4, 5):
        torch.save(content, tmp_path / "a.pt", pickle_protocol=protocol)
        loaded = load_pickle(tmp_path / "a.pt")
        assert loaded["module"]["weight"].read().equal(model.weight)
        assert loaded["sizes"] == [(3, 2)]
        assert (loaded["set"], loaded["frozen"], loaded["bytes"]) == ({1, 2}, frozenset("ab"), b"\x00\xff")
        assert (loaded["key"], loaded["dtype"]) == ({("a", 1): 2, 3: 4}, torch.bfloat16)
