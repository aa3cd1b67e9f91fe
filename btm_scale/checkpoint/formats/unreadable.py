"""Say what a path holds that is not a readable checkpoint: one fact and one remedy for each common mistake."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from btm_scale.checkpoint.formats.weight_sets import weight_sets
from btm_scale.errors import CheckpointError, first_few

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LFS = b"version https://git-lfs"
_HEAD_BYTES = 64
_SHARD = re.compile(r"(?:model|pytorch_model)-\d{5}-of-\d{5}\.(?:safetensors|bin)")
_OTHER_KINDS = {
    ".gguf": ("a GGUF file, quantized for llama.cpp", "Give the Hugging Face model that it was made from"),
    ".ggml": ("a GGML file for llama.cpp", "Give the Hugging Face model that it was made from"),
    ".onnx": ("an ONNX graph", "Give the Hugging Face model that it was exported from"),
    ".h5": ("a TensorFlow model", "Load it in transformers with from_tf=True and save it as safetensors"),
    ".msgpack": ("a Flax model", "Load it in transformers with from_flax=True and save it as safetensors"),
    ".nemo": ("a NeMo archive", "Export it to Hugging Face with NeMo's converter"),
    ".npz": ("a NumPy archive", "Give the Hugging Face model that it was made from"),
    ".pth": ("a PyTorch file in the layout of Meta or of the user's own", "Convert it to Hugging Face format"),
    ".ckpt": ("a PyTorch Lightning or TensorFlow checkpoint", "Save its model in Hugging Face format"),
    ".engine": ("a TensorRT engine", "Give the Hugging Face model that it was built from"),
    ".zip": ("an archive", "Unpack it first"),
    ".gz": ("an archive", "Unpack it first"),
    ".tar": ("an archive", "Unpack it first"),
}
_FSDP_RANK = re.compile(r"model_world_size_\d+_rank_\d+\.pt")
_FSDP_FULL = "pytorch_model_fsdp.bin"
_OPTIMIZER = re.compile(r".*optim_states\.pt|optimizer\.(?:pt|bin|safetensors)|optimizer_?\d*\.bin")


def absent(path: Path) -> CheckpointError:
    """Return the error for a path that does not exist."""
    if _HUB_NAME.fullmatch(str(path)) and not path.parent.exists():
        return CheckpointError(
            f"{path} does not exist. If it is a model on the Hugging Face Hub, download it with `hf download {path}` "
            "and give the path that this prints; otherwise, give the path of an existing model directory or checkpoint."
        )
    return CheckpointError(f"{path} does not exist. Give the path of an existing model directory or checkpoint.")


def unreadable(path: Path) -> CheckpointError:
    """Return the error for a path without a readable checkpoint: what it is, and what to do."""
    try:
        explain = _file if path.is_file() else _folder
        reason = explain(path)
    except OSError as error:
        reason = f"cannot be read ({error.strerror}). Make it readable for this user."
    return CheckpointError(f"{path} {reason}")


def require_weights_in(file: Path) -> None:
    """Raise `CheckpointError` if a file of weights is only Git LFS's pointer to it."""
    if _head(file).startswith(_LFS):
        raise CheckpointError(
            f"{file} is a Git LFS pointer, not the weights. Download them: run `git lfs pull` in its folder."
        )


def _head(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(_HEAD_BYTES)


def _file(path: Path) -> str:
    head = _head(path)
    if head.startswith(_LFS):
        return "is a Git LFS pointer, not the weights. Run `git lfs pull` in its folder."
    suffix = ".gguf" if head.startswith(b"GGUF") else path.suffix
    if suffix in _OTHER_KINDS:
        what, remedy = _OTHER_KINDS[suffix]
        return f"is {what}, which cannot be read. {remedy}."
    if suffix in (".bin", ".pt", ".json"):
        return f"is a single file of a checkpoint. Give its folder, {path.parent}."
    return "is not a model file: only a .safetensors file can be given by itself. Give the folder of a model."


def _folder(path: Path) -> str:
    files = sorted(path.iterdir())
    if not files:
        return "is empty. Give the folder of a model, or download the model again."
    names = [file.name for file in files]
    for explain in _EXPLANATIONS:
        if reason := explain(path, files, names):
            return reason
    return (
        "is not a model: it has no model.safetensors, model.safetensors.index.json or pytorch_model.bin, and is not a "
        "DeepSpeed, torch_dist or training checkpoint. Give the path of a model directory or checkpoint."
    )


def _program(path: Path, files: list[Path], names: list[str]) -> str | None:
    """Explain the checkpoints of programs that have their own converters."""
    if shards := [name for name in names if _FSDP_RANK.fullmatch(name)]:
        return (
            f"has one shard per FSDP rank, {first_few(shards, 'files')}. Merge them with the program that saved them, "
            "such as verl: python -m verl.model_merger merge --backend fsdp."
        )
    if any((folder / "checkpoint_metadata.json").is_file() for folder in (path, *files)):
        return (
            "is a checkpoint of nanotron. Convert it to Hugging Face format with nanotron's "
            "examples/llama/convert_nanotron_to_hf.py."
        )
    if _FSDP_FULL in names:
        return f"has the complete model in {_FSDP_FULL}. transformers reads it as pytorch_model.bin: rename it."
    return None


def _inner(path: Path, files: list[Path], names: list[str]) -> str | None:
    """Explain a folder whose model is in a folder below, such as the one that zero_to_fp32.py makes."""
    if inner := [str(file) for file in files if file.is_dir() and weight_sets(file) is not None]:
        return f"has no model itself, but these folders in it do: {first_few(inner, 'folders')}. Give one of them."
    return None


def _adapter(path: Path, files: list[Path], names: list[str]) -> str | None:
    if "adapter_config.json" in names:
        return "has the config of a PEFT adapter without its weights. Copy its adapter_model.safetensors here."
    return None


def _without_marker(path: Path, files: list[Path], names: list[str]) -> str | None:
    """Explain a folder of checkpoints: the marker of the one to use is missing or names what does not exist."""
    steps = [name for name in names if re.fullmatch(r"(?:global_step|iter_|checkpoint-|step-)\d+", name)]
    steps = [name for name in steps if (path / name).is_dir()]
    for marker in ("latest", "latest_checkpointed_iteration.txt"):
        if marker in names:
            with (path / marker).open("rb") as opened:
                content = opened.read(_HEAD_BYTES).decode("utf-8", "replace").strip()
            has = f" It has {first_few(steps, 'folders')}." if steps else ""
            return f"has a file `{marker}` that names {content}, which has no checkpoint.{has} Correct the file."
    if not steps:
        return None
    best = max(steps, key=lambda name: int(re.sub(r"\D", "", name)))
    marker = "`latest_checkpointed_iteration.txt`" if best.startswith("iter_") else "`latest`"
    lack = f"no file {marker}" if best.startswith(("iter_", "global_step")) else "no model"
    return (
        f"has {lack}, but the checkpoints {first_few(steps, 'checkpoints')}. Give one of them, such as {path / best}."
    )


def _optimizer(path: Path, files: list[Path], names: list[str]) -> str | None:
    if any(_OPTIMIZER.fullmatch(name) for name in names):
        return (
            "holds the state of an optimizer without the model's file. Copy the model's files (*_model_states.pt or "
            "model.safetensors) of the same checkpoint here."
        )
    return None


def _other_kind(path: Path, files: list[Path], names: list[str]) -> str | None:
    for suffix, (what, remedy) in _OTHER_KINDS.items():
        if matching := [name for name in names if name.endswith(suffix)]:
            return f"has no weights but {matching[0]}, {what}, which cannot be read. {remedy}."
    return None


def _shards(path: Path, files: list[Path], names: list[str]) -> str | None:
    if shards := [name for name in names if _SHARD.fullmatch(name)]:
        kind = "model.safetensors" if shards[0].endswith("safetensors") else "pytorch_model.bin"
        return f"has {first_few(shards, 'shards')}, but no {kind}.index.json, which lists them. Download the index too."
    if single := [name for name in names if name.endswith(".safetensors")]:
        return f"has no model.safetensors, but {first_few(single, 'files')}. Give the file, {path / single[0]}."
    return None


def _cache(path: Path, files: list[Path], names: list[str]) -> str | None:
    if "snapshots" not in names:
        return None
    snapshots = sorted(str(folder) for folder in (path / "snapshots").iterdir())
    where = f"Give a snapshot: {first_few(snapshots, 'snapshots')}." if snapshots else "Download the model first."
    return f"is the Hugging Face cache of a repository, not a model. {where}"


def _without_weights(path: Path, files: list[Path], names: list[str]) -> str | None:
    if "model_index.json" in names:
        return "is a diffusers pipeline, not a language model. Give the folder of a language model."
    if "config.json" in names:
        return "has a config.json but no weights. Download or copy its model.safetensors or shards here."
    if not {"tokenizer.json", "tokenizer.model", "tekken.json"}.isdisjoint(names):
        return "has a tokenizer but no weights. Give the folder of the model itself."
    return None


_Explanation = Callable[[Path, list[Path], list[str]], str | None]
_EXPLANATIONS: Iterable[_Explanation] = (
    _program,
    _adapter,
    _without_marker,
    _cache,
    _inner,
    _optimizer,
    _shards,
    _other_kind,
    _without_weights,
)
