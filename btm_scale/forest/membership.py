"""Add experts from elsewhere to the forest, and remove experts."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from btm_scale.checkpoint.completeness import require_complete
from btm_scale.checkpoint.convert import convert
from btm_scale.checkpoint.formats.based import base_of, is_adapter
from btm_scale.checkpoint.formats.locate import require_no_run, require_path
from btm_scale.checkpoint.formats.quantized import dequantized, quantization_sections
from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.hashing import content_hash, hash_and_keep
from btm_scale.checkpoint.targets import require_untied
from btm_scale.config.run import RunConfig
from btm_scale.data.tokenizer import Tokenizer, same_ids
from btm_scale.errors import CheckpointError, ForestError, UnsupportedModelError, unknown_name
from btm_scale.forest.abandoned import REMOVED, remove_abandoned
from btm_scale.forest.expert import CARD, Expert, is_finished, read_expert
from btm_scale.forest.forest import experts
from btm_scale.forest.methods import require_free_name
from btm_scale.forest.turns import changing_config, current_config, scoring
from btm_scale.model.hf_config import read_config, read_shape
from btm_scale.model.shape import ModelShape
from btm_scale.run_dir import RunDir
from btm_scale.util.files import new_directory, require_space, sync_directory
from btm_scale.util.inside import copy_inside, file_inside
from btm_scale.util.leftovers import scratch_directory
from btm_scale.util.provenance import NAME as PROVENANCE

_PERMISSION = "Make it writable for this user."


def add_expert(config: RunConfig, run: RunDir, source: Path, name: str) -> Expert:
    """Copy a Hugging Face directory into the forest under a new name; returns its card. Raises as `adding` does."""
    with adding(config, run, source, name) as added:
        return added.card


@dataclass(frozen=True)
class Added:
    """An expert from elsewhere, and whether the forest already had it."""

    card: Expert
    is_complete: bool


@contextmanager
def adding(
    config: RunConfig, run: RunDir, source: Path, name: str, score: Callable[[str], None] | None = None
) -> Iterator[Added]:
    """Copy a Hugging Face directory into the forest under a new name; until the block ends, no evaluation begins.

    An adapter is added as the complete model that it and its base are. `score` gets the copy's name before it is part
    of the forest, and leaves its scores under that name; an error in it leaves the forest as it was.

    A model must have the run's tokenizer and vocabulary; its size may differ, and so may its family, if transformers
    has a causal LM of it. Any number of processes may add experts at once. The same model under the same name again is
    not copied. Raises ForestError with the reason if it cannot be an expert of this run.
    """
    try:
        require_free_name(name, "an expert")
    except ValueError as error:
        raise ForestError(f"{error} (--name)") from None
    remove_abandoned(current_config(config, run), run)
    with _complete(run, source) as model, _adding_model(config, run, model, name, score) as added:
        yield added


@contextmanager
def _complete(run: RunDir, source: Path) -> Iterator[Path]:
    """Yield the path of a complete model: `source`, or for an adapter a temporary one in the run's folder."""
    if not is_adapter(source):
        yield source
        return
    try:
        base_of(source)
    except CheckpointError as error:
        raise ForestError(
            f"{error} First make it a complete model: btm-scale convert {source} DST --to huggingface --base DIR"
        ) from None
    with scratch_directory(run.root / source.resolve().name) as folder:
        model = folder / source.resolve().name
        convert(source, model, to="huggingface")
        (model / PROVENANCE).unlink()
        yield model


@contextmanager
def _adding_model(
    config: RunConfig, run: RunDir, source: Path, name: str, score: Callable[[str], None] | None
) -> Iterator[Added]:
    _require_free(current_config(config, run), run, source, name)
    _require_fit(config, run, source)
    with ExitStack() as turn:
        card = None
        if not is_finished(run.model(name)):
            with ExitStack() as publishing, suppress(_AddedMeanwhile), _copied(run, source, name, score) as copy:
                publishing.enter_context(changing_config(run))  # `branch` may claim the name
                turn.enter_context(scoring(run))
                _require_free(current_config(config, run), run, source, name)
                if is_finished(run.model(name)):
                    raise _AddedMeanwhile
                card = copy
        if card is None:
            # Not a second time beside the first: a command that waits to be alone in between would block both forever.
            turn.close()
            turn.enter_context(scoring(run))
            # Another process may have added another model between the first check and the look at the name.
            _require_free(current_config(config, run), run, source, name)
        yield Added(card or read_expert(run.model(name)), is_complete=card is None)


class _AddedMeanwhile(Exception):  # noqa: N818 (it names an event)
    """Another process added the same model under the same name."""


@contextmanager
def _copied(run: RunDir, source: Path, name: str, score: Callable[[str], None] | None) -> Iterator[Expert]:
    """Copy a model and score it aside, and publish both as an expert when the block ends."""
    files = [file_inside(source, file.name) for file in sorted(source.iterdir()) if file.is_file()]
    require_space(run.root, sum(file.stat().st_size for file in files))
    try:
        with new_directory(run.model(name), shared=True) as directory:
            for file in files:
                if file.name != CARD:
                    copy_inside(source, file.name, directory)
            card = _card(source, directory, name)
            card.write(directory / CARD)
            aside = directory.name  # hidden, so that it is not one of the experts
            try:
                if score is not None:
                    score(aside)
                yield card
                _rename_scores(run, aside, name)
            finally:
                shutil.rmtree(run.model_scores(aside), ignore_errors=True)
    except CheckpointError:
        raise ForestError(
            f"Another process added an expert '{name}' to {run.root} at the same time. Choose another --name."
        ) from None


def _rename_scores(run: RunDir, aside: str, name: str) -> None:
    """Give the scores of a model its final name, before the model gets it."""
    if run.model_scores(aside).is_dir():
        if run.model_scores(name).exists():  # of a model that was removed
            shutil.rmtree(run.model_scores(name))
        run.model_scores(aside).rename(run.model_scores(name))
        sync_directory(run.model_scores(name).parent)


def remove_expert(run: RunDir, name: str) -> None:
    """Remove an expert from the forest, with its scores and training checkpoints; nothing else changes.

    Everything is renamed first, so that an error leaves either all of the expert or nothing. Raises ForestError if
    there is no such expert, or with the reason if it cannot be removed.
    """
    if name not in experts(run):
        raise ForestError(unknown_name("expert", name, experts(run)))
    remove_folders([run.model(name), run.model_scores(name), run.train(name)])


def remove_folders(folders: Sequence[Path]) -> None:
    """Remove folders, of which each may be a link or missing: all of them or, if one cannot be renamed, none."""
    renamed: list[tuple[Path, Path]] = []
    try:
        for folder in folders:
            if folder.is_symlink() or folder.exists():
                # Of a link, only the link is renamed and removed: its target is not part of the run.
                target = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{REMOVED}")
                folder.rename(target)
                renamed.append((folder, target))
    except OSError as error:
        for former, target in reversed(renamed):
            target.rename(former)
        raise ForestError(f"Cannot remove {folder}: {error.strerror}. Nothing was removed. {_PERMISSION}") from None
    for parent in {folder.parent for folder in folders if folder.parent.is_dir()}:
        sync_directory(parent)
        for target in sorted(parent.glob(f".*{REMOVED}")):  # also those of a removal that was interrupted
            _delete(target)


def _delete(path: Path) -> None:
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)
    except OSError as error:
        raise ForestError(
            f"Cannot delete {error.filename}: {error.strerror}. It is no longer part of the run, but still on disk. "
            f"{_PERMISSION} Then delete {path}."
        ) from None


def _require_free(config: RunConfig, run: RunDir, source: Path, name: str) -> None:
    """Raise ForestError if the run has another model of this name than the one in `source`."""
    if not is_finished(run.model(name)):
        if name in config.expert_domains:
            raise ForestError(f"'{name}' is already an expert that {run.root} trains. Choose another --name.")
    elif not _is_copy(source, run.model(name)):
        raise ForestError(
            f"The forest of {run.root} already has an expert '{name}' with other weights or a different config than "
            f"{source}. Choose another --name, or remove it first: btm-scale forest remove {run.root} {name}"
        )


def _is_copy(source: Path, expert: Path) -> bool:
    """Return whether an expert has the config and the weights of a model."""
    if not (source / "config.json").is_file():
        return False
    if (source / "config.json").read_bytes() != (expert / "config.json").read_bytes():
        return False
    return content_hash(source) == read_expert(expert).content_hash


def _require_fit(config: RunConfig, run: RunDir, source: Path) -> None:
    try:
        require_path(source)
        require_no_run(source)
    except CheckpointError as error:
        raise ForestError(str(error)) from None
    if not (source / "config.json").is_file():
        raise ForestError(
            f"{source} is not a Hugging Face model directory: it has no config.json. Convert it first: "
            "btm-scale convert SRC DST --to huggingface"
        )
    try:
        shape, rows, longest = _sizes(source)
    except CheckpointError as error:
        raise ForestError(f"Cannot add {source} to the forest. {error}") from None
    with SafetensorsModel(source) as weights:
        if dequantized(weights) is not weights or quantization_sections(read_config(source)):
            raise ForestError(
                f"{source} is quantized. An expert has weights in bf16, fp16 or fp32. Dequantize it first: btm-scale "
                f"convert {source} DST --to huggingface --dtype bfloat16"
            )
        require_complete(weights)
        if shape is not None:
            require_untied(weights, shape)
    if not same_ids(source, run.tokenizer):
        raise ForestError(
            f"{source} has a different tokenizer than {run.root}. Probabilities of different tokens cannot be mixed. "
            "Train an expert with the run's own tokenizer."
        )
    ours = Tokenizer.load(run.tokenizer).vocab_size
    if rows < ours:
        raise ForestError(
            f"{source} has a vocabulary of {rows}, but the run's tokenizer needs {ours}. Train with the run's "
            "tokenizer."
        )
    length = config.budget.sequence_length
    if longest is not None and longest < length:
        raise ForestError(
            f"{source} has learned positions for {longest} tokens, but {run.root} scores blocks of {length}. A model "
            "cannot read beyond its positions. Choose a model with more."
        )


def _sizes(source: Path) -> tuple[ModelShape | None, int, int | None]:
    """Return the shape, or None for a model that transformers computes; its vocabulary; and its learned positions."""
    try:
        shape = read_shape(source)
        return shape, shape.vocabulary, None if shape.rotary else shape.positions
    except UnsupportedModelError:
        from btm_scale.model.hf_decoder import learned_positions, limits_of  # imports transformers

        return None, limits_of(source)[1], learned_positions(source)


def _card(source: Path, copy: Path, name: str) -> Expert:
    digest = hash_and_keep(copy)
    if is_finished(source):
        # Its parents are models of another run, so their names are dropped.
        own = {"name": name, "parents": (), "parent_hashes": {}, "content_hash": digest}
        return read_expert(source).model_copy(update=own)
    return Expert(
        name=name, domains={}, parents=(), tokens=0, steps=0, layout={}, data_fingerprint={}, content_hash=digest
    )
