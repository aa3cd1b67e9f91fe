"""Scores on disk: the same bytes each time, and truncated files count as missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_run import save_card, share_text

from btm_scale.config.run import RunConfig
from btm_scale.errors import ForestError
from btm_scale.forest.scores import Scores, Stack, evaluation_text, missing_scores, scored_model, scored_tokens
from btm_scale.run_dir import RunDir


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


def test_scores_of_a_shorter_or_longer_text_count_as_missing(
    prepared: tuple[RunConfig, RunDir], tmp_path: Path
) -> None:
    config, run = prepared[0], RunDir(tmp_path)
    share_text(run, prepared[1])
    save_card(run.model("seed"), "seed", content_hash="model")
    texts = [("code", "dev"), ("code", "test")]
    for domain, split in texts:
        tokens = scored_tokens(config, run, domain, split)
        assert tokens == len(evaluation_text(config, run, domain, split).targets)
        scores = Scores(np.zeros(tokens, np.float32), np.zeros(1, np.int64), "model", "text")
        scores.save(run.scores("seed", domain, split))
    assert missing_scores(config, run, "seed", texts) == []
    for change, missing in (({"dev_blocks": 3}, texts[:1]), ({"tokens_per_domain": 100}, texts)):
        changed = config.model_copy(update={"evaluate": config.evaluate.model_copy(update=change)})
        assert missing_scores(changed, run, "seed", texts) == missing


def test_scores_keep_which_tokens_count_and_stacks_join_them(tmp_path: Path) -> None:
    run, log_probs = RunDir(tmp_path), np.full(6, -1.0, np.float32)
    counted = np.array([False, True, True, False, False, True])
    for domain, which in (("chats", counted), ("prose", None)):
        scores = Scores(log_probs, np.array([0, 3]), "model", domain, counted=which)
        scores.save(run.scores("seed", domain, "dev"))
    chats, prose = (Stack.load(run, ["seed"], domain, "dev") for domain in ("chats", "prose"))
    assert chats.counted is not None
    assert chats.counted.tolist() == counted.tolist()
    assert prose.counted is Stack.joined([prose, prose]).counted is None
    joined = Stack.joined([chats, prose]).counted
    assert joined is not None
    assert joined.tolist() == [*counted.tolist(), *[True] * 6]
    Scores(log_probs, np.array([0, 3]), "model", "chats", counted=counted[:5]).save(run.scores("seed", "chats", "dev"))
    with pytest.raises(ForestError, match=r"counted is bool \[5\], and must be bool \[6\]"):
        Stack.load(run, ["seed"], "chats", "dev")


def test_the_same_scores_always_have_the_same_bytes(tmp_path: Path) -> None:
    scores = Scores(np.linspace(-9, 0, 50, dtype=np.float32), np.array([0, 25]), "model", "text")
    written = set()
    for number in range(20):
        scores.save(tmp_path / f"{number}.safetensors")
        written.add((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(written) == 1
    loaded = Scores.load(tmp_path / "0.safetensors")
    assert (loaded.model, loaded.fingerprint) == ("model", "text")
    np.testing.assert_array_equal(loaded.log_probs, scores.log_probs)
    np.testing.assert_array_equal(loaded.block_starts, scores.block_starts)
