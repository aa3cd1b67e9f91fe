"""Small checkpoints as other libraries write them, to be mutated, and an independent reading of each."""

from __future__ import annotations

import json
import math
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from helpers.complete_models import quantize
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata

from btm_scale.model.hf_names import from_huggingface, table
from btm_scale.model.shape import ModelShape

Tensors = Mapping[str, torch.Tensor]
_FLAT = {"a.weight": (3, 5), "b.weight": (7,)}
_PEFT = "base_model.model."
_MODULES = {"model.layers.0.self_attn.q_proj": 2, "model.layers.1.mlp.up_proj": 3}  # with their ranks


def write_foreign(root: Path, shape: ModelShape, weights: Tensors, config: str) -> None:
    """Fill a folder with one folder per format; `root` has the model `model`, the base of the adapter, already."""
    for name in ("peft", "dcp", "legacy", "fp8", "universal3", "pipeline"):
        (root / name).mkdir()
    _write_peft(root / "peft", root / "model", weights)
    dcp.save({"model": dict(weights), "step": torch.tensor(3)}, checkpoint_id=root / "dcp", no_dist=True)
    (root / "dcp" / "config.json").write_text(config)
    _write_legacy(root / "legacy", shape, weights)
    section = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 6]}}
    (root / "fp8" / "config.json").write_text(json.dumps(json.loads(config) | section))
    save_file(quantize(weights, (4, 6))[0], root / "fp8" / "model.safetensors")
    _write_universal(root / "universal3")
    _write_pipeline(root / "pipeline")


def _write_peft(folder: Path, base: Path, weights: Tensors) -> None:
    draw = torch.Generator().manual_seed(7)
    tensors = {}
    for module, rank in _MODULES.items():
        rows, columns = weights[f"{module}.weight"].shape
        tensors[f"{_PEFT}{module}.lora_A.weight"] = torch.randn(rank, columns, generator=draw)
        tensors[f"{_PEFT}{module}.lora_B.weight"] = torch.randn(rows, rank, generator=draw)
    tensors[f"{_PEFT}lm_head.weight"] = torch.randn(weights["lm_head.weight"].shape, generator=draw)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": 2}
    settings |= {"lora_alpha": 6, "rank_pattern": {"up_proj": 3}, "alpha_pattern": {"layers.1.mlp.up_proj": 5}}
    settings |= {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head"], "use_rslora": True}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def _write_legacy(folder: Path, shape: ModelShape, weights: Tensors) -> None:
    """Write what Megatron-LM's `checkpointing.py` does for one rank, without config.json."""
    read = weights.__getitem__
    model = {entry.megatron: from_huggingface(entry, read, shape, shape.vocabulary) for entry in table(shape)}
    arguments = Namespace(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        ffn_hidden_size=shape.ffn,
        kv_channels=shape.head_size,
        max_position_embeddings=shape.positions,
        padded_vocab_size=shape.vocabulary,
        untie_embeddings_and_output_weights=True,
        position_embedding_type="rope",
        normalization="RMSNorm",
        norm_epsilon=1e-5,
        swiglu=True,
        add_bias_linear=False,
    )
    place = folder / "iter_0000007" / "mp_rank_00"
    place.mkdir(parents=True)
    torch.save({"args": arguments, "iteration": 7, "model": model}, place / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("7")


def _write_universal(folder: Path) -> None:
    """Write what DeepSpeed's ds_to_universal.py does of ZeRO 3: flat weights, whose shapes are in the model states."""
    place = folder / "global_step3_universal"
    for name, shape in _FLAT.items():
        (place / "zero" / name).mkdir(parents=True)
        torch.save({"param": torch.randn(math.prod(shape))}, place / "zero" / name / "fp32.pt")
    state: dict[str, Any] = {"module": {"scale": torch.ones(2)}, "buffer_names": ["scale"], "global_steps": 3}
    state |= {"param_shapes": [{name: torch.Size(shape) for name, shape in _FLAT.items()}], "shared_params": {}}
    torch.save(state, place / "mp_rank_00_model_states.pt")
    (folder / "latest_universal").write_text(place.name)
    (folder / "config.json").write_text(json.dumps({"model_type": "flat", "hidden_size": 16}))


def _write_pipeline(folder: Path) -> None:
    """Write the files of a pipeline as Megatron-DeepSpeed and GPT-NeoX do."""
    place = folder / "global_step3"
    place.mkdir()
    for layer in range(3):
        torch.save({"weight": torch.randn(4, 4)}, place / f"layer_{layer:02d}-model_00-model_states.pt")
    torch.save({"module": None, "global_steps": 3, "dp_world_size": 1}, place / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text(place.name)


def read_peft(folder: Path) -> dict[str, torch.Tensor]:
    """Return the base with the adapter merged into it, by safetensors and the formula of LoRA."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(Path(settings["base_model_name_or_path"]) / "model.safetensors")
    adapter = load_file(folder / "adapter_model.safetensors")
    for key, value in adapter.items():
        name = key.removeprefix(_PEFT)
        if name.endswith(".lora_B.weight"):
            module, rank = name.removesuffix(".lora_B.weight"), value.shape[1]
            patterns = settings.get("alpha_pattern") or {}
            alpha = next(
                (each for pattern, each in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)),
                settings.get("lora_alpha", 8),
            )
            scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
            base = tensors[f"{module}.weight"]
            product = value.double() @ adapter[key.replace("lora_B", "lora_A")].double()
            tensors[f"{module}.weight"] = (base.double() + scale * product).to(base.dtype)
        elif not name.endswith(".lora_A.weight"):
            tensors[name] = value.to(tensors[name].dtype)
    return tensors


def read_dcp(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors that were saved under `model`, by torch.distributed.checkpoint."""
    reader = FileSystemReader(folder)
    metadata = reader.read_metadata()
    tensors = {
        name: torch.zeros(tensor.size, dtype=tensor.properties.dtype)
        for name, tensor in metadata.state_dict_metadata.items()
        if isinstance(tensor, TensorStorageMetadata) and (metadata.planner_data or {}).get(name, ())[:1] == ("model",)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {metadata.planner_data[name][-1]: tensor for name, tensor in tensors.items()}


def _load(file: Path) -> Any:
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(file, map_location="cpu", weights_only=True)


def read_legacy(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the only rank, by torch."""
    iteration = int((folder / "latest_checkpointed_iteration.txt").read_text())
    state = _load(folder / f"iter_{iteration:07d}" / "mp_rank_00" / "model_optim_rng.pt")
    return {f"0/{name}": tensor for name, tensor in state["model"].items() if isinstance(tensor, torch.Tensor)}


def read_fp8(folder: Path) -> dict[str, torch.Tensor]:
    """Return the products of fp8 weights and their scales, by safetensors."""
    config = json.loads((folder / "config.json").read_text())
    height, width = config["quantization_config"]["weight_block_size"]
    dtype = getattr(torch, config["torch_dtype"])
    stored = load_file(folder / "model.safetensors")
    tensors = {}
    for name, weight in stored.items():
        if weight.dtype == torch.float8_e4m3fn:
            scales = stored[f"{name}_scale_inv"].float().repeat_interleave(height, 0).repeat_interleave(width, 1)
            tensors[name] = (weight.float() * scales[: weight.shape[0], : weight.shape[1]]).to(dtype)
        elif not name.endswith("_scale_inv"):
            tensors[name] = weight
    return tensors


def read_flat_universal(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a universal checkpoint of ZeRO 3, by torch."""
    place = folder / (folder / "latest_universal").read_text().strip()
    state = _load(place / "mp_rank_00_model_states.pt")
    shapes = {name: tuple(shape) for group in state["param_shapes"] for name, shape in group.items()}
    flat = {file.parent.name: _load(file)["param"] for file in place.glob("zero/*/fp32.pt")}
    tensors = {name: state["module"][name] for name in state["buffer_names"]}
    tensors |= {name: value.reshape(shapes.get(name, value.shape)) for name, value in flat.items()}
    return tensors | {alias: tensors[name] for alias, name in (state.get("shared_params") or {}).items()}
