"""Figures of a run, for the page and for notebooks: functions of results that return a plotly figure.

Each takes `width`, the pixels that the layout is made for; below 600 it is one for phones.
"""

from btm_scale.report.figures.compute import compute
from btm_scale.report.figures.curves import training_loss
from btm_scale.report.figures.matrices import expert_matrix, prior_matrix, routing_map
from btm_scale.report.figures.mixtures import mixture_fit
from btm_scale.report.figures.ratios import perplexity_ratios
from btm_scale.report.figures.trees import forest, lineage

__all__ = [
    "compute",
    "expert_matrix",
    "forest",
    "lineage",
    "mixture_fit",
    "perplexity_ratios",
    "prior_matrix",
    "routing_map",
    "training_loss",
]
