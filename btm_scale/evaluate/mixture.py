"""Predict the best proportions of the domains: measure averages of experts, choose a mixture, record it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from btm_scale.config.run import RunConfig
from btm_scale.evaluate.ablate import Text
from btm_scale.evaluate.mixture_choice import MixtureGoal, choose, domain_weights
from btm_scale.evaluate.mixture_record import ChosenMixture
from btm_scale.evaluate.mixture_runs import Mixture, measure, save_chosen
from btm_scale.evaluate.mixture_trained import related_models
from btm_scale.forest.expert import read_expert
from btm_scale.run_dir import RunDir


def choose_mixture(
    config: RunConfig,
    run: RunDir,
    texts: Mapping[str, Text],
    mixtures: Sequence[Mixture],
    goal: MixtureGoal,
    *,
    random_seed: int = 0,
    device: str = "cpu",
    on_mixture: Callable[[Mixture], None] = lambda mixture: None,
) -> ChosenMixture:
    """Return the mixture with the lowest predicted perplexity, and write it to evaluation/mixture.json.

    Mixtures that are not recorded there yet are measured first. Every model that may be mixed must be in one of
    `mixtures`, as in those of `drawn`. Raises UserError if no mixture meets the limits, and CheckpointError for models
    of different shapes.
    """
    names = sorted({name for mixture in mixtures for name in mixture})
    measured = measure(run, texts, mixtures, device=device, on_mixture=on_mixture)
    cards = {name: read_expert(run.model(name)) for name in names}
    chosen = choose(measured, texts, names, goal, random_seed, related_models(list(texts), cards))
    alone = [] if chosen.mean.trained else [name for name, card in cards.items() if len(card.domains) == 1]
    domains, outside = domain_weights(run, chosen.weights, list(config.expert_domains))
    chosen = chosen.model_copy(
        update={
            "domains": {name: {"weight": weight} for name, weight in domains.items()},
            "outside": outside,
            "unreplayed": tuple(alone),
        }
    )
    save_chosen(run, chosen)
    return chosen
