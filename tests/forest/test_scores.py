"""Scores on disk: what is whole is read, what is torn counts as missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from btm_scale.errors import ForestError
from btm_scale.forest.scores import Scores, scored_model


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_scores_that_were_cut_short_count_as_missing_so_that_they_are_made_again(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "math.test.safetensors"
    Scores(np.zeros(100, np.float32), np.zeros(1, np.int64), "model", "text").save(path)
    assert scored_model(path) == "model"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    assert scored_model(path) is None
    with pytest.raises(ForestError, match=r"are damaged .* btm-scale score RUN"):
        Scores.load(path)
