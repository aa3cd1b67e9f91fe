"""Options with named numbers, such as `--target law=2,python=1`."""

from __future__ import annotations

from collections.abc import Sequence

from btm_scale.errors import UserError


def named_numbers(option: str, values: Sequence[str]) -> dict[str, float]:
    """Return {name: number} of a repeatable option. Raises UserError for invalid syntax or a repeated name."""
    numbers: dict[str, float] = {}
    for value in values:
        for part in value.split(","):
            name, sign, number = (word.strip() for word in part.rpartition("="))
            try:
                parsed = float(number)
            except ValueError:
                sign = ""
            if not sign or not name:
                raise UserError(f"{option} {value}: expected NAME=NUMBER, or several, such as law=2,python=1")
            if name in numbers:
                raise UserError(f"{option} names '{name}' twice. Give each name one number.")
            numbers[name] = parsed
    return numbers
