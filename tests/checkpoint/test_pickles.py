from __future__ import annotations

import argparse
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from helpers.small_models import random_weights

from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.formats.pickles import Inert, load_pickle, load_plain_pickle
from btm_scale.errors import CheckpointError


class Runs:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


def test_tensors_of_any_stride_are_read_from_their_file(tmp_path: Path) -> None:
    matrix = torch.randn(6, 8)
    views = {
        "matrix": matrix,
        "transposed": matrix.t(),
        "window": matrix[1:4, 2:5],
        "rows": matrix[2:4],
        "parameter": torch.nn.Parameter(matrix.bfloat16()),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
    }
    torch.save(views, tmp_path / "file.pt")
    loaded = load_pickle(tmp_path / "file.pt")
    for name, tensor in views.items():
        assert loaded[name].read().equal(tensor), name
        out = torch.empty(max(tensor.numel() - 2, 0), dtype=tensor.dtype)
        loaded[name].read_into(min(1, tensor.numel()), out)
        assert out.equal(tensor.detach().reshape(-1)[1 : 1 + out.numel()]), name


@pytest.mark.parametrize("shards", [1, 2])
def test_a_bin_model_reads_like_any_other_model(tmp_path: Path, shards: int) -> None:
    weights = random_weights(0)
    names = sorted(weights)
    if shards == 1:
        torch.save(weights, tmp_path / "pytorch_model.bin")
    else:
        where = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
        for file in set(where.values()):
            torch.save({name: weights[name] for name in names if where[name] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    with open_model(tmp_path) as model:
        assert model.names == tuple(names)
        assert all(model.read(name).equal(weights[name]) for name in names)
    next(tmp_path.glob("*-0.bin" if shards == 2 else "*.bin")).unlink()
    with pytest.raises(CheckpointError, match=r"is missing|is not a model|is empty"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(2, dtype=torch.complex64), torch.zeros(2).to(torch.float8_e4m3fn), torch.eye(2).to_sparse()],
)
def test_unsupported_tensors_in_a_bin_file_raise(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"a": torch.ones(3), "b": tensor, "c": None}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="1 tensors, the first 'b', have a dtype or layout"):
        open_model(tmp_path)


@pytest.mark.parametrize("function", [os.system, os.remove, eval, exec, __import__, os.execv])
def test_a_malicious_pickle_raises_and_executes_nothing(tmp_path: Path, function: object) -> None:
    victim = tmp_path / "victim"
    victim.touch()
    command = f"__import__('os').remove({str(victim)!r})" if function in (eval, exec) else f"rm {victim}"
    argument = str(victim) if function is os.remove else command
    torch.save({"weight": torch.ones(3), "x": Runs(function, argument)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="nothing was executed"):
        open_model(tmp_path)
    assert victim.exists()


def test_objects_of_other_classes_are_loaded_as_inert(tmp_path: Path) -> None:
    content = {"arguments": argparse.Namespace(lr=0.1), "step": 5, "path": Path("x")}
    torch.save(content, tmp_path / "file.pt")
    loaded = load_pickle(tmp_path / "file.pt")
    assert isinstance(loaded["arguments"], Inert)
    assert loaded["arguments"].lr == 0.1
    assert isinstance(loaded["path"], Inert)
    assert loaded["step"] == 5


def test_truncated_files_and_other_formats_raise(tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    torch.save(random_weights(0), file)
    raw = file.read_bytes()
    for content in (b"", b"text", raw[: len(raw) // 2], pickle.dumps({"a": 1})):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="Copy it again"):
            load_pickle(file)
    whole = pickle.dumps({"model.first.weight": 1, "second": 2}, protocol=4)
    file.write_bytes(whole.replace(b"\x12model.first.weight", b"\x0cfirst.weight"))  # bytes are missing from its frame
    assert file.stat().st_size == len(whole) - 6
    with pytest.raises(CheckpointError, match=r"a frame that is cut off.*Copy it again"):
        load_plain_pickle(file)
    file.write_bytes(b"\x80\x04K\x01")
    with pytest.raises(CheckpointError, match="Copy it again"):
        load_plain_pickle(file)


def test_a_tensor_that_extends_past_its_storage_raises(tmp_path: Path) -> None:
    tensor = torch.ones(4)
    torch.save({"a": tensor.as_strided((2, 2), (2, 1))}, tmp_path / "good.pt")
    raw = (tmp_path / "good.pt").read_bytes()
    bad = raw.replace(b"K\x02K\x02\x86", b"K\x02K\x09\x86", 1)
    assert bad != raw
    (tmp_path / "bad.pt").write_bytes(bad)
    with pytest.raises(CheckpointError):
        load_pickle(tmp_path / "bad.pt")
