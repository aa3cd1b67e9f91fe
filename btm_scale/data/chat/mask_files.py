"""The mask files beside the token files of conversations, and the conversations that could not be encoded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np

from btm_scale.data.chat.encode import TRAINED
from btm_scale.data.documents import BadLines
from btm_scale.data.files import SourceFile
from btm_scale.data.formats.read import UNITS
from btm_scale.data.formats.sense import format_of
from btm_scale.data.sources import DomainSource

_COUNTED_BYTES = 1 << 24


class MaskWriter:
    """`SPLIT.mask`, a byte per token, written document by document. The first `kept` bytes of the file stay."""

    def __init__(self, folder: Path, split: str, kept: int = 0) -> None:
        self._path = folder / f"{split}.mask"
        self._file = self._path.open("r+b" if kept else "wb")
        self._file.truncate(kept)
        self._file.seek(kept)
        self._digest = hashlib.sha256()

    def add(self, mask: np.ndarray[Any, Any]) -> None:
        """Append the mask of a document, uint8 [tokens]."""
        content = np.ascontiguousarray(mask, np.uint8).data
        self._file.write(content)
        self._digest.update(content)

    def flush(self) -> tuple[int, str]:
        """Return the size of the file, and the digest of what was added since the last call."""
        self._file.flush()
        digest, self._digest = self._digest.hexdigest(), hashlib.sha256()
        return self._file.tell(), digest

    def close(self) -> int:
        """Complete the file, and return how many tokens are trained on."""
        self._file.close()
        count = 0
        with self._path.open("rb") as file:
            while content := file.read(_COUNTED_BYTES):
                count += int(np.count_nonzero(np.frombuffer(content, np.uint8) & TRAINED))
        return count


class Refusals:
    """Conversations that were read and could not be encoded: an error at the first, or skipped and counted."""

    def __init__(self, source: DomainSource, policy: Literal["error", "skip"]) -> None:
        self.lines = BadLines(policy)
        self._source = source
        self._units: dict[SourceFile, str] = {}

    def add(self, origin: str, problem: str) -> None:
        """Report a conversation by its origin, as a document has it. Raises DataError unless such lines are skipped."""
        name, _, line = origin.rpartition(":")
        file = next(file for file in self._source.files if file.name == name)
        if file not in self._units:
            self._units[file] = UNITS.get(format_of(file, self._source.settings), "line")
        self.lines(file, int(line), problem, unit=self._units[file])
