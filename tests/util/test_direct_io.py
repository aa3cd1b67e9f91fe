"""Writing to a disk without the page cache."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from btm_scale.util import direct_io
from btm_scale.util.direct_io import BLOCK, aligned, is_worthwhile, open_direct, write_directly

CONTENT = np.random.default_rng(0).integers(0, 256, 5 * BLOCK, dtype="u1")

Write = Callable[[np.ndarray, int], None]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(len(CONTENT)))
    return path


@pytest.fixture
def write(file: Path) -> Iterator[Write]:
    """Write directly, or through another descriptor where the file system of the tests cannot."""
    opened = open_direct(file)
    direct = os.open(file, os.O_WRONLY) if opened is None else opened
    buffered = os.open(file, os.O_WRONLY)
    yield lambda data, offset: write_directly(direct, buffered, data.data, offset)
    os.close(direct)
    os.close(buffered)


def placed(start: int, stop: int, skew: int) -> np.ndarray:
    """Return a part of the content in memory `skew` bytes after the border of a block."""
    memory = aligned(skew + stop - start)
    memory[skew:] = CONTENT[start:stop]
    return memory[skew:]


@pytest.mark.parametrize("start", [0, 8, BLOCK - 8, BLOCK])
@pytest.mark.parametrize("stop", [BLOCK + 16, 3 * BLOCK, 3 * BLOCK + 8, 5 * BLOCK])
@pytest.mark.parametrize("skewed", [0, 2])
def test_any_range_is_written_wherever_it_is_in_memory(
    file: Path, write: Write, start: int, stop: int, skewed: int
) -> None:
    write(placed(start, stop, (start + skewed) % BLOCK), start)
    expected = np.zeros_like(CONTENT)
    expected[start:stop] = CONTENT[start:stop]
    assert file.read_bytes() == expected.tobytes()
    write(placed(0, start, 0), 0)  # both write to the block of the border
    write(placed(stop, len(CONTENT), stop % BLOCK), stop)
    assert file.read_bytes() == CONTENT.tobytes()


def test_only_complete_blocks_at_the_border_of_a_block_in_memory_are_written_directly(
    file: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[int, int]] = []
    monkeypatch.setattr(direct_io, "write_at", lambda _, data, offset: written.append((offset, len(data))))
    write(placed(8, 3 * BLOCK + 8, 8), 8)
    assert written == [(BLOCK, 2 * BLOCK), (8, BLOCK - 8), (3 * BLOCK, 8)]
    written.clear()
    write(placed(8, 3 * BLOCK + 8, 16), 8)
    assert written == [(8, 3 * BLOCK)]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSPC])
def test_a_disk_with_larger_blocks_is_written_through_the_page_cache_and_a_full_one_is_an_error(
    file: Path, write: Write, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_at, calls = direct_io.write_at, 0

    def refused_once(descriptor: int, data: memoryview, offset: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError(code, os.strerror(code))
        write_at(descriptor, data, offset)

    monkeypatch.setattr(direct_io, "write_at", refused_once)
    if code == errno.EINVAL:
        write(placed(0, len(CONTENT), 0), 0)
        assert file.read_bytes() == CONTENT.tobytes()
    else:
        with pytest.raises(OSError, match=r"No space left"):
            write(placed(0, len(CONTENT), 0), 0)


def test_file_systems_in_memory_and_those_that_refuse_are_not_written_directly(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.major", lambda device: 0)
    assert open_direct(file) is None
    monkeypatch.setattr("os.major", lambda device: 8)

    def refuse(*arguments: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    with monkeypatch.context() as patch:
        patch.setattr("os.open", refuse)
        assert open_direct(file) is None
    with pytest.raises(FileNotFoundError):
        open_direct(tmp_path / "none")


def test_only_outputs_that_do_not_stay_in_memory_anyway_are_written_directly() -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert not is_worthwhile(memory // 20)
    assert is_worthwhile(memory // 5)
