"""A complete run, from text to report, through the command line and the real `deepspeed` launcher."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from helpers.cuts import full
from helpers.in_process import answer, refusal
from helpers.processes import wait_for
from helpers.tiny_run import btm_scale, start_btm_scale, tiny_values, write_config
from helpers.warm import Warm

from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.hashing import combined_hash, content_hash
from btm_scale.config.run import RunConfig
from btm_scale.evaluate.results import Results
from btm_scale.forest.expert import read_expert
from btm_scale.forest.scores import Scores, evaluation_text
from btm_scale.launch.shutdown import REQUEUE
from btm_scale.run_dir import RunDir

pytestmark = pytest.mark.slow

Run = tuple[RunConfig, RunDir]


def test_the_device_and_its_kernels_are_reported_everywhere(finished_run: Run, warm: Warm) -> None:
    _, run = finished_run
    cpu = f"CPU ({platform.machine()})"
    [first, *_] = (line for line in run.log("seed").read_text().splitlines() if "[seed rank 0]" in line)
    assert f"device: {cpu}; kernels: reference; ranks: 1" in first
    rows = [json.loads(line) for line in run.metrics("seed").read_text().splitlines()]
    assert {(row["device"], row["kernels"]) for row in rows} == {(cpu, "reference")}
    assert read_expert(run.model("python")).device == cpu
    devices = json.loads(run.results.read_text())["devices"]
    assert devices.keys() >= {"seed", "dense", "python", "licences", "random/0"}
    assert all(ran == {"trained": cpu, "scored": cpu, "kernels": "reference"} for ran in devices.values())
    assert f"Trained on {cpu}; scored on {cpu} with reference kernels." in run.report.read_text()
    assert f"trained on {cpu} (reference kernels)" in warm.check("status", run.root).stdout
    assert answer("status", run.root)["models"]["seed"]["device"] == cpu


def test_results_hold_every_method_on_every_domain(finished_run: Run) -> None:
    config, run = finished_run
    results = json.loads(run.results.read_text())
    assert results["schema"] == 1
    assert {name: domain["novel"] for name, domain in results["domains"].items()} == {
        "python": False,
        "licences": False,
        "docs": True,
    }
    expected = {
        "seed",
        "dense",
        "expert:python",
        "expert:licences",
        "ensemble",
        "ensemble:uniform-prior",
        "ensemble:token",
        "ensemble:tempered",
        "ensemble:static",
        "ensemble:gated",
        "ensemble:equal",
        "ensemble:top1",
        "ensemble:top2",
        "average:uniform",
        "average:argmax",
        "average:posterior",
        "average:tempered",
        "average:greedy",
        "random-split",
    }
    assert set(results["methods"]) == expected
    for method in results["methods"].values():
        assert set(method["perplexity"]) == set(config.all_domains)
    assert set(Results.load(run.results).gates) == set(config.all_domains)
    assert results["compute"]["ensemble"]["tokens"] == results["compute"]["dense"]["tokens"] == config.budget.tokens


def test_the_argmax_average_is_the_most_likely_expert_itself(finished_run: Run) -> None:
    config, run = finished_run
    results = json.loads(run.results.read_text())
    for domain in config.all_domains:
        prior = results["priors"][domain]
        perplexity_of_most_likely = results["methods"][f"expert:{max(prior, key=prior.__getitem__)}"]["perplexity"][
            domain
        ]
        assert results["methods"]["average:argmax"]["perplexity"][domain] == perplexity_of_most_likely
    assert not run.model("average/argmax").exists(), "an expert is not copied"


def test_every_file_of_a_run_is_readable_as_the_umask_allows(finished_run: Run) -> None:
    _, run = finished_run
    mask = os.umask(0o077)
    os.umask(mask)
    # Each user's note of a tried tokenizer is trusted because only that user can write, and needs to read, it.
    files = [path for path in run.root.rglob("*") if not path.name.startswith(".tokenizer-passed-")]
    closed = [path for path in files if ~path.stat().st_mode & 0o444 & ~mask]
    assert not closed, "several users may work on one run"


def test_every_trained_model_keeps_the_hashes_of_its_blocks(finished_run: Run) -> None:
    _, run = finished_run
    for name in ("seed", "dense", "python", "licences"):
        with SafetensorsModel(run.model(name)) as model:
            hashes = {tensor: model.kept_hashes(tensor) or [] for tensor in model.names}
            assert combined_hash(model.specs(), hashes) == read_expert(run.model(name)).content_hash


def test_training_lowers_every_models_loss(finished_run: Run) -> None:
    """The seed's loss falls from batch to batch; later gains are within batch noise, but show on held-out text."""
    _, run = finished_run
    for model in ("seed", "dense", "python", "licences"):
        steps = [json.loads(line) for line in run.metrics(model).read_text().splitlines()]
        assert [step["step"] for step in steps] == list(range(1, 13))
        assert set(steps[0]) == {
            "step",
            "loss",
            "learning_rate",
            "gradient_norm",
            "tokens_per_second",
            "seconds",
            "flops_per_second",
            "device",
            "kernels",
        }
        assert model != "seed" or steps[-1]["loss"] < steps[0]["loss"] - 0.5
    methods = json.loads(run.results.read_text())["methods"]
    domains = ("python", "licences")
    for domain, other in (domains, domains[::-1]):
        assert methods["dense"]["perplexity"][domain] < methods["seed"]["perplexity"][domain]
        assert methods[f"expert:{domain}"]["perplexity"][domain] < methods[f"expert:{other}"]["perplexity"][domain]
    before = math.prod(methods["seed"]["perplexity"][domain] for domain in domains)
    # Twelve steps on one domain may gain less than the noise of its held-out text; on two domains they do not.
    assert math.prod(methods[f"expert:{domain}"]["perplexity"][domain] for domain in domains) < before


def test_the_ensembles_perplexity_follows_from_the_scores_in_plain_numpy(finished_run: Run) -> None:
    config, run = finished_run
    results = json.loads(run.results.read_text())
    names = sorted(config.domains)

    def posterior_walk(log_probs: np.ndarray, starts: np.ndarray, prior: np.ndarray) -> tuple[float, np.ndarray]:
        """Token by token in float64: total nats of the mixture, and the last posterior of each block."""
        total, last = 0.0, []
        for begin, end in zip(starts, [*starts[1:], log_probs.shape[1]], strict=True):
            weights = prior.copy()
            for t in range(begin, end):
                probabilities = np.exp(log_probs[:, t].astype(np.float64))
                total += math.log(weights @ probabilities)
                weights = weights * probabilities / (weights @ probabilities)
            last.append(weights)
        return total, np.array(last)

    for domain in config.all_domains:
        dev = [Scores.load(run.scores(name, domain, "dev")) for name in names]
        prior = np.full(len(names), 1.0 / len(names))
        bounds = [*dev[0].block_starts, len(dev[0].log_probs)]
        for begin, end in itertools.pairwise(bounds):
            block = np.stack([scores.log_probs[begin:end] for scores in dev])
            prior = 0.7 * prior + 0.3 * posterior_walk(block, np.array([0]), prior)[1][-1]
        test = [Scores.load(run.scores(name, domain, "test")) for name in names]
        log_probs = np.stack([scores.log_probs for scores in test])
        nats, _ = posterior_walk(log_probs, test[0].block_starts, prior)
        perplexity = results["methods"]["ensemble"]["perplexity"][domain]
        assert perplexity == pytest.approx(math.exp(-nats / log_probs.shape[1]), rel=1e-6)


def test_exported_models_load_in_transformers_with_the_same_ids_and_probabilities(finished_run: Run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from btm_scale.data.tokenizer import Tokenizer

    config, run = finished_run
    text = "def f(x):\n\treturn x ** 2  # naïve λ 🙂"
    for name in ("seed", "python", "average/uniform"):
        tokenizer = AutoTokenizer.from_pretrained(run.model(name))
        assert tokenizer.encode(text) == list(Tokenizer.load(run.tokenizer).encode(text))
        model = AutoModelForCausalLM.from_pretrained(run.model(name), dtype=torch.float32)
        scores = Scores.load(run.scores(name, "docs", "test"))
        tokens = torch.as_tensor(evaluation_text(config, run, "docs", "test").tokens[:65])[None]
        with torch.no_grad():
            log_probs = model(tokens[:, :-1]).logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])
        # The scores are from bf16, the precision of training.
        np.testing.assert_allclose(log_probs.flatten().numpy(), scores.log_probs[:64], atol=0.08)


def test_the_card_of_an_expert_records_its_origin(finished_run: Run) -> None:
    _, run = finished_run
    card = read_expert(run.model("python"))
    assert [(parent.name, parent.weight) for parent in card.parents] == [("seed", 1.0)]
    assert card.domains == {"python": 1.0}
    assert (card.tokens, card.steps) == (12 * 512, 12)
    assert card.content_hash == content_hash(run.model("python"))


def test_a_second_run_repeats_no_work(finished_run: Run, warm: Warm, tmp_path: Path) -> None:
    config, run = finished_run
    watched = [
        run.model("python") / "model.safetensors",
        run.scores("seed", "docs", "test"),
        run.metrics("dense"),
        run.tokens("docs", "test").with_suffix(".bin"),
    ]
    before = [path.stat().st_mtime_ns for path in watched]
    config.save(tmp_path / "again.yaml")
    warm.check("run", tmp_path / "again.yaml", "--out", run.root)
    assert [path.stat().st_mtime_ns for path in watched] == before


def test_another_config_on_the_same_folder_is_rejected(finished_run: Run, tmp_path: Path) -> None:
    config, run = finished_run
    config.save(tmp_path / "other.yaml")
    message = refusal("run", tmp_path / "other.yaml", "--out", run.root, "--set", "optimizer.lr=0.5")
    assert "optimizer.lr: 0.01 there, 0.5 here" in message


def test_the_report_shows_the_results(finished_run: Run) -> None:
    _, run = finished_run
    page = run.report.read_text()
    results = json.loads(run.results.read_text())
    assert f"{results['methods']['ensemble']['perplexity']['python']:.1f}" in page
    assert not re.search(
        r"""(src|href)\s*=\s*["']?(https?:)?//|url\(\s*["']?(https?:)?//""", page.partition("<script>")[0]
    )


@pytest.mark.parametrize("stages", [("branch",), full(("seed", "branch", "averages"))], ids=" and ".join)
def test_a_run_killed_in_any_stage_ends_in_the_same_results(
    stages: tuple[str, ...], finished_run: Run, real_text: Path, warm: Warm, tmp_path: Path
) -> None:
    _, finished = finished_run
    write_config(tmp_path / "tiny.yaml", tiny_values(real_text))
    run = RunDir(tmp_path / "run")
    if "seed" not in stages:
        _copy_all_but_experts(finished, run)
    conditions = {
        "seed": lambda: any(run.checkpoints("seed").glob("step-*")),
        "branch": lambda: any(any(run.checkpoints(name).glob("step-*")) for name in ("python", "licences")),
        "averages": lambda: run.model("average/uniform").is_dir(),
    }
    for stage in stages:
        _kill_when(conditions[stage], tmp_path, run)
    warm.check("run", tmp_path / "tiny.yaml", "--out", run.root)
    assert json.loads(run.results.read_text()) == json.loads(finished.results.read_text())
    for name in ("seed", "dense", "python", "licences"):
        assert read_expert(run.model(name)).content_hash == read_expert(finished.model(name)).content_hash


def test_a_run_that_is_asked_to_stop_saves_a_checkpoint(real_text: Path, tmp_path: Path) -> None:
    values = tiny_values(real_text, checkpoint={"every": 100_000})
    values["budget"] |= {"tokens": 4_000_000}
    write_config(tmp_path / "tiny.yaml", values)
    run = RunDir(tmp_path / "run")
    process = _started_until(lambda: run.metrics("seed").is_file(), tmp_path, run)
    process.terminate()
    _, output = process.communicate(timeout=120)
    assert process.returncode == REQUEUE
    assert "asked to stop: running groups save their states" in output
    step = int((run.train("seed") / "stopped").read_text())
    assert [path.name for path in run.checkpoints("seed").glob("step-*")] == [f"step-{step:08d}"]
    assert not _has_ranks(run)


def _copy_all_but_experts(finished: RunDir, run: RunDir) -> None:
    """Copy a run's text, seed LM and baselines, as if it had not trained its experts yet."""
    run.root.mkdir()
    folders = [finished.tokenizer, finished.data]
    for model in ("seed", "dense", "random/0", "random/1"):
        folders += [finished.train(model), finished.model(model), finished.model_scores(model)]
    for folder in folders:
        shutil.copytree(folder, run.root / folder.relative_to(finished.root))


def _kill_when(condition: Callable[[], bool], folder: Path, run: RunDir) -> None:
    """Start the run, SIGKILL it once `condition` holds, and wait for its groups to end by themselves."""
    process = _started_until(condition, folder, run)
    process.kill()
    process.communicate()
    wait_for(lambda: not _has_ranks(run), 300, poll=0.1)


def _started_until(condition: Callable[[], bool], folder: Path, run: RunDir) -> subprocess.Popen[str]:
    process = start_btm_scale("run", folder / "tiny.yaml", "--out", run.root)
    wait_for(condition, 300, process)
    return process


def _has_ranks(run: RunDir) -> bool:
    commands = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
    return any(str(run.root) in " ".join(command) for command in commands)


def test_a_failing_group_is_reported_and_does_not_stop_the_others(real_text: Path, warm: Warm, tmp_path: Path) -> None:
    values = tiny_values(real_text, experts={"python": {"layout": {"micro_batch": 1}}}, baselines={"dense": False})
    write_config(tmp_path / "tiny.yaml", values)
    run = RunDir(tmp_path / "run")
    refusal("train", tmp_path / "tiny.yaml", "--model", "seed", "--out", run.root)
    assert not run.model("seed").exists()  # there are no token files yet: an error
    answer("prepare", tmp_path / "tiny.yaml", "--out", run.root)
    warm.check("train", tmp_path / "tiny.yaml", "--model", "seed", "--out", run.root)
    run.train("python").mkdir(parents=True)
    (run.train("python") / "checkpoints").write_text("in the way of python's states")
    done = btm_scale("run", tmp_path / "tiny.yaml", "--out", run.root, check=False)
    assert done.returncode == 1
    assert "group 'python' failed" in done.stderr
    assert read_expert(run.model("licences")).steps == 12
