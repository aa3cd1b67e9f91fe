from __future__ import annotations

from pathlib import Path

import torch
from helpers.tiny_forest import write_experts
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from btm_scale.evaluate.averages import write_averages
from btm_scale.forest.expert import Expert, Parent
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
