"""Everything between a config and training: the tokenizer and each domain's token files."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from btm_scale.config.run import RunConfig
from btm_scale.data.encode import Encoder
from btm_scale.data.files import SourceFile, require_text
from btm_scale.data.fingerprint import Fingerprint, Source, settings_of
from btm_scale.data.token_files import Progress, digest_of_text, keys_elsewhere, require_enough, write_domain
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.data.train_tokenizer import adopt_tokenizer, balanced_sample, train_tokenizer
from btm_scale.errors import DataError, GroupFailed
from btm_scale.run_dir import RunDir
from btm_scale.util.files import new_directory, partial_path
from btm_scale.util.locks import held


def prepare(config: RunConfig, run: RunDir, on_progress: Progress | None = None) -> None:
    """Make the tokenizer and token files that are not there yet; what is there is checked, not made again.

    `on_progress(domain, bytes, documents)` hears how much text has been encoded. Raises DataError; nothing half-written
    is left then. Raises GroupFailed while another process prepares the run, whose files would pass for leftovers.
    """
    files = require_text(config)
    with held(run.root / ".prepare.lock") as is_ours:
        if not is_ours:
            raise GroupFailed(f"another process prepares the run in {run.root}; wait until it ends, or end it")
        _prepare(files, config, run, on_progress or _silent)


def _prepare(files: dict[str, list[SourceFile]], config: RunConfig, run: RunDir, on_progress: Progress) -> None:
    _remove_leftovers(run)
    _ensure_tokenizer(config, run)
    digest = Tokenizer.load(run.tokenizer).digest
    waiting = [name for name in config.all_domains if not _is_done(name, files[name], config, run, digest)]
    if not waiting:
        return
    with Encoder(run.tokenizer, config.data.workers) as encoder:
        for name in waiting:
            _encode(name, config, run, encoder, on_progress)


def _silent(domain: str, encoded_bytes: int, documents: int) -> None:
    pass


def _remove_leftovers(run: RunDir) -> None:
    for leftover in (partial_path(run.tokenizer), *run.data.glob(".*.partial")):
        if leftover.is_dir():
            shutil.rmtree(leftover)


def _ensure_tokenizer(config: RunConfig, run: RunDir) -> None:
    source = config.tokenizer.path
    if source is not None and run.tokenizer.is_dir():
        if Tokenizer.load(source).digest == Tokenizer.load(run.tokenizer).digest:
            return
    elif run.tokenizer.is_dir():
        if (size := Tokenizer.load(run.tokenizer).vocab_size) != config.tokenizer.vocab_size:
            raise _other_tokenizer(
                run, f"{size} tokens, and tokenizer.vocab_size asks for {config.tokenizer.vocab_size}"
            )
        return
    if source is not None and run.tokenizer.is_dir():
        with tempfile.TemporaryDirectory() as adopted:
            adopt_tokenizer(Path(adopted), source)
            if Tokenizer.load(Path(adopted)).digest != Tokenizer.load(run.tokenizer).digest:
                raise _other_tokenizer(run, f"other files than tokenizer.path {source}")
        return
    with new_directory(run.tokenizer) as directory:
        if source is not None:
            adopt_tokenizer(directory, source)
        else:
            train_tokenizer(directory, balanced_sample(config), vocab_size=config.tokenizer.vocab_size)


def _other_tokenizer(run: RunDir, difference: str) -> DataError:
    return DataError(
        f"the tokenizer in {run.tokenizer} has {difference}. All data and models of a run share one: "
        "choose another --out, or set the config back."
    )


def _is_done(name: str, files: list[SourceFile], config: RunConfig, run: RunDir, tokenizer: str) -> bool:
    """Whether a domain's token files are there. Raises DataError if they were made from something else."""
    if not run.fingerprint(name).exists():
        return False
    made = Fingerprint.of_domain(run, name)
    made.require_tokenizer(tokenizer, run)
    made.require_whole(run)
    require_enough(name, config, made.splits)
    domain = config.all_domains[name]
    settings, sources = settings_of(domain, config.data), [Source.of(file) for file in files]
    differences = [
        f"{key} was {made.settings.get(key)!r} and is {value!r}"
        for key, value in settings.items()
        if made.settings.get(key) != value
    ]
    if not differences and made.sources != sources:
        # A copied file has a new time; only another text is another domain.
        same_names = [source.name for source in made.sources] == [source.name for source in sources]
        if same_names and made.text == digest_of_text(name, config):
            made.model_copy(update={"sources": sources}).save(run.fingerprint(name))
            return True
        differences = _changed(made.sources, sources)
    if differences:
        raise DataError(
            f"the token files of domain '{name}' in {run.domain(name)} were made from something else: "
            f"{'; '.join(differences)}. Choose another --out, or delete that folder to encode it again."
        )
    return True


def _changed(old: list[Source], new: list[Source]) -> list[str]:
    before, after = {source.name: source for source in old}, {source.name: source for source in new}
    changes = [f"{name} is new" for name in after if name not in before]
    changes += [f"{name} is gone" for name in before if name not in after]
    changes += [f"{name} has changed" for name in after if name in before and before[name] != after[name]]
    return changes[:5] + ([f"and {len(changes) - 5} more files"] if len(changes) > 5 else [])


def _encode(name: str, config: RunConfig, run: RunDir, encoder: Encoder, on_progress: Progress) -> None:
    with new_directory(run.domain(name)) as directory:
        elsewhere = keys_elsewhere(name, config, run)
        write_domain(name, config, encoder, directory, elsewhere, on_progress)
        if run.domain(name).exists():  # without its fingerprint, so it is nothing
            shutil.rmtree(run.domain(name))
