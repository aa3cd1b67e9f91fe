"""Training checkpoints: what a run resumes from and what branches begin with, in any layout.

A checkpoint is a folder `step-00000100` with one safetensors file and `state.json`, its marker. The tensors have
Hugging Face names and shapes, prefixed with `master/`, `exp_avg/` or `exp_avg_sq/`, so a group of any tensor, data and
ZeRO setting can read what any other wrote.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from btm_scale.checkpoint.formats.locate import STATE_MARKER
from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.formats.safetensors_writer import SINGLE
from btm_scale.checkpoint.formats.tensors import TensorSpec
from btm_scale.distributed.patience import patient_group
from btm_scale.errors import CheckpointError
from btm_scale.model.hf_names import table
from btm_scale.model.hf_weights import huggingface_shapes, local_part
from btm_scale.model.partition import complete_shape
from btm_scale.model.trained import TrainedPart, frozen_names
from btm_scale.train.engine import KINDS, MASTER, OUTER, Engine
from btm_scale.train.jobs import TrainingJob
from btm_scale.train.pieces import Placement, Span
from btm_scale.train.position import Marker, Position, random_state, read_position, state_path, step_of
from btm_scale.train.retention import continues, remove_old_states
from btm_scale.train.state_file import (
    PartWriter,
    equal_part_digest,
    file_digest,
    part_digest,
    require_complete,
)
from btm_scale.util.disk_errors import writing
from btm_scale.util.files import make_partial, partial_path, publish_directory, remove_partial, require_space

logger = logging.getLogger(__name__)

# A tensor's name, a span of it, and its flat float32 elements there by kind.
OwnPiece = tuple[str, Span, Mapping[str, Iterable[torch.Tensor]]]

_LOG_SECONDS = 30.0
_UNSEEN = "not there yet"


class Watch(Protocol):
    """A watchdog of training steps, which must not mistake a long save for a hang."""

    def progress(self) -> None:
        """Note that the work between two steps advances."""

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which this rank waits for others, which are watched themselves."""


def save_state(
    engine: Engine, folder: Path, step: int, keep: int, watch: Watch | None = None, kept: Container[int] = ()
) -> None:
    """Write the checkpoint after `step` steps, then delete all but the `keep` newest and those after `kept` steps.

    All ranks call this together. Every rank writes its part; `watch` is notified of each tensor that is written, and of
    waits for other ranks.
    """
    group, decay_end = engine.group, engine.job.decay_after(step)
    load = tuple(map(tuple, engine.routers.load))
    position = Position(step, engine.adam_steps, random_state(), engine.loss_scale, decay_end, load)
    write_state(engine, folder, position, _own_pieces(engine), engine.kinds, (group.rank, group.size), watch)
    if group.is_first:
        remove_old_states(folder, step, keep, kept)
    _wait(watch)


def write_state(
    engine: Engine,
    folder: Path,
    position: Position,
    pieces: Iterable[OwnPiece],
    kinds: Sequence[str] = KINDS,
    part: tuple[int, int] = (0, 1),
    watch: Watch | None = None,
) -> None:
    """Write a checkpoint of the engine's shape.

    `part`: this rank and the number of ranks, which call this together; by default one rank. The `pieces` of all ranks
    together are every element of every tensor once.
    """
    index, ranks = part
    final = state_path(folder, position.step)
    temporary = partial_path(final)
    specs = {name: TensorSpec(torch.float32, size) for name, size in state_shapes(engine, kinds).items()}
    total = sum(spec.nbytes for spec in specs.values())
    try:
        with writing(final):
            if index == 0:
                require_space(folder, total)
                make_partial(temporary)
                writer = PartWriter(temporary, specs, creates=True)
            if ranks > 1:
                _wait(watch)  # for the file
            if index > 0:
                writer = PartWriter(temporary, specs, creates=False)
            _write_part(writer, pieces, position.step, total / ranks, watch, logs=index == 0)
            parts: list[Any] = [writer.finish()]
            if ranks > 1:
                own, parts = parts[0], [None] * ranks
                with _waiting(watch):
                    dist.gather_object(own, parts if index == 0 else None, dst=0, group=patient_group())
            if index > 0:
                return
            writer.publish(parts)
            Marker(**asdict(position), parts=tuple(parts)).write(temporary / STATE_MARKER)
            publish_directory(temporary, final, replace=True)
    except OSError:
        # If the disk is full after all, a partial checkpoint would take the space that the next attempt needs.
        remove_partial(temporary)
        raise


def _write_part(
    writer: PartWriter,
    pieces: Iterable[OwnPiece],
    step: int,
    size: float,
    watch: Watch | None,
    *,
    logs: bool,
) -> None:
    """Write a rank's part of all tensors, about `size` bytes, and log the progress of a long save."""
    written, logged = 0, time.monotonic()
    for name, span, tensors in pieces:
        written += writer.write(name, span, tensors)
        if watch is not None:
            watch.progress()
        if logs and time.monotonic() - logged > _LOG_SECONDS:
            logged = time.monotonic()
            logger.info(
                "saving the checkpoint of step %d: %.0f%% of %.1f GB per rank", step, 100 * written / size, size / 1e9
            )


def _own_pieces(engine: Engine) -> Iterator[OwnPiece]:
    """Yield what this rank saves: what only it has, and its part of what several ranks have. No rank communicates."""
    group, shape, parameters = engine.group, engine.model.shape, engine.parameters
    tensor = group.layout.tensor
    for entry in table(shape):
        parameter = parameters[entry.megatron]
        parts = {kind: engine.own_part(parameter, kind) for kind in engine.kinds_of(parameter)}
        first, size = parts[MASTER][0], parts[MASTER][1].numel()
        is_divided = engine.is_divided(parameter)
        index, copies = (0, 1) if is_divided else (group.replica_rank, group.layout.replicas)
        if entry.cut is None:
            index, copies = index * tensor + group.tensor_rank, copies * tensor
        placement = Placement(entry, tuple(complete_shape(parameter)), shape, group.tensor_rank, tensor)
        if is_divided:
            start, stop = size * index // copies, size * (index + 1) // copies
            pieces = placement.pieces(first + start, first + stop)
        else:
            start, stop = 0, size
            pieces = placement.share(index, copies)
        for piece in pieces:
            yield piece.name, piece.span, {kind: piece.tiles(part[start:stop]) for kind, (_, part) in parts.items()}


def _wait(watch: Watch | None) -> None:
    with _waiting(watch):
        dist.barrier(patient_group())


def _waiting(watch: Watch | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if watch is None else watch.waiting()


def newest_state(folder: Path) -> Path | None:
    """Return the newest intact checkpoint, or None; incomplete and damaged ones are skipped with a message."""
    return next((path for path in _newest_first(folder) if _usable(path, _problem(path))), None)


def common_state(folder: Path, job: TrainingJob | None = None, *, only: int | None = None) -> Path | None:
    """Return `newest_state` as the group's first rank sees it, so that all ranks resume from the same checkpoint.

    With `job`, checkpoints of a decay that ends earlier than the job's are left out; with `only`, all but that of this
    step. All ranks call this together, and each verifies some parts.
    """
    group, first = patient_group(), dist.get_rank() == 0
    candidates = [_newest_first(folder) if first else []]
    if only is not None:
        candidates = [[path for path in candidates[0] if step_of(path) == only]]
    candidates = [[path for path in candidates[0] if continues(path, job)]]
    dist.broadcast_object_list(candidates, src=0, group=group)
    for path in candidates[0]:
        problems: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, _problem_of_parts(path, dist.get_rank(), dist.get_world_size()), group=group)
        if first and _UNSEEN in problems[1:]:
            # A folder that was just published may show up late on another host.
            problems = [_problem(path)]
        verdict = [next((problem for problem in problems if problem is not None), None)]
        dist.broadcast_object_list(verdict, src=0, group=group)
        if _usable(path, verdict[0], logs=first):
            return path
    return None


def has_checkpoint(folder: Path) -> bool:
    """Return whether the group's first rank sees a checkpoint, complete or not. All ranks call this together."""
    seen = [bool(_newest_first(folder)) if dist.get_rank() == 0 else False]
    dist.broadcast_object_list(seen, src=0, group=patient_group())
    return seen[0]


def load_state(engine: Engine, path: Path) -> Position:
    """Load a checkpoint into an engine of any layout. Raises CheckpointError if its shape differs."""
    position = read_position(path)
    with SafetensorsModel(path) as tensors:
        expected = state_shapes(engine)
        # A parent that was trained completely has moments that an expert with frozen tensors does not need.
        known = state_shapes(engine, part="all")
        shapes = {name: spec.shape for name, spec in tensors.specs().items()}
        outer = {name: size for name, size in shapes.items() if name.startswith(f"{OUTER}/")}
        shapes = {name: size for name, size in shapes.items() if name not in outer}
        differing = next((name for name in sorted(expected.keys() | shapes) if shapes.get(name) != known.get(name)), "")
        if differing:
            raise CheckpointError(
                f"Cannot load {path}: '{differing}' is {shapes.get(differing)} there and {known.get(differing)} in "
                "this model. A checkpoint fits only a model of its shape. Restore the run's `model`, or use another "
                "--out."
            )
        engine.adam_steps = position.adam_steps
        engine.loss_scale = position.loss_scale
        engine.routers.load = position.router_load
        restore(engine, lambda kind, name: tensors.read(f"{kind}/{name}"), engine.kinds if outer else KINDS)
    return position


def state_shapes(
    engine: Engine, kinds: Sequence[str] = KINDS, part: TrainedPart | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's complete tensors by `KIND/NAME`, with the Hugging Face name.

    Tensors outside `part`, by default the part that the engine trains, are frozen and have only their weights.
    """
    shape = engine.model.shape
    frozen = frozen_names(shape, part or engine.job.trains)
    sizes = huggingface_shapes(shape)
    return {
        f"{kind}/{name}": size for kind in kinds for name, size in sizes.items() if kind == MASTER or name not in frozen
    }


def restore(engine: Engine, read: Callable[[str, str], torch.Tensor], kinds: Sequence[str]) -> None:
    """Set every parameter of an engine of any layout from complete tensors.

    `read(kind, name)` returns a tensor by its Hugging Face name, of any float type. Moments not in `kinds` become zero.
    """
    group, shape, parameters = engine.group, engine.model.shape, engine.parameters
    for entry in table(shape):
        state = {}
        own = engine.kinds_of(parameters[entry.megatron])
        for kind in (kind for kind in kinds if kind in own):
            part = local_part(entry, partial(read, kind), shape, group.tensor_rank, group.layout.tensor)
            state[kind] = part.to(group.device, torch.float32)
        for kind in KINDS:
            state.setdefault(kind, torch.zeros_like(state[MASTER]))
        engine.restore(parameters[entry.megatron], state)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _usable(path: Path, problem: str | None, *, logs: bool = True) -> bool:
    if problem is not None and logs:
        logger.warning("%s cannot be used: %s; going back to the state before it", path, problem)
    return problem is None


def _problem(path: Path) -> str | None:
    """Return why a checkpoint is not intact, or None if it is."""
    return _problem_of_parts(path, 0, 1)


def _problem_of_parts(path: Path, rank: int, ranks: int) -> str | None:
    """Return what is wrong with the parts that a rank verifies, every `ranks`-th from its own number, or None."""
    try:
        marker = Marker.load(path / STATE_MARKER)
        if marker.sha256 is not None:
            intact = rank > 0 or file_digest(path) == marker.sha256
        elif digests := marker.equal_parts:
            mine = range(rank, len(digests), ranks)
            intact = all(equal_part_digest(path, i, len(digests)) == digests[i] for i in mine)
        else:
            require_complete(path, marker.parts)
            mine = range(rank, len(marker.parts), ranks)
            intact = all(part_digest(path, p, is_first=i == 0) == p.sha256 for i in mine for p in [marker.parts[i]])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointError) as error:
        missing = not (path / STATE_MARKER).is_file() or isinstance(error, FileNotFoundError)
        return _UNSEEN if rank > 0 and missing else f"{type(error).__name__}: {error}"
    return None if intact else f"{SINGLE} differs from its checksum"
