"""Loading results.json."""

from __future__ import annotations

from pathlib import Path

import pytest

from btm_scale.errors import ForestError
from btm_scale.evaluate.results import load_results
from btm_scale.run_dir import RunDir


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is a JSON list, and must be an object"),
        ('{"schema": 1, "domains": {', "is not valid JSON"),
        ('{"schema": 1, "name": "", "random_seed": 0, "domains": {}}', "field 'methods' is missing"),
    ],
)
def test_damaged_results_are_an_error_with_the_remedy(tmp_path: Path, text: str, message: str) -> None:
    run = RunDir(tmp_path)
    run.results.parent.mkdir()
    run.results.write_text(text)
    with pytest.raises(ForestError, match=rf"{message}.*\. Run btm-scale evaluate again\."):
        load_results(run)
