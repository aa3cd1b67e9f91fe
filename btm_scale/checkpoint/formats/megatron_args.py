"""The config of a model from the arguments that Megatron-LM records in its checkpoints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from btm_scale.checkpoint.formats.fields import Fields
from btm_scale.checkpoint.formats.inert import Inert
from btm_scale.checkpoint.formats.pickles import load_pickle
from btm_scale.errors import CheckpointError
from btm_scale.model.hf_config import config_json
from btm_scale.model.shape import ModelShape, RopeScaling
from btm_scale.util.bounded_json import shown

LEGACY_FILE = "model_optim_rng.pt"
LEGACY_FOLDER = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?")  # tensor, pipeline and expert rank
_COMMON = "common.pt"
# Arguments that change what the weights mean, and that no supported family has.
_UNSUPPORTED = (
    "num_experts",
    "multi_latent_attention",
    "apply_layernorm_1p",
    "rotary_interleaved",
    "window_size",
    "heterogeneous_layers_config_path",
    "hybrid_override_pattern",
    "spec",
    "mtp_num_layers",
)

_OF_LAYERS = (
    "position_embedding_type",
    "normalization",
    "swiglu",
    "add_bias_linear",
    "rotary_percent",
    "bias_gelu_fusion",
)


def legacy_files(folder: Path) -> dict[tuple[int, int], Path]:
    """Return the files of Megatron's format before `torch_dist`, by tensor and pipeline rank; none for other folders.

    Raises `CheckpointError` for those of a mixture of experts.
    """
    files: dict[tuple[int, int], Path] = {}
    for rank in folder.iterdir() if folder.is_dir() else ():
        match = LEGACY_FOLDER.fullmatch(rank.name)
        if match is None or not (rank / LEGACY_FILE).is_file():
            continue
        if match[3]:
            raise CheckpointError(
                f"{folder} was saved with expert parallelism, which cannot be read. Save it with --ckpt-format "
                "torch_dist and without experts."
            )
        files[int(match[1]), int(match[2] or 0)] = rank / LEGACY_FILE
    return files


def recorded_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of the model whose arguments are recorded in a folder; empty if none are.

    Raises `CheckpointError` for a model that is not of a supported family.
    """
    legacy = legacy_files(folder)
    file = min(legacy.items())[1] if legacy else folder / _COMMON
    if not file.is_file():
        return {}
    content = load_pickle(file)
    arguments = content.get("args") if isinstance(content, dict) else None
    if arguments is None:
        return {}
    state = arguments.state if isinstance(arguments, Inert) else arguments
    return config_json(_shape(Fields(state, file, "args.")), dtype="float32", end_of_text=None)


def _shape(arguments: Fields) -> ModelShape:
    get, file = arguments.get, arguments.file
    if present := [name for name in _UNSUPPORTED if get(name)]:
        raise _unsupported(file, f"'{present[0]}' is {shown(get(present[0]))}")
    heads = get("num_attention_heads")
    shared = get("num_query_groups") if get("group_query_attention") else None
    family = _family(arguments)
    sizes: dict[str, Any] = {
        "family": family,
        "layers": get("num_layers"),
        "hidden": get("hidden_size"),
        "heads": heads,
        "kv_heads": heads if shared is None else shared,
        "ffn": get("ffn_hidden_size"),
        "positions": get("max_position_embeddings") or get("seq_length"),
        "vocabulary": get("vocab_size") or get("padded_vocab_size"),
        "tied": not get("untie_embeddings_and_output_weights"),
    }
    optional = {
        "head_size": get("kv_channels"),
        "norm_epsilon": get("norm_epsilon") or get("layernorm_epsilon"),
        "rope_theta": get("rotary_base"),
    }
    given = sizes | {name: value for name, value in optional.items() if value is not None}
    try:
        if get("use_rope_scaling"):
            # Megatron-core's scaling of rotary positions, of which only the factor is an argument.
            factor = get("rope_scaling_factor") or 8.0
            given["rope_scaling"] = RopeScaling.model_validate({"kind": "llama3", "factor": factor}, strict=True)
        return ModelShape.model_validate(given, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{file}: the recorded arguments do not describe a model: {field or 'they'}: {first['msg']}. Put the "
            "config.json of the Hugging Face model beside the checkpoint."
        ) from None


def _family(arguments: Fields) -> str:
    """Return the family whose layers the arguments describe."""
    get = arguments.get
    rotary = get("position_embedding_type") == "rope" or (
        get("position_embedding_type") is None and bool(get("use_rotary_position_embeddings"))
    )
    gated, rms, bias = bool(get("swiglu")), get("normalization") == "RMSNorm", bool(get("add_bias_linear"))
    if rotary and gated and rms and not bias and get("rotary_percent") in (None, 1, 1.0):
        if get("qk_layernorm"):
            if get("add_qkv_bias"):
                raise _unsupported(arguments.file, "it has both add_qkv_bias and qk_layernorm")
            return "qwen3"
        return "qwen2" if get("add_qkv_bias") else "llama"
    learned = get("position_embedding_type") in (None, "learned_absolute") and not rotary
    # Megatron's fused GELU is GPT-2's, by tanh; the one that is not fused is exact.
    tanh = get("bias_gelu_fusion") is not False or get("openai_gelu")
    if learned and tanh and not gated and not rms and bias and not get("qk_layernorm") and not get("squared_relu"):
        return "gpt2"
    described = ", ".join(
        f"{name} {shown(get(name))}"
        for name in (
            "position_embedding_type",
            "normalization",
            "swiglu",
            "add_bias_linear",
            "rotary_percent",
            "bias_gelu_fusion",
        )
    )
    raise _unsupported(arguments.file, described)


def _unsupported(file: Path, fact: str) -> CheckpointError:
    return CheckpointError(
        f"{file} records a model that cannot be read: {fact}. Its layers must be those of GPT-2, Llama, Qwen2 or Qwen3."
    )
