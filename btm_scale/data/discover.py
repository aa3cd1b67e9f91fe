"""Discover domains: cluster a text collection into one file per cluster and their YAML (c-BTM, arXiv 2303.14177).

The collection is streamed twice: first to cluster a random sample, then to assign every document to its cluster.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, TypeVar

from btm_scale.config.data import DomainConfig
from btm_scale.config.run import RunConfig
from btm_scale.config.yaml import dump_text
from btm_scale.data.clustering import PLACING_CHARACTERS, Clustering
from btm_scale.data.documents import BadLines, Document, expected_bytes_of, read_documents
from btm_scale.data.fingerprint import reading_of
from btm_scale.data.progress import ASSIGNING, CLUSTERING, SAMPLE, Progress, logged_progress, reported
from btm_scale.data.sources import DomainSource, resolve_sources
from btm_scale.errors import DataError
from btm_scale.util.files import new_directory
from btm_scale.util.leftovers import scratch_directory
from btm_scale.util.provenance import Input, Provenance, made_before, same_files
from btm_scale.util.snapshot import Snapshot

logger = logging.getLogger(__name__)

DOMAINS = "domains.yaml"
_AT_ONCE = 512  # documents
_Item = TypeVar("_Item")


def collection_of(paths: Sequence[Path], field: str) -> list[DomainSource]:
    """Return the text to cluster: the training domains of a run's YAML, or files and globs.

    Raises DataError if any path matches no file, and for conversations.
    """
    if len(paths) == 1 and paths[0].suffix in (".yaml", ".yml"):
        config = RunConfig.load(paths[0])
        sources = resolve_sources(config.domains, config.text_root, config.tokenizer.path)
        if chats := [source.name for source in sources if source.settings.chat is not None]:
            raise DataError(
                f"Domain '{chats[0]}' has conversations. Clusters are of documents, and are written as plain text. "
                f"Copy {paths[0]} without it, or keep it as a domain beside the clusters."
            )
        return sources
    text = tuple(str(path) for path in paths)
    return resolve_sources({"collection": DomainConfig(text=text, field=field)}, Path.cwd())


def discover(
    collection: Sequence[DomainSource],
    output: Path,
    *,
    clusters: int,
    sample: int = 20_000,
    dimensions: int = 100,
    random_seed: int = 0,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Cluster a collection into `output`: one `<cluster>.jsonl.gz` each, the clustering, and domains.yaml.

    Only the beginnings of `sample` documents are held in memory. `on_progress` is called with how much text has been
    read; by default it is logged. Returns the contents of each cluster, and after the same call has finished before,
    what it returned with `already_complete`. Raises DataError if there is too little text or `output` is not empty.
    """
    before = Snapshot.of(file.path for source in collection for file in source.files)
    made_by = Provenance(
        command="discover",
        inputs=tuple(Input.of(file.path) for source in collection for file in source.files),
        settings={
            "text": [reading_of(source.settings) for source in collection],
            "clusters": clusters,
            "sample": sample,
            "dimensions": dimensions,
            "random_seed": random_seed,
        },
        answer={},
    )
    watched = _Reported(collection, on_progress or logged_progress())
    fit = partial(_fit, watched, clusters=clusters, sample=sample, dimensions=dimensions, random_seed=random_seed)
    is_same = partial(_would_be_same, watched, fit, output)
    if (made := made_before(output, made_by, DataError, is_same=is_same)) is not None:
        return {"output": str(output), **made.answer, "already_complete": True}
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(
            f"{output} exists already. The output must be new or empty. Choose another --out, or delete it."
        )
    clustering = fit()
    with new_directory(output) as folder:
        contents = _write_clusters(watched, clustering, folder)
        made_by.model_copy(update={"answer": {"clusters": contents}}).write_into(folder)
        before.require_unchanged("discover", DataError)
    return {"output": str(output), "clusters": contents}


class _Reported:
    """A collection that reports how much of it has been read."""

    def __init__(self, sources: Sequence[DomainSource], on_progress: Progress) -> None:
        self.sources, self.report = sources, on_progress

    def documents(self, step: str) -> Iterator[Document]:
        """Yield all documents; the progress is reported as that of `step`."""
        read = (document for source in self.sources for document in read_documents(source, BadLines("error")))
        expected = sum(map(expected_bytes_of, self.sources))
        return reported(read, lambda document: len(document.text), step, expected, self.report)


def _fit(collection: _Reported, *, clusters: int, sample: int, dimensions: int, random_seed: int) -> Clustering:
    """Cluster a sample of a collection."""
    beginnings = (
        (document.text[:PLACING_CHARACTERS], len(document.text.encode())) for document in collection.documents(SAMPLE)
    )
    chosen = random_sample(beginnings, sample, random_seed)
    if not chosen:
        names = ", ".join(source.name for source in collection.sources)
        raise DataError(f"There is no document in {names}. Give files that contain text.")
    texts, sizes = zip(*chosen, strict=True)
    collection.report(CLUSTERING, 0, 0, 0)
    return Clustering.fit(texts, clusters, sizes=sizes, dimensions=dimensions, random_seed=random_seed)


def _write_clusters(collection: _Reported, clustering: Clustering, folder: Path) -> dict[str, Any]:
    """Write the files of a clustering into a folder, and return the contents of each cluster."""
    names = [cluster_name(number) for number in range(len(clustering.centres))]
    counts_by_cluster = _write(
        collection.documents(ASSIGNING), clustering, [folder / f"{name}.jsonl.gz" for name in names]
    )
    contents = {
        name: counts | {"terms": terms}
        for name, counts, terms in zip(names, counts_by_cluster, clustering.typical_terms(), strict=True)
    }
    clustering.save(folder)
    (folder / DOMAINS).write_text(_domains_yaml(contents))
    return contents


def _would_be_same(collection: _Reported, fit: Callable[[], Clustering], output: Path) -> bool:
    """Cluster again, beside the output, and return whether that gives the files that the output has."""
    logger.info("The text of %s has new modification times: clustering it again, to compare.", output)
    with scratch_directory(output) as folder:
        _write_clusters(collection, fit(), folder)
        return same_files(folder, output)


def cluster_name(number: int) -> str:
    """Return the name of a cluster's domain."""
    return f"cluster{number}"


def random_sample(items: Iterable[_Item], size: int, random_seed: int) -> list[_Item]:
    """Return a uniform sample of a stream, in memory for the sample only."""
    chooser = random.Random(random_seed)
    kept: list[_Item] = []
    for number, item in enumerate(items):
        if len(kept) < size:
            kept.append(item)
        elif (place := chooser.randrange(number + 1)) < size:
            kept[place] = item
    return kept


def _write(documents: Iterable[Document], clustering: Clustering, paths: Sequence[Path]) -> list[dict[str, int]]:
    """Write every document to its cluster's file; returns the documents and bytes in each."""
    counts = [{"documents": 0, "bytes": 0} for _ in paths]
    stream = iter(documents)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_compressed(path)) for path in paths]
        while batch := list(islice(stream, _AT_ONCE)):
            places = clustering.assign([document.text for document in batch])
            for document, place in zip(batch, places.tolist(), strict=True):
                # Documents with one split key get one source, which keeps them in one split of the new domain too.
                row = {"text": document.text, "source": document.split_key or document.origin}
                files[place].write(json.dumps(row, ensure_ascii=False) + "\n")
                counts[place]["documents"] += 1
                counts[place]["bytes"] += len(document.text.encode())
    return counts


@contextlib.contextmanager
def _compressed(path: Path) -> Iterator[TextIO]:
    # No time in the header, so that the same collection gives the same bytes.
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8") as text,
    ):
        yield text


def _domains_yaml(clusters: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the `domains` section of a run's YAML."""
    lines = [
        "# Found by btm-scale discover; add a model and a budget, and run it: btm-scale run domains.yaml",
        "domains:",
    ]
    for name, cluster in clusters.items():
        value = dump_text({"text": f"{name}.jsonl.gz", "split_by": {"field": "source"}}, flow=True).strip()
        lines += [f"  # {', '.join(cluster['terms'])}", f"  {name}: {value}"]
    return "\n".join(lines) + "\n"
