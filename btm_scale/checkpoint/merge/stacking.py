"""The config.json of layers that a recipe stacks: their number, and all that it says of single layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from btm_scale.checkpoint.merge.settings import LAYER_KEYS, is_harmless

Config = Mapping[str, Any]
Layers = Sequence[tuple[Config, int]]
"""For each layer of the output, the config of the model that it is from and its number there."""

_TEXT = ("text_config", "llm_config", "language_config")
# Lists of the numbers of layers; all other lists have one item per layer.
_NUMBERS = (
    "mlp_only_layers",
    "moe_layers",
    "attn_layer_indices",
    "hybrid_layer_ids",
    "cross_attention_layers",
    "full_attn_idxs",
)
# Settings that give layers their kind by number, with the value at which all are of one kind.
_COUNTED = {"num_kv_shared_layers": 0, "first_k_dense_replace": 0, "moe_layer_freq": 1, "decoder_sparse_step": 1}


def stacked_config(config: Config, layers: Layers) -> tuple[dict[str, Any], list[str]]:
    """Return the config of stacked layers, otherwise that of the first model, and what it cannot express.

    What a family derives from the number of a layer, such as sliding windows in each second one, is written out.
    """
    stacked = dict(config)
    if not stacked:
        return stacked, []
    section = _section(stacked)
    if section is None or stacked.get("is_encoder_decoder"):
        keys = ", ".join(LAYER_KEYS)
        return stacked, [
            "config.json does not have the number of layers of one stack of layers. Slices need one of the keys "
            f"{keys}, and models that are not encoder-decoders."
        ]
    own = dict(stacked[section] if section else stacked)
    problems = list(_counted(own, layers))
    own |= {key: len(layers) for key in LAYER_KEYS if key in own}
    complete = {id(config): _part(_completed(config) or config) for config, _ in layers}
    full = [(complete[id(config)], number) for config, number in layers]
    written = _listed([(_part(config), number) for config, number in layers])
    for key in written:
        own[key] = _of_layers(key, full)
        if own[key] is None:
            problems.append(f"`{key}` lists only some layers in a config.json. Give it one item per layer.")
    described = {**stacked, section: own} if section else own
    derived = _part(_completed(described) or {})
    for key in _listed(full):
        if key not in written and _has_one_per_layer(derived.get(key), layers):
            value = _of_layers(key, full)
            own |= {key: value} if value != derived[key] else {}
    return {**stacked, section: own} if section else own, problems


def _section(config: Config) -> str | None:
    """Return the name of the part that describes the language model's layers, "" for the config itself."""
    for name in ("", *_TEXT):
        part = config if name == "" else config.get(name)
        if isinstance(part, Mapping) and any(isinstance(part.get(key), int) for key in LAYER_KEYS):
            return name
    return None


def _part(config: Config) -> Config:
    section = _section(config)
    return config if not section else config[section]


def _completed(config: Config) -> Config | None:
    from btm_scale.model.hf_load import completed_config

    return completed_config(config)


def _count(config: Config) -> int | None:
    return next((config[key] for key in LAYER_KEYS if isinstance(config.get(key), int)), None)


def _listed(layers: Layers) -> list[str]:
    """Return the settings that a config of the layers lists for each layer."""
    return sorted(
        {
            key
            for config, _ in layers
            for key, value in config.items()
            if isinstance(value, list) and not is_harmless(key) and (key in _NUMBERS or len(value) == _count(config))
        }
    )


def _of_layers(key: str, layers: Layers) -> list[Any] | None:
    """Return a list for the stacked layers, or None if a config has none that fits."""
    values = [config.get(key) for config, _ in layers]
    if key in _NUMBERS:
        return [i for i, (value, (_, number)) in enumerate(zip(values, layers, strict=True)) if number in (value or [])]
    if any(
        not isinstance(value, list) or number >= len(value) for value, (_, number) in zip(values, layers, strict=True)
    ):
        return None
    return [value[number] for value, (_, number) in zip(values, layers, strict=True) if isinstance(value, list)]


def _has_one_per_layer(value: Any, layers: Layers) -> bool:
    return isinstance(value, list) and len(value) == len(layers)


def _counted(config: Config, layers: Layers) -> Iterator[str]:
    """Yield a problem for each setting that counts layers, unless all layers keep their numbers."""
    if [number for _, number in layers] == list(range(_count(config) or 0)):
        return
    for key, plain in _COUNTED.items():
        if isinstance(value := config.get(key), int) and value > plain:
            yield (
                f"{key} is {value}, so that the kind of a layer depends on its number, which slices change. Merge full "
                "models with `models`."
            )
