"""Models of one shape as one mixture of experts: their MLPs become its experts, and the rest is averaged.

Every tensor of the mixture is a range of one model's tensor, the mean of all models', or a row of the router, so the
mixture is merged in the same stream and with the same memory as a mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from btm_scale.checkpoint.expected import Shape, expected_tensors
from btm_scale.checkpoint.formats.locate import described_config
from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.formats.tensors import TensorSpec
from btm_scale.checkpoint.merge.noise import uniform
from btm_scale.errors import CheckpointError, few_names
from btm_scale.model.hf_config import config_json, shape_from_config
from btm_scale.model.hf_names import table
from btm_scale.model.shape import ModelShape

EXPERT_NAMES = "expert_names"  # in config.json; in the order of the experts
_EXPERT = re.compile(r"(.*\.mlp\.)experts\.local_experts\.(\d+)\.(.*)")
_SHARED_EXPERT = re.compile(r"(.*\.mlp\.)shared_experts\.(linear_.*)")
# The shared expert's gate of zeros multiplies its output by sigmoid(0). The experts have the other half: it is exact
# except for subnormal numbers, and several times one MLP is that MLP.
_HALF = 0.5
RANDOM_LIMIT = 0.02 * 3**0.5  # of a random router's uniform weights, whose standard deviation is that of other matrices


@dataclass(frozen=True)
class ComputedRouter:
    """A router that is computed gate by gate while the models are merged; it can be sent to other processes.

    `gate` returns the gate [experts, hidden] of this Hugging Face name. `key` changes with all that gates depend on. At
    most `at_once` processes compute gates, for memory. A gate takes as long as copying `bytes_of_gate`.
    """

    key: str
    gate: Callable[[str], np.ndarray] = field(repr=False)
    at_once: int = field(default=1, repr=False)
    bytes_of_gate: int = field(default=0, repr=False)


@dataclass(frozen=True)
class Ingredients:
    """What a mixture needs besides the models: the experts' names, and its router.

    `router` is computed, or a safetensors file with the tensors of the output's gates; None draws them. `shared`: the
    models differ only in their MLPs, so that everything else is copied from the first. `rest`: the model from which it
    is copied instead. `shared_expert`: the model whose MLPs compute every token, beside the experts.
    """

    names: tuple[str, ...]
    router: Path | ComputedRouter | None = None
    shared: bool = False
    rest: Path | None = None
    shared_expert: Path | None = None

    @property
    def others(self) -> list[Path]:
        """The models that are read besides the experts: that of the rest, and that of the shared expert."""
        return [path for path in (self.rest, self.shared_expert) if path is not None]


@dataclass(frozen=True)
class Origin:
    """Where a tensor of the mixture comes from: the input of this index, the mean of all, a router, or zeros.

    `router` is a router's file; `computed` and `random` routers have none. Indices after that of the last input are
    those of the other models of the ingredients. A tensor of an input is multiplied by `scale`.
    """

    tensor: str
    source: int | Literal["mean", "router", "computed", "random", "zeros"]
    scale: float = 1.0


@dataclass(frozen=True)
class Mixture:
    """The model that is made of others, and where its tensors come from. It can be sent to other processes."""

    shape: ModelShape
    names: tuple[str, ...]
    origins: Mapping[str, Origin]
    special_tokens: Mapping[str, Any] = field(default_factory=dict)
    router: ComputedRouter | None = None

    def of_sources(self, indices: Sequence[int]) -> Mixture:
        """Return the mixture with `indices[i]` in place of the index i of a model."""
        origins = {
            name: replace(origin, source=indices[origin.source]) if isinstance(origin.source, int) else origin
            for name, origin in self.origins.items()
        }
        return replace(self, origins=origins)

    def config(self, specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
        """Return its config.json."""
        dtype = next(spec.dtype_name for spec in specs.values() if spec.is_floating_point)
        config = config_json(self.shape, dtype=dtype, end_of_text=None)
        return config | dict(self.special_tokens) | {EXPERT_NAMES: list(self.names)}


def names_of(paths: Sequence[Path]) -> tuple[str, ...]:
    """Return a name for each model: that of its directory, numbered where several have the same."""
    names: list[str] = []
    for name in (path.resolve().name for path in paths):
        number = 2
        unique = name
        while unique in names:
            unique, number = f"{name}-{number}", number + 1
        names.append(unique)
    return tuple(names)


def mixture_of(
    paths: Sequence[Path], specs: Mapping[str, TensorSpec], ingredients: Ingredients, top_k: float
) -> tuple[Mixture, dict[str, TensorSpec]]:
    """Return the mixture of models with these tensors, in the order of `paths`, and its tensors.

    Raises `CheckpointError` for a family without a mixture, an impossible `top_k`, and a router that does not fit.
    """
    config = described_config(paths[0])
    dense = shape_from_config(config, paths[0] / "config.json")
    shape = _mixture_shape(paths[0], dense, len(paths), top_k, ingredients.shared_expert is not None)
    problem = _names_problem(ingredients.names, len(paths))
    if problem:
        raise CheckpointError(problem)
    by_megatron = {entry.megatron: entry.huggingface for entry in table(dense)}
    router = ingredients.router
    gates: Literal["random", "router", "computed"]
    gates = "random" if router is None else "router" if isinstance(router, Path) else "computed"
    rest: int | Literal["mean"] = "mean"
    if ingredients.shared or ingredients.rest is not None:
        rest = 0 if ingredients.rest is None else len(paths)
    origins: dict[str, Origin] = {}
    last = len(paths) + len(ingredients.others) - 1
    for entry in table(shape):
        expert, always = _EXPERT.fullmatch(entry.megatron), _SHARED_EXPERT.fullmatch(entry.megatron)
        scale = _HALF if shape.shared_ffn and entry.megatron.endswith("linear_fc2.weight") else 1.0
        for i, name in enumerate(entry.huggingface):
            if expert is not None:
                origins[name] = Origin(by_megatron[expert[1] + expert[3]][i], int(expert[2]), scale)
            elif always is not None:
                origins[name] = Origin(by_megatron[always[1] + always[2]][i], last)
            elif entry.megatron.endswith((".gate_weight", "_qkv.bias")) and entry.megatron not in by_megatron:
                origins[name] = Origin(name, "zeros")
            elif entry.megatron.endswith(".router.weight"):
                origins[name] = Origin(name, gates)
            else:
                tied = name == "lm_head.weight" and name not in specs
                origins[name] = Origin("model.embed_tokens.weight" if tied else name, rest)
    read = {origin.tensor for origin in origins.values() if origin.source == "mean" or isinstance(origin.source, int)}
    if odd := read ^ specs.keys():
        raise CheckpointError(
            f"{paths[0]} does not have the tensors of a {dense.family} model, but lacks {few_names(odd, 'tensors')} or "
            "has them in addition. A mixture is made of complete models. Save the model again."
        )
    sizes = _sizes(shape)
    floating = next(spec.code for spec in specs.values() if spec.is_floating_point)
    result = {
        name: TensorSpec(specs[origin.tensor].code if origin.tensor in specs else floating, sizes[name])
        for name, origin in origins.items()
    }
    if isinstance(router, Path):
        _require_router(router, result, origins)
    special: dict[str, Any] = {
        key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config
    }
    computed = router if isinstance(router, ComputedRouter) else None
    return Mixture(shape, ingredients.names, origins, special, computed), result


def drawn(limit: float, seed: int, name: str, start: int, stop: int) -> np.ndarray:
    """Return elements [start, stop) of a tensor that no model has, float64: uniform below `limit` in size."""
    if not limit:
        return np.zeros(stop - start)
    return (uniform(f"{seed}/{name}", start, stop) * 2 - 1) * limit


def _sizes(shape: ModelShape) -> dict[str, Shape]:
    """Return the shapes of all tensors by name."""
    expected = expected_tensors(config_json(shape, dtype="float32", end_of_text=None))
    assert expected is not None
    return {f"{expected.prefix}{name}": size for name, size in expected.body.items()} | dict(expected.heads)


def _mixture_shape(path: Path, dense: ModelShape, experts: int, top_k: float, shared_expert: bool) -> ModelShape:
    if top_k != int(top_k) or not 1 <= top_k <= experts:
        raise CheckpointError(
            f"top_k is {top_k:g} and there are {experts} experts. Each token is computed by at least 1 expert and at "
            "most all: change top_k."
        )
    try:
        return dense.mixture(experts, int(top_k), shared_expert=shared_expert)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {error.errors()[0]['msg']}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _names_problem(names: Sequence[str], experts: int) -> str | None:
    if len(names) == experts and len(set(names)) == experts:
        return None
    return f"The experts' names are {', '.join(names)}. {experts} experts need as many different names: rename a model."


def _require_router(path: Path, specs: Mapping[str, TensorSpec], origins: Mapping[str, Origin]) -> None:
    """Raise `CheckpointError` unless a file has the gate of every layer in its shape, and nothing else."""
    with open_model(path) as file:
        theirs = {name: spec.shape for name, spec in file.specs().items()}
    wanted = {name: specs[name].shape for name, origin in origins.items() if origin.source == "router"}
    if theirs != wanted:
        name = next(name for name in sorted({**theirs, **wanted}) if theirs.get(name) != wanted.get(name))
        has, needs = (list(sizes[name]) if name in sizes else "absent" for sizes in (theirs, wanted))
        raise CheckpointError(
            f"{path} is not a router of this mixture: '{name}' is {has} and must be {needs}. A router has the gate "
            "[experts, hidden] of each layer, and no other tensor."
        )
