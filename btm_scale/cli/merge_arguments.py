"""The arguments of `btm-scale merge` as values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from btm_scale.errors import UserError

if TYPE_CHECKING:  # `merge --help` answers without it
    from btm_scale.checkpoint.merge.moe import Ingredients


def ingredients(router: str, models: list[Path]) -> Ingredients:
    """Return what `--method moe` needs besides the models."""
    from btm_scale.checkpoint.merge.moe import Ingredients, names_of

    return Ingredients(names_of(models), None if router == "random" else Path(router))


def weighted_path(text: str) -> tuple[Path, float]:
    """Return a model and its weight from DIR or DIR=WEIGHT. Raises UserError."""
    path, sign, weight = text.rpartition("=")
    # A folder may have `=` in its name.
    if not sign or (Path(text).exists() and not Path(path).exists()):
        return Path(text), 1.0
    try:
        return Path(path), float(weight)
    except ValueError:
        raise UserError(f"'{text}': the weight after '=' must be a number, such as DIR=0.5") from None


def setting(text: str) -> tuple[str, float]:
    """Return a parameter of a method from NAME=NUMBER. Raises UserError."""
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise UserError(f"--parameter {text}: expected NAME=NUMBER, such as density=0.5") from None
