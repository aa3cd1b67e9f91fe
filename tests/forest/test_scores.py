"""Scores on disk: truncated files count as missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from btm_scale.errors import ForestError
from btm_scale.forest.scores import Scores, scored_model


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_truncated_scores_count_as_missing(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "math.test.safetensors"
    Scores(np.zeros(100, np.float32), np.zeros(1, np.int64), "model", "text").save(path)
    assert scored_model(path) == "model"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert scored_model(path) is None
    with pytest.raises(ForestError, match=r"are damaged .* btm-scale score RUN"):
        Scores.load(path)
