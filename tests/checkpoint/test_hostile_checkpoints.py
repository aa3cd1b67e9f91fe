"""Checkpoints whose parts are valid and contradict each other: a message names the file and the field."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz.corpus import FLAT_SHAPES, write_models, write_zero
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties

from btm_scale.checkpoint.formats.dcp import Chunk, _tile
from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.formats.stored import StoredTensor
from btm_scale.checkpoint.formats.tensors import TensorSpec
from btm_scale.checkpoint.inspect import inspect
from btm_scale.errors import CheckpointError
from btm_scale.model.hf_config import read_shape


def chunk(*spans: tuple[int, int]) -> Chunk:
    """Return a chunk from (offset, size) of each dimension."""
    spec = TensorSpec(torch.float32, tuple(size for _, size in spans))
    return Chunk(tuple(offset for offset, _ in spans), StoredTensor(spec, ()))


@pytest.mark.parametrize(
    ("chunks", "complete"),
    [
        ([chunk((0, 4), (0, 6))], True),
        ([chunk((0, 2), (0, 6)), chunk((2, 2), (0, 6))], True),
        ([chunk((0, 4), (0, 3)), chunk((0, 4), (3, 3))], True),
        ([chunk((0, 2), (0, 6)), chunk((0, 2), (0, 6))], False),  # as many elements as the tensor has
        ([chunk((0, 2), (0, 6)), chunk((1, 2), (0, 6))], False),
        ([chunk((0, 2), (0, 6)), chunk((2, 2), (1, 6))], False),
        ([chunk((0, 2), (0, 6))], False),
        ([chunk((2, 2), (0, 6))], False),
        ([chunk((0, 5), (0, 6))], False),
    ],
)
def test_only_chunks_that_fill_a_tensor_once_are_complete(chunks: list[Chunk], complete: bool) -> None:
    assert _tile((4, 6), chunks) is complete


Change = Callable[[dict[str, Any]], object]


def test_zero_states_with_wrong_fields_are_refused_with_the_field(tmp_path: Path) -> None:
    write_zero(tmp_path)
    changes: dict[str, Change] = {
        "partition_count": lambda own: own.update(partition_count="2"),
        "single_partition_of_fp32_groups": lambda own: own.update(single_partition_of_fp32_groups={"a": 1}),
        "single_partition_of_fp32_groups.0": lambda own: own.update(single_partition_of_fp32_groups=[torch.ones(5, 5)]),
        "zero_stage": lambda own: own.update(zero_stage=-1),
        "param_alignment_paddings": lambda own: own.update(param_alignment_paddings=[[0]]),
    }
    file = tmp_path / "zero2" / "global_step3" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    good = file.read_bytes()
    for field, change in changes.items():
        file.write_bytes(good)
        content = torch.load(file, weights_only=True)
        change(content["optimizer_state_dict"])
        torch.save(content, file)
        with pytest.raises(CheckpointError, match=field) as error:
            open_model(tmp_path / "zero2")
        assert str(file) in str(error.value)
    file.write_bytes(good)
    with open_model(tmp_path / "zero2") as model:
        assert set(FLAT_SHAPES) < set(model.names)


def test_ranks_of_different_dtypes_or_lengths_are_not_joined(tmp_path: Path) -> None:
    write_zero(tmp_path)
    for stage, problem in ((2, "2 dtypes"), (3, "different lengths")):
        file = tmp_path / f"zero{stage}" / "global_step3" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
        content = torch.load(file, weights_only=True)
        for key in ("single_partition_of_fp32_groups", "fp32_flat_groups"):
            for i, flat in enumerate(content["optimizer_state_dict"].get(key, ())):
                content["optimizer_state_dict"][key][i] = flat.double() if stage == 2 else flat[:-1].clone()
        torch.save(content, file)
        with pytest.raises(CheckpointError, match=problem):
            open_model(tmp_path / f"zero{stage}")


def test_tensor_ranks_with_unequal_shards_are_not_joined(tmp_path: Path) -> None:
    write_models(tmp_path)
    file = tmp_path / "deepspeed" / "global_step0" / "mp_rank_01_model_states.pt"
    content = torch.load(file, weights_only=False)
    name = next(name for name in content["module"] if name.endswith("linear_fc2.weight"))
    content["module"][name] = content["module"][name].float()
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=r"linear_fc2\.weight' is bfloat16 .* float32 .* on the tensor ranks"):
        open_model(tmp_path / "deepspeed")


@pytest.mark.parametrize(
    "chunks",
    [[], [ChunkStorageMetadata(torch.Size([1, 0, 0]), torch.Size([1, 4, 8]))] * 4, [0] * 4],
)
def test_metadata_whose_chunks_are_not_the_stored_ones_is_refused(tmp_path: Path, chunks: list[object]) -> None:
    write_models(tmp_path)
    file = tmp_path / "torch_dist" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks = chunks
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"linear_fc2\.weight\.chunks.* must be") as error:
        open_model(tmp_path / "torch_dist")
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("properties", "problem"),
    [
        (
            TensorProperties(torch.float16),
            "must be torch.bfloat16, the dtype of the .* and is torch.float16",
        ),
        ({"dtype": torch.bfloat16}, "must be a dtype and is None"),
        ("float16", "must be a dtype and is None"),
    ],
)
def test_metadata_whose_dtype_is_not_the_stored_one_is_refused(
    tmp_path: Path, properties: object, problem: str
) -> None:
    write_models(tmp_path)
    file = tmp_path / "torch_dist" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].properties = properties
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=rf"linear_fc2\.weight\.properties\.dtype' {problem}") as error:
        open_model(tmp_path / "torch_dist")
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_hidden_layers": 10**9}, "less than or equal to 10000"),
        ({"num_hidden_layers": 10**40}, "'num_hidden_layers' must be a number"),
        ({"hidden_size": "8"}, "'hidden_size' must be a number from 0 to 2147483647 and is '8'"),
        ({"hidden_size": True}, "'hidden_size' must be a number"),
        ({"num_attention_heads": 0}, "heads: Input should be greater than 0"),
        ({"num_attention_heads": None}, "heads: Input should be a valid integer"),
        ({"num_attention_heads": 0, "head_dim": None}, "0 or null"),
        ({"rope_parameters": []}, "'rope_parameters' must be an object"),
        ({"rope_parameters": {"rope_theta": [1]}}, "'rope_parameters.rope_theta' must be a finite number"),
        ({"rms_norm_eps": float("inf")}, "'rms_norm_eps' must be a finite number"),
        ({"model_type": ["llama"]}, "'model_type' must be text"),
        ({"tie_word_embeddings": "no"}, "'tie_word_embeddings' must be true or false"),
    ],
)
def test_a_config_value_of_the_wrong_type_is_refused_with_the_setting(
    tmp_path: Path, change: Mapping[str, object], problem: str
) -> None:
    write_models(tmp_path)
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=problem) as error:
        read_shape(tmp_path / "model")
    assert str(file) in str(error.value)


@pytest.mark.parametrize("name", ["", "../x", "\x1b[2J", "x" * 5000, "9" * 250])
def test_a_marker_that_names_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    write_zero(tmp_path)
    (tmp_path / "zero2" / "latest").write_text(name)
    with pytest.raises(CheckpointError, match=r"latest|is not a model|refers to"):
        inspect(tmp_path / "zero2")
    (tmp_path / "zero2" / "latest").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="cannot be read as a name"):
        inspect(tmp_path / "zero2")
