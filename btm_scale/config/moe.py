"""The section `moe` of a run's YAML: the forest as one mixture of experts, and its joint training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from btm_scale.config.layout import Layout
from btm_scale.config.section import Section, explain
from btm_scale.errors import unknown_name
from btm_scale.model.shape import ModelShape
from btm_scale.run_dir import MOE

if TYPE_CHECKING:
    from btm_scale.config.run import RunConfig


class MoeTrainConfig(Section):
    """Joint training of the mixture on all of its experts' domains, with its own warmup of 10% and decay to 0."""

    budget_share: float = Field(
        default=0.1, ge=0, description="training tokens as a fraction of budget.tokens; 0 trains nothing"
    )
    batch_tokens: int | None = Field(
        default=None, gt=0, description="tokens per step; default: budget.batch_tokens divided by the number of experts"
    )
    parameters: Literal["all", "router"] = Field(default="all", description="the trained part")
    lr_scale: float = Field(default=0.25, gt=0, description="learning rate as a multiple of optimizer.lr")
    router_lr_scale: float = Field(default=3.0, gt=0, description="that of the routers, as a multiple of optimizer.lr")
    z_loss: float = Field(default=1e-3, ge=0, description="weight of the mean squared logsumexp of the routers' logits")
    balance: float = Field(default=0.0, ge=0, description="weight of the load-balancing loss")


class MoeConfig(Section):
    """The experts as one mixture-of-experts model, which is trained jointly; absent without this section."""

    experts: Literal["all"] | tuple[str, ...] = Field(
        default="all", description="the experts of the mixture: all that the run trains, or a list"
    )
    top_k: int = Field(default=2, gt=0, description="experts that compute each token")
    router: Literal["fitted", "fitted-routed", "embedding", "hidden", "random"] = Field(
        default="fitted-routed", description="how the routers begin, as `--router` of upcycle"
    )
    train: MoeTrainConfig = MoeTrainConfig()
    layout: dict[str, Any] = Field(
        default_factory=dict, description="settings that differ from seed_layout; several tensor ranks shard sequences"
    )


def mixture_experts(config: RunConfig) -> list[str]:
    """Return the experts of the run's mixture, sorted; none without the section."""
    if config.moe is None:
        return []
    return sorted(config.expert_domains if config.moe.experts == "all" else config.moe.experts)


def mixture_sequences(config: RunConfig) -> int:
    """Return the sequences per batch of the mixture's joint training."""
    assert config.moe is not None
    own = config.moe.train.batch_tokens
    if own is not None:
        return own // config.budget.sequence_length
    return max(1, config.budget.sequences // len(mixture_experts(config)))


def mixture_layout(config: RunConfig) -> Layout:
    """Return the layout of the mixture's group, whose tensor ranks always shard the sequence too."""
    assert config.moe is not None
    own = dict(config.moe.layout)
    if own.get("precision") == "auto":  # resolved in the layout that it differs from
        del own["precision"]
    settings = config.shared_layout.model_dump() | own | {"sequence_parallel": False}
    layout = Layout.model_validate(settings)
    return layout.model_copy(update={"sequence_parallel": layout.tensor > 1})


def mixture_shape(config: RunConfig, vocabulary: int) -> ModelShape:
    """Return the shape of the mixture. Raises ValueError if the run's models make none."""
    assert config.moe is not None
    shape = config.model.shape(vocabulary, config.budget.sequence_length)
    return shape.mixture(len(mixture_experts(config)), config.moe.top_k)


def mixture_problems(config: RunConfig) -> Iterator[str]:
    """Yield why the section `moe` does not fit the rest of the config, a message for each problem."""
    if config.moe is None:
        return
    names = mixture_experts(config)
    if MOE in config.all_domains:
        yield f"moe: a domain is called '{MOE}', which is the name of a run's mixture of experts. Rename the domain."
    unknown = [name for name in names if name not in config.expert_domains]
    yield from (f"moe.experts: {unknown_name('domain', name, config.expert_domains)}" for name in unknown)
    if len(set(names)) < 2 or len(set(names)) < len(names):
        yield f"moe.experts: {', '.join(names)} are not at least two different experts. Name others, or all."
        return
    yield from (
        f"moe: '{name}' has its own model. The experts of a mixture have one shape: list the others in moe.experts."
        for name in names
        if name in config.experts and config.experts[name].model is not None
    )
    if config.moe.top_k > len(names):
        yield (
            f"moe.top_k is {config.moe.top_k}, and there are {len(names)} experts. A token is computed by at least 1 "
            "and at most all of them: lower it."
        )
        return
    if config.moe.train.parameters == "router" and config.moe.top_k == 1:
        yield (
            "moe.train.parameters: the weight of a token's only expert is 1, so that routers of top_k 1 learn nothing "
            "from the text. Set top_k to 2 or more, or parameters to all."
        )
    if problem := config.budget.batch_problem(config.moe.train.batch_tokens):
        yield f"moe.train: {problem}"
        return
    try:
        shape = mixture_shape(config, vocabulary=1)
    except ValueError as error:
        yield f"moe: {error}"
        return
    try:
        _ = config.shared_layout
    except ValidationError:  # reported as that of seed_layout
        return
    try:
        layout = mixture_layout(config)
    except ValidationError as error:
        yield explain(error, Layout, prefix="moe.layout")
        return
    yield from (f"moe.layout: {problem}" for problem in layout.problems(shape, config.budget.sequence_length))
    yield from (
        f"moe.layout: {problem} Or set moe.train.batch_tokens, which is by default the batch of an expert."
        for problem in layout.batch_problems(mixture_sequences(config))
    )
