"""The router of a run's mixture, by one of the routers of `ROUTERS` that are not drawn."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from safetensors.numpy import save

from btm_scale.checkpoint.merge.moe import ComputedRouter
from btm_scale.config.run import RunConfig
from btm_scale.forest.router import computed
from btm_scale.forest.router_sums import router_sums
from btm_scale.forest.routers import texts_of_expert
from btm_scale.forest.scores import with_sorted_header
from btm_scale.model.shape import ModelShape
from btm_scale.run_dir import MOE, RunDir
from btm_scale.util.files import make_directory, write_file

logger = logging.getLogger(__name__)


def router_of_sums(
    config: RunConfig, run: RunDir, names: Sequence[str], shape: ModelShape, kind: str, device: str
) -> ComputedRouter:
    """Return the router that is made of each expert's own sums, which are computed first if there are none.

    `kind` is as for `computed`.
    """
    return computed(kind, shape, [router_sums(config, run, name, device=device) for name in names])


def write_routed_router(
    config: RunConfig, run: RunDir, names: Sequence[str], shape: ModelShape, unrouted: Path, device: str
) -> Path:
    """Write the gates that are fitted to a mixture, which has any router, layer by layer; returns the file's path."""
    from btm_scale.forest.routed_router import fitted_routed  # imports torch, which kept sums do not need

    logger.info("fitting the router to the mixture, layer by layer")
    texts = [texts_of_expert(config, run, name) for name in names]
    path, content = run.router(MOE), with_sorted_header(save(fitted_routed(unrouted, shape, texts, device)))
    if not path.is_file() or path.read_bytes() != content:  # an interrupted merge resumes if the file is the same
        make_directory(path.parent)
        write_file(path, content)
    return path
