"""Compare configs by what they mean: every setting, whatever the version of transformers that wrote it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from btm_scale.checkpoint.formats.locate import described_config
from btm_scale.errors import first_few
from btm_scale.util.bounded_json import shown

Settings = dict[str, Any]
"""The settings of a config by dotted name, such as `text_config.hidden_size`."""

# What does not change what the weights compute: bookkeeping, training, generation, labels and implementations.
_HARMLESS_NAMES = (
    "architectures auto_map begin_suppress_tokens cache_implementation chunk_size_feed_forward custom_pipelines "
    "dtype finetuning_task gradient_checkpointing id2label ignore_keys_at_rope_validation init_std "
    "initializer_factor initializer_range is_composition label2id model_max_length name_or_path num_labels "
    "output_attentions output_hidden_states output_router_logits output_scores pretraining_tp problem_type "
    "quantization_config return_dict return_dict_in_generate router_aux_loss_coef router_jitter_noise "
    "router_z_loss_coef reorder_and_upcast_attn suppress_tokens task_specific_params tf_legacy_loss tokenizer_class "
    "tokenizer_model_max_length tokenizer_padding_side torch_dtype torchscript transformers_version trust_remote_code "
    "unsloth_fixed unsloth_version use_bfloat16 use_cache use_flash_attention use_flash_attn layerdrop bad_words_ids "
    "diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty "
    "length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences "
    "prefix remove_invalid_values repetition_penalty temperature top_k top_p typical_p"
)
_HARMLESS = frozenset(_HARMLESS_NAMES.split())
_HARMLESS_KINDS = re.compile(
    r"_.*|summary_.*|.*dropout(?:_prob)?|.*_pdrop|(?:bos|eos|pad|sep|cls|mask|unk|decoder_start|forced_bos|forced_eos)"
    r"_token_id|.*attn_implementation.*|.*experts_implementation.*"
)
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# Approximations of one function; `swish` is the former name of `silu`.
_SAME_ACTIVATION = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}
_FIRST = ("model_type", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head")
_MOST = 8  # settings in one message
_ABSENT = object()
# With these the model computes positions from the length it was trained for.
_LENGTH_MATTERS = ("dynamic", "yarn", "longrope", "su")


def config_problems(paths: Sequence[Path], allow: Sequence[str] = ()) -> list[str]:
    """Return a problem for every config that differs in a setting that changes what the weights compute.

    Settings that `allow` names, in full or by one part of the dotted name, may differ.
    """
    configs = {path: config for path in paths if (config := described_config(path))}
    if not configs:
        return []
    (first, ours), *others = configs.items()
    problems = []
    for path, theirs in others:
        stored = _differences(settings_of(ours), settings_of(theirs))
        if all(is_allowed(key, allow) for key in stored):
            continue  # without the import of transformers
        differing = {
            key: values for key, values in differing_settings(ours, theirs).items() if not is_allowed(key, allow)
        }
        if differing:
            listed = [f"{key} {_shown(one)} and {_shown(other)}" for key, (one, other) in differing.items()]
            problems.append(
                f"The config.json of {first} and {path} differ: {first_few(listed, 'settings', most=_MOST)}. Merge "
                "models of one architecture, or accept a difference with --allow KEY (`allow` in Python)."
            )
    return problems


def is_allowed(key: str, allow: Sequence[str]) -> bool:
    """Whether a dotted name, its end, its beginning or one of its parts is in `allow`."""
    return any(f".{allowed}." in f".{key}." for allowed in allow)


def is_harmless(key: str) -> bool:
    """Whether a setting does not change what the weights compute."""
    return key in _HARMLESS or _HARMLESS_KINDS.fullmatch(key) is not None


def differing_settings(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return both values of every setting in which two configs differ in meaning; an absent one is None."""
    differing = _differences(settings_of(ours), settings_of(theirs))
    if differing and ours.get("model_type") == theirs.get("model_type"):
        from btm_scale.model.hf_load import completed_config

        # The defaults of a family are known to transformers, whose import takes seconds.
        full = completed_config(ours), completed_config(theirs)
        if full[0] is not None and full[1] is not None:
            complete = _differences(settings_of(full[0]), settings_of(full[1]))
            return {key: complete[key] for key in differing if key in complete}
    return {key: pair for key, pair in differing.items() if pair[0] or pair[1]}


def settings_of(config: Mapping[str, Any]) -> Settings:
    """Return the settings that change what weights compute, in the form of transformers 5."""
    return dict(_flat(config, ""))


def _flat(config: Mapping[str, Any], path: str) -> list[tuple[str, Any]]:
    settings = _with_rope_parameters(config)
    if settings.get("use_sliding_window") is False:
        settings = {key: value for key, value in settings.items() if key not in ("sliding_window", "max_window_layers")}
    if not _length_matters(settings):
        settings.pop("max_position_embeddings", None)
    flat: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if is_harmless(key):
            continue
        if key == "rope_parameters":
            flat += _leaves(value, path + key)
        elif isinstance(value, Mapping):
            flat += _flat(value, f"{path}{key}.")
        elif isinstance(value, str) and re.search(r"act(?:ivation)?(?:_function|_fn)?$", key):
            flat.append((path + key, _SAME_ACTIVATION.get(value, value)))
        else:
            flat.append((path + key, value))
    return flat


def _leaves(value: Any, path: str) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        return [(path, value)]
    return [leaf for key, part in value.items() for leaf in _leaves(part, f"{path}.{key}")]


def _with_rope_parameters(config: Mapping[str, Any]) -> Settings:
    """Return a config whose settings of rotary positions are in `rope_parameters`, as transformers 5 writes them."""
    settings = dict(config)
    old = settings.pop("rope_scaling", None)
    rope = settings.pop("rope_parameters", None) or {}
    named = {
        "rope_theta": ("rope_theta", "rotary_emb_base"),
        "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
    }
    top = {}
    for name, keys in named.items():
        for key in keys:
            if (value := settings.pop(key, None)) is not None:
                top[name] = value
    local = settings.pop("rope_local_base_freq", None)
    if not isinstance(rope, Mapping) or not isinstance(old, Mapping | None):
        return settings | {"rope_parameters": rope or old}
    if any(isinstance(value, Mapping) for value in rope.values()):  # one set per kind of layer
        kinds = {kind: _one_rope(part) for kind, part in rope.items() if isinstance(part, Mapping)}
    else:
        one = _one_rope({**top, **(old or {}), **rope})
        if local is None:
            return settings | ({"rope_parameters": one} if one else {})
        kinds = {"full_attention": one, "sliding_attention": _one_rope({"rope_theta": local})}
    return settings | {"rope_parameters": kinds}


def _one_rope(rope: Mapping[str, Any]) -> Settings:
    """Return the parameters of one kind of rotary positions; the default kind is left out."""
    kind = rope.get("rope_type") or rope.get("type")
    rest = {key: value for key, value in rope.items() if key not in ("rope_type", "type") and value is not None}
    if rest.get("partial_rotary_factor") == 1.0:
        del rest["partial_rotary_factor"]
    return rest if kind in (None, "default") else {"rope_type": kind, **rest}


def _length_matters(settings: Settings) -> bool:
    rope = settings.get("rope_parameters")
    kind = rope.get("rope_type") if isinstance(rope, Mapping) else None
    return isinstance(kind, str) and kind in _LENGTH_MATTERS


def _differences(ours: Settings, theirs: Settings) -> dict[str, tuple[Any, Any]]:
    keys = [*(key for key in _FIRST if key in ours or key in theirs), *sorted(ours.keys() | theirs.keys())]
    return {
        key: (ours.get(key), theirs.get(key))
        for key in dict.fromkeys(keys)
        if not _equal(ours.get(key, _ABSENT), theirs.get(key, _ABSENT))
    }


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):  # 1e-5 is 9.999999747378752e-06 in float32
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def _shown(value: object) -> str:
    return "(not set)" if value is None else value if isinstance(value, str) and len(value) < 60 else shown(value)
