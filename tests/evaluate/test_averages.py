from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from helpers.tiny_forest import write_experts
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from btm_scale.config.run import RunConfig
from btm_scale.evaluate.average_weights import DevText, tempered
from btm_scale.evaluate.averages import write_averages
from btm_scale.forest.expert import Expert, Parent
from btm_scale.forest.posterior.mixture import mean_tempered_weights
from btm_scale.forest.posterior.tempering import fitted_tempering
from btm_scale.forest.scores import Stack
from btm_scale.run_dir import RunDir


def test_experts_trained_in_different_precisions_are_averaged_in_the_wider_one(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_experts(run.experts)
    narrow = run.experts / "llama0"
    AutoModelForCausalLM.from_pretrained(narrow).to(torch.bfloat16).save_pretrained(narrow)
    parents = (Parent("llama0", 0.25), Parent("llama1", 0.75))
    card = Expert(
        name="average/uniform",
        domains={},
        parents=parents,
        tokens=0,
        steps=0,
        layout={},
        data_fingerprint={},
        content_hash="",
    )
    [name] = write_averages(run, [card])
    # An average of narrow experts only, and the only one missing, still has the forest's dtype.
    alone = card.model_copy(update={"name": "average/posterior/law", "parents": (Parent("llama0", 1.0),)})
    assert write_averages(run, [card, alone]) == [alone.name]
    assert {tensor.dtype for tensor in load_file(run.model(alone.name) / "model.safetensors").values()} == {
        torch.float32
    }
    one, other, mean = (load_file(run.model(model) / "model.safetensors") for model in ("llama0", "llama1", name))
    assert {tensor.dtype for tensor in one.values()} == {torch.bfloat16}
    for key, tensor in mean.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, 0.25 * one[key].float() + 0.75 * other[key], rtol=1e-6, atol=1e-7)


def test_the_tempered_average_of_a_domain_of_conversations_is_that_of_its_answers(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    counted = np.arange(400) % 20 >= 10
    log_probs = -random.gamma(1.0, 1.0, (2, 400)) - 0.5
    log_probs[np.where(counted, 0, random.integers(0, 2, 400)), np.arange(400)] *= 0.3
    starts, prior = np.arange(0, 400, 100), np.log([0.5, 0.5])
    config = RunConfig.model_validate({"domains": {name: {"text": f"{name}.jsonl"} for name in "ab"}})

    def weights(which: np.ndarray | None) -> np.ndarray:
        scores = Stack(log_probs, starts, which)
        return tempered(DevText(config, RunDir(tmp_path), "a", ["a", "b"], scores, prior))

    fitted = fitted_tempering(log_probs, starts, prior, counted)
    expected = mean_tempered_weights(log_probs, starts, fitted, log_prior=prior, counted=counted)
    np.testing.assert_array_equal(weights(counted), expected)
    assert abs(weights(counted) - weights(None)).max() > 0.01
