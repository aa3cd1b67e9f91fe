"""Recipes of mergekit-moe: the MLPs of several models become experts, and everything else is a base model's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Len
from pydantic import BaseModel, ValidationError

from btm_scale.checkpoint.merge.moe import Ingredients, names_of
from btm_scale.checkpoint.merge.recipe import Extras, refuse_recipe, sentence
from btm_scale.util.records import Part
from btm_scale.util.yaml_text import dump_text

_RANDOM = "random"
# Keys of mergekit-moe's YAML that are refused, each with the remedy.
_UNSUPPORTED = {
    "shared_experts": "Mixtures with a shared expert are made of a run's experts: leave it out, or add the models to a "
    "run and use btm-scale upcycle RUN --shared-expert MODEL.",
    "noise_scale": "Weights are copied without noise: leave it out.",
    "residual_scale": "It is for shared experts: leave it out.",
}


class RecipeExpert(Part):
    """A model whose MLPs become an expert. The prompts are for computed gates; random gates ignore them."""

    source_model: str
    positive_prompts: list[str] | None = None
    negative_prompts: list[str] | None = None


class MoeRecipe(Part):
    """A mixture of experts in mergekit-moe's YAML, which ignores the key `btm_scale`."""

    base_model: str
    experts: Annotated[list[RecipeExpert], Len(1)]
    gate_mode: str = "hidden"
    dtype: str | None = None
    experts_per_token: int = 2
    architecture: str | None = None
    btm_scale: Extras = Extras()

    @property
    def model_names(self) -> list[str]:
        """All models, as the recipe gives them, the base model last."""
        return [*(expert.source_model for expert in self.experts), self.base_model]

    def ingredients(self, paths: Mapping[str, Path]) -> Ingredients:
        """Return what the mixture needs besides the models in these directories."""
        names = names_of([paths[expert.source_model] for expert in self.experts])
        return Ingredients(names, rest=paths[self.base_model])

    def text(self) -> str:
        """Return the recipe as YAML."""
        values = self.model_dump(exclude_defaults=True)
        extras = self.btm_scale.model_dump(exclude_defaults=True)
        values["btm_scale"] = self.btm_scale.model_dump(include={"random_seed", "max_shard_bytes"}) | extras
        return dump_text(values)


def is_moe_recipe(values: Mapping[str, Any]) -> bool:
    """Return whether a YAML file is for mergekit-moe rather than for mergekit."""
    return "experts" in values and "merge_method" not in values


def moe_recipe(file: Path, values: Mapping[str, Any]) -> MoeRecipe:
    """Return the recipe of a file with these values. Raises `CheckpointError` that lists every problem."""
    problems = list(_unsupported(values))
    if not problems:
        try:
            recipe = MoeRecipe.model_validate(values, strict=True)
            problems = list(_contradictions(recipe))
        except ValidationError as error:
            problems = [sentence(problem, _KEYS) for problem in error.errors(include_url=False)]
    refuse_recipe(file, problems)
    return recipe


def _unsupported(values: Any) -> Iterator[str]:
    experts = values["experts"] if isinstance(values["experts"], list) else []
    parts = [("", values), *((f"experts.{i}.", one) for i, one in enumerate(experts))]
    for path, part in parts:
        for key, remedy in _UNSUPPORTED.items():
            if isinstance(part, dict) and part.get(key) is not None:
                yield f"{path}{key} is not supported. {remedy}"


def _contradictions(recipe: MoeRecipe) -> Iterator[str]:
    if recipe.gate_mode != _RANDOM:
        yield (
            f"gate_mode is '{recipe.gate_mode}'. Gates are not computed from prompts here. Set gate_mode to "
            f"{_RANDOM}, or give the gates in a file: btm-scale merge OUT A B --method moe --router FILE"
        )
    if recipe.architecture not in (None, "mixtral", "qwen3"):
        yield (
            f"architecture is '{recipe.architecture}'. Mixtures of llama and mistral models are mixtral, and those of "
            "qwen3 models qwen3: leave it out."
        )


_KEYS: Mapping[str, type[BaseModel]] = {"": MoeRecipe, "experts": RecipeExpert, "btm_scale": Extras}
