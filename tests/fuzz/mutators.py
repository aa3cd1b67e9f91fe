"""Mutations of files by their format. All randomness comes from the `Random` of the input's seed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from random import Random

import zstandard

from fuzz.byte_mutators import mutate_bytes
from fuzz.json_mutators import mutate_json
from fuzz.pickle_mutators import mutate_pickle
from fuzz.zip_mutators import mutate_zip

_YAML = [
    *("&a [*a]", "!!python/object:os.system x", "*nobody", "- - - - -", "{", "[[[[", "? x", "%YAML 1.9", "\\U00FFFFFF"),
    *("1e999", ".nan", "-.inf", "9" * 400, "0x" + "f" * 300, "yes", "~", "''", "../../etc/passwd", "\t", '"\x1b[31m"'),
    "\n".join(
        ["a: &a [x, x]", *(f"{b}: &{b} [*{a}, *{a}, *{a}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True))]
    ),
]
_ARCHIVES = (".bin", ".pt", ".distcp")


def mutate(draw: Random, content: bytes, name: str) -> bytes:
    """Return the content of a file after one to three mutations that suit its name."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        content = _mutate_once(draw, content, name)
    return content


def _mutate_once(draw: Random, content: bytes, name: str) -> bytes:
    suffix = Path(name).suffix
    if draw.random() < 0.25:
        return mutate_bytes(draw, content)
    try:
        if suffix == ".json":
            return mutate_json(draw, content)
        if suffix in (".jsonl", ".ndjson"):
            return _mutate_line(draw, content)
        if suffix in _COMPRESSIONS:
            return _recompressed(draw, content, suffix, name)
        if suffix == ".safetensors":
            return _mutate_header(draw, content)
        if suffix in _ARCHIVES:
            return mutate_zip(draw, content)
        if name == ".metadata":
            return mutate_pickle(draw, content)
        if suffix == ".yaml":
            return _mutate_yaml(draw, content)
    except Exception:
        pass  # an earlier mutation has destroyed the structure
    return mutate_bytes(draw, content)


def _mutate_line(draw: Random, content: bytes) -> bytes:
    lines = content.splitlines(keepends=True)
    i = draw.randrange(len(lines))
    if draw.random() < 0.3:
        lines[i] = mutate_bytes(draw, lines[i])
    else:
        lines[i] = mutate_json(draw, lines[i]) + b"\n"
    return b"".join(lines)


def _mutate_header(draw: Random, content: bytes) -> bytes:
    """Mutate the JSON header of a safetensors file and set its length accordingly, or lie about the length."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    if draw.random() < 0.15:
        claimed = draw.choice((0, 1, length - 1, length + 1, 1 << 31, 1 << 62, (1 << 64) - 1))
        return claimed.to_bytes(8, "little") + header + data
    header = mutate_json(draw, header)
    return len(header).to_bytes(8, "little") + header + data


def _mutate_yaml(draw: Random, content: bytes) -> bytes:
    lines = content.decode().split("\n")
    i = draw.randrange(len(lines))
    kind = draw.randrange(6)
    if kind == 0:
        del lines[i]
    elif kind == 1:
        lines.insert(i, lines[draw.randrange(len(lines))])
    elif kind == 2:
        lines[i] = draw.choice(("  ", "    ", "")) + lines[i].lstrip()
    elif kind == 3:
        lines[i] = draw.choice(_YAML)
    else:
        key, sign, _ = lines[i].partition(":")
        lines[i] = f"{key}{sign or ':'} {draw.choice(_YAML)}"
    return "\n".join(lines).encode()


def _recompressed(draw: Random, content: bytes, suffix: str, name: str) -> bytes:
    """Mutate the uncompressed content, or append one that expands a thousandfold."""
    decompress, compress = _COMPRESSIONS[suffix]
    plain = decompress(content)
    if draw.random() < 0.1:
        plain += draw.choice((b"\n", b'{"text": "', b"[")) * (draw.choice((1, 4)) << 20)
    else:
        plain = _mutate_once(draw, plain, Path(name).stem)
    return compress(plain)


def _decompress_zstd(content: bytes) -> bytes:
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content)) as reader:
        return reader.read()


_COMPRESSIONS: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    ".gz": (gzip.decompress, lambda content: gzip.compress(content, 6, mtime=0)),
    ".zst": (_decompress_zstd, lambda content: zstandard.ZstdCompressor().compress(content)),
    ".xz": (lzma.decompress, lambda content: lzma.compress(content, preset=0)),
    ".bz2": (bz2.decompress, bz2.compress),
}
