"""Sizes as people write them."""

from __future__ import annotations

import re

from btm_scale.errors import UserError

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def bytes_from_text(text: str) -> float:
    """A number of bytes such as '8GB', '500MiB' or '1e9'. Raises UserError for what is none."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?i?b?)\s*", text, re.IGNORECASE)
    unit = match and match[2].upper()
    if not match or unit not in _UNITS:
        raise UserError(f"'{text}' is no size; write it as 8GB, 500MiB or a number of bytes")
    try:
        return float(match[1]) * _UNITS[unit]
    except ValueError:
        raise UserError(f"'{text}' is no size; write it as 8GB, 500MiB or a number of bytes") from None
