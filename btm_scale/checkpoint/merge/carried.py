"""Which files of a model directory belong to the model and are carried into what is made of it.

Everything but weights, optimizer state, and records of how the weights came about. Python files of a custom
architecture are copied like any other file; nothing here imports or runs them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from btm_scale.checkpoint.formats.locate import TOKENIZER_FILES, read_json
from btm_scale.errors import CheckpointError
from btm_scale.util.bounded_json import parse_json, read_bounded

_WEIGHTS = re.compile(
    r".*\.(?:safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|msgpack|onnx|onnx_data|distcp|npz|nemo|tflite|pkl|pickle|metadata)"
    r"|.*\.(?:safetensors|bin)\.index\.json"
)
_RECORDS = re.compile(
    r"README(?:\.md)?|expert\.json|provenance\.json|state\.json|branch\.json|metrics\.jsonl|mergekit_config\.ya?ml"
    r"|merge_recipe\.yaml|adapter_.*|trainer_state\.json|training_args\..*|optimizer.*|scheduler.*|rng_state.*|latest"
    r"|latest_checkpointed_iteration\.txt|zero_to_fp32\.py|zero_.*|quantize_config\.json|quant_config\.json"
    r"|hf_quant_config\.json|config\.json|modelopt_state.*|all_results\.json|train_results\.json"
    r"|eval_results\.json|run\.yaml"
)
_FOLDERS_LEFT = re.compile(
    r"\..*|__pycache__|checkpoint-\d+|global_step\d+|iter_\d+|runs|wandb|logs|log|tensorboard|original|onnx"
)
_TOKENIZER = re.compile(
    "|".join(map(re.escape, TOKENIZER_FILES))
    + r"|tokenizer_config\.json|special_tokens_map\.json|tekken\.json|tokenizer\.model\..*|.*\.tiktoken|.*\.spm"
    r"|(?:.*\.)?(?:sentencepiece|sp|spiece|bpe|spm)(?:\..*)?\.model|vocab\..*|merges\..*|.*\.vocab|.*_vocab\.json"
)
_TEMPLATE = re.compile(r"chat_template\..*|additional_chat_templates/.*")
# Carried also from a folder around a training checkpoint, which may hold anything else.
_DESCRIBING = re.compile(
    r"generation_config\.json|.*processor_config\.json|processor\.json|(?:LICENSE|LICENCE|NOTICE|COPYING).*"
    r"|(?:configuration|modeling|tokenization|processing)_.*\.py",
    re.IGNORECASE,
)
_MOST_DEPTH = 4


def own_files(folder: Path, *, is_model: bool) -> list[str]:
    """Return the paths of the files to carry from a folder with a config.json, sorted.

    Folders are searched only in a Hugging Face directory (`is_model`), not around a training checkpoint; one with
    weights is another model, unless modules.json of sentence-transformers lists it.
    """
    entries = sorted(folder.iterdir())
    files = [entry.name for entry in entries if entry.is_file() and _is_own(entry.name)]
    if not is_model:
        return [name for name in files if kind_of(name) in ("tokenizer", "template") or _DESCRIBING.fullmatch(name)]
    modules = _modules(folder)
    for below in entries:
        if not below.is_dir() or below.is_symlink() or _FOLDERS_LEFT.fullmatch(below.name):
            continue
        inside = [str(path.relative_to(folder)) for path in _walk(below)]
        if below.name in modules:
            files += inside
        elif not any(_WEIGHTS.fullmatch(PurePosixPath(path).name) for path in inside):
            files += [path for path in inside if not PurePosixPath(path).name.startswith(".")]
    return files


def kind_of(name: str) -> str:
    """Return `tokenizer`, `template`, `code` or `other`: files of one kind come from one model."""
    if _TEMPLATE.fullmatch(name):
        return "template"
    if _TOKENIZER.fullmatch(name):
        return "tokenizer"
    return "code" if name.endswith(".py") else "other"


def template_of(folder: Path) -> str | None:
    """Return the chat template of a model directory, from any of the files that may hold it, or None."""
    try:
        if (folder / "chat_template.jinja").is_file():
            return read_bounded(folder / "chat_template.jinja").decode("utf-8")
        for name in ("tokenizer_config.json", "chat_template.json"):
            template = read_json(folder / name).get("chat_template")
            if isinstance(template, str):
                return template
    except (OSError, ValueError, CheckpointError):
        return None  # a damaged file is copied as it is
    return None


def given_template(path: Path) -> str:
    """Return the chat template in a file (text, or JSON with `chat_template`) or of a model directory.

    Raises `CheckpointError` if there is none.
    """
    remedy = "Give a model directory that has a chat template, or a .jinja file."
    if path.is_dir():
        template = template_of(path)
    else:
        try:
            content = read_bounded(path)
            template = content.decode("utf-8") if path.suffix != ".json" else parse_json(content)["chat_template"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read as a chat template: {error}. {remedy}") from None
    if not isinstance(template, str) or not template.strip():
        raise CheckpointError(f"{path} has no chat template. {remedy}")
    return template


def _is_own(name: str) -> bool:
    return not (name.startswith(".") or _WEIGHTS.fullmatch(name) or _RECORDS.fullmatch(name))


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        depth = len(Path(parent).relative_to(folder).parts)
        folders[:] = sorted(name for name in folders if depth < _MOST_DEPTH and not _FOLDERS_LEFT.fullmatch(name))
        yield from (Path(parent, name) for name in sorted(names) if Path(parent, name).is_file())


def _modules(folder: Path) -> set[str]:
    """Return the folders that sentence-transformers lists in modules.json."""
    path = folder / "modules.json"
    try:
        listed = parse_json(read_bounded(path)) if path.is_file() else []
    except (OSError, ValueError):
        return set()
    entries = listed if isinstance(listed, list) else []
    return {str(entry["path"]) for entry in entries if isinstance(entry, dict) and entry.get("path")}
