"""The routers of a mixture by name, and the text that each expert's row is fitted to. Needs no torch."""

from __future__ import annotations

from btm_scale.config.run import RunConfig
from btm_scale.data.eval_text import EvaluationText
from btm_scale.errors import ForestError
from btm_scale.forest.expert import read_expert
from btm_scale.forest.scores import evaluation_text
from btm_scale.run_dir import RunDir

ROUTED = "fitted-routed"  # of the complete mixture; see routed_router.py
ROUTERS = ("fitted", ROUTED, "embedding", "hidden", "random")


def domains_of_expert(config: RunConfig, run: RunDir, name: str) -> list[str]:
    """Return the domains of this run that an expert was trained on. Raises ForestError if there are none."""
    domains = [domain for domain, share in read_expert(run.model(name)).domains.items() if share > 0]
    known = [domain for domain in domains if domain in config.all_domains]
    if not known:
        raise ForestError(
            f"'{name}' was not trained on a domain of {run.root}. A router is fitted to the dev text of the experts' "
            f"domains. Leave it out (--without {name}), or draw the router (--router random)."
        )
    return known


def texts_of_expert(config: RunConfig, run: RunDir, name: str) -> list[EvaluationText]:
    """Return the dev text of an expert's domains. Raises ForestError if there are none."""
    return [evaluation_text(config, run, domain, "dev") for domain in domains_of_expert(config, run, name)]
