"""Convert any readable checkpoint to Hugging Face, Megatron-core or DeepSpeed format."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from btm_scale.checkpoint.completeness import require_complete
from btm_scale.checkpoint.formats.based import base_of, is_completed, require_completed, with_base
from btm_scale.checkpoint.formats.deepspeed_writer import write_model_states
from btm_scale.checkpoint.formats.library import LibraryModel
from btm_scale.checkpoint.formats.megatron import find_shape
from btm_scale.checkpoint.formats.open import format_of, open_model, with_head_names
from btm_scale.checkpoint.formats.quantized import dequantized
from btm_scale.checkpoint.formats.rounded import ALL_FINITE, NonFinite, RoundedModel
from btm_scale.checkpoint.formats.tensors import ModelReader, dtype_name, parse_dtype, same_bits
from btm_scale.checkpoint.formats.torch_dist_writer import write_torch_dist
from btm_scale.checkpoint.formats.universal_writer import verify_universal, write_universal
from btm_scale.checkpoint.formats.weight_sets import weight_sets
from btm_scale.checkpoint.formats.wrapped import unwrapped
from btm_scale.checkpoint.merge.compatibility import is_derived
from btm_scale.checkpoint.merge.journal import only_merge_into
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.checkpoint.merge.sidecars import carry_sidecars
from btm_scale.checkpoint.targets import HUGGINGFACE, TARGETS, UNIVERSAL, require_convertible
from btm_scale.errors import CheckpointError, unknown_name
from btm_scale.util.disk_errors import writing
from btm_scale.util.files import make_partial, partial_path, publish_directory, remove_partial
from btm_scale.util.inside import as_private_as
from btm_scale.util.leftovers import scratch_directory
from btm_scale.util.provenance import Input, Provenance, is_recorded, made_before, same_files
from btm_scale.util.snapshot import Snapshot

WRITERS: dict[str, Callable[..., None]] = {"megatron": write_torch_dist, "deepspeed": write_model_states}
logger = logging.getLogger(__name__)
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class Conversion:
    """A conversion: its target, and whether an earlier call had already written it."""

    target: Path
    already_complete: bool = False
    nonfinite: NonFinite = ALL_FINITE  # elements of the target
    weights: str | None = None  # the set of files that was read from a Hugging Face directory


def convert(
    source: Path,
    target: Path,
    *,
    to: str,
    tensor: int = 1,
    dtype: str | None = None,
    verify: bool = False,
    base: Path | None = None,
) -> Conversion:
    """Write the model in `source` as the directory `target`, with its config and tokenizer.

    `to` is `huggingface`, `megatron` (torch_dist), `deepspeed` (model states) or `universal` (of DeepSpeed, from
    training checkpoints, with Adam's moments); `tensor` is the tensor parallel degree of `megatron` and `deepspeed`.
    With `verify` every tensor is read back and compared, and `target` appears only if all are equal. `base` completes
    an adapter, or a checkpoint without its frozen weights. The same call again after it finished writes nothing.
    Raises `CheckpointError`.
    """
    source, target = with_base(source, base), Path(target)
    if os.path.lexists(target) and not is_recorded(target):
        raise CheckpointError(
            f"{target} already exists. convert does not overwrite: choose another target, or remove it first."
        )
    if to not in TARGETS:
        raise CheckpointError(unknown_name("format", to, TARGETS))
    format_of(source)  # before anything else, because other messages assume a checkpoint
    require_completed(source, base)
    wanted = parse_dtype(dtype) if dtype else None
    settings = {"to": to, "tensor": tensor, "dtype": dtype_name(wanted) if wanted else None}
    sources = [source, *filter(None, [base_of(source) if is_completed(source) else None])]
    before = Snapshot.of(sources)
    write = partial(_write, source, to=to, tensor=tensor, dtype=wanted)
    read = tuple(Input.of(path, besides=target) for path in sources)
    made_by = Provenance(command="convert", inputs=read, settings=settings, answer={"format": to})
    is_same = partial(_would_be_same, write, target)
    if made_before(target, made_by, CheckpointError, is_same=is_same) is not None:
        if verify:
            _verify(source, target, to=to, dtype=wanted)
        return Conversion(target, already_complete=True, weights=_read_from(source))
    unpublished = partial_path(target)
    with only_merge_into(unpublished), writing(target):
        remove_partial(unpublished)
        try:
            nonfinite = write(unpublished)
            if verify:
                _verify(source, unpublished, to=to, dtype=wanted)
            made_by.write_into(unpublished)
            as_private_as(sources, unpublished)
            before.require_unchanged("convert", CheckpointError)
            publish_directory(unpublished, target, synced=to == HUGGINGFACE)
        except Exception:
            remove_partial(unpublished)
            raise
    if nonfinite and to != HUGGINGFACE:  # `merge` has reported its own
        logger.warning("%s", nonfinite.message(target, wanted))
    return Conversion(target, nonfinite=nonfinite, weights=_read_from(source))


def _verify(source: Path, copy: Path, *, to: str, dtype: torch.dtype | None) -> None:
    verify_equal(source, copy, dtype)
    if to == UNIVERSAL:
        verify_universal(source, copy)


def _read_from(source: Path) -> str | None:
    return str(weight_sets(source)) if weight_sets(source) else None


def _would_be_same(write: Callable[[Path], object], target: Path) -> bool:
    """Convert again, beside the target, and return whether that gives the files that the target has."""
    logger.info("Inputs of %s have new modification times: converting them again, to compare.", target)
    with scratch_directory(target) as folder:
        write(folder / target.name)
        return same_files(folder / target.name, target)


def _write(source: Path, directory: Path, *, to: str, tensor: int, dtype: torch.dtype | None) -> NonFinite:
    """Write the converted model into a directory that is not published yet; return what is not finite in it."""
    if to == HUGGINGFACE:
        name = dtype_name(dtype) if dtype else None
        return merge(directory, [(source, 1.0)], dtype=name, with_recipe=False).nonfinite
    with RoundedModel(with_head_names(open_model(source)), dtype) as model:
        require_convertible(model, source, to)
        shape = find_shape(source)
        if tensor not in shape.tensor_degrees():
            raise CheckpointError(
                f"Cannot shard {source} over tensor={tensor}. tensor must divide the attention heads ({shape.heads}), "
                f"KV heads ({shape.kv_heads}) and MLP width ({shape.ffn}): use one of "
                f"{', '.join(map(str, shape.tensor_degrees()))}."
            )
        if to == UNIVERSAL and (tensor != 1 or dtype not in (None, torch.float32)):
            raise CheckpointError(
                "A universal checkpoint has complete float32 tensors, which DeepSpeed shards when it loads them. Leave "
                "--tensor and --dtype out."
            )
        make_partial(directory)
        if to == UNIVERSAL:
            write_universal(directory, source, shape)
        else:
            WRITERS[to](directory, model, shape, tensor=tensor, dtype=dtype)
        specs = {name: spec for name, spec in model.specs().items() if not is_derived(name, model)}
        carry_sidecars([source], directory, specs)
        return model.nonfinite


def _open_independently(path: Path) -> ModelReader:
    """Open a model with the safetensors library if it can read it, and so not with the reader that was converted."""
    if format_of(path) == "safetensors" and path.is_dir():
        return dequantized(unwrapped(LibraryModel(path)))
    return open_model(path)


def verify_equal(source: Path, copy: Path, dtype: torch.dtype | None) -> None:
    """Raise `CheckpointError` unless two models are bit-identical after rounding `source` to `dtype`."""
    with (
        RoundedModel(with_head_names(_open_independently(source)), dtype) as ours,
        with_head_names(_open_independently(copy)) as theirs,
    ):
        require_complete(theirs)  # by config.json, whatever the reader of the source did not find
        names, written = ({name for name in each.names if not is_derived(name, each)} for each in (ours, theirs))
        if odd := sorted(names ^ written):
            raise CheckpointError(
                f"Only one of {copy} and {source} has '{odd[0]}'. The conversion failed: run it again."
            )
        for name in sorted(written):
            elements = ours.spec(name).elements
            step = max(1, _CHUNK_BYTES // ours.spec(name).dtype.itemsize)
            for start in range(0, elements, step):
                stop = min(start + step, elements)
                expected, actual = ours.read_range(name, start, stop), theirs.read_range(name, start, stop)
                if not same_bits(expected, actual):
                    raise CheckpointError(
                        f"'{name}' in {copy} differs from {source} between elements {start} and {stop}. The conversion "
                        "failed: check the disk, and run it again."
                    )
