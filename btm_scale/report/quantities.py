"""Format estimates: a sensible unit and at most three significant digits."""

from __future__ import annotations

from math import floor, isfinite, log10

_SIZES = ("B", "kB", "MB", "GB", "TB", "PB")
_LARGE = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"))


def rounded(number: float, digits: int = 3) -> str:
    """Return a number with at most this many significant digits: 1,060 for 1059, 0.0123 for 0.01234."""
    if number == 0 or not isfinite(number):
        return f"{number:g}"
    places = digits - 1 - floor(log10(abs(number)))
    number = round(number, places)
    text = f"{number:,.{max(0, places)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def amount(number: float, digits: int = 3) -> str:
    """Return a count: 950, 12,300, 148,000, 1.06 billion."""
    for size, name in _LARGE:
        if abs(number) >= 0.9995 * size:
            return f"{rounded(number / size, digits)} {name}"
    return rounded(number, digits)


def size(number: float, digits: int = 3) -> str:
    """Return bytes with their unit: 297 kB, 35.5 MB."""
    for unit in _SIZES:
        if abs(number) < 999.5 or unit == _SIZES[-1]:
            break
        number /= 1000
    return f"{rounded(number, digits)} {unit}"


def time(seconds: float, digits: int = 2) -> str:
    """Return an estimated time with its unit: 38 ms, 12 s, 3.4 minutes, 2.1 hours, 12.3 days."""
    if seconds < 1e-3:
        return "less than 1 ms"
    if seconds < 1:
        return f"{rounded(1000 * seconds, digits)} ms"
    if seconds < 100:
        return f"{rounded(seconds, digits)} s"
    for unit, length, most in (("minutes", 60, 100), ("hours", 3600, 48)):
        if seconds < most * length:
            return f"{rounded(seconds / length, digits)} {unit}"
    return f"{rounded(seconds / 86_400, max(digits, 2))} days"
