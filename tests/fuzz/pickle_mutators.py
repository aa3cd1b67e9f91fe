"""Mutations of pickles, instruction by instruction."""

from __future__ import annotations

import pickletools
import struct
from random import Random

_NUMBERS = (0, 1, 2, 3, 255, 1 << 15, (1 << 31) - 1)
# Hashing a tuple that contains itself 60 levels deep, twice in each level, would never end.
_HASH_BOMB = b"}" + b")" + b"2\x86" * 60 + b"K\x01s0"
_INSERTED = [
    _HASH_BOMB,
    b"}]" + b"\x85" * 20_000 + b"K\x01s0",  # recursion in hashing
    b"]" * 5_000 + b"a" * 4_999 + b"0",
    b"\x96" + struct.pack("<Q", 1 << 33) + b"0",  # BYTEARRAY8 of 8 GB
    b"\x8e" + struct.pack("<Q", 1 << 40),
    b"\x8b" + struct.pack("<I", (1 << 31) - 1),
    b"r\xff\xff\xff\xff",  # a memo of 4 billion entries
    b"cos\nsystem\n(S'true'\ntR",
    b"cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x02\x85R0",
    b"ctorch._utils\n_rebuild_tensor_v2\n}X\x0c\x00\x00\x00__defaults__N0sb0",
    b"ctorch\nQUInt8Storage\n0",
    b"ccollections\nOrderedDict\n)R",
    *(b"0", b"1", b"2", b"(", b"t", b"R", b"b", b"s", b"u", b"a", b"e", b"N", b")", b"]", b"}", b"\x81", b"\x90", b"."),
    *(b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"G\x7f\xf8\x00\x00\x00\x00\x00\x00"),
]


def mutate_pickle(draw: Random, content: bytes) -> bytes:
    """Delete, repeat, swap or insert an instruction, or change a number, a name or a dtype."""
    spots = [position or 0 for _, _, position in pickletools.genops(content)]
    spans = list(zip(spots, [*spots[1:], len(content)], strict=True))
    start, end = draw.choice(spans)
    instruction = content[start:end]
    kind = draw.randrange(8)
    if kind == 0:
        instruction = b""
    elif kind == 1:
        instruction *= draw.choice((2, 3))
    elif kind == 2:
        other_start, other_end = draw.choice(spans)
        instruction = content[other_start:other_end]
    elif kind == 3:
        instruction = draw.choice(_INSERTED) + instruction
    else:
        numbers = [span for span in spans if content[span[0] : span[0] + 1] in (b"K", b"M", b"J", b"\x8a")]
        names = [span for span in spans if content[span[0] : span[0] + 1] in (b"X", b"\x8c", b"c")]
        start, end = draw.choice((numbers if kind < 7 else names) or spans)
        instruction = _changed(draw, content[start:end])
    return content[:start] + instruction + content[end:]


def _changed(draw: Random, instruction: bytes) -> bytes:
    code, rest = instruction[:1], instruction[1:]
    if code in (b"K", b"M", b"J", b"\x8a"):
        if draw.random() < 0.2:
            return b"\x8a\x08" + struct.pack("<q", draw.choice((-1, 1 << 40, 1 << 62, -(1 << 62))))
        number = int.from_bytes(rest[:4] if code != b"\x8a" else rest[1:], "little", signed=True)
        near = (number + draw.choice((-2, -1, 1, 2))) & 0x7FFFFFFF
        return b"J" + struct.pack("<i", draw.choice((*_NUMBERS, near, near, near, -1)))
    if code == b"c":
        names = (b"torch\nFloatStorage\n", b"torch\nHalfStorage\n", b"torch\nLongStorage\n", b"torch\nQInt8Storage\n")
        return b"c" + draw.choice((*names, b"torch\nfloat64\n", b"x\ny\n", b"subprocess\nPopen\n", b"torch\nSize\n"))
    text = draw.choice((b"0", b"1", b"2", b"", b"../x", b"\x1b[2J", b"\xed\xa0\x80", b"cuda:0", b"storage"))
    return b"X" + struct.pack("<I", len(text)) + text
