"""Runs on a GPU by the command line: their steps, a kill, and the text that they generate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.killed_run import kill_after, steps_taken
from helpers.tiny_forest import Letters, write_experts
from helpers.tiny_run import btm_scale, share_text, tiny_values, write_config
from transformers import AutoModelForCausalLM

from btm_scale.evaluate.results import load_results
from btm_scale.generate.generator import Generator
from btm_scale.generate.sampling import Sampling
from btm_scale.generate.together import Together
from btm_scale.kernels import last_path
from btm_scale.model.decode_graph import DecodeStep
from btm_scale.model.hf_decoder import Decoder
from btm_scale.run_dir import SEED, RunDir

DEVICE, KERNELS = "cuda", "triton"
LAUNCH = {"device": "gpu"}
STEPS, EVERY = 120, 20


def values(text: Path) -> dict[str, Any]:
    """One expert, of as many steps as the seed LM; long enough to be killed in."""
    return tiny_values(
        text,
        domains={"python": {"text": "python.jsonl"}},
        novel_domains={},
        budget={"tokens": 2 * STEPS * 512, "seed_share": 0.5, "sequence_length": 64, "batch_tokens": 512},
        baselines={"dense": False},
        checkpoint={"every": EVERY, "keep": 2},
        evaluate={"tokens_per_domain": 1000, "dev_blocks": 5, "averages": []},
        health={"deterministic": True},
        launch=LAUNCH,
    )


@pytest.fixture(scope="module")
def config(real_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    write_config(path, values(real_text))
    return path


@pytest.fixture(scope="module")
def finished(config: Path) -> RunDir:
    run = RunDir(config.parent / "run")
    btm_scale("run", config, "--out", run.root)
    return run


def metrics_of(run: RunDir, model: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics(model).read_text().splitlines()]


def test_a_run_trains_and_scores_on_the_gpu_with_its_kernels(finished: RunDir) -> None:
    for model in (SEED, "python"):
        rows = metrics_of(finished, model)
        assert {(row["device"].startswith("CPU"), row["kernels"]) for row in rows} == {(DEVICE == "cpu", KERNELS)}
        assert len(rows) == STEPS
        assert np.isfinite([row["loss"] for row in rows]).all()
    results = load_results(finished).document()
    ran = results["devices"]["python"]
    assert (ran["scored"].startswith("CPU"), ran["kernels"]) == (DEVICE == "cpu", KERNELS)
    perplexity = {name: method["perplexity"]["python"] for name, method in results["methods"].items()}
    assert perplexity["expert:python"] < perplexity["seed"]


def test_a_killed_run_resumes_with_the_bits_of_one_that_was_not(finished: RunDir, config: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    share_text(run, finished)
    kill_after(config, run, SEED, EVERY + EVERY // 2)
    assert steps_taken(run, SEED) < STEPS
    assert not run.model(SEED).exists()
    btm_scale("run", config, "--out", run.root)
    for model in (SEED, "python"):
        ours, theirs = (one.model(model) / "model.safetensors" for one in (run, finished))
        assert ours.read_bytes() == theirs.read_bytes()


def test_the_losses_of_a_few_steps_are_those_of_the_cpu(finished: RunDir, config: Path, tmp_path: Path) -> None:
    losses = []
    for device in (LAUNCH["device"], "cpu"):
        run = RunDir(tmp_path / device)
        share_text(run, finished)
        settings = {"launch.device": device, "layout.precision": "fp32", "budget.tokens": 2 * 4 * 512}
        options = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        btm_scale("train", config, "--out", run.root, "--model", SEED, *options)
        losses.append([row["loss"] for row in metrics_of(run, SEED)])
        shutil.rmtree(run.root)
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_products_in_float8_train_as_those_in_bfloat16_or_are_refused(
    finished: RunDir, config: Path, tmp_path: Path
) -> None:
    losses = []
    for is_float8 in (True, False):
        run = RunDir(tmp_path / str(is_float8))
        share_text(run, finished)
        settings = {"layout.precision": "bf16", "layout.float8": str(is_float8).lower(), "budget.tokens": 2 * 20 * 512}
        options = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        done = btm_scale("train", config, "--out", run.root, "--model", SEED, *options, check=False)
        if is_float8 and DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
            assert done.returncode != 0
            assert "This device computes no float8 products" in done.stderr
            return
        assert done.returncode == 0, done.stderr
        losses.append([row["loss"] for row in metrics_of(run, SEED)])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_mixture_writes_the_same_text_on_the_gpu_by_steps_that_are_cuda_graphs(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed = []
    feed = DecodeStep.feed

    def counted(self: DecodeStep, tokens: torch.Tensor) -> torch.Tensor:
        fed.append(self._graph is not None)
        return feed(self, tokens)

    monkeypatch.setattr(DecodeStep, "feed", counted)
    experts = write_experts(tmp_path, 3, family)
    written = []
    for device in ("cpu", DEVICE):
        generator = Generator(
            experts,
            Letters(),
            log_prior=np.log([0.2, 0.5, 0.3]),
            method="mixture",
            sampling=Sampling(temperature=0),
            device=device,
        )
        texts = generator.generate(["abcdabcdaa", "d", "", "bbbb"], max_tokens=12)
        written.append([text.tokens for text in texts])
    assert written[1] == written[0]
    assert len(fed) > 2, "a step that differs from the model's own forward pass is dropped after its first token"
    assert all(fed)


def test_prompts_of_stacked_bfloat16_experts_are_scored_by_the_kernel_as_from_their_logits(tmp_path: Path) -> None:
    experts = write_experts(tmp_path, 3)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(DEVICE) for path in experts.values()]
    together = Together([Decoder(model) for model in models])
    (part,) = together.parts
    assert part.decoder.state_scores is not None
    prompts = [[0, 1, 2, 3, 4, 1, 2, 3, 3, 1, 4, 2], [0, 4], [0], [0, 2, 2, 2, 1]]
    found = together.read(prompts)
    path = last_path("token_logprobs")
    assert path is not None
    assert path.backend == KERNELS
    part.decoder.state_scores = None
    expected = together.read(prompts)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-3)
