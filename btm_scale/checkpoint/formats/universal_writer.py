"""Write training checkpoints as DeepSpeed's universal checkpoints, from which its engine resumes at any ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from btm_scale.checkpoint.formats.locate import STATE_MARKER, read_json
from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.formats.tensors import as_bytes
from btm_scale.checkpoint.formats.training import TrainingState, is_training_state
from btm_scale.errors import CheckpointError, few_names
from btm_scale.model.shape import ModelShape
from btm_scale.util.files import make_directory, require_space

_FILE_OF = {"master": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
_MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")  # of ZeRO 1 and 2; of 3
# DeepSpeed reads one saved parameter group for each of the optimizer's, and copies its settings. These have none, so
# that the optimizer keeps its own.
_GROUPS = 64
_VERSION = "0.16.0"  # of DeepSpeed, whose engine requires that one is recorded


def write_universal(directory: Path, source: Path, shape: ModelShape) -> None:
    """Write the training checkpoint `source` into `directory` under the Hugging Face names of its parameters.

    One tensor is in memory at a time. `convert` publishes the directory. Raises `CheckpointError` for any other source,
    for one that lacks Adam's moments or has the momentum of local steps, and if the disk has too little space.
    """
    step, adam_steps = _position(source)
    with _opened(source) as state:
        names = _parameters(source, state)
        require_space(directory, state.nbytes_as(None))
        make_directory(directory.parent)
        folder = directory / f"global_step{step}"
        for name in names:
            tensors = folder / "zero" / name
            tensors.mkdir(parents=True)
            for kind, file in _FILE_OF.items():
                _save({"param": state.read(f"{kind}/{name}")}, tensors / f"{file}.pt")
            # torch's optimizers count in a tensor, and DeepSpeed's accept one.
            _save(torch.tensor(float(adam_steps)), tensors / "step.pt")
        groups: list[dict[str, Any]] = [{"params": []} for _ in range(_GROUPS)]
        # Under ZeRO 3 all groups share this object: it is a number, because each group would change a tensor.
        common = {"state": {0: {"step": adam_steps}}, "param_groups": groups}
        _save(
            {"ds_version": _VERSION, "param_groups": groups, "optimizer_state_dict": common},
            folder / "zero/optimizer_state.pt",
        )
        shapes = {name: torch.Size(state.spec(f"master/{name}").shape) for name in names}
    for file in _MODEL_STATES:
        _save(_model_states(step, shapes, shape), folder / file)
    (directory / "latest_universal").write_text(folder.name)


def verify_universal(source: Path, directory: Path) -> None:
    """Raise `CheckpointError` unless `directory` has the weights, moments and step of `source`, bit by bit."""
    step, adam_steps = _position(source)
    folder = directory / f"global_step{step}" / "zero"
    with _opened(source) as state:
        for name, kind, file in _files(_parameters(source, state)):
            expected = torch.tensor(float(adam_steps)) if kind is None else state.read(f"{kind}/{name}")
            content = torch.load(folder / name / file, weights_only=True)
            actual = content if kind is None else content["param"]
            if actual.shape != expected.shape or as_bytes(actual) != as_bytes(expected):
                raise CheckpointError(
                    f"{folder / name / file} differs from {source}. The conversion failed: check the disk, and run it "
                    "again."
                )


def require_moments(source: Path) -> None:
    """Raise `CheckpointError` unless `source` has all that `write_universal` writes."""
    _position(source)
    with _opened(source) as state:
        _parameters(source, state)


def _files(names: list[str]) -> Iterator[tuple[str, str | None, str]]:
    """Yield each file of each parameter: name, kind and file name."""
    for name in names:
        yield from ((name, kind, f"{file}.pt") for kind, file in _FILE_OF.items())
        yield name, None, "step.pt"


def _opened(source: Path) -> SafetensorsModel:
    """Open weights and moments. Raises `CheckpointError` if the config does not describe them."""
    TrainingState(source).close()
    return SafetensorsModel(source)


def _position(source: Path) -> tuple[int, int]:
    """Return the numbers of steps that the job and Adam have taken; a branch may carry on its parents' Adam steps."""
    if not is_training_state(source):
        raise CheckpointError(
            f"{source} is not a training checkpoint of btm-scale, so it has no moments to resume from. Give a folder "
            "RUN/train/NAME/checkpoints/step-N, or convert to deepspeed, which takes weights alone."
        )
    marker = read_json(source / STATE_MARKER)
    steps = marker.get("step"), marker.get("adam_steps")
    if not all(type(each) is int and 0 <= each < 1 << 53 for each in steps):
        raise CheckpointError(
            f"{source / STATE_MARKER} has step {steps[0]!r:.40} and adam_steps {steps[1]!r:.40}. Both must be natural "
            "numbers. Use another checkpoint of the run."
        )
    return steps  # type: ignore[return-value]


def _parameters(source: Path, state: SafetensorsModel) -> list[str]:
    """Return the names of all parameters, each of which must have its weights and moments in one shape."""
    kinds: dict[str, set[str]] = {}
    for full in state.names:
        kind, _, name = full.partition("/")
        kinds.setdefault(kind, set()).add(name)
    if others := sorted(kinds.keys() - _FILE_OF.keys()):
        raise CheckpointError(
            f"{source} has tensors of the kind '{others[0]:.40}', because the run takes local steps (sync_every above "
            "1). DeepSpeed's engine has only weights and Adam's moments: convert to huggingface for the weights alone."
        )
    names = sorted(set().union(*kinds.values()))
    lacking = [f"{kind}/{name}" for kind in _FILE_OF for name in names if name not in kinds.get(kind, ())]
    forms = {} if lacking else {name: state.spec(f"master/{name}") for name in names}
    odd = [full for full in state.names if forms and state.spec(full) != forms[full.partition("/")[2]]]
    odd += [name for name, spec in forms.items() if spec.code != "F32"]
    if lacking or odd:
        named = few_names(lacking or odd, "tensors")
        fault = f"lacks {named}" if lacking else f"has {named} in another type or shape"
        raise CheckpointError(
            f"{source} {fault}. A universal checkpoint needs the float32 weights and both moments of every parameter, "
            "in one shape; models with `train: mlp` have no moments of the others. Use another checkpoint, or convert "
            "to huggingface for the weights alone."
        )
    return names


def _model_states(step: int, shapes: dict[str, torch.Size], shape: ModelShape) -> dict[str, Any]:
    tied = {"lm_head.weight": _embedding(shapes)} if shape.tied else {}
    return {
        "module": {},
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [shapes],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": tied,
        "lr_scheduler": {"last_batch_iteration": step - 1},
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": [],
        "skipped_steps": 0,
        "global_steps": step,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": _VERSION,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
    }


def _embedding(names: Iterable[str]) -> str:
    return next(name for name in names if name.endswith(("embed_tokens.weight", "wte.weight")))


def _save(content: object, path: Path) -> None:
    # With an open file, a failed write is an OSError; torch.save(path) would raise a RuntimeError.
    with path.open("wb") as file:
        torch.save(content, file)
