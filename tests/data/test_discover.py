from __future__ import annotations

import gzip
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_run import tiny_values, write_config
from helpers.warm import Warm

from btm_scale.config.data import DomainConfig
from btm_scale.config.run import RunConfig
from btm_scale.data.clustering import Clustering, balanced_kmeans, squared_distances
from btm_scale.data.discover import DOMAINS, collection_of, discover, random_sample
from btm_scale.data.sources import resolve_domain, resolve_sources
from btm_scale.errors import DataError

KINDS = ("python", "cpp", "licences", "docs")


def rows(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def mixed(real_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four kinds of installed text in one file, in small documents labelled with their kind."""
    folder = tmp_path_factory.mktemp("mixed")
    with (folder / "all.jsonl").open("w") as file:
        for kind in KINDS:
            for line in (real_text / f"{kind}.jsonl").read_text().splitlines():
                text = json.loads(line)["text"]
                for start in range(0, len(text), 3000):
                    file.write(json.dumps({"text": text[start : start + 3000], "kind": kind}) + "\n")
    return folder


@pytest.fixture(scope="module")
def discovered(mixed: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("discovered") / "domains"
    words = ("--clusters", "2", "--out", output, "--sample", "250", "--json")
    done = warm.check("discover", mixed / "all.jsonl", *words)
    assert set(json.loads(done.stdout)["clusters"]) == {"cluster0", "cluster1"}
    return output


def test_clusters_are_balanced_and_separate_code_from_prose(mixed: Path, discovered: Path) -> None:
    kinds = {row["text"]: row["kind"] for row in map(json.loads, (mixed / "all.jsonl").read_text().splitlines())}
    clusters = [rows(discovered / f"cluster{number}.jsonl.gz") for number in range(2)]
    assert sorted(row["text"] for cluster in clusters for row in cluster) == sorted(
        json.loads(line)["text"] for line in (mixed / "all.jsonl").read_text().splitlines()
    )
    sizes = [sum(len(row["text"]) for row in cluster) for cluster in clusters]
    assert max(sizes) < 1.25 * min(sizes)
    of_code = [Counter(kinds[row["text"]] in ("python", "cpp") for row in cluster) for cluster in clusters]
    shares = sorted(count[True] / count.total() for count in of_code)
    assert shares[0] < 0.2
    assert shares[1] > 0.8


def test_discover_writes_a_valid_config(discovered: Path) -> None:
    config = RunConfig.load(discovered / DOMAINS)
    assert list(config.domains) == ["cluster0", "cluster1"]
    assert all((config.text_root / domain.text[0]).is_file() for domain in config.domains.values())


def test_a_loaded_clustering_assigns_the_same_clusters(mixed: Path, discovered: Path) -> None:
    clustering = Clustering.load(discovered)
    texts = [json.loads(line)["text"] for line in (mixed / "all.jsonl").read_text().splitlines()][::7]
    written = {row["text"]: number for number in range(2) for row in rows(discovered / f"cluster{number}.jsonl.gz")}
    assert clustering.assign(texts).tolist() == [written[text] for text in texts]


def test_clusters_of_unequal_blobs_hold_equal_mass() -> None:
    random = np.random.default_rng(0)
    blobs = [random.normal(centre, 0.05, size=(count, 2)) for centre, count in ((0.0, 700), (1.0, 200), (2.0, 100))]
    points = np.concatenate(blobs).astype(np.float32)
    masses = random.uniform(0.5, 1.5, len(points))
    centres, prices = balanced_kmeans(points, masses / masses.sum(), 4, random_seed=0)
    chosen = np.argmin(squared_distances(points, centres) - prices, axis=1)
    shares = np.bincount(chosen, weights=masses, minlength=4) / masses.sum()
    assert shares == pytest.approx(0.25, abs=0.02)


def test_a_sample_of_a_stream_is_uniform() -> None:
    counts = Counter(item for seed in range(2000) for item in random_sample(range(10), 3, seed))
    assert all(count == pytest.approx(600, abs=100) for count in counts.values())
    assert random_sample(range(2), 3, 0) == [0, 1]


def test_the_domains_of_a_run_can_be_clustered_again(real_text: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", tiny_values(real_text))
    collection = resolve_sources(config.domains, config.text_root)
    answer = discover(collection, tmp_path / "out", clusters=2, sample=100)
    clusters_by_name = answer["clusters"].values()
    assert sum(cluster["documents"] for cluster in clusters_by_name) > 50
    assert all(cluster["terms"] for cluster in clusters_by_name)
    again = discover(collection, tmp_path / "again", clusters=2, sample=100)
    assert again["clusters"] == answer["clusters"]
    for name in ("cluster0", "cluster1"):
        assert (tmp_path / "out" / f"{name}.jsonl.gz").read_bytes() == (
            tmp_path / "again" / f"{name}.jsonl.gz"
        ).read_bytes()


def test_the_same_collection_again_is_already_complete_and_another_is_refused(mixed: Path, tmp_path: Path) -> None:
    collection = collection_of([mixed / "all.jsonl"], "text")
    answer = discover(collection, tmp_path / "out", clusters=2, sample=100)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    again = discover(collection, tmp_path / "out", clusters=2, sample=100)
    assert again == {**answer, "already_complete": True}
    with pytest.raises(DataError, match="already exists, and clusters was 2 and is now 3"):
        discover(collection, tmp_path / "out", clusters=3, sample=100)
    (tmp_path / "all.jsonl").write_text((mixed / "all.jsonl").read_text() * 2)
    with pytest.raises(DataError, match=r"all\.jsonl has changed since"):
        discover(collection_of([tmp_path / "all.jsonl"], "text"), tmp_path / "out", clusters=2, sample=100)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before


def test_a_collection_that_was_only_touched_is_complete(mixed: Path, tmp_path: Path) -> None:
    text = tmp_path / "all.jsonl"
    shutil.copy(mixed / "all.jsonl", text)
    answer = discover(collection_of([text], "text"), tmp_path / "out", clusters=2, sample=100)
    os.utime(text, (1, 1))
    again = discover(collection_of([text], "text"), tmp_path / "out", clusters=2, sample=100)
    assert again == {**answer, "already_complete": True}
    content = text.read_bytes()
    text.write_bytes(content.replace(b"the", b"teh"))
    with pytest.raises(DataError, match=r"all\.jsonl has changed since"):
        discover(collection_of([text], "text"), tmp_path / "out", clusters=2, sample=100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.jsonl", "out"]


def test_text_that_changes_while_it_is_clustered_is_refused(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "all.jsonl"
    shutil.copy(mixed / "all.jsonl", text)
    plain = Clustering.save

    def appending(clustering: Clustering, folder: Path) -> None:
        plain(clustering, folder)
        with text.open("a") as file:
            file.write('{"text": "a line of a crawler that still runs"}\n')

    monkeypatch.setattr(Clustering, "save", appending)
    with pytest.raises(DataError, match=r"all\.jsonl was changed while discover read it"):
        discover(collection_of([text], "text"), tmp_path / "out", clusters=2, sample=100)
    assert list(tmp_path.iterdir()) == [text]


def test_too_little_text_and_a_nonempty_output_are_errors(tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text('{"text": "one word"}\n{"text": "another word"}\n')
    collection = [resolve_domain("few", DomainConfig(text=("few.jsonl",)), tmp_path)]
    with pytest.raises(DataError, match="4 documents for each"):
        discover(collection, tmp_path / "out", clusters=2)
    assert list(tmp_path.iterdir()) == [tmp_path / "few.jsonl"]
    with pytest.raises(DataError, match="exists already"):
        discover(collection, tmp_path, clusters=2)
    with pytest.raises(DataError, match="no clustering in"):
        Clustering.load(tmp_path)


def test_conversations_are_not_clustered(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    values = tiny_values(tmp_path)
    values["domains"] = {"support": {"text": str(tmp_path / "chats.jsonl"), "chat": "messages"}}
    write_config(tmp_path / "run.yaml", values)
    with pytest.raises(DataError, match="Domain 'support' has conversations"):
        collection_of([tmp_path / "run.yaml"], "text")
