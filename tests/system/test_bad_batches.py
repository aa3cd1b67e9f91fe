"""A batch that corrupts the weights is undone and skipped, and the run ends as if it had never existed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.in_process import answer
from helpers.launcher import TESTS
from helpers.tiny_run import tiny_values, write_config
from helpers.worlds import run_script

from btm_scale.checkpoint.hashing import content_hash
from btm_scale.run_dir import RunDir
from btm_scale.train.bad_batches import SkippedBatches

pytestmark = pytest.mark.slow

BAD = {"before the first state": 3, "after a state": 7}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_bad_batch_is_undone_and_skipped(bad: int, real_text: Path, tmp_path: Path) -> None:
    write_config(tmp_path / "tiny.yaml", tiny_values(real_text, novel_domains={}))
    hashes = []
    prepared = tmp_path / "prepared"
    answer("prepare", tmp_path / "tiny.yaml", "--out", prepared)
    for name in ("spoiled", "without"):
        run = RunDir(tmp_path / name)
        run.root.mkdir()
        for part in ("data", "tokenizer", "run.yaml"):
            (run.root / part).symlink_to(prepared / part)
        skipped = run.train("seed") / "skipped.json"
        if name == "without":
            skipped.parent.mkdir(parents=True)
            skipped.write_text(json.dumps({bad: "known to be bad"}))
        spec = {"run": str(run.root), "step": bad if name == "spoiled" else 0}
        run_script(TESTS / "train" / "train_with_a_bad_batch.py", spec, tmp_path)
        assert list(SkippedBatches.load(skipped).batches) == [bad]
        steps = [json.loads(line)["step"] for line in run.metrics("seed").read_text().splitlines()]
        assert steps == [step for step in range(1, 13) if step != bad]
        hashes.append(content_hash(run.model("seed")))
    assert hashes[0] == hashes[1]
