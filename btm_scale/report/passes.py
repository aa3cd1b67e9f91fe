"""How often training passes over each domain's text, as words."""

from __future__ import annotations

from collections.abc import Mapping

from btm_scale.report.quantities import rounded
from btm_scale.report.summary import shorten
from btm_scale.util.terminal import printable

_LISTED = 8  # domains; of more, only the least and the most
_LONGEST_NAME = 28


def passes_line(passes: Mapping[str, float]) -> str:
    """Return a line for the terminal."""
    return f"passes over the train split: {passes_text(passes)}"


def passes_text(passes: Mapping[str, float]) -> str:
    """Return the passes of each domain; of many domains, of those with the fewest and the most."""
    names = sorted(passes, key=lambda name: passes[name])
    if len(names) <= _LISTED:
        return ", ".join(_one(name, passes) for name in passes)
    return f"from {_one(names[0], passes)} to {_one(names[-1], passes)}"


def _one(name: str, passes: Mapping[str, float]) -> str:
    return f"{shorten(printable(name), _LONGEST_NAME)} {rounded(passes[name], 2)}"
