"""Models whose weights have NaN or infinities, by name."""

from __future__ import annotations

from collections.abc import Iterable

from btm_scale.checkpoint.formats.open import open_model
from btm_scale.run_dir import RunDir

_CHUNK_BYTES = 16 << 20


def nonfinite_models(run: RunDir, names: Iterable[str]) -> list[str]:
    """Return the models that have a weight that is not a number, or is infinite. Reads all weights."""
    return [name for name in names if not _is_finite(run, name)]


def _is_finite(run: RunDir, name: str) -> bool:
    with open_model(run.model(name)) as model:
        floating = [tensor for tensor, spec in model.specs().items() if spec.is_floating_point]
        return all(bool(piece.isfinite().all()) for tensor in floating for piece in model.chunks(tensor, _CHUNK_BYTES))
