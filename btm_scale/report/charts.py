"""SVG and HTML as strings: escaped elements, scales, ticks, and labels that fit."""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Callable, Sequence

_NARROWEST = 0.57  # mean width of a sans-serif's letters, as a share of its size
Scale = Callable[[float], float]


def escape(text: object) -> str:
    """Text made safe for element content and attribute values; control characters become spaces."""
    clean = "".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in str(text))
    return html.escape(clean, quote=True)


def element(tag: str, *children: str, **attributes: object) -> str:
    """One element. Children are markup already; attribute values are escaped here, and None leaves one out.

    `class_` stands for `class`, and an underscore for a hyphen. Floats are cut to a tenth of a pixel.
    """
    written = []
    for name, setting in attributes.items():
        if setting is None:
            continue
        shown = f"{setting:.1f}".removesuffix(".0") if isinstance(setting, float) else setting
        written.append(f' {name.rstrip("_").replace("_", "-")}="{escape(shown)}"')
    return f"<{tag}{''.join(written)}>{''.join(children)}</{tag}>"


def text(x: float, y: float, words: object, **attributes: object) -> str:
    """Words in a drawing, their baseline at y."""
    return element("text", escape(words), x=float(x), y=float(y), **attributes)


def tooltip(words: object) -> str:
    """What a browser shows over a mark, and a screen reader says of it."""
    return element("title", escape(words))


def line(x1: float, y1: float, x2: float, y2: float, **attributes: object) -> str:
    """A straight line."""
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), **attributes)


def rectangle(x: float, y: float, width: float, height: float, *children: str, **attributes: object) -> str:
    """A rectangle by its corner and size."""
    box = {"x": float(x), "y": float(y), "width": float(max(0.0, width)), "height": float(max(0.0, height))}
    return element("rect", *children, **box, **attributes)


def drawing(width: float, height: float, title: str, *parts: str, class_: str = "") -> str:
    """A whole drawing, which scales with its box and which screen readers announce by its title."""
    return element(
        "svg",
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=f"{width:.0f}",
        height=f"{height:.0f}",
        role="img",
        aria_label=title,
        class_=class_ or None,
    )


def linear(low: float, high: float, start: float, end: float) -> Scale:
    """Maps low..high to start..end."""
    span = (high - low) or 1.0
    return lambda number: start + (number - low) / span * (end - start)


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    """Maps low..high, both positive, to start..end in equal steps for equal ratios."""
    inner = linear(math.log(low), math.log(high), start, end)
    return lambda number: inner(math.log(number))


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """At most about `most` round numbers between low and high, evenly spaced."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, most)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * size for size in (1, 2, 5, 10) if power * size >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def text_width(words: str, size: float = 12.0) -> float:
    """About how many pixels wide words are in a sans-serif of a size; East Asian characters count double."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in words)
    return (_NARROWEST * (len(words) - wide) + 1.05 * wide) * size


def fit(words: str, pixels: float, size: float = 12.0) -> str:
    """Words, shortened in the middle if they are too wide: names often differ at their ends."""
    words = " ".join(words.split())
    # No character is narrower than this, so that only few lengths need a try.
    kept = min(len(words), int(pixels / (_NARROWEST * size)) + 1)
    while kept and text_width(shorten(words, kept), size) > pixels:
        kept -= 1
    return shorten(words, kept)


def shorten(words: str, length: int) -> str:
    """Words of at most about `length` characters, with an ellipsis for the middle."""
    if len(words) <= length:
        return words
    head = length // 2
    return f"{words[:head]}…{words[len(words) - (length - 1 - head) :] if length - 1 > head else ''}"


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions moved as little as needed to stand `gap` apart within low..high, in the same order.

    Less i gaps, no position may lie below the one before it: isotonic regression by pooling neighbours.
    """
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    gap = min(gap, (high - low) / max(1, len(order) - 1))
    pools: list[tuple[float, int]] = []
    for rank, i in enumerate(order):
        total, size = positions[i] - rank * gap, 1
        while pools and pools[-1][0] / pools[-1][1] > total / size:
            before = pools.pop()
            total, size = total + before[0], size + before[1]
        pools.append((total, size))
    level = [total / size for total, size in pools for _ in range(size)]
    highest = high - gap * (len(order) - 1)
    placed = [0.0] * len(order)
    for rank, i in enumerate(order):
        placed[i] = min(max(level[rank], low), highest) + rank * gap
    return placed
