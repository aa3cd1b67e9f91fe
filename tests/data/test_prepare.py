"""From a config to token files: what is created, what is kept, and an error for everything that can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.text_samples import CODE, PROSE, MakeConfig, prose_texts, python_texts, write_jsonl
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from btm_scale.config.run import RunConfig
from btm_scale.data.fingerprint import Fingerprint
from btm_scale.data.prepare import prepare
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.data.train_tokenizer import train_tokenizer
from btm_scale.errors import DataError, GroupFailed
from btm_scale.run_dir import SPLITS, RunDir
from btm_scale.util.locks import held


def texts_of(run: RunDir, domain: str, split: str) -> list[str]:
    """Return the documents of a token file as text."""
    tokenizer = Tokenizer.load(run.tokenizer)
    documents = IndexedDataset(str(run.tokens(domain, split)))
    for document in documents:
        assert document[-1] == tokenizer.eos
    return [tokenizer.decode(document[:-1].tolist()) for document in documents]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_document_is_in_one_split_and_is_decoded_exactly(
    prepared: tuple[RunConfig, RunDir], text_root: Path
) -> None:
    _, run = prepared
    for domain in ("code", "prose"):
        given = [json.loads(line)["text"] for line in (text_root / f"{domain}.jsonl").read_text().splitlines()]
        splits = {split: texts_of(run, domain, split) for split in SPLITS}
        assert sorted(text for texts in splits.values() for text in texts) == sorted(given)
        # Within a split, documents keep the order of the files.
        assert [text for text in given if text in set(splits["train"])] == splits["train"]
        fingerprint = Fingerprint.of_domain(run, domain)
        for split, texts in splits.items():
            assert fingerprint.splits[split].documents == len(texts)
            assert fingerprint.splits[split].bytes == sum(len(text.encode()) for text in texts)
            size = run.tokens(domain, split).with_suffix(".bin").stat().st_size
            assert fingerprint.splits[split].tokens == size // np.dtype(np.uint16).itemsize


def test_documents_with_one_split_key_share_a_split(prepared: tuple[RunConfig, RunDir], text_root: Path) -> None:
    group_of = {}
    for line in (text_root / "code.jsonl").read_text().splitlines():
        row = json.loads(line)
        group_of[row["text"]] = row["file"].partition("#")[0]
    groups = [{group_of[text] for text in texts_of(prepared[1], "code", split)} for split in SPLITS]
    assert all(groups)
    assert sum(map(len, groups)) == len(set.union(*groups))


def test_the_token_files_do_not_depend_on_the_number_of_workers(
    prepared: tuple[RunConfig, RunDir], text_root: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    run = RunDir(tmp_path)
    prepare(make_config(text_root, {"code": CODE, "prose": PROSE}, data={"workers": 3}), run)
    for domain in ("code", "prose"):
        assert contents(run.domain(domain)) == contents(prepared[1].domain(domain))
    assert contents(run.tokenizer) == contents(prepared[1].tokenizer)


def test_adding_files_moves_no_document(text_root: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    first, second = RunDir(tmp_path / "first"), RunDir(tmp_path / "second")
    prepare(make_config(text_root, {"prose": PROSE}), first)
    root = tmp_path / "text"
    root.mkdir()
    shutil.copy(text_root / "prose.jsonl", root / "prose.jsonl")
    write_jsonl(root / "added.jsonl", python_texts(50))
    prepare(make_config(root, {"prose": {"text": "*.jsonl"}}), second)
    added = set(python_texts(50))
    for split in SPLITS:
        after = [text for text in texts_of(second, "prose", split) if text not in added]
        assert after == texts_of(first, "prose", split)


def test_duplicates_are_dropped_and_no_text_is_in_two_splits(make_config: MakeConfig, tmp_path: Path) -> None:
    texts = prose_texts(240)
    # Every text is in `a` twice, with different groups, and half of them are in `b` too.
    write_jsonl(tmp_path / "a.jsonl", texts + texts, group=lambda i: i // 5)
    write_jsonl(tmp_path / "b.jsonl", texts[:120] + python_texts(120), group=lambda i: f"group {i // 5}")
    grouped = {"split_by": {"field": "group"}}
    config = make_config(
        tmp_path,
        {"a": {"text": "a.jsonl"} | grouped, "b": {"text": "b.jsonl"} | grouped},
        data={"dev": 0.2, "test": 0.2},
    )
    run = RunDir(tmp_path / "run")
    prepare(config, run)
    texts_by_split = {split: [set(texts_of(run, domain, split)) for domain in "ab"] for split in SPLITS}
    texts_in = {split: set.union(*parts) for split, parts in texts_by_split.items()}
    assert not texts_in["train"] & texts_in["dev"]
    assert not texts_in["train"] & texts_in["test"]
    assert not texts_in["dev"] & texts_in["test"]
    assert set.union(*(parts[0] for parts in texts_by_split.values())) == set(texts)
    assert Fingerprint.of_domain(run, "a").duplicates == 240
    assert Fingerprint.of_domain(run, "b").duplicates > 0


def test_a_second_call_changes_nothing_and_a_new_domain_is_added(
    text_root: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    run = RunDir(tmp_path)
    calls: list[tuple[str, int, int, int]] = []
    prepare(make_config(text_root, {"prose": PROSE}), run, lambda *progress: calls.append(progress))
    fingerprint = Fingerprint.of_domain(run, "prose")
    assert calls[-1][:3] == (
        "prose",
        sum(split.bytes for split in fingerprint.splits.values()),
        sum(split.documents for split in fingerprint.splits.values()),
    )
    before, times = contents(tmp_path), {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    config = make_config(text_root, {"prose": PROSE}, novel_domains={"code": CODE})
    prepare(config, run)
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert run.fingerprint("code").exists()
    calls.clear()
    prepare(config, run, lambda *progress: calls.append(progress))
    assert not calls
    assert times.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}.items() | {
        (path, time) for path, time in times.items() if path.is_dir()
    }


def test_a_copied_text_is_accepted_and_a_changed_one_is_an_error(
    text_root: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    root, run = tmp_path / "text", RunDir(tmp_path / "run")
    root.mkdir()
    (root / "prose.jsonl").write_bytes((text_root / "prose.jsonl").read_bytes())
    config = make_config(root, {"prose": PROSE})
    prepare(config, run)
    os.utime(root / "prose.jsonl", (1, 1))
    prepare(config, run)
    assert Fingerprint.of_domain(run, "prose").sources[0].modified_ns == 10**9
    before = contents(run.root)
    write_jsonl(root / "prose.jsonl", prose_texts(299))
    (root / "more.jsonl").write_text('{"text": "new"}\n')
    with pytest.raises(DataError, match=r"domain 'prose' .* made from something else: prose.jsonl has changed.*--out"):
        prepare(config, run)
    with pytest.raises(DataError, match=r"more.jsonl is new"):
        prepare(make_config(root, {"prose": {"text": "*.jsonl"}}), run)
    assert contents(run.root) == before


def test_changed_settings_are_an_error(text_root: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    prepare(make_config(text_root, {"prose": PROSE}), run)
    with pytest.raises(DataError, match=r"dev was 0.1 and is 0.2.*delete that folder"):
        prepare(make_config(text_root, {"prose": PROSE}, data={"dev": 0.2}), run)
    with pytest.raises(DataError, match=r"has 512 tokens, and tokenizer.vocab_size asks for 600.*--out"):
        prepare(make_config(text_root, {"prose": PROSE}, tokenizer={"vocab_size": 600}), run)
    longer = {"sequence_length": 60_000, "batch_tokens": 60_000, "tokens": 600_000}
    with pytest.raises(DataError, match=r"'prose' is too small to split: .* needs at least 60001 tokens"):
        prepare(make_config(text_root, {"prose": PROSE}, budget=longer), run)


def test_an_existing_tokenizer_is_used_and_another_one_is_an_error(
    text_root: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for directory, texts in ((one, prose_texts(200)), (other, python_texts(50))):
        directory.mkdir()
        train_tokenizer(directory, texts, vocab_size=400)
    run = RunDir(tmp_path / "run")
    config = make_config(text_root, {"prose": PROSE}, tokenizer={"path": one})
    prepare(config, run)
    prepare(config, run)
    assert Tokenizer.load(run.tokenizer).digest == Tokenizer.load(one).digest
    with pytest.raises(DataError, match=r"has other files than tokenizer.path"):
        prepare(make_config(text_root, {"prose": PROSE}, tokenizer={"path": other}), run)
    with pytest.raises(DataError, match=r"no tokenizer in .*gone"):
        prepare(
            make_config(text_root, {"prose": PROSE}, tokenizer={"path": tmp_path / "gone"}),
            RunDir(tmp_path / "r2"),
        )
    assert not list((tmp_path / "r2").rglob("*"))


def test_all_missing_paths_are_reported_together_before_any_work(make_config: MakeConfig, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "good.jsonl", prose_texts(300))
    domains = {
        "good": {"text": "good.jsonl"},
        "legal": {"text": "law.jsonl"},
        "math": {"text": ["tex/**/*.tex"]},
    }
    with pytest.raises(DataError) as caught:
        prepare(make_config(tmp_path, domains), RunDir(tmp_path / "run"))
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"domain 'legal': 'law.jsonl' matches no file below {tmp_path}.")
    assert "set text_root" in first
    assert second.startswith("domain 'math': 'tex/**/*.tex' matches no file")
    assert not (tmp_path / "run").exists()


BAD_DOMAINS = {
    "empty": ("\n \n", "Domain 'bad' is empty: its 1 files hold no document. Add text"),
    "malformed": ('{"text": "fine"}\n{"text": \n', "bad.jsonl, line 2: not valid JSON"),
    "small": (
        '{"text": "a short document"}\n' * 3,
        r"Domain 'bad' is too small to split: .*test has 1 documents with \d+ tokens. Each needs at least 65",
    ),
}


@pytest.mark.parametrize("kind", BAD_DOMAINS)
@pytest.mark.parametrize("novel", [False, True])
def test_a_bad_domain_is_an_error_and_leaves_nothing_half_written(
    make_config: MakeConfig, tmp_path: Path, kind: str, novel: bool
) -> None:
    content, message = BAD_DOMAINS[kind]
    write_jsonl(tmp_path / "good.jsonl", prose_texts(300))
    (tmp_path / "bad.jsonl").write_text(content)
    domains = {"good": {"text": "good.jsonl"}}
    bad = {"bad": {"text": "bad.jsonl"}}
    config = make_config(tmp_path, domains if novel else domains | bad, novel_domains=bad if novel else {})
    run = RunDir(tmp_path / "run")
    with pytest.raises(DataError, match=message):
        prepare(config, run)
    names = {path.name for path in run.root.rglob("*") if path.is_dir()}
    assert names <= {"tokenizer", "data", "good"}
    for domain in run.data.glob("*"):
        Fingerprint.of_domain(run, domain.name)
    # With valid text instead, the same run resumes.
    write_jsonl(tmp_path / "bad.jsonl", python_texts(150))
    prepare(config, run)
    assert Fingerprint.of_domain(run, "bad").splits["test"].documents


def test_skipped_lines_are_counted(make_config: MakeConfig, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", prose_texts(300))
    path.write_bytes(b"not json\n" + path.read_bytes() + b'{"text": "\xff"}\n')
    run = RunDir(tmp_path / "run")
    prepare(make_config(tmp_path, {"a": {"text": "a.jsonl"}}, data={"on_bad_line": "skip"}), run)
    fingerprint = Fingerprint.of_domain(run, "a")
    assert fingerprint.skipped_lines == 2
    assert sum(split.documents for split in fingerprint.splits.values()) == 300


def test_only_one_process_prepares_a_run_at_a_time(text_root: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    run, config = RunDir(tmp_path), make_config(text_root, {"prose": PROSE})
    unfinished = run.root / ".tokenizer.partial"
    unfinished.mkdir()
    with held(run.root / ".prepare.lock"), pytest.raises(GroupFailed, match="Another process is preparing the run"):
        prepare(config, run)
    assert unfinished.exists()
    prepare(config, run)
    assert not list(run.root.glob(".*"))


def test_text_that_changes_while_it_is_encoded_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    """Splits and duplicates were determined by reading it before."""
    text = write_jsonl(tmp_path / "a.jsonl", prose_texts(300))
    run, config = RunDir(tmp_path / "run"), make_config(tmp_path, {"a": {"text": "a.jsonl"}})

    def append(domain: str, encoded_bytes: int, documents: int, expected: int) -> None:
        with text.open("a") as file:
            file.write('{"text": "a line of a crawler that still runs"}\n')

    with pytest.raises(DataError, match=r"a\.jsonl was changed while prepare read it"):
        prepare(config, run, append)
    assert not run.domain("a").exists()
    prepare(config, run)


def test_leftovers_of_a_killed_run_are_deleted(text_root: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for leftover in (
        run.root / ".tokenizer.partial",
        run.data / ".prose.partial",
        run.data / ".gone.partial",
    ):
        leftover.mkdir(parents=True)
        (leftover / "train.bin").write_bytes(b"half")
    run.domain("prose").mkdir()
    (run.domain("prose") / "train.bin").write_bytes(b"a folder without its fingerprint is nothing")
    prepare(make_config(text_root, {"prose": PROSE}), run)
    assert not list(tmp_path.rglob("*.partial"))
    assert len(texts_of(run, "prose", "train")) > 100


def test_megatron_reads_a_large_vocabulary_as_32_bits(tmp_path: Path) -> None:
    from btm_scale.data.token_files import TokenFileWriter

    for vocabulary, dtype in ((1 << 16, np.uint16), ((1 << 16) + 1, np.int32)):
        writer = TokenFileWriter(tmp_path / "tokens", vocabulary)
        writer.add(np.array([vocabulary - 1, 2], dtype=dtype))
        writer.add(np.array([3], dtype=dtype))
        writer.close()
        documents = IndexedDataset(str(tmp_path / "tokens"))
        assert documents[0].dtype == dtype
        theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
        theirs.add_document(np.array([vocabulary - 1, 2]), [2])
        theirs.add_document(np.array([3]), [1])
        theirs.finalize(str(tmp_path / "theirs.idx"))
        for suffix in (".bin", ".idx"):
            assert (tmp_path / f"theirs{suffix}").read_bytes() == (tmp_path / f"tokens{suffix}").read_bytes()
        assert documents[0].tolist() == [vocabulary - 1, 2]


def test_workers_that_encode_text_do_not_import_torch() -> None:
    """They would take four times as much memory."""
    code = "import sys, btm_scale.data.prepare; print(*{'torch', 'transformers', 'megatron'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
