"""Add experts from elsewhere to the forest, and remove experts."""

from __future__ import annotations

import shutil
from pathlib import Path

from btm_scale.checkpoint.formats.locate import require_no_run, require_path
from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.hashing import content_hash
from btm_scale.config.run import RunConfig
from btm_scale.data.tokenizer import Tokenizer, same_ids
from btm_scale.errors import CheckpointError, ForestError, unknown_name
from btm_scale.forest.expert import CARD, Expert, is_finished, read_expert
from btm_scale.forest.forest import experts
from btm_scale.forest.methods import require_free_name
from btm_scale.model.hf_config import read_shape
from btm_scale.run_dir import RunDir
from btm_scale.util.files import new_directory, require_space, sync_directory
from btm_scale.util.inside import copy_inside, file_inside
from btm_scale.util.records import read_object


def add_expert(config: RunConfig, run: RunDir, source: Path, name: str) -> Expert:
    """Copy a Hugging Face directory into the forest under a new name; returns its card.

    It must have the run's tokenizer and vocabulary; its size and family may differ. Any number of processes may add
    experts at once. Raises ForestError with the reason if it cannot be an expert of this run.
    """
    try:
        require_free_name(name, "an expert")
    except ValueError as error:
        raise ForestError(f"{error} (--name)") from None
    final = run.model(name)
    if is_finished(final) or name in config.expert_domains:
        raise ForestError(f"The forest of {run.root} already has an expert '{name}'. Choose another --name.")
    _require_fit(run, source)
    files = [file_inside(source, file.name) for file in sorted(source.iterdir()) if file.is_file()]
    require_space(run.root, sum(file.stat().st_size for file in files))
    try:
        with new_directory(final, shared=True) as directory:
            for file in files:
                if file.name != CARD:
                    copy_inside(source, file.name, directory)
            card = _card(source, directory, name)
            card.write(directory / CARD)
    except CheckpointError:
        raise ForestError(
            f"Another process added an expert '{name}' to {run.root} at the same time. Choose another --name."
        ) from None
    return card


def remove_expert(run: RunDir, name: str) -> None:
    """Remove an expert from the forest, with its scores and training checkpoints; nothing else changes.

    Raises ForestError if there is no such expert.
    """
    if name not in experts(run):
        raise ForestError(unknown_name("expert", name, experts(run)))
    # The card is deleted first: without it, the directory is not an expert, even if this is interrupted.
    if not run.model(name).is_symlink():
        (run.model(name) / CARD).unlink()
        sync_directory(run.model(name))  # before a file that belongs to the card is gone
    for folder in (run.model(name), run.model_scores(name), run.train(name)):
        if folder.is_symlink():  # only the link belongs to the run
            folder.unlink()
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _require_fit(run: RunDir, source: Path) -> None:
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
        read_shape(source)
    except CheckpointError as error:
        raise ForestError(f"Cannot add {source} to the forest. {error}") from None
    with SafetensorsModel(source):
        pass
    if not same_ids(source, run.tokenizer):
        raise ForestError(
            f"{source} has a different tokenizer than {run.root}. Probabilities of different tokens cannot be mixed. "
            "Train an expert with the run's own tokenizer."
        )
    rows = read_object(source / "config.json", ForestError).get("vocab_size", 0)
    ours = Tokenizer.load(run.tokenizer).vocab_size
    if rows < ours:
        raise ForestError(
            f"{source} has a vocabulary of {rows}, but the run's tokenizer needs {ours}. Train with the run's "
            "tokenizer."
        )


def _card(source: Path, copy: Path, name: str) -> Expert:
    digest = content_hash(copy)
    if is_finished(source):
        # Its parents are models of another run, so their names are dropped.
        return read_expert(source).model_copy(update={"name": name, "parents": (), "content_hash": digest})
    return Expert(
        name=name, domains={}, parents=(), tokens=0, steps=0, layout={}, data_fingerprint={}, content_hash=digest
    )
