"""Prepare a run for training: resolve its text once, make the tokenizer, and write each domain's token files."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from btm_scale.config.run import RunConfig
from btm_scale.data.adopt_tokenizer import adopt_tokenizer, begin_with_bos
from btm_scale.data.dedup import keys_elsewhere
from btm_scale.data.encode import Encoder
from btm_scale.data.enough import needed_splits, require_enough
from btm_scale.data.fingerprint import Fingerprint, Source, settings_of
from btm_scale.data.journal import TextChangedError, is_resumable, remove_journal, resumable_directory
from btm_scale.data.progress import SAMPLE, TRAINING, Progress, logged_progress, reported
from btm_scale.data.sources import DomainSource, resolve_sources
from btm_scale.data.splits import Placement, placement_of
from btm_scale.data.token_files import digest_of_text, write_domain
from btm_scale.data.tokenizer import Tokenizer, directory_digest
from btm_scale.data.tokenizer_files import DOCUMENT_START
from btm_scale.data.train_tokenizer import balanced_sample, train_tokenizer
from btm_scale.errors import ConfigError, DataError, GroupFailed, unknown_name
from btm_scale.run_dir import RunDir
from btm_scale.util.cores import visible_cores
from btm_scale.util.files import new_directory, partial_path, remove_partial
from btm_scale.util.locks import held
from btm_scale.util.snapshot import Snapshot

logger = logging.getLogger(__name__)


def prepare(
    config: RunConfig, run: RunDir, on_progress: Progress | None = None, only: Sequence[str] = ()
) -> dict[str, Fingerprint]:
    """Create the tokenizer and token files that do not exist yet; existing ones are checked, not created again.

    `on_progress` is called with how much text has been encoded; by default it is logged. `only` names the domains to
    prepare, by default all: once the tokenizer exists, several processes may prepare different domains at once.

    Returns the fingerprint of each of these domains' token files, in the config's order. Raises ConfigError for an
    unknown domain, DataError for text or a tokenizer that cannot be used, and GroupFailed while another process
    prepares the same text. The shards that were encoded before an error are kept, and the next call resumes after them.
    """
    for name in only:
        if name not in config.all_domains:
            raise ConfigError(unknown_name("domain", name, config.all_domains))
    sources = resolve_sources(config.all_domains, config.text_root)
    # Text that is placed by file, field or position must not be in another split of a domain that is being prepared.
    by_document = all(source.settings.split_by == "document" for source in sources if source.name in only)
    beside_others = bool(only) and by_document and run.tokenizer.is_dir()
    with contextlib.nullcontext() if beside_others else _held_by_us(run.prepare_lock, f"the run in {run.root}"):
        _remove_leftovers(config, run, only)
        chosen = [source.name for source in sources if source.name in only or not only]
        return _prepare(sources, chosen, config, run, on_progress or logged_progress())


@contextlib.contextmanager
def _held_by_us(lock: Path, text: str) -> Iterator[None]:
    with held(lock) as is_ours:
        if not is_ours:
            raise GroupFailed(f"Another process is preparing {text}. Wait until it ends, or stop it.")
        yield


def _prepare(
    sources: Sequence[DomainSource], chosen: Sequence[str], config: RunConfig, run: RunDir, on_progress: Progress
) -> dict[str, Fingerprint]:
    before = {
        source.name: Snapshot.of(file.path for file in source.files) for source in sources if source.name in chosen
    }
    placements = Placements(config)
    _ensure_tokenizer(sources, config, run, placements, on_progress)
    sources = [replace(source, tokenizer=run.tokenizer) for source in sources]
    digest = directory_digest(run.tokenizer)
    own = [source for source in sources if source.name in chosen]
    finished = {source.name: _finished(source, config, run, digest, placements, on_progress) for source in own}
    fingerprints = {name: fingerprint for name, fingerprint in finished.items() if fingerprint is not None}
    waiting = [source for source in own if source.name not in fingerprints]
    if waiting:
        with Encoder(run.tokenizer, config.data.workers or visible_cores()) as encoder:
            for source in waiting:
                arguments = (source, sources, config, run, encoder, on_progress, placements, before[source.name])
                try:
                    fingerprints[source.name] = _encode(*arguments)
                except TextChangedError:  # the journal is removed by now
                    logger.warning("the text of domain '%s' has changed: encoding it from the beginning", source.name)
                    fingerprints[source.name] = _encode(*arguments)
    return {name: fingerprints[name] for name in chosen}


class Placements:
    """How each domain is split, determined when it is first asked for."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._known: dict[str, Placement] = {}

    def of(self, source: DomainSource) -> Placement:
        """Return the placement of a domain. Raises DataError if its text cannot be read."""
        if source.name not in self._known:
            needed = needed_splits(source, self._config)
            self._known[source.name] = placement_of(source, self._config.data, needed)
        return self._known[source.name]


def _remove_leftovers(config: RunConfig, run: RunDir, only: Sequence[str]) -> None:
    """Remove what interrupted processes left of the tokenizer and of the domains in `only`, by default of all.

    What another process is writing, and what can be resumed, stays.
    """
    remove_partial(partial_path(run.tokenizer))
    resumable = {partial_path(run.domain(name)) for name in config.all_domains}
    leftovers = [partial_path(run.domain(name)) for name in only] or run.data.glob(".*.partial")
    for leftover in leftovers:
        # Held while it is removed: a process that begins to encode the domain meanwhile would lose its new folder.
        with held(run.domain_lock(leftover.name.removeprefix(".").removesuffix(".partial"))) as is_ours:
            if is_ours and (leftover not in resumable or not is_resumable(leftover)):
                remove_partial(leftover)
    for name in only or config.all_domains:
        remove_journal(run.domain(name))


def _ensure_tokenizer(
    sources: Sequence[DomainSource], config: RunConfig, run: RunDir, placements: Placements, on_progress: Progress
) -> None:
    existing, bos = config.tokenizer.path, config.tokenizer.bos
    if run.tokenizer.is_dir() and (run.tokenizer / DOCUMENT_START).is_file() != bos:
        documents = "documents without BOS" if bos else "documents with BOS"
        raise _other_tokenizer(run, f"{documents}, and tokenizer.bos is {str(bos).lower()}")
    if existing is not None and run.tokenizer.is_dir():
        if directory_digest(existing) == directory_digest(run.tokenizer):
            return
    elif run.tokenizer.is_dir():
        if (size := Tokenizer.load(run.tokenizer).vocab_size) != config.tokenizer.vocab_size:
            raise _other_tokenizer(
                run, f"{size} tokens, and tokenizer.vocab_size asks for {config.tokenizer.vocab_size}"
            )
        return
    if existing is not None and run.tokenizer.is_dir():
        with tempfile.TemporaryDirectory() as adopted:
            adopt_tokenizer(Path(adopted), existing, bos=bos)
            if directory_digest(Path(adopted)) != directory_digest(run.tokenizer):
                raise _other_tokenizer(run, f"other files than tokenizer.path {existing}")
        return
    with new_directory(run.tokenizer) as directory:
        if existing is not None:
            adopt_tokenizer(directory, existing, bos=bos)
        else:
            sample = config.tokenizer.sample_bytes / 1e6
            tokens = f"{config.tokenizer.vocab_size:,}"
            logger.info("training a tokenizer of %s tokens on up to %.1f MB of text", tokens, sample)
            trained_on = [source for source in sources if source.name in config.domains]
            texts = _Sample(trained_on, config, placements, on_progress)
            train_tokenizer(directory, texts, vocab_size=config.tokenizer.vocab_size)
            if bos:
                begin_with_bos(directory)


class _Sample:
    """The text on which a tokenizer is trained; it can be read several times."""

    def __init__(
        self, sources: Sequence[DomainSource], config: RunConfig, placements: Placements, on_progress: Progress
    ) -> None:
        self._sources, self._config, self._placements, self._report = sources, config, placements, on_progress

    def __iter__(self) -> Iterator[str]:
        most = self._config.tokenizer.sample_bytes
        texts = balanced_sample(self._sources, most, self._config.data, self._placements.of)
        yield from reported(texts, len, SAMPLE, most, self._report)
        self._report(TRAINING, 0, 0, 0)


def _other_tokenizer(run: RunDir, difference: str) -> DataError:
    return DataError(
        f"The tokenizer in {run.tokenizer} has {difference}. All data and models of a run share one tokenizer. "
        "Choose another --out, or restore the former config."
    )


def _finished(
    source: DomainSource,
    config: RunConfig,
    run: RunDir,
    tokenizer: str,
    placements: Placements,
    on_progress: Progress,
) -> Fingerprint | None:
    """Return the fingerprint of a domain's token files, or None if there are none yet.

    Raises DataError if they were made from something else.
    """
    name = source.name
    if not run.fingerprint(name).exists():
        return None
    fingerprint = Fingerprint.of_domain(run, name)
    fingerprint.require_tokenizer(tokenizer, run)
    fingerprint.require_whole(run)
    require_enough(source, config, fingerprint.splits)
    settings, files = settings_of(source, config.data), [Source.of(file) for file in source.files]
    differences = [
        f"{key} was {fingerprint.settings.get(key)!r} and is {settings.get(key)!r}"
        for key in dict.fromkeys([*settings, *fingerprint.settings])
        if fingerprint.settings.get(key) != settings.get(key)
    ]
    if not differences and fingerprint.sources != files:
        # A copied file has a new time; only other text makes it another domain.
        same_names = [file.name for file in fingerprint.sources] == [file.name for file in files]
        if same_names and fingerprint.text == digest_of_text(source, config.data, placements.of(source), on_progress):
            fingerprint = fingerprint.model_copy(update={"sources": files})
            fingerprint.save(run.fingerprint(name))
            return fingerprint
        differences = _changed(fingerprint.sources, files)
    if differences:
        raise DataError(
            f"The token files of domain '{name}' in {run.domain(name)} were made from something else: "
            f"{'; '.join(differences)}. Choose another --out, or delete that folder to encode it again."
        )
    return fingerprint


def _changed(old: list[Source], new: list[Source]) -> list[str]:
    before, after = {file.name: file for file in old}, {file.name: file for file in new}
    changes = [f"{name} is new" for name in after if name not in before]
    changes += [f"{name} is gone" for name in before if name not in after]
    changes += [f"{name} has changed" for name in after if name in before and before[name] != after[name]]
    return changes[:5] + ([f"and {len(changes) - 5} more files"] if len(changes) > 5 else [])


def _encode(
    source: DomainSource,
    sources: Sequence[DomainSource],
    config: RunConfig,
    run: RunDir,
    encoder: Encoder,
    on_progress: Progress,
    placements: Placements,
    before: Snapshot,
) -> Fingerprint:
    placement, final = placements.of(source), run.domain(source.name)
    made_from = json.dumps([encoder.tokenizer.digest, settings_of(source, config.data)])
    with _held_by_us(run.domain_lock(source.name), f"the domain '{source.name}' of the run in {run.root}"):
        # Another process may have finished the domain since this one looked for its fingerprint.
        finished = _finished(source, config, run, encoder.tokenizer.digest, placements, on_progress)
        if finished is not None:
            return finished
        with resumable_directory(final, made_from) as (directory, journal):
            if journal.resumed:
                logger.info("resuming domain '%s': %d shards are encoded", source.name, len(journal.resumed))
            elsewhere = keys_elsewhere(source, sources, run, placement)
            fingerprint = write_domain(source, config, encoder, directory, elsewhere, on_progress, placement, journal)
            before.require_unchanged("prepare", DataError)
            if final.is_dir():  # it has no fingerprint, so it is incomplete
                remove_partial(final)
    return fingerprint
