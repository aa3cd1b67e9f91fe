"""Models that Megatron-core does not compute here are scored and continued as transformers computes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_families import FAMILIES, VOCABULARY, write_family
from safetensors.torch import load_file, save_file
from torch import Tensor

from btm_scale.checkpoint.completeness import problems_of
from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.errors import CheckpointError, UnsupportedModelError
from btm_scale.evaluate.hf_score import TransformersModel
from btm_scale.generate.sampling import token_log_probs
from btm_scale.model.families import READABLE
from btm_scale.model.hf_config import read_shape
from btm_scale.model.hf_decoder import Decoder


def their_log_probs(model: Any, tokens: Tensor) -> Tensor:
    """Return what transformers gives each token after those before it: [batch, tokens - 1] in nats."""
    with torch.no_grad():
        log_probs: Tensor = model(tokens[:, :-1]).logits.log_softmax(-1)
    return log_probs.gather(2, tokens[:, 1:, None]).squeeze(2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_scored_and_continued_as_transformers_does(family: str, tmp_path: Path) -> None:
    model = write_family(tmp_path, family)
    if family not in READABLE:
        with pytest.raises(UnsupportedModelError, match="Other models join a forest as experts, which transformers"):
            read_shape(tmp_path)
    with SafetensorsModel(tmp_path) as weights:
        assert problems_of(weights) == []
    tokens = torch.randint(1, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(1))
    theirs = their_log_probs(model, tokens)
    ours = TransformersModel(tmp_path, dtype=torch.float32).log_probs(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)

    prompts = [tokens[0, :20].tolist(), tokens[1, :7].tolist()]
    reading = Decoder.load(tmp_path).read(prompts)
    assert reading.log_probs is not None
    torch.testing.assert_close(reading.log_probs[1, -6:], theirs[1, :6], atol=1e-4, rtol=0)
    reading.feed(torch.stack([tokens[0, 20], tokens[1, 7]]))
    continued = token_log_probs(reading.logits[None], torch.stack([tokens[0, 21], tokens[1, 8]]))[:, 0]
    expected = torch.stack([theirs[0, 20], theirs[1, 7]])
    torch.testing.assert_close(continued.float(), expected, atol=1e-4, rtol=0)


def test_soft_caps_of_logits_and_of_attention_count(tmp_path: Path) -> None:
    write_family(tmp_path, "gemma2")
    tokens = torch.arange(1, 21)[None]
    capped = TransformersModel(tmp_path, dtype=torch.float32).log_probs(tokens[:, :-1], tokens[:, 1:])
    config = json.loads((tmp_path / "config.json").read_text())
    for cap in ("final_logit_softcapping", "attn_logit_softcapping"):
        (tmp_path / "config.json").write_text(json.dumps(config | {cap: None}))
        other = TransformersModel(tmp_path, dtype=torch.float32).log_probs(tokens[:, :-1], tokens[:, 1:])
        assert (other - capped).abs().max() > 1e-2


def test_a_model_that_sees_later_tokens_is_no_expert(tmp_path: Path) -> None:
    write_family(tmp_path, "bert", is_decoder=False)
    with pytest.raises(CheckpointError, match="is not a causal LM: its predictions depend on later tokens"):
        TransformersModel(tmp_path, dtype=torch.float32)


def test_weights_that_transformers_would_draw_at_random_are_reported(tmp_path: Path) -> None:
    write_family(tmp_path, "granite")
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"lacks '{name}'\. A model has all the tensors"):
        TransformersModel(tmp_path, dtype=torch.float32)
