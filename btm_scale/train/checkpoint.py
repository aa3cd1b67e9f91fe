"""Training checkpoints: what a run resumes from and what branches begin with, in any layout.

A checkpoint is a folder `step-00000100` with one safetensors file and `state.json`, its marker. The tensors have
Hugging Face names and shapes, prefixed with `master/`, `exp_avg/` or `exp_avg_sq/`, so a group of any tensor, data and
ZeRO setting can read what any other wrote.
"""

from __future__ import annotations

import base64
import collections
import hashlib
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from btm_scale.checkpoint.formats.locate import STATE_MARKER
from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.formats.safetensors_writer import SINGLE, ShardedWriter
from btm_scale.checkpoint.formats.tensors import TensorSpec
from btm_scale.errors import CheckpointError
from btm_scale.model.hf_names import table, to_huggingface
from btm_scale.model.hf_weights import gather_whole, huggingface_shapes, local_part
from btm_scale.train.engine import KINDS, MASTER, OUTER, Engine
from btm_scale.util.disk_errors import writing
from btm_scale.util.files import make_partial, partial_path, publish_directory, remove_partial, require_space
from btm_scale.util.records import Record

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """The progress of a job at a checkpoint."""

    step: int
    adam_steps: int
    random_state: str  # state of torch's CPU generator, base64
    loss_scale: dict[str, float] = field(default_factory=dict)  # fp16 only


class _Marker(Record):
    """state.json: the position, and the digest of the tensors."""

    ERROR = CheckpointError
    ABSENT = "{folder} is not a complete checkpoint: it has no state.json. Use another one."
    REMEDY = "Delete {folder}, and training resumes from the checkpoint before it."

    step: int
    adam_steps: int
    random_state: str
    loss_scale: dict[str, int | float] = {}
    sha256: str

    @property
    def position(self) -> Position:
        return Position(self.step, self.adam_steps, self.random_state, self.loss_scale)


def state_path(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return folder / f"step-{step:08d}"


def save_state(engine: Engine, folder: Path, step: int, keep: int) -> None:
    """Write the checkpoint after `step` steps, then delete all but the `keep` newest. All ranks call this together."""
    parameters = engine.parameters

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for entry in table(engine.model.shape):
            for kind in engine.kinds:
                full = gather_whole(entry, engine.full(parameters[entry.megatron], kind), engine.group.tensor_group)
                for name, tensor in to_huggingface(entry, full, engine.model.shape).items():
                    yield f"{kind}/{name}", tensor

    if engine.group.is_first:
        random_state = base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()
        position = Position(step, engine.adam_steps, random_state, engine.loss_scale)
        write_state(engine, folder, position, tensors(), engine.kinds)
        # A newer checkpoint was skipped as damaged; it must not displace a usable one.
        states = (path for path in folder.glob("step-*") if path <= state_path(folder, step))
        for old in sorted(states)[:-keep]:
            shutil.rmtree(old)
    else:
        # Takes part in gathering every tensor on the first rank.
        collections.deque(tensors(), maxlen=0)
    dist.barrier()


def write_state(
    engine: Engine,
    folder: Path,
    position: Position,
    tensors: Iterable[tuple[str, torch.Tensor]],
    kinds: Sequence[str] = KINDS,
) -> None:
    """Write a checkpoint of the engine's shape from `kind/name` and float32 tensors. Only one rank calls this."""
    final = state_path(folder, position.step)
    temporary = partial_path(final)
    specs = {
        f"{kind}/{name}": TensorSpec(torch.float32, size)
        for kind in kinds
        for name, size in huggingface_shapes(engine.model.shape).items()
    }
    require_space(folder, sum(spec.nbytes for spec in specs.values()))
    make_partial(temporary)
    try:
        with writing(final):
            writer = ShardedWriter(temporary, specs, max_shard_bytes=float("inf"))
            for name, tensor in tensors:
                writer.write(name, tensor)
            writer.close()
            digest = _digest(temporary / SINGLE)
            _Marker(**asdict(position), sha256=digest).write(temporary / STATE_MARKER)
            publish_directory(temporary, final, replace=True)
    except OSError:
        # If the disk is full after all, a partial checkpoint would take the space that the next attempt needs.
        remove_partial(temporary)
        raise


def read_position(path: Path) -> Position:
    """Return the progress recorded in a checkpoint. Raises CheckpointError if it is incomplete."""
    return _Marker.load(path / STATE_MARKER).position


def newest_state(folder: Path) -> Path | None:
    """Return the newest intact checkpoint, or None; incomplete and damaged ones are skipped with a message."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        problem = _problem(path)
        if problem is None:
            return path
        logger.warning("%s cannot be used: %s; going back to the state before it", path, problem)
    return None


def common_state(folder: Path) -> Path | None:
    """Return `newest_state` as the group's first rank sees it, so that all ranks resume from the same checkpoint.

    All ranks call this together. A folder that was just published may show up late on another host.
    """
    newest = [newest_state(folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(newest, src=0)
    return newest[0]


def load_state(engine: Engine, path: Path) -> Position:
    """Load a checkpoint into an engine of any layout. Raises CheckpointError if it is of another shape."""
    position = read_position(path)
    with SafetensorsModel(path) as tensors:
        sizes = huggingface_shapes(engine.model.shape)
        expected = {f"{kind}/{name}": size for kind in KINDS for name, size in sizes.items()}
        shapes = {name: spec.shape for name, spec in tensors.specs().items()}
        outer = {name: size for name, size in shapes.items() if name.startswith(f"{OUTER}/")}
        shapes = {name: size for name, size in shapes.items() if name not in outer}
        if shapes != expected:
            differing = next(name for name in sorted({*shapes, *expected}) if shapes.get(name) != expected.get(name))
            raise CheckpointError(
                f"Cannot load {path}: '{differing}' is {shapes.get(differing)} there and {expected.get(differing)} in "
                "this model. A checkpoint fits only a model of its shape. Restore the run's `model`, or use another "
                "--out."
            )
        engine.adam_steps = position.adam_steps
        engine.loss_scale = position.loss_scale
        restore(engine, lambda kind, name: tensors.read(f"{kind}/{name}"), engine.kinds if outer else KINDS)
    return position


def restore(engine: Engine, read: Callable[[str, str], torch.Tensor], kinds: Sequence[str]) -> None:
    """Set every parameter of an engine of any layout from complete tensors.

    `read(kind, name)` returns a tensor by its Hugging Face name, of any float type. Moments not in `kinds` become zero.
    """
    group, shape, parameters = engine.group, engine.model.shape, engine.parameters
    for entry in table(shape):
        state = {}
        for kind in kinds:
            part = local_part(entry, partial(read, kind), shape, group.tensor_rank, group.layout.tensor)
            state[kind] = part.to(group.device, torch.float32)
        for kind in KINDS:
            state.setdefault(kind, torch.zeros_like(state[MASTER]))
        engine.restore(parameters[entry.megatron], state)


def restore_random_state(position: Position) -> None:
    """Restore the state of torch's CPU generator."""
    data = bytearray(base64.b64decode(position.random_state))
    torch.set_rng_state(torch.frombuffer(data, dtype=torch.uint8))


def _problem(path: Path) -> str | None:
    try:
        recorded = _Marker.load(path / STATE_MARKER).sha256
        digest = _digest(path / SINGLE)
    except (OSError, CheckpointError) as error:
        return f"{type(error).__name__}: {error}"
    return None if digest == recorded else f"{SINGLE} differs from its checksum"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(8 << 20):
            yield block
