"""Verbs that need no run: checkpoints in, checkpoints out."""

from __future__ import annotations

import argparse
from pathlib import Path

from btm_scale.cli.common import Answer, shown
from btm_scale.errors import UserError


def merge(options: argparse.Namespace) -> Answer | None:
    """Merge models into one; under mpirun the first rank alone has an answer."""
    from btm_scale.checkpoint.merge.merge import merge as merge_models
    from btm_scale.config.section import bytes_from_text
    from btm_scale.util.mpi import mpi_rank

    started = mpi_rank()
    done = merge_models(
        options.output,
        [_weighted_path(text) for text in options.inputs],
        method=options.method,
        parameters=dict(_setting(text) for text in options.parameter),
        base=options.base,
        dtype=options.dtype,
        jobs=options.jobs,
        max_shard_bytes=bytes_from_text(options.max_shard_size),
        seed=options.seed,
        mpi=started is not None and started.is_one_of_several,
    )
    if started is not None and started.rank > 0:
        return None
    return shown(
        options,
        {
            "output": str(done.output),
            "method": done.method,
            "tensors": done.tensors,
            "parameters": done.parameters,
            "content_hash": done.content_hash,
            "seconds": round(done.seconds, 2),
        },
    )


def convert(options: argparse.Namespace) -> Answer:
    """Write a checkpoint in another format or tensor layout."""
    from btm_scale.checkpoint.convert import convert as convert_checkpoint

    made = convert_checkpoint(
        options.source,
        options.target,
        to=options.to,
        tensor=options.tensor,
        dtype=options.dtype,
        verify=options.verify,
    )
    return shown(options, {"output": str(made), "format": options.to, "verified": options.verify})


def inspect(options: argparse.Namespace) -> Answer:
    """Say what a checkpoint is, and what it can be turned into."""
    from dataclasses import asdict

    from btm_scale.checkpoint.inspect import inspect as inspect_checkpoint

    found = asdict(inspect_checkpoint(options.path))
    lists = {name: list(found[name]) for name in ("converts_to", "tensor_degrees")}
    return shown(options, found | {"path": str(options.path)} | lists)


def _weighted_path(text: str) -> tuple[Path, float]:
    path, sign, weight = text.rpartition("=")
    if not sign:
        return Path(text), 1.0
    try:
        return Path(path), float(weight)
    except ValueError:
        raise UserError(f"'{text}': the weight after '=' must be a number, such as DIR=0.5") from None


def _setting(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise UserError(f"--parameter {text}: expected NAME=NUMBER, such as density=0.5") from None
