"""Mutations of any bytes."""

from __future__ import annotations

from random import Random

_NASTY_BYTES = [
    b"\0",
    b"\xff" * 8,
    b"\xed\xa0\x80",
    b"\x1b]0;owned\x07",
    b"[" * 5000,
    b"9" * 5000,
    b"\n",
    b'"',
    b"\xf0\x9f",
]


def mutate_bytes(draw: Random, content: bytes) -> bytes:
    """Flip, remove, insert, repeat or truncate bytes."""
    where = draw.randrange(len(content) + 1)
    length = min(draw.choice((1, 1, 2, 4, 8, 64, 1000)), len(content) - where)
    kind = draw.randrange(7)
    if kind == 0:
        return content[:where]
    if kind == 1:
        return content[:where] + content[where + length :]
    if kind == 2:
        return content[:where] + draw.choice(_NASTY_BYTES) + content[where:]
    if kind == 3:
        return content[:where] + content[where : where + length] * draw.choice((2, 3, 50)) + content[where + length :]
    if kind == 4:
        return content[:where] + draw.randbytes(length) + content[where + length :]
    mutated = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 10))):
        if mutated:
            mutated[draw.randrange(len(mutated))] ^= 1 << draw.randrange(8)
    return bytes(mutated)
