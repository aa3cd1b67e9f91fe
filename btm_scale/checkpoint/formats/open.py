"""Open a model of any supported checkpoint format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from btm_scale.checkpoint.formats.based import ADAPTER_CONFIG, base_of, is_adapter
from btm_scale.checkpoint.formats.completed import CompletedModel, require_frozen
from btm_scale.checkpoint.formats.locate import described_config, iteration_folder, require_no_run, require_path
from btm_scale.checkpoint.formats.quantized import dequantized
from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.formats.safetensors_writer import INDEX, SINGLE
from btm_scale.checkpoint.formats.tensors import ModelReader
from btm_scale.checkpoint.formats.training import TrainingState, is_training_state
from btm_scale.checkpoint.formats.unreadable import unreadable
from btm_scale.checkpoint.formats.weight_sets import BIN, BIN_INDEX
from btm_scale.checkpoint.formats.wrapped import RenamedModel, unwrapped
from btm_scale.errors import CheckpointError

# What the causal LM class puts before the names of its base class, by one of those names.
_PREFIXES = {"wte.weight": "transformer.", "embed_tokens.weight": "model."}
# Formats that read pickles or compute import torch, so they are imported only when they are opened.


def _open_bin(path: Path) -> ModelReader:
    from btm_scale.checkpoint.formats.pytorch_bin import open_bin

    return open_bin(path)


def _open_torch_dist(path: Path) -> ModelReader:
    from btm_scale.checkpoint.formats.torch_dist import open_torch_dist

    return open_torch_dist(path)


def _open_megatron_legacy(path: Path) -> ModelReader:
    from btm_scale.checkpoint.formats.megatron_legacy import open_megatron_legacy

    return open_megatron_legacy(path)


def _open_adapter(path: Path) -> ModelReader:
    from btm_scale.checkpoint.formats.peft import PeftModel

    base = base_of(path)
    assert base is not None
    return _with_base(base, lambda model: PeftModel(path, model, described_config(base)))


def _open_deepspeed(path: Path) -> ModelReader:
    from btm_scale.checkpoint.formats.deepspeed import open_deepspeed

    checkpoint = unwrapped(open_deepspeed(path))
    base = base_of(path)
    if base is None:
        require_frozen(with_head_names(checkpoint), path)
        return checkpoint
    return _with_base(base, lambda model: CompletedModel(path, checkpoint, model))


def _open_dcp(path: Path) -> ModelReader:
    from btm_scale.checkpoint.formats.dcp import open_dcp
    from btm_scale.checkpoint.formats.llama_native import NativeLlama, is_native_llama

    model = open_dcp(path)
    return NativeLlama(path, model) if is_native_llama(model) else model


def _with_base(base: Path, complete: Callable[[ModelReader], ModelReader]) -> ModelReader:
    """Return what `complete` makes of an open base, which is closed again if it raises."""
    model = open_model(base)
    try:
        return complete(model)
    except BaseException:
        model.close()
        raise


_OPENERS: dict[str, Callable[[Path], ModelReader]] = {
    "safetensors": SafetensorsModel,
    "bin": _open_bin,
    "deepspeed": _open_deepspeed,
    "deepspeed universal": _open_deepspeed,
    "torch_dist": _open_torch_dist,
    "training state": TrainingState,
    "megatron legacy": _open_megatron_legacy,
    "dcp": _open_dcp,
    "adapter": _open_adapter,
}


def format_of(path: Path) -> str:
    """Return the name of a path's format, such as `safetensors` or `deepspeed universal`.

    Raises `CheckpointError` if `path` does not exist or has none of the formats that can be read.
    """
    require_path(path)
    if is_training_state(path):
        return "training state"
    complete = [name for name in (SINGLE, INDEX, BIN, BIN_INDEX) if (path / name).is_file()]
    if is_adapter(path):
        if complete:
            raise CheckpointError(
                f"{path} holds a model ({complete[0]}) and an adapter ({ADAPTER_CONFIG}), and only one of them can be "
                "meant. Move the adapter's files into a separate folder."
            )
        return "adapter"
    if path.suffix == ".safetensors" or any((path / name).is_file() for name in (SINGLE, INDEX)):
        return "safetensors"
    if any((path / name).is_file() for name in (BIN, BIN_INDEX)):
        return "bin"
    return _training_format_of(path)


def _training_format_of(path: Path) -> str:
    """Return the name of the format in which another program saved its training."""
    from btm_scale.checkpoint.formats.dcp import METADATA, dcp_folder
    from btm_scale.checkpoint.formats.deepspeed import checkpoint_folder, is_universal
    from btm_scale.checkpoint.formats.megatron_args import legacy_files

    folder = iteration_folder(path)
    if (folder / METADATA).is_file() and any((folder / name).is_file() for name in ("common.pt", "metadata.json")):
        return "torch_dist"
    if legacy_files(folder):
        return "megatron legacy"
    if dcp_folder(path) is not None:
        return "dcp"
    if path.is_dir() and checkpoint_folder(path) is not None:
        return "deepspeed universal" if is_universal(path) else "deepspeed"
    require_no_run(path)
    raise unreadable(path)


def open_model(path: Path) -> ModelReader:
    """Open a model under Hugging Face names, with the values that its fp8 weights and their scales mean.

    Raises `CheckpointError` for a path that does not exist, an unknown format, quantized weights of other kinds or
    damaged files.
    """
    return dequantized(open_stored(path))


def open_stored(path: Path) -> ModelReader:
    """Open a model like `open_model`, but with the tensors as they are stored, whatever their quantization."""
    model = unwrapped(_OPENERS[format_of(path)](path))
    if not model.names:
        model.close()
        raise CheckpointError(
            f"{path} has no named tensors. Save the model's state dict itself, not a dictionary around it."
        )
    return model


def with_head_names(model: ModelReader) -> ModelReader:
    """Return the model under the tensor names of transformers' causal LM class; closing it closes `model`.

    The published GPT-2 files, and others that were saved from the base class, lack its prefix.
    """
    prefix = next((prefix for name, prefix in _PREFIXES.items() if name in model.names), None)
    if prefix is None:
        return model
    return RenamedModel(model, {name if name.startswith("lm_head.") else prefix + name: name for name in model.names})
