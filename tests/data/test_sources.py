"""Which files a domain's text comes from: resolved once, and the same for every step that reads them."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.text_samples import MakeConfig, prose_texts, python_texts, write_jsonl

from btm_scale.config.data import DomainConfig
from btm_scale.config.run import RunConfig
from btm_scale.data.discover import collection_of, discover
from btm_scale.data.documents import BadLines, read_documents
from btm_scale.data.encode import Encoder
from btm_scale.data.fingerprint import Fingerprint
from btm_scale.data.prepare import prepare
from btm_scale.data.sources import DomainSource, resolve_domain, resolve_sources
from btm_scale.data.splits import placement_of
from btm_scale.data.token_files import digest_of_text, write_domain
from btm_scale.data.train_tokenizer import balanced_sample
from btm_scale.errors import DataError
from btm_scale.run.dry_run import dry_run
from btm_scale.run.slurm import submit_run
from btm_scale.run_dir import SPLITS, RunDir

DOMAINS = {
    "code": {"text": "code/**/*.jsonl", "split_by": {"field": "file"}},
    "prose": {"text": ["prose/*.jsonl"]},
}


def names(root: Path, *text: str) -> list[str]:
    return [file.name for file in resolve_domain("d", DomainConfig(text=text), root).files]


def test_globs_and_lists_give_each_file_once_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b/x.py", "a/deep/y.py", "a/z[1].py", "a/skip.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert names(tmp_path, "b/x.py", "**/*.py") == ["a/deep/y.py", "a/z[1].py", "b/x.py"]
    assert names(tmp_path, "a/z[1].py") == ["a/z[1].py"]
    outside = str(tmp_path / "a" / "skip.txt")
    assert names(tmp_path / "b", str(tmp_path / "a" / "*.txt")) == [outside]


def test_a_file_name_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("some text")
    with pytest.raises(DataError, match=r"the file name '\\udcff.txt' is not UTF-8. Rename the file"):
        names(tmp_path, "*.txt")


def test_every_path_that_matches_nothing_is_reported_at_once_with_its_domain_and_root(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    domains = {"d": DomainConfig(text=("gone/*.txt", "folder")), "e": DomainConfig(text=("law.jsonl",))}
    with pytest.raises(DataError) as caught:
        resolve_sources(domains, tmp_path)
    gone, folder, law = str(caught.value).splitlines()
    assert gone.startswith(f"domain 'd': 'gone/*.txt' matches no file below {tmp_path}")
    assert "only folders. Name files in them, such as 'folder/**/*.txt'" in folder
    assert law.startswith("domain 'e': 'law.jsonl' matches no file")


def test_an_absolute_path_that_matches_nothing_is_not_looked_for_below_the_root(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        resolve_sources({"d": DomainConfig(text=(f"{tmp_path}/gone.txt",))}, tmp_path / "root")
    assert str(caught.value) == f"domain 'd': '{tmp_path}/gone.txt' matches no file. Correct the path."


@pytest.fixture
def globbed(tmp_path: Path, make_config: MakeConfig) -> RunConfig:
    """A run whose domains are globs, one of them split by a field."""
    for folder in ("code/deep", "prose"):
        (tmp_path / "text" / folder).mkdir(parents=True)
    write_jsonl(tmp_path / "text" / "code" / "deep" / "a.jsonl", python_texts(200), file=lambda i: i // 4)
    write_jsonl(tmp_path / "text" / "prose" / "a.jsonl", prose_texts(300))
    return make_config(tmp_path / "text", DOMAINS)


@pytest.fixture
def patterns(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the lookups of each pattern since the counter was last cleared."""
    counts: Counter[str] = Counter()
    lookup = glob.iglob

    def counted(pattern: str, **options: Any) -> Iterator[str]:
        if "site-packages" not in pattern:  # ruamel.yaml looks for its plug-ins
            counts[pattern] += 1
        return lookup(pattern, **options)

    monkeypatch.setattr("btm_scale.data.locations.glob.iglob", counted)
    return counts


def test_every_command_looks_each_glob_up_once(globbed: RunConfig, patterns: Counter[str], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    once = {str(globbed.text_root / path): 1 for domain in globbed.all_domains.values() for path in domain.text}
    commands: list[Callable[[], object]] = [
        lambda: dry_run(globbed, run),
        lambda: submit_run(globbed, run, dry_run=True),
        lambda: prepare(globbed, run),  # the tokenizer, a split by a field, and token files
        lambda: prepare(globbed, run),  # only checks them
    ]
    for command in commands:
        patterns.clear()
        command()
        assert patterns == once


def test_discover_reads_its_collection_twice_from_one_lookup(
    globbed: RunConfig, patterns: Counter[str], tmp_path: Path
) -> None:
    pytest.importorskip("sklearn", reason="discovering domains needs scikit-learn")
    collection = collection_of([globbed.text_root / "**" / "*.jsonl*"], "text")
    answer = discover(collection, tmp_path / "found", clusters=2, sample=100)
    assert sum(cluster["documents"] for cluster in answer["clusters"].values()) == 500
    assert list(patterns.values()) == [1]


def test_a_file_that_appears_while_a_run_is_prepared_is_ignored(
    globbed: RunConfig, make_config: MakeConfig, tmp_path: Path
) -> None:
    undisturbed, run = RunDir(tmp_path / "undisturbed"), RunDir(tmp_path / "run")
    prepare(globbed, undisturbed)

    def add_files(domain: str, size: int, documents: int, expected: int) -> None:
        for folder in ("code", "prose"):
            late = [f"late {text}" for text in prose_texts(50)]
            write_jsonl(globbed.text_root / folder / "late.jsonl", late, file=lambda i: i)

    fingerprints = prepare(globbed, run, add_files)
    for domain in ("code", "prose"):
        assert [Path(file.name).name for file in fingerprints[domain].sources] == ["a.jsonl"]
        for path in undisturbed.domain(domain).iterdir():
            assert path.read_bytes() == (run.domain(domain) / path.name).read_bytes()
    with pytest.raises(DataError, match=r"made from something else: code/late.jsonl is new"):
        prepare(globbed, run)


@pytest.mark.parametrize("on_bad_line", ["error", "skip"])
def test_a_file_that_disappears_while_a_run_is_prepared_is_an_error(
    globbed: RunConfig, tmp_path: Path, on_bad_line: str
) -> None:
    config = globbed.model_copy(update={"data": globbed.data.model_copy(update={"on_bad_line": on_bad_line})})
    run, file = RunDir(tmp_path / "run"), globbed.text_root / "prose" / "a.jsonl"
    with pytest.raises(DataError, match=rf"{file} cannot be read any more \(No such file or directory\)"):
        prepare(config, run, lambda domain, size, documents, expected: file.unlink(missing_ok=True))
    assert run.fingerprint("code").exists()
    assert not run.domain("prose").exists()


def test_every_step_reads_the_files_of_a_source_and_ignores_its_patterns(globbed: RunConfig, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    fingerprints = prepare(globbed, run)
    pattern_matches_nothing = DomainConfig(text=("nowhere/*.jsonl",), split_by=globbed.domains["code"].split_by)
    [code, prose] = resolve_sources(globbed.all_domains, globbed.text_root)
    source = DomainSource("code", code.files, pattern_matches_nothing)
    assert len(list(read_documents(source, BadLines()))) == 200
    assert "".join(balanced_sample([source, prose], 10_000, globbed.data)) == "".join(
        balanced_sample([code, prose], 10_000, globbed.data)
    )
    assert digest_of_text(source, globbed.data, placement_of(source, globbed.data, SPLITS)) == fingerprints["code"].text
    folder = tmp_path / "code"
    folder.mkdir()
    with Encoder(run.tokenizer, 1) as encoder:
        assert write_domain(source, globbed, encoder, folder, {}, lambda *_: None) == fingerprints["code"]
    assert (folder / "train.bin").read_bytes() == run.tokens("code", "train").with_suffix(".bin").read_bytes()


def test_preparing_returns_every_domains_fingerprint_in_the_configs_order(
    globbed: RunConfig, make_config: MakeConfig, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    prepare(make_config(globbed.text_root, {"prose": DOMAINS["prose"]}), run)
    config = make_config(globbed.text_root, {"code": DOMAINS["code"], "prose": DOMAINS["prose"]})
    fingerprints = prepare(config, run)  # code is encoded now, prose was before
    assert list(fingerprints) == ["code", "prose"]
    assert fingerprints == {name: Fingerprint.of_domain(run, name) for name in fingerprints}


@pytest.mark.parametrize("pattern", ["*.jsonl", "b.jsonl"])
def test_a_link_to_a_file_that_is_gone_is_an_error(tmp_path: Path, pattern: str) -> None:
    """Another file that the glob matches must not hide that text is missing."""
    write_jsonl(tmp_path / "a.jsonl", ["text"])
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "blobs" / "b")
    with pytest.raises(DataError, match=r"b\.jsonl is a link to .*blobs/b, which does not exist\. Restore it"):
        resolve_domain("web", DomainConfig(text=(pattern,)), tmp_path)
