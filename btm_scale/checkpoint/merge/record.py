"""What a merge records of itself: the inputs and settings that it was made from, and what is known of its output."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btm_scale.checkpoint.formats.based import base_of, is_completed
from btm_scale.checkpoint.formats.locate import described_in
from btm_scale.checkpoint.formats.rounded import NonFinite
from btm_scale.checkpoint.formats.tensors import DTYPES, parse_code
from btm_scale.checkpoint.merge.carried import given_template
from btm_scale.checkpoint.merge.plan import MergePlan
from btm_scale.checkpoint.merge.sidecars import shown_parameters
from btm_scale.errors import CheckpointError
from btm_scale.util.provenance import Input, Provenance


@dataclass(frozen=True)
class Merged:
    """What is known of an output once it is written."""

    content_hash: str
    nonfinite: NonFinite

    @classmethod
    def of(cls, record: Provenance) -> Merged:
        """Return what the record of an output says."""
        counts = record.answer.get("nonfinite") or {}
        names = {name: counts[name] for name in ("nan", "infinite", "overflowed") if type(counts.get(name)) is int}
        return cls(str(record.answer.get("content_hash", "")), NonFinite(**names))


def chosen_template(given: str | Path | None, base: Path | None, inputs: Sequence[tuple[Path, float]]) -> str | None:
    """Return the chat template that was asked for, or None for that of the inputs. Raises `CheckpointError`."""
    if given is None:
        return None
    if str(given) == "base":
        return given_template(described_in(base or inputs[0][0]))
    if not Path(given).exists():
        raise CheckpointError(f"{given} does not exist. --chat-template takes `base`, a model directory or a file.")
    return given_template(Path(given))


def provenance(
    plan: MergePlan,
    output: Path,
    inputs: Sequence[tuple[Path, float]],
    dtype: str | None,
    template: str | None,
    recipe: str | None,
) -> Provenance:
    """Return the record of a merge, without its answer. Bases are the last inputs."""
    read = {source.path for source in plan.sources}
    made_from = [Input.of(path, weight=weight, besides=output) for path, weight in inputs if path in read]
    bases = dict.fromkeys(bases_of(plan))
    made_from += [Input.of(base, besides=output) for base in bases]
    settings: dict[str, Any] = {
        "method": plan.method_name,
        "parameters": shown_parameters(plan),
        "dtype": DTYPES[parse_code(dtype)][0] if dtype else None,
        "max_shard_bytes": float(plan.max_shard_bytes),
        "seed": plan.seed,
    }
    if template is not None:
        settings["chat_template"] = template
    if (rows := plan.views.rows) is not None:
        settings |= {"tokenizer": rows.choice, "new_rows": "zero" if rows.zero else "mean", "vocabulary": rows.digest}
    if plan.mixture is not None:
        settings["experts"] = list(plan.mixture.names)
        router = plan.mixture.router
        settings["router"] = router.key if router is not None else "random" if plan.base is None else "file"
    elif plan.tensors:
        settings["recipe"] = hashlib.sha256(str(recipe).encode()).hexdigest()
    return Provenance(command="merge", inputs=tuple(made_from), settings=settings, answer={})


def bases_of(plan: MergePlan) -> Iterator[Path]:
    """Yield the models that are read besides the inputs."""
    if plan.base is not None:
        yield plan.base.path
    for source in plan.sources:
        if is_completed(source.path) and (base := base_of(source.path)) is not None:
            yield base
