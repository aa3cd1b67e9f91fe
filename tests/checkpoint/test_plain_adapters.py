"""LoRA adapters that are written by hand, without PEFT: what they change of their base, and what they lack."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.complete_models import LLAMA, complete_weights, write_adapter, write_model
from safetensors.torch import load_file

from btm_scale.checkpoint.convert import convert
from btm_scale.checkpoint.inspect import inspect
from btm_scale.errors import CheckpointError

TIED = LLAMA | {"tie_word_embeddings": True}
PREFIX = "base_model.model."
QUERY = f"{PREFIX}model.layers.0.self_attn.q_proj"
MATRICES = {f"{QUERY}.lora_A.weight": torch.ones(2, 32), f"{QUERY}.lora_B.weight": torch.ones(32, 2)}


def test_an_adapter_with_another_vocabulary_and_head_is_converted_to_every_format(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", complete_weights(0, TIED), TIED)
    rows = {f"{PREFIX}{name}.weight": torch.rand(70, 32) for name in ("model.embed_tokens", "lm_head")}
    adapter = write_adapter(tmp_path / "adapter", base, MATRICES | rows, modules_to_save=["embed_tokens", "lm_head"])
    described = inspect(adapter)
    assert (described.problem, described.converts_to) == (None, ("huggingface", "megatron", "deepspeed"))
    convert(adapter, tmp_path / "expected", to="huggingface")
    expected = load_file(tmp_path / "expected/model.safetensors")
    assert expected["lm_head.weight"].shape == (70, 32)
    for target in ("megatron", "deepspeed"):
        convert(adapter, tmp_path / target, to=target, tensor=2, verify=True)
        convert(tmp_path / target, tmp_path / f"{target}-back", to="huggingface")
        back = load_file(tmp_path / f"{target}-back/model.safetensors")
        assert back.keys() == expected.keys()
        assert all(tensor.equal(expected[name]) for name, tensor in back.items())


def test_an_adapter_with_the_empty_tensors_of_zero_3_is_refused(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", complete_weights(0))
    adapter = write_adapter(tmp_path / "adapter", base, {name: torch.zeros(0) for name in MATRICES})
    with pytest.raises(CheckpointError, match=r"has no values for .*lora_A.*ZeRO 3 leaves empty tensors"):
        convert(adapter, tmp_path / "out", to="huggingface")


def test_an_adapter_with_one_rank_s_part_of_its_matrices_is_refused(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", complete_weights(0))
    adapter = write_adapter(tmp_path / "adapter", base, {name: tensor[:1] for name, tensor in MATRICES.items()})
    with pytest.raises(CheckpointError, match=r"has matrices \[1, 2\] and \[1, 32\] for"):
        convert(adapter, tmp_path / "out", to="huggingface")
