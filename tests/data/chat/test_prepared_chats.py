"""Domains of conversations from rows to token files, training sequences and evaluation text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.chat_samples import CHATML, TEMPLATES, conversations, turns, write_chats, write_tokenizer
from helpers.cuts import full
from helpers.text_samples import MakeConfig, prose_texts, write_jsonl
from megatron.core.datasets.indexed_dataset import IndexedDataset

from btm_scale.config.run import RunConfig
from btm_scale.data import encode, token_files
from btm_scale.data.chat import mask_files
from btm_scale.data.chat.encode import TRAINED, EncodedChat, end_rendering
from btm_scale.data.chat.packing import IDS, START, UNTRAINED, packed
from btm_scale.data.dataset import TrainingSamples
from btm_scale.data.eval_text import EvaluationText
from btm_scale.data.fingerprint import Fingerprint
from btm_scale.data.prepare import prepare
from btm_scale.data.preview import preview_texts
from btm_scale.data.sources import resolve_sources
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.errors import DataError
from btm_scale.run_dir import SPLITS, RunDir
from btm_scale.train.passes import budget_tokens, passes_of_run

LENGTH = 256
CHATS = conversations(120)
SUPPORT = {"text": "support.jsonl", "chat": "messages"}


@pytest.fixture(scope="module", autouse=True)
def one_process_per_template() -> Iterator[None]:
    """A process that renders takes seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "end_rendering", lambda: None)
        yield
    end_rendering()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chats")
    write_tokenizer(root / "tokenizer")
    write_chats(root / "support.jsonl", CHATS)
    write_jsonl(root / "prose.jsonl", prose_texts(300)[200:])
    return root


def config_of(
    make_config: MakeConfig, folder: Path, domains: dict[str, Any] | None = None, **sections: Any
) -> RunConfig:
    return make_config(
        folder,
        domains or {"support": SUPPORT, "prose": {"text": "prose.jsonl"}},
        tokenizer={"path": folder / "tokenizer"},
        budget={"sequence_length": LENGTH},
        **sections,
    )


@pytest.fixture(scope="module")
def run(folder: Path, make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = RunDir(tmp_path_factory.mktemp("run"))
    prepare(config_of(make_config, folder), run)
    return run


def answers_in(ids: np.ndarray, trained: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    places = np.flatnonzero(trained)
    parts = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    return [tokenizer.decode(ids[part].tolist()) for part in parts]


def expected_answers() -> list[str]:
    return sorted({m["content"] + "<|im_end|>" for chat in CHATS for m in chat if m["role"] == "assistant"})


def test_token_files_have_a_mask_per_token_that_selects_exactly_the_answers(run: RunDir) -> None:
    tokenizer = Tokenizer.load(run.tokenizer)
    fingerprint = Fingerprint.of_domain(run, "support")
    answers: list[str] = []
    for split in SPLITS:
        documents = IndexedDataset(str(run.tokens("support", split)))
        mask = np.fromfile(run.mask("support", split), np.uint8)
        ids = np.concatenate([documents[i] for i in range(len(documents))])
        counts = fingerprint.splits[split]
        assert (len(documents), len(ids), len(mask)) == (counts.documents, counts.tokens, counts.tokens)
        assert counts.trained == np.count_nonzero(mask & TRAINED) > 0
        answers += answers_in(ids, mask & TRAINED, tokenizer)
    assert sorted(set(answers)) == expected_answers()
    assert not run.mask("prose", "train").exists()
    assert "trained" not in json.loads(run.fingerprint("prose").read_text())["splits"]["train"]


def test_every_sequence_holds_whole_conversations_and_an_epoch_holds_each_once(run: RunDir) -> None:
    counts = Fingerprint.of_domain(run, "support").splits["train"]
    tokenizer = Tokenizer.load(run.tokenizer)

    def samples_of(seed: int, samples: int) -> np.ndarray:
        made = TrainingSamples(run, {"support": 1.0}, tokenizer, sequence_length=LENGTH, samples=samples, seed=seed)
        return made.read(0, samples).numpy()

    rows = samples_of(1, 60)
    starts = np.flatnonzero(rows[:, :-1].ravel() & START)
    flat = rows[:, :-1].ravel()
    pieces = [part & IDS for part in np.split(flat, starts)[1:]]
    bodies = [piece.tolist() for piece in pieces if len(set(piece.tolist())) > 1]
    documents = IndexedDataset(str(run.tokens("support", "train")))
    whole = sorted(documents[i].tolist() for i in range(len(documents)))
    epoch = sorted(bodies[: counts.documents])
    assert epoch == whole
    trained = (flat & UNTRAINED) == 0
    assert set(answers_in(flat & IDS, trained, tokenizer)) <= set(expected_answers())
    assert np.array_equal(samples_of(1, 90)[:60], rows), "a longer order begins with the shorter"
    assert not np.array_equal(samples_of(2, 60), rows)


def test_a_mixture_trains_on_answers_of_conversations_and_on_all_of_other_text(run: RunDir) -> None:
    tokenizer = Tokenizer.load(run.tokenizer)
    weights = {"support": 1.0, "prose": 1.0}
    mixed = TrainingSamples(run, weights, tokenizer, sequence_length=LENGTH, samples=40, seed=1).read(0, 40)
    plain = TrainingSamples(run, {"prose": 1.0}, tokenizer, sequence_length=LENGTH, samples=20, seed=1).read(0, 20)
    assert int(plain.max()) < 1 << 16, "a domain without conversations has plain ids"
    assert bool((mixed[:, 0] & START).bool().all())
    is_prose = ((mixed[:, 1:] & UNTRAINED) == 0).all(dim=1)
    assert int(is_prose.sum()) == 20
    assert {tuple(row) for row in (mixed[is_prose] & IDS).tolist()} <= {
        tuple(row)
        for row in TrainingSamples(run, {"prose": 1.0}, tokenizer, sequence_length=LENGTH, samples=22, seed=1)
        .read(0, 22)
        .tolist()
    }


def test_the_index_knows_the_lengths_of_conversations_and_documents_in_a_sample(run: RunDir) -> None:
    tokenizer = Tokenizer.load(run.tokenizer)
    weights = {"support": 1.0, "prose": 1.0}
    samples = TrainingSamples(run, weights, tokenizer, sequence_length=LENGTH, samples=40, seed=1)
    for row, lengths in zip(samples.read(0, 40)[:, :-1], samples.document_lengths(0, 40), strict=True):
        starts = np.flatnonzero(row.numpy() & START)
        assert lengths.tolist() == np.diff([*starts, LENGTH]).tolist()


def test_each_conversation_is_a_block_of_the_evaluation_text_and_only_answers_count(run: RunDir) -> None:
    text = EvaluationText.load(run, "support", "test", tokens=10**6, sequence_length=LENGTH)
    tokenizer = Tokenizer.load(run.tokenizer)
    documents = IndexedDataset(str(run.tokens("support", "test")))
    assert text.counted is not None
    sizes = np.diff([*text.block_starts, len(text.tokens)])
    assert sorted(sizes) == sorted(documents.sequence_lengths)
    answers = answers_in(text.targets, text.counted, tokenizer)
    assert set(answers) <= set(expected_answers())
    assert text.bytes == sum(len(answer.removesuffix("<|im_end|>").encode()) for answer in answers)
    assert text.of_targets(np.arange(len(text.targets))).tolist() == np.flatnonzero(text.counted).tolist()
    plain = EvaluationText.load(run, "prose", "test", tokens=500, sequence_length=LENGTH)
    assert plain.counted is None
    sequences = text.sequences(LENGTH)
    assert int(np.sum((sequences[:, 1:] & UNTRAINED) == 0)) == np.count_nonzero(text.counted)


def test_text_without_an_answer_is_refused_with_every_setting_of_its_size(run: RunDir) -> None:
    with pytest.raises(DataError, match=r"evaluate\.tokens_per_domain, evaluate\.dev_blocks and dev_loss\.tokens, or"):
        EvaluationText.load(run, "support", "dev", tokens=2, sequence_length=LENGTH)


def test_an_interrupted_domain_of_conversations_resumes_to_the_same_files(
    folder: Path, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_files, "SHARD_BYTES", 10_000)
    monkeypatch.setattr(encode, "_BATCH_CHARACTERS", 3_000)
    refused = [*CHATS[:40], turns("", "an answer first")[1:], *CHATS[40:]]
    write_chats(tmp_path / "support.jsonl", refused)
    write_tokenizer(tmp_path / "tokenizer", TEMPLATES["mistral"])
    config = config_of(make_config, tmp_path, {"support": SUPPORT}, data={"on_bad_line": "skip"})

    def interrupt(domain: str, encoded_bytes: int, documents: int, expected: int) -> None:
        if documents >= 100:
            raise KeyboardInterrupt

    def contents(run: RunDir) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in run.domain("support").iterdir() if path.is_file()}

    prepare(config, RunDir(tmp_path / "whole"))
    run = RunDir(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        prepare(config, run, interrupt)
    assert list((run.data / ".support.partial" / "journal").glob("shard-*"))
    again = prepare(config, run)["support"]
    assert contents(run) == contents(RunDir(tmp_path / "whole"))
    assert again.skipped_lines == 1
    assert (
        "line 41: the chat template refuses it: roles must alternate; 120 documents" in again.skipped["support.jsonl"]
    )


def test_a_conversation_that_the_template_refuses_is_a_bad_line(make_config: MakeConfig, tmp_path: Path) -> None:
    write_chats(tmp_path / "support.jsonl", [*CHATS[:40], turns("", "an answer first")[1:]])
    write_tokenizer(tmp_path / "tokenizer", TEMPLATES["mistral"])
    with pytest.raises(DataError, match=r"support\.jsonl, line 41: the chat template refuses it: roles must alternate"):
        prepare(config_of(make_config, tmp_path, {"support": SUPPORT}), RunDir(tmp_path / "run"))


def test_a_template_that_refuses_every_conversation_ends_with_its_reason(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    write_chats(tmp_path / "support.jsonl", [turns("", f"answer {i} first")[1:] for i in range(40)])
    write_tokenizer(tmp_path / "tokenizer", TEMPLATES["mistral"])
    config = config_of(make_config, tmp_path, {"support": SUPPORT}, data={"on_bad_line": "skip"})
    with pytest.raises(DataError, match=r"'support' is empty: .*\(40 bad lines skipped, .*: roles must alternate\)"):
        prepare(config, RunDir(tmp_path / "run"))


def test_a_pass_over_conversations_is_counted_in_the_sequences_that_are_read(
    make_config: MakeConfig, run: RunDir, folder: Path
) -> None:
    config = config_of(make_config, folder)
    support = Fingerprint.of_domain(run, "support").splits["train"]
    documents = IndexedDataset(str(run.tokens("support", "train")))
    assert support.per_pass == LENGTH * len(packed(documents.sequence_lengths.tolist(), LENGTH)) > support.tokens
    assert passes_of_run(config, run)["support"] * support.per_pass == pytest.approx(budget_tokens(config, "support"))
    assert (train := Fingerprint.of_domain(run, "prose").splits["train"]).per_pass == train.tokens


def test_parts_without_an_answer_are_not_in_a_pass(make_config: MakeConfig, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    write_chats(tmp_path / "support.jsonl", [*CHATS[:40], *(turns(f"{i} " + "long " * 800, "yes") for i in range(40))])
    fingerprint = prepare(config_of(make_config, tmp_path, {"support": SUPPORT}), RunDir(tmp_path / "run"))["support"]
    train = fingerprint.splits["train"]
    assert train.per_pass < train.tokens / 3


def test_a_reason_that_is_not_found_again_is_still_a_reason(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_files, "SHARD_BYTES", 1_000)
    monkeypatch.setattr(encode, "_BATCH_CHARACTERS", 1_000)
    write_chats(tmp_path / "support.jsonl", [CHATS[0], turns("", "an answer first")[1:], *CHATS[1:]])
    write_tokenizer(tmp_path / "tokenizer", TEMPLATES["mistral"])
    config = config_of(make_config, tmp_path, {"support": SUPPORT}, data={"on_bad_line": "skip"})

    def interrupt(domain: str, encoded_bytes: int, documents: int, expected: int) -> None:
        if documents >= 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, RunDir(tmp_path / "run"), interrupt)
    nothing = np.empty(0, np.int32), np.empty(0, np.uint8)
    monkeypatch.setattr(token_files, "encode_chats", lambda *_: [EncodedChat(*nothing)])
    skipped = prepare(config, RunDir(tmp_path / "run"))["support"].skipped["support.jsonl"]
    assert "line 2: the chat template exceeded a limit in an interrupted process" in skipped


def test_the_format_of_a_file_is_determined_once_for_all_of_its_refused_rows(
    folder: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    formats = mask_files.format_of
    monkeypatch.setattr(
        mask_files, "format_of", lambda file, settings: seen.append(file.name) or formats(file, settings)
    )
    config = config_of(make_config, folder)
    [source, _] = resolve_sources(config.all_domains, folder, config.tokenizer.path)
    refused = mask_files.Refusals(source, "skip")
    for line in range(1, 6):
        refused.add(f"{source.files[0].name}:{line}", "no")
    assert seen == [source.files[0].name]
    assert refused.lines.skipped == 5


def test_another_template_is_another_text(folder: Path, make_config: MakeConfig, run: RunDir, tmp_path: Path) -> None:
    (folder / "other.jinja").write_text(CHATML.replace("im_start", "start"))
    for changes in ({"template": "other.jinja"}, {"loss": "last"}):
        with pytest.raises(DataError, match=r"domain 'support' .* were made from something else"):
            prepare(config_of(make_config, folder, {"support": SUPPORT | changes}), run, only=["support"])


def test_a_mask_file_of_another_size_is_damage(folder: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    prepare(config_of(make_config, folder, {"support": SUPPORT}), run)
    mask = run.mask("support", "train")
    mask.write_bytes(mask.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train\.mask does not have a byte for each of the"):
        EvaluationText.load(run, "support", "test", tokens=100, sequence_length=LENGTH)


def test_a_turn_that_is_longer_than_a_sequence_is_reported(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    long = [turns(f"{i} " + "long " * 100, f"answer {i}") for i in range(40)]
    write_chats(tmp_path / "support.jsonl", [*CHATS[:40], *long])
    prepare(config_of(make_config, tmp_path, {"support": SUPPORT}), RunDir(tmp_path / "run"))
    assert (
        "turns that have more than the 256 tokens of budget.sequence_length are cut at their beginning" in caplog.text
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        pytest.param(
            None, "Domain 'support' has conversations, and the tokenizer in .* has no chat template", id="none"
        ),
        pytest.param(
            CHATML.replace("m.content", "m.content | upper"),
            "cannot render support.jsonl:1: the chat template changes",
            id="undecided",
        ),
        full("{{ raise_exception('no') }}", "cannot render support.jsonl:1: no", id="refuses"),
    ],
)
def test_a_dry_run_reports_a_template_that_cannot_be_used(
    template: str | None, message: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path / "tokenizer", template)
    write_chats(tmp_path / "support.jsonl", CHATS)
    config = config_of(make_config, tmp_path, {"support": SUPPORT})
    with pytest.raises(DataError, match=message):
        preview_texts(resolve_sources(config.all_domains, tmp_path, config.tokenizer.path), config, 300)
