"""Independent readers: what safetensors, torch and json read from a file that btm-scale accepted."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import math
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed.checkpoint as dcp
import zstandard
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata

from btm_scale.checkpoint.formats.megatron import MegatronModel
from btm_scale.checkpoint.formats.open import open_model

Tensors = Mapping[str, torch.Tensor]


def require_equal(ours: Tensors, theirs: Tensors, what: str) -> None:
    """Raise `AssertionError` unless names, dtypes, shapes and bytes are equal."""
    assert sorted(ours) == sorted(theirs), f"{what}: names {sorted(ours)} and {sorted(theirs)}"
    for name, tensor in ours.items():
        other = theirs[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), (
            f"{what}: {name} {tensor.shape} {other.shape}"
        )
        assert _bytes(tensor).equal(_bytes(other)), f"{what}: {name} has other numbers"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def read_ours(path: Path) -> dict[str, torch.Tensor]:
    """Return what btm-scale reads, of a Megatron-core model each rank's tensors."""
    with open_model(path) as model:
        if isinstance(model, MegatronModel):
            return {f"{i}/{name}": part.read(name) for i, part in enumerate(model.parts) for name in part.names}
        return {name: model.read(name) for name in model.names}


def read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a folder, by the safetensors library."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return load_file(folder / "model.safetensors")
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return {name: tensor for shard in shards for name, tensor in load_file(folder / shard).items()}


def read_state(folder: Path) -> dict[str, torch.Tensor]:
    """Return the master weights of a training checkpoint, by the safetensors library."""
    tensors = read_safetensors(folder)
    return {name.removeprefix("master/"): tensor for name, tensor in tensors.items() if name.startswith("master/")}


def _load(file: Path) -> Any:
    with torch.serialization.safe_globals([__import__("argparse").Namespace]):
        return torch.load(file, map_location="cpu", weights_only=True)


def read_bin(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of .bin files, by torch."""
    index = folder / "pytorch_model.bin.index.json"
    files = ["pytorch_model.bin"]
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    tensors = {name: value for file in files for name, value in _load(folder / file).items()}
    return {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}


def read_deepspeed(folder: Path) -> dict[str, torch.Tensor]:
    """Return each tensor rank's weights of the forward pass, by torch."""
    files = sorted(folder.glob("*/mp_rank_*_model_states.pt"))
    return {f"{i}/{name}": tensor for i, file in enumerate(files) for name, tensor in _load(file)["module"].items()}


def read_zero(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights in ZeRO's flat arrays, cut as DeepSpeed's zero_to_fp32.py does."""
    folder = folder / (folder / "latest").read_text().strip()
    state = _load(min(folder.glob("*model_states.pt")))
    ranks = [_load(file)["optimizer_state_dict"] for file in sorted(folder.glob("*optim_states.pt"))]
    shapes = [(name, shape) for group in state["param_shapes"] for name, shape in group.items()]
    tensors: dict[str, torch.Tensor] = {}
    position = 0
    if ranks[0]["zero_stage"] == 3:
        rows = [torch.cat(rank["fp32_flat_groups"]) for rank in ranks]
        for name, shape in shapes:
            step = math.ceil(math.prod(shape) / len(rows))
            pieces = torch.cat([row[position : position + step] for row in rows])
            tensors[name] = pieces[: math.prod(shape)].reshape(tuple(shape))
            position += step
    else:
        row = torch.cat([rank["single_partition_of_fp32_groups"][0] for rank in ranks])
        for name, shape in shapes:
            tensors[name] = row[position : position + math.prod(shape)].reshape(tuple(shape))
            position += math.prod(shape)
    tensors |= {name: state["module"][name] for name in state.get("buffer_names") or () if name in state["module"]}
    return tensors | {alias: tensors[name] for alias, name in (state.get("shared_params") or {}).items()}


def read_universal(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a universal checkpoint, by torch."""
    return {file.parent.name: _load(file)["param"] for file in folder.glob("zero/*/fp32.pt")}


def read_torch_dist(folder: Path) -> dict[str, torch.Tensor]:
    """Return the layers of the global tensors, by torch.distributed.checkpoint."""
    latest = folder / "latest_checkpointed_iteration.txt"
    if latest.is_file():
        name = latest.read_text().strip()
        folder = folder / (f"iter_{int(name):07d}" if name.isdecimal() else name)
    reader = FileSystemReader(folder)
    tensors = {
        name: torch.zeros(tensor.size, dtype=tensor.properties.dtype)  # the library does not notice a missing chunk
        for name, tensor in reader.read_metadata().state_dict_metadata.items()
        if isinstance(tensor, TensorStorageMetadata)
        if name.startswith(("embedding.", "decoder.", "output_layer."))
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    layers: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith("decoder.layers."):
            layers[f"0/{name}"] = tensor
            continue
        rest = name.removeprefix("decoder.layers.")
        rest = rest.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
        rest = rest.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
        layers |= {f"0/decoder.layers.{i}.{rest}": layer for i, layer in enumerate(tensor)}
    return layers


def documents(file: Path) -> list[str]:
    """Return the texts of a file that is completely valid, by the standard library, zstandard and pyarrow."""
    if file.suffix == ".parquet":
        texts = pq.read_table(file, columns=["text"]).column("text").to_pylist()
    elif file.suffix == ".arrow":
        with pa.ipc.open_stream(file.read_bytes()) as stream:
            texts = stream.read_all().column("text").to_pylist()
    elif file.suffix == ".tar":
        texts = _texts_of_tar(file)
    elif file.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(file.read_bytes().decode("utf-8-sig"), newline=""), strict=True)
        texts = [row["text"] for row in rows]
    else:
        content = _DECOMPRESS.get(file.suffix, bytes)(file.read_bytes())
        if file.suffix == ".json":
            texts = [row["text"] for row in json.loads(content.decode("utf-8-sig"))]
        elif ".jsonl" not in file.name:
            texts = [content.decode("utf-8-sig")]
        else:
            lines = content.decode("utf-8-sig").split("\n")
            texts = [json.loads(line)["text"] for line in lines if line.strip(" \t\r\f\v")]
    return [text for text in texts if text and not text.isspace()]


def _decompress_zstd(content: bytes) -> bytes:
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content), read_across_frames=True) as reader:
        return reader.read()


_DECOMPRESS = {".gz": gzip.decompress, ".zst": _decompress_zstd, ".xz": lzma.decompress, ".bz2": bz2.decompress}


def _texts_of_tar(file: Path) -> list[str]:
    samples: list[tuple[str, dict[str, Any]]] = []
    with tarfile.open(file) as archive:
        for member in archive:
            if not member.isfile():
                continue
            key, _, extension = member.name.partition(".")
            if not samples or samples[-1][0] != key:
                samples.append((key, {}))
            reader = archive.extractfile(member)
            assert reader is not None
            if extension.lower() == "json":
                samples[-1][1].update(json.loads(reader.read()))
            elif extension.lower() == "txt":
                samples[-1][1].setdefault("text", reader.read().decode("utf-8-sig"))
    return [row["text"] for _, row in samples]
