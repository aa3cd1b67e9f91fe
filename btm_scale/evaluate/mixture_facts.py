"""What the results say of a run's mixture of experts besides its perplexity."""

from __future__ import annotations

from btm_scale.config.run import RunConfig
from btm_scale.evaluate.results import Parameters
from btm_scale.forest.expert import Expert, find_expert
from btm_scale.forest.forest import experts
from btm_scale.forest.scores import Scores
from btm_scale.model.hf_config import read_shape
from btm_scale.run_dir import MOE, RunDir


def parameters_of(run: RunDir, model: str) -> Parameters:
    """Return the number of a model's parameters, and of those that compute a token."""
    shape = read_shape(run.model(model))
    return Parameters(total=shape.parameters, active=shape.active_parameters)


def routing_by_domain(config: RunConfig, run: RunDir, mixture: Expert) -> dict[str, dict[str, tuple[float, ...]]]:
    """Return each expert's fraction of the uses by domain, expert and layer, where the scores have recorded it."""
    names = [parent.name for parent in mixture.parents]
    by_domain = {}
    for domain in config.all_domains:
        routing = Scores.load(run.scores(MOE, domain, config.evaluate.split)).routing
        if routing is not None and routing.ndim == 2 and routing.shape[1] == len(names):
            by_domain[domain] = {name: tuple(routing[:, j].tolist()) for j, name in enumerate(names)}
    return by_domain


def routing_entropy_by_domain(config: RunConfig, run: RunDir) -> dict[str, tuple[float, ...]]:
    """Return the mean entropy of each layer's router in nats, by domain, where the scores have recorded it."""
    by_domain = {}
    for domain in config.all_domains:
        scores = Scores.load(run.scores(MOE, domain, config.evaluate.split))
        if scores.routing_entropy is not None and scores.routing_entropy.ndim == 1:
            by_domain[domain] = tuple(scores.routing_entropy.tolist())
    return by_domain


def mixture_note(run: RunDir, mixture: Expert) -> str:
    """Return a sentence on the size and the experts of a mixture, and one if the forest has changed since."""
    size = parameters_of(run, MOE)
    names = [parent.name for parent in mixture.parents]
    note = (
        f"{MOE}: {size.total:,} parameters, of which {size.active:,} compute a token; top {mixture.layout['top_k']} of "
        f"{', '.join(names)}; router {mixture.layout['router']}."
    )
    if (shared := mixture.layout.get("shared_expert")) is not None:
        note = note.removesuffix(".") + f"; shared expert {shared}."
    forest = {name: expert.content_hash for name, expert in experts(run).items()}
    # The shared expert may be a model outside the forest, such as the seed LM.
    others_of = [name for name in mixture.data_fingerprint if name not in names]
    cards = {name: find_expert(run.model(name)) for name in others_of}
    now = forest | {name: card.content_hash for name, card in cards.items() if card is not None}
    if changed := [name for name in [*names, *others_of] if now.get(name) != mixture.data_fingerprint[name]]:
        command = "run CONFIG" if mixture.joint_steps else f"upcycle {run.root}"
        note += f" {', '.join(changed)} changed or left the forest since. Make it again: btm-scale {command}"
    elif others := [name for name in forest if name not in names]:
        note += f" Without {', '.join(others)}."
    return note
