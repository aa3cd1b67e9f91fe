"""The router of a run's mixture, made by one of the routers of `ROUTERS` and written beside the run's sums."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from btm_scale.config.run import RunConfig
from btm_scale.forest.router import gates
from btm_scale.forest.router_sums import router_sums
from btm_scale.forest.routers import texts_of_expert
from btm_scale.forest.scores import with_sorted_header
from btm_scale.model.shape import ModelShape
from btm_scale.run_dir import MOE, RunDir
from btm_scale.util.files import make_directory, write_file

logger = logging.getLogger(__name__)


def write_router(
    config: RunConfig, run: RunDir, names: Sequence[str], shape: ModelShape, kind: str, device: str
) -> Path:
    """Write the gates that are made of each expert's own sums, unless the file has them; returns its path.

    `kind` is as for `gates`.
    """
    return _write(run, gates(kind, shape, [router_sums(config, run, name, device=device) for name in names]))


def write_routed_router(
    config: RunConfig, run: RunDir, names: Sequence[str], shape: ModelShape, unrouted: Path, device: str
) -> Path:
    """Write the gates that are fitted to a mixture, which has any router, layer by layer; returns the file's path."""
    from btm_scale.forest.routed_router import fitted_routed  # imports torch, which kept sums do not need

    logger.info("fitting the router to the mixture, layer by layer")
    texts = [texts_of_expert(config, run, name) for name in names]
    return _write(run, fitted_routed(unrouted, shape, texts, device))


def _write(run: RunDir, tensors: dict[str, np.ndarray]) -> Path:
    path, content = run.router(MOE), with_sorted_header(save(tensors))
    if not path.is_file() or path.read_bytes() != content:  # an interrupted merge resumes if the file is the same
        make_directory(path.parent)
        write_file(path, content)
    return path
