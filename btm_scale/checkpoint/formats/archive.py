"""The zip archives that `torch.save` writes: where each entry's bytes are, checked against the archive's bounds."""

from __future__ import annotations

import io
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from btm_scale.errors import CheckpointError

# A directory of this size lists half a million storages, and a pickle describes some 200,000 tensors.
_MAX_READ = 32 << 20
_LOCAL_HEADER = 30  # bytes, before the name
_DIRECTORY_HEADER = 46
_FLAGS = 0x0808  # a data descriptor follows, the name is UTF-8: torch.save sets no others


@dataclass(frozen=True)
class Extent:
    """Where an entry's bytes are in the file."""

    offset: int
    nbytes: int


class Archive:
    """A zip archive in `length` bytes from byte `start` of an open file; the default is the complete file.

    Raises `CheckpointError` for an archive that `torch.save` cannot have written, such as one with entries that
    overlap: the bytes of one tensor would also be those of another.
    """

    def __init__(self, path: Path, file: IO[bytes], start: int = 0, length: int | None = None) -> None:
        size = path.stat().st_size
        length = size - start if length is None else length
        if not 0 <= start <= start + length <= size:
            raise CheckpointError(f"{path} has {size} bytes, too few for {length} bytes at {start}. Copy it again.")
        self.path, self._window = path, _Window(file, path, start, length)
        self._zip = zipfile.ZipFile(self._window)
        infos = self._zip.infolist()
        self._entries = {info.filename.partition("/")[2]: info for info in infos}
        folders = {info.filename.partition("/")[0] for info in infos}
        if len(folders) != 1 or len(self._entries) != len(infos):
            raise self._foreign("it has several folders, or several entries of one name")
        self._check_directory(infos)
        starts = sorted(info.header_offset for info in infos)
        self._end_of = dict(zip(starts, [*starts[1:], self._zip.start_dir], strict=True))
        if len(self._end_of) != len(infos) or starts[0] < 0:
            raise self._foreign("its entries overlap")
        if "byteorder" in self._entries and self.read("byteorder") != b"little":
            raise CheckpointError(f"{path} has numbers in big-endian order. Save it on a little-endian machine.")

    def extent(self, name: str) -> Extent:
        """Return where an entry is in the file. Raises `CheckpointError` if it is missing, compressed or damaged."""
        info = self._entries.get(name)
        if info is None:
            raise self._foreign(f"it has no entry '{name:.80}'")
        self._window.seek(info.header_offset)
        local = self._window.read(_LOCAL_HEADER)
        name_bytes, extra_bytes = (int.from_bytes(local[i : i + 2], "little") for i in (26, 28))
        named = self._window.read(name_bytes)
        offset = info.header_offset + _LOCAL_HEADER + name_bytes + extra_bytes
        if local[:4] != b"PK\3\4" or local[8:10] != b"\0\0" or named != info.orig_filename.encode():
            raise self._foreign(f"the entry '{name:.80}' has a header that differs from the archive's directory")
        if info.compress_size != info.file_size or offset + info.file_size > self._end_of[info.header_offset]:
            raise self._foreign(f"the entry '{name:.80}' extends past its end")
        return Extent(self._window.start + offset, info.file_size)

    def read(self, name: str) -> bytes:
        """Return the content of a small entry, after checking its CRC."""
        if self.extent(name).nbytes > _MAX_READ:
            raise self._foreign(f"its entry '{name:.80}' is larger than {_MAX_READ >> 20} MiB")
        return self._zip.read(self._entries[name])

    def _check_directory(self, infos: list[zipfile.ZipInfo]) -> None:
        """Check what zipfile tolerates, and torch.load does not."""
        end = zipfile._EndRecData(self._window)  # type: ignore[attr-defined]
        _, disk, first_disk, entries_here, entries, size, start, *_ = end
        if (disk, first_disk) not in ((0, 0), (1, 1)) or any(info.volume not in (disk, 1) for info in infos):
            raise self._foreign("it has several disks")
        if start != self._zip.start_dir or not entries_here == entries == len(infos):
            raise self._foreign("its directory is not where, or not as long as, its end record says")
        lengths = [len(part) for part in (infos[-1].orig_filename.encode(), infos[-1].extra, infos[-1].comment)]
        self._window.seek(start + size - sum(lengths) - _DIRECTORY_HEADER)
        if self._window.read(_DIRECTORY_HEADER)[28:34] != struct.pack("<3H", *lengths):
            raise self._foreign("its directory is too short for its last entry")
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & ~_FLAGS:
                raise self._foreign(f"its entry '{info.filename:.80}' is compressed or encrypted")

    def _foreign(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} was not written by torch.save: {problem}. Copy it again, or save it again."
        )


class _Window(io.RawIOBase):
    """A byte range of an open file, presented as a file; one read returns at most 32 MiB."""

    def __init__(self, file: IO[bytes], path: Path, start: int, length: int) -> None:
        self.file, self.path, self.start, self.length, self.position = file, path, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = 0, /) -> int:
        position = offset + (0, self.position, self.length)[whence]
        if position < 0:
            raise OSError(f"byte {position} is before the archive")
        self.position = position
        return position

    def read(self, size: int = -1, /) -> bytes:
        remaining = max(0, self.length - self.position)
        size = remaining if size < 0 else min(size, remaining)
        if size > _MAX_READ:
            raise CheckpointError(f"{self.path} lists more than {_MAX_READ >> 20} MiB of entries. Copy it again.")
        self.file.seek(self.start + self.position)
        content = self.file.read(size)
        self.position += len(content)
        return content
