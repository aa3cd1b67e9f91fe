"""Untrusted JSON: what is refused, and that refusing takes little time and memory."""

from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path

import pytest

from btm_scale.util.bounded_json import parse_json, read_bounded, shown


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 500 + b"]" * 500, "nested too deeply"),
        (b'{"a": ' * 200 + b"1" + b"}" * 200, "nested too deeply"),
        (b'{"a": 1, "b": 2, "a": 3}', "ambiguous: the key 'a' appears twice"),
        (b'["\\ud800"]', "not valid Unicode"),
        (b'["\xff"]', r"not UTF-8 text \(invalid start byte at byte 2\)"),
        ('["text"]'.encode("utf-16"), "not UTF-8 text"),
        (b"9" * 5000, "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[" + b"[]," * 4_000_000 + b"[]]", "larger than 3,000,000 JSON values"),
        (b'["a"' + b',"a"' * 3_000_001 + b"]", "larger than 3,000,000 JSON values"),
    ],
)
def test_json_that_no_writer_writes_is_refused_with_the_reason(content: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_json(content)


def test_json_that_would_fill_the_memory_is_refused_before_it_is_parsed() -> None:
    bomb = b"[" + b"[]," * 8_000_000 + b"[]]"
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(ValueError, match="larger than"):
        parse_json(bomb)
    assert tracemalloc.get_traced_memory()[1] < 100_000_000
    tracemalloc.stop()
    assert time.perf_counter() - started < 5


def test_values_outside_of_millions_of_strings_are_counted_in_little_memory() -> None:
    content = b'"{' * 3_200_000
    tracemalloc.start()
    with pytest.raises(ValueError, match="not valid JSON"):
        parse_json(content)
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()
    with pytest.raises(ValueError, match="larger than 3,000,000 JSON values"):
        parse_json(b'["x"' + b',"x"' * 3_000_000 + b"]")


def test_commas_and_brackets_inside_of_text_are_not_counted_as_values() -> None:
    text = ',[{\\"' * 2_000_000
    assert parse_json(b'["' + text.encode() + b'"]') == [',[{"' * 2_000_000]


def test_complete_surrogate_pairs_and_ordinary_nesting_are_read() -> None:
    assert parse_json(b'{"a": ["\\ud83d\\ude00", {"b": [[[1]]]}]}') == {"a": ["😀", {"b": [[[1]]]}]}
    assert parse_json(b'["\\udc80"]', unicode=False) == ["\udc80"]
    assert parse_json(b'{"a": 1, "a": 2}', unique_keys=False) == {"a": 2}


def test_a_pipe_and_a_file_that_is_too_large_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(11))
    with pytest.raises(ValueError, match="not a regular file"):
        read_bounded(tmp_path / "pipe")
    with pytest.raises(ValueError, match="larger than 1e-05 MB"):
        read_bounded(tmp_path / "large", 10)


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, [1] * 10**6, {"a": "b" * 100}, 10**5000, [[[[[]]]]] * 50],
    ids=["text", "list", "dict", "number", "nested"],
)
def test_a_foreign_value_is_shown_in_a_few_characters(value: object) -> None:
    assert len(shown(value)) <= 63
