"""Mutations of the archives of `torch.save`: their pickle, and the headers that say where each entry is."""

from __future__ import annotations

import io
import struct
import zipfile
from random import Random

from fuzz.byte_mutators import mutate_bytes
from fuzz.pickle_mutators import mutate_pickle

_LOCAL, _CENTRAL, _END = b"PK\3\4", b"PK\1\2", b"PK\5\6"
# Offset and size of each field after the signature.
_FIELDS = {
    _LOCAL: [(6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)],
    _CENTRAL: [(8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (42, 4)],
    _END: [(8, 2), (10, 2), (12, 4), (16, 4), (20, 2)],
}


def mutate_zip(draw: Random, content: bytes) -> bytes:
    """Mutate an archive; in a checkpoint of several, the last one."""
    start = _start_of_last(content)
    before, archive = content[:start], content[start:]
    kind = draw.randrange(10)
    if kind < 5:
        return before + _rebuilt(draw, archive)
    if kind < 9:
        return before + _with_other_header(draw, archive)
    return before + mutate_bytes(draw, archive)


def _start_of_last(content: bytes) -> int:
    """Return where the last archive starts: each ends with its directory."""
    ends, position = [], content.find(_END)
    while position >= 0:
        ends.append(position)
        position = content.find(_END, position + 4)
    return 0 if len(ends) < 2 else max(0, content.find(_LOCAL, ends[-2]))


def _rebuilt(draw: Random, archive: bytes) -> bytes:
    """Write the archive again with another pickle, or with entries removed, compressed, renamed or repeated."""
    with zipfile.ZipFile(io.BytesIO(archive)) as old:
        entries = [(info.filename, old.read(info)) for info in old.infolist()]
    kind = draw.randrange(10)
    i = draw.randrange(len(entries))
    method = zipfile.ZIP_STORED
    if kind < 6:
        entries = [(name, mutate_pickle(draw, data) if name.endswith("data.pkl") else data) for name, data in entries]
    elif kind == 6:
        del entries[i]
    elif kind == 7:
        method = zipfile.ZIP_DEFLATED
        entries[i] = entries[i][0], entries[i][1] + bytes(draw.choice((0, 1 << 20)))
    elif kind == 8:
        entries[i] = draw.choice(("x", "../x", "archive/data/0", "b/data.pkl")), entries[i][1]
    else:
        entries[i] = entries[i][0], mutate_bytes(draw, entries[i][1])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as new:
        for name, data in entries:
            new.writestr(name, data)
    return out.getvalue()


def _with_other_header(draw: Random, archive: bytes) -> bytes:
    signature = draw.choice((_LOCAL, _CENTRAL, _CENTRAL, _END))
    places, position = [], archive.find(signature)
    while position >= 0:
        places.append(position)
        position = archive.find(signature, position + 4)
    place = draw.choice(places)
    offset, size = draw.choice(_FIELDS[signature])
    here = slice(place + offset, place + offset + size)
    before = int.from_bytes(archive[here], "little")
    others = [struct.unpack_from("<I", archive, at + 42)[0] for at in _all(archive, _CENTRAL)]
    value = draw.choice((0, 1, before + 1, before - 1, before + 64, before * 2, (1 << 8 * size) - 1, *others))
    return archive[: here.start] + (value % (1 << 8 * size)).to_bytes(size, "little") + archive[here.stop :]


def _all(archive: bytes, signature: bytes) -> list[int]:
    places, position = [], archive.find(signature)
    while 0 <= position < len(archive) - 46:
        places.append(position)
        position = archive.find(signature, position + 4)
    return places
