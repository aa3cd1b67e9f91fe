"""A finished forest that grows and shrinks, by the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.in_process import answer, refusal
from helpers.small_families import write_family
from helpers.tiny_run import tiny_values
from helpers.warm import Warm

from btm_scale.config.run import RunConfig
from btm_scale.config.yaml import dump_text
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.evaluate.hf_score import block_log_probs
from btm_scale.forest.branch import Branch
from btm_scale.forest.expert import read_expert
from btm_scale.forest.scores import Scores, evaluation_text
from btm_scale.model.hf_decoder import Decoder
from btm_scale.model.hf_load import load_causal_lm
from btm_scale.run_dir import RunDir

pytestmark = pytest.mark.slow

Run = tuple[RunConfig, RunDir]


@pytest.fixture(scope="module")
def grown(
    finished_run: Run, real_text: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDir, bytes]:
    """A copy of the finished run with a third expert, which branched from the posterior mean of the two and replays
    their text; and the results before."""
    folder = tmp_path_factory.mktemp("grown")
    run = RunDir(folder / "run")
    shutil.copytree(finished_run[1].root, run.root)
    before = run.results.read_bytes()
    text = real_text / "cpp.jsonl"
    options = ("--from", "posterior", "--replay", "0.25", "--text", text)
    settled = answer("branch", run.root, "--name", "cpp", *options)
    assert answer("branch", run.root, "--name", "cpp", *options) == settled
    assert not (run.root / "branches").exists()
    warm.check("run", run.config, "--out", run.root)
    return run, before


def test_an_added_expert_starts_from_its_recorded_branch(grown: tuple[RunDir, bytes]) -> None:
    run, _ = grown
    card = read_expert(run.model("cpp"))
    assert {parent.name for parent in card.parents} <= {"python", "licences"}
    assert sum(parent.weight for parent in card.parents) == pytest.approx(1.0)
    assert card.domains["cpp"] == pytest.approx(0.75)
    assert sum(card.domains.values()) == pytest.approx(1.0)
    assert Branch.load(run.branch("cpp")) == Branch(
        parents=card.parents, domains=card.domains, parent_hashes=card.parent_hashes
    )
    metrics = [json.loads(line) for line in run.metrics("cpp").read_text().splitlines()]
    # A mean of trained experts starts far below a fresh model's ln(512) = 6.2 nats.
    assert metrics[0]["loss"] < 5.5
    # Its schedule restarts, while the first experts continued the seed's.
    carried = json.loads(run.metrics("python").read_text().splitlines()[0])
    assert metrics[0]["learning_rate"] > 1.5 * carried["learning_rate"]


def test_growing_rescores_nothing_and_adds_the_expert_to_the_results(
    grown: tuple[RunDir, bytes], finished_run: Run
) -> None:
    run, _ = grown
    old = finished_run[1]
    for path in (old.root / "scores").rglob("*.safetensors"):
        if "average" not in path.parts:
            twin = run.root / path.relative_to(old.root)
            assert twin.read_bytes() == path.read_bytes()
    results = json.loads(run.results.read_text())
    assert "expert:cpp" in results["methods"]
    assert results["domains"]["cpp"]["novel"] is False
    seed, python, cpp = (read_expert(run.model(name)).tokens for name in ("seed", "python", "cpp"))
    assert results["compute"]["expert:cpp"]["tokens"] in (seed + python + cpp, seed + 2 * python + cpp)
    assert "Who came from whom" in run.report.read_text()
    parents = answer("forest", "lineage", run.root)["parents"]
    assert parents["python"] == {"seed": 1.0}
    assert set(parents["cpp"]) <= {"python", "licences"}


def test_removing_the_expert_restores_the_former_results_exactly(
    grown: tuple[RunDir, bytes], warm: Warm, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(grown[0].root, run.root)
    answer("forest", "remove", run.root, "cpp")
    warm.check("evaluate", run.root)
    assert run.results.read_bytes() == grown[1]


def test_a_model_of_any_family_is_scored_without_rescoring_others_and_used_like_them(
    finished_run: Run, warm: Warm, tmp_path: Path
) -> None:
    config, run = finished_run[0], RunDir(tmp_path / "run")
    shutil.copytree(finished_run[1].root, run.root)
    times = {path: path.stat().st_mtime_ns for path in (run.root / "scores").rglob("*.safetensors")}
    friend = tmp_path / "gemma"
    write_family(friend, "gemma2", vocab_size=Tokenizer.load(run.tokenizer).vocab_size)
    shutil.copytree(run.tokenizer, friend, dirs_exist_ok=True)
    pretrained = tiny_values(config.text_root, model={"pretrained": str(friend)}, tokenizer={"path": str(friend)})
    (tmp_path / "other.yaml").write_text(dump_text(pretrained))
    refused = refusal("run", tmp_path / "other.yaml", "--out", tmp_path / "other", "--dry-run")
    assert "'gemma2' is not supported. Megatron-core trains and shards llama" in refused
    warm.check("forest", "add", run.root, friend, "--name", "friend")
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert list(answer("forest", "list", run.root)["experts"]) == ["friend", "licences", "python"]
    text = evaluation_text(config, run, "docs", "test")
    dtype, rounding = (torch.float32, 1e-4) if config.layout.precision == "fp32" else (torch.bfloat16, 0.1)
    theirs = block_log_probs(Decoder(load_causal_lm(friend, dtype)), text.tokens, text.block_starts)
    scores = Scores.load(run.scores("friend", "docs", "test"))
    np.testing.assert_allclose(scores.log_probs, theirs, atol=rounding, rtol=0)
    results = answer("evaluate", run.root)
    perplexity = np.exp(-scores.log_probs.mean(dtype=np.float64))
    assert results["methods"]["expert:friend"]["perplexity"]["docs"] == pytest.approx(perplexity)
    assert "friend" in results["priors"]["docs"]
    written = answer("generate", run.root, "--prompt", "The", "--max-tokens", "4", "--device", "cpu")
    assert set(written["generations"][0]["posterior"]) == {"friend", "licences", "python"}
    answer("report", run.root)
    assert "friend" in run.report.read_text()


def test_an_invalid_branch_is_an_error_and_changes_nothing(finished_run: Run, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(finished_run[1].root, run.root)
    before = run.config.read_bytes()
    for arguments, message in (
        (("--name", "cpp"), "The run has no domain 'cpp'. Give its text with --text"),
        (("--name", "python"), "'python' is already an expert of"),
        (("--name", "cpp", "--from", "law", "--text", __file__), "'law', which is not a finished model of"),
        (("--name", "cpp", "--from", "python=1,python=2", "--text", __file__), "names 'python' twice"),
        (("--name", "cpp", "--from", "python=x", "--text", __file__), "or weights such as A=0.3,B=0.7"),
    ):
        assert message in refusal("branch", run.root, *arguments)
        assert run.config.read_bytes() == before
