"""Files of a run as the first version wrote them: some without a schema number, some of another shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from btm_scale.data.fingerprint import Fingerprint
from btm_scale.evaluate.ablate import Ablation
from btm_scale.evaluate.results import Results
from btm_scale.evaluate.soups import Soups
from btm_scale.forest.expert import Expert, Parent
from btm_scale.launch.slurm_queue import Submissions
from btm_scale.train.bad_batches import SkippedBatches
from btm_scale.train.checkpoint import read_position
from btm_scale.train.position import Position
from btm_scale.util.rank_log import read_failure
from btm_scale.util.records import Record

EXPERT = {
    "name": "math",
    "domains": {"math": 1.0},
    "parents": [{"name": "seed", "weight": 1}],
    "tokens": 12,
    "steps": 3,
    "layout": {"tensor": 1, "precision": "bf16"},
    "data_fingerprint": {"math": "ab"},
    "content_hash": "cd",
    "schema": 1,
}
FINGERPRINT = {
    "schema_version": 1,
    "domain": "math",
    "sources": [{"name": "math.jsonl", "bytes": 10, "modified_ns": 10**18}],
    "settings": {"field": "text", "dev": 0.1},
    "tokenizer": "ab",
    "dtype": "uint16",
    "text": "cd",
    "splits": {"train": {"documents": 1, "tokens": 2, "bytes": 3}},
    "skipped_lines": 0,
    "duplicates": 0,
}
SOUPS = {"forest": {"math": "ab"}, "members": {"math": ["math"]}}
ABLATION = {
    "schema": 1,
    "measured": [{"key": "k", "experts": ["math"], "mean": 2.5, "perplexity": {"math": 2.5}}],
}
RESULTS = {
    "schema": 1,
    "name": "a run",
    "random_seed": 0,
    "domains": {"math": {"novel": False, "tokens": 4096, "bytes": 16000}},
    "methods": {"seed": {"perplexity": {"math": 12.345678901234567}, "bits_per_byte": {"math": 1.1}}},
    "compute": {"seed": {"tokens": 100, "flops": 1.2345678901234567e18}},
    "priors": {"math": {"math": 1.0}},
    "tempering": {"math": {"power": 0.5, "forgetting": 0.99, "share": 0.0}},
    "lineage": {"seed": {}, "math": {"seed": 1.0}},
    "notes": [],
}


@pytest.mark.parametrize(
    ("record", "content"),
    [(Expert, EXPERT), (Fingerprint, FINGERPRINT), (Soups, SOUPS), (Ablation, ABLATION), (Results, RESULTS)],
)
def test_a_record_of_the_first_version_is_read_and_written_with_the_same_keys(
    record: type[Record], content: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "old.json").write_text(json.dumps(content))
    record.load(tmp_path / "old.json").save(tmp_path / "new.json")
    written = json.loads((tmp_path / "new.json").read_text())
    assert written.pop("schema") == 1
    assert written == {key: value for key, value in content.items() if not key.startswith("schema")}


def test_the_results_of_the_first_version_are_written_byte_for_byte(tmp_path: Path) -> None:
    text = json.dumps(RESULTS, indent=2) + "\n"
    (tmp_path / "results.json").write_text(text)
    found = Results.load(tmp_path / "results.json")
    found.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == text
    assert json.dumps(found.document(), indent=2) + "\n" == text


def test_a_parent_with_a_field_too_many_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "expert.json").write_text(json.dumps(EXPERT | {"parents": [{"name": "seed", "weight": 1, "x": 1}]}))
    with pytest.raises(Expert.ERROR, match=r"field 'parents\.0\.x' is unknown"):
        Expert.load(tmp_path / "expert.json")
    (tmp_path / "expert.json").write_text(json.dumps(EXPERT))
    assert Expert.load(tmp_path / "expert.json").parents == (Parent("seed", 1.0),)


def test_skipped_batches_were_a_bare_mapping(tmp_path: Path) -> None:
    (tmp_path / "skipped.json").write_text(json.dumps({"7": "the loss is nan"}))
    assert SkippedBatches.load(tmp_path / "skipped.json").batches == {7: "the loss is nan"}
    (tmp_path / "skipped.json").write_text("{}")
    assert SkippedBatches.load(tmp_path / "skipped.json").batches == {}


def test_submissions_were_a_bare_list(tmp_path: Path) -> None:
    jobs = [{"job": "experts", "id": "12", "models": {"0": "math"}, "slurm_name": "run-experts"}]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    (submitted,) = Submissions(tmp_path).read()
    assert (submitted.job, submitted.id, submitted.models) == ("experts", "12", {"0": "math"})


def test_a_checkpoint_and_a_failure_had_no_schema_number(tmp_path: Path) -> None:
    state = {"step": 3, "adam_steps": 3, "random_state": "AA==", "sha256": "ab"}
    scaled = {"loss_scale": {"cur_scale": 65536.0, "cur_iter": 3}}
    (tmp_path / "state.json").write_text(json.dumps(state | scaled))
    position = read_position(tmp_path)
    assert position == Position(3, 3, "AA==", scaled["loss_scale"])
    assert isinstance(position.loss_scale["cur_iter"], int)
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert read_position(tmp_path).loss_scale == {}
    note = {"rank": 0, "ranks": 1, "host": "node7", "time": 1, "error": "RuntimeError: told"}
    (tmp_path / "log.failed-0.json").write_text(json.dumps(note))
    failure = read_failure(tmp_path / "log")
    assert failure is not None
    assert failure.error == "RuntimeError: told"
