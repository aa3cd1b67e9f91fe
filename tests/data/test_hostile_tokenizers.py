"""Hostile tokenizers: an endless regex, a panic, a crash or an absurd id is reported in one sentence with the file."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.forked_commands import call
from helpers.handmade_run import DOMAINS, score_dev
from helpers.hostile_tokenizers import HOSTILE, RARE, RARE_TEXT, write
from helpers.text_samples import CODE, MakeConfig

from btm_scale.cli.app import main
from btm_scale.config.run import RunConfig
from btm_scale.data import tokenizer_trial
from btm_scale.data.adopt_tokenizer import adopt_tokenizer
from btm_scale.data.encode import Encoder
from btm_scale.data.fingerprint import Fingerprint
from btm_scale.data.prepare import prepare
from btm_scale.data.tokenizer import Tokenizer, directory_digest
from btm_scale.errors import DataError
from btm_scale.run_dir import SEED, RunDir
from btm_scale.util.pools import may_fork
from btm_scale.util.time_limit import within


@pytest.fixture(autouse=True)
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tokenizer has passed its trial yet, and a trial takes seconds and a gigabyte at most.

    A new interpreter would have neither these limits nor a test's patches, so the trial is a fork of this process
    even if other threads run, such as those that another test left.
    """
    monkeypatch.setattr(tokenizer_trial, "_passed", set())
    monkeypatch.setattr(tokenizer_trial, "may_fork", lambda: True)
    monkeypatch.setattr(tokenizer_trial, "_CPU_SECONDS", 5)
    monkeypatch.setattr(tokenizer_trial, "_MEMORY", 1 << 30)


# Each ends a process, or takes seconds of CPU time: one of them for `make test`.
LONG = {"never returns", "expands a letter to a megabyte", "expands without bound"}


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=pytest.mark.full if what in LONG else ()) for what in HOSTILE]
)
def test_a_hostile_tokenizer_is_reported_in_one_sentence(
    what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change, reason = HOSTILE[what]
    directory = write(tmp_path / "strange", change)
    with pytest.raises(DataError, match=reason) as raised:
        Tokenizer.load(directory)
    assert str(directory) in str(raised.value)
    assert "\n" not in str(raised.value)
    shown = capfd.readouterr()
    assert "panicked" not in shown.out + shown.err
    assert "RUST_BACKTRACE" not in shown.out + shown.err


def test_a_tokenizer_without_a_token_that_ends_documents_is_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "endless")
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}))
    with pytest.raises(DataError, match="it has no eos_token, which ends every document"):
        Tokenizer.load(directory)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, os.urandom(5_000), b"\x0a\xff\xff\xff\xff\x0f" * 50])
def test_a_damaged_sentencepiece_model_is_reported_in_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(DataError, match="cannot be loaded"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_a_pointer_of_git_lfs_is_named(name: str, prepared: tuple[RunConfig, RunDir], tmp_path: Path) -> None:
    shutil.copytree(prepared[1].tokenizer, tmp_path / "own")
    (tmp_path / "own" / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(DataError, match=f"{name} is a Git LFS pointer.*run `git lfs pull`"):
        Tokenizer.load(tmp_path / "own")


@pytest.mark.parametrize("token", [-5, 1 << 24, 4_000_000_000, "7", 1.5, None, True, [1]])
def test_an_added_id_that_no_vocabulary_has_is_refused(
    token: Any, prepared: tuple[RunConfig, RunDir], tmp_path: Path
) -> None:
    shutil.copytree(prepared[1].tokenizer, tmp_path / "own")
    (tmp_path / "own" / "added_tokens.json").write_text(json.dumps({"<x>": token}))
    with pytest.raises(DataError, match=f"must be the id of a token and is {re.escape(repr(token))}|with the id"):
        Tokenizer.load(tmp_path / "own")


@pytest.mark.parametrize(("token", "reason"), [("600", ""), ("-5", "is '?-5"), ("x", "must be the id of a token")])
def test_the_ids_of_a_tokenizer_config_are_the_keys_of_its_added_tokens(
    token: str, reason: str, prepared: tuple[RunConfig, RunDir], tmp_path: Path
) -> None:
    shutil.copytree(prepared[1].tokenizer, tmp_path / "own")
    settings = {"added_tokens_decoder": {token: {"content": "<x>"}}}
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps(settings))
    if not reason:
        assert Tokenizer.load(tmp_path / "own").vocab_size == 601
        return
    with pytest.raises(DataError, match=reason):
        Tokenizer.load(tmp_path / "own")


def test_a_crash_of_the_library_is_reported_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = os.getpid()

    def crash(directory: Path) -> Any:
        assert os.getpid() != tests, "the tokenizer was loaded without a trial in a child process"
        os.kill(os.getpid(), signal.SIGSEGV)

    monkeypatch.setattr("btm_scale.data.tokenizer.load_tokenizer", crash)
    with pytest.raises(DataError, match=r"crashed or ran out of memory \(SIGSEGV\) when it had to load it"):
        Tokenizer.load(write(tmp_path / "strange"))


def test_a_tokenizer_that_never_loads_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = os.getpid()

    def wait(directory: Path) -> Any:
        assert os.getpid() != tests, "the tokenizer was loaded without a trial in a child process"
        time.sleep(1_000)

    monkeypatch.setattr("btm_scale.data.tokenizer.load_tokenizer", wait)
    monkeypatch.setattr(tokenizer_trial, "_WALL_SECONDS", 1.0)
    with pytest.raises(DataError, match="did not load it within"):
        Tokenizer.load(write(tmp_path / "strange"))


@pytest.mark.slow
def test_a_hostile_tokenizer_is_refused_in_a_process_with_threads_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process with other threads cannot be forked safely: a new one tries the tokenizer."""
    monkeypatch.setattr(tokenizer_trial, "may_fork", may_fork)
    directory = write(tmp_path / "strange", HOSTILE["panics when it encodes"][0])
    ended = threading.Event()
    threading.Thread(target=ended.wait, daemon=True).start()
    try:
        with pytest.raises(DataError, match="non-zero"):
            Tokenizer.load(directory)
        Tokenizer.load(write(tmp_path / "plain"))
    finally:
        ended.set()


def test_a_tokenizer_is_tried_once_until_its_files_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, trials = write(tmp_path / "own"), []
    fork = tokenizer_trial._forked
    monkeypatch.setattr(tokenizer_trial, "_forked", lambda *arguments: (trials.append(1), fork(*arguments))[1])
    assert Tokenizer.load(directory).decode(Tokenizer.load(directory).encode("a text")) == "a text"
    assert len(trials) == 1
    write(directory, HOSTILE["panics when it encodes"][0])
    with pytest.raises(DataError, match="non-zero"):
        Tokenizer.load(directory)


def rare(tokenizer: dict[str, Any]) -> None:
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"Regex": RARE}, "content": "z"}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_panic_in_mid_encoding_names_the_tokenizer_and_the_text(workers: int, tmp_path: Path) -> None:
    directory = write(tmp_path / "own", rare)
    texts = [("an honest text", 0), (RARE_TEXT, 1), ("another", 2)]
    with Encoder(directory, workers) as encoder, pytest.raises(DataError) as raised:
        list(encoder.encode(texts))
    assert str(directory / "tokenizer.json") in str(raised.value)
    assert "begins with 'zebraxx" in str(raised.value)
    assert "retry-limit" in str(raised.value)


def test_a_text_that_takes_too_long_to_encode_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write(tmp_path / "own", lambda one: one.update(normalizer=HOSTILE_LOOP))
    monkeypatch.setattr("btm_scale.data.tokenizer.require_usable", lambda *arguments: None)
    monkeypatch.setattr("btm_scale.data.tokenizer._SECONDS", 0.2)
    tokenizer = Tokenizer.load(directory)
    begun = time.monotonic()
    with pytest.raises(DataError, match=r"begins with 'жжж.*takes too long"):
        tokenizer.encode("ж" * 3_000 + "!y")
    assert time.monotonic() - begun < 60


HOSTILE_LOOP = {"type": "Replace", "pattern": {"Regex": "(?:ж*ж*)y"}, "content": "z"}


def test_a_call_within_its_time_returns_or_raises_as_it_would_alone() -> None:
    assert within(5, lambda: "done") == "done"
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)


def linked_out(directory: Path, secret: Path) -> None:
    (directory / "chat_template.jinja").symlink_to(secret)


def linked_vocabulary(directory: Path, secret: Path) -> None:
    (directory / "tokenizer.json").rename(secret)
    (directory / "tokenizer.json").symlink_to(secret)


@pytest.mark.parametrize("link", [linked_out, linked_vocabulary])
def test_a_tokenizer_with_a_link_out_of_its_directory_is_not_adopted(
    link: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("of another")
    directory = write(tmp_path / "strange")
    link(directory, tmp_path / "secret")
    (tmp_path / "run").mkdir()
    with pytest.raises(DataError, match="outside of the model directory"):
        adopt_tokenizer(tmp_path / "run", directory)
    assert not list((tmp_path / "run").iterdir())


def test_a_chat_template_cannot_be_written_elsewhere(tmp_path: Path) -> None:
    directory = write(tmp_path / "strange")
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "../../escaped", "template": "x"}, {"name": "default", "template": "x"}]
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "run").mkdir()
    with pytest.raises(DataError, match="cannot be copied"):
        adopt_tokenizer(tmp_path / "run", directory)
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.fixture
def scored_run(handmade: tuple[RunConfig, RunDir], tmp_path: Path) -> RunDir:
    """A copy of a run in which every model is scored, so that it can be evaluated."""
    run = RunDir(tmp_path / "run")
    shutil.copytree(handmade[1].root, run.root)
    config = handmade[0]
    evaluate = config.evaluate.model_copy(update={"split": "dev", "averages": ()})  # all that has been scored
    baselines = config.baselines.model_copy(update={"dense": False})
    config = config.model_copy(update={"evaluate": evaluate, "baselines": baselines})
    config.save(run.config)
    for name in (SEED, *DOMAINS):
        score_dev(config, run, name)
    return run


@pytest.fixture
def strange_run(scored_run: RunDir) -> RunDir:
    """A run of a stranger: its tokenizer is hostile, and the records of its token files agree with it."""
    make_strange(scored_run)
    return scored_run


def make_strange(run: RunDir) -> None:
    """Replace a run's tokenizer by a hostile one, and let the records of its token files name that."""
    shutil.rmtree(run.tokenizer)
    write(run.tokenizer, HOSTILE["panics when it encodes"][0])
    for domain in DOMAINS:
        made_with = {"tokenizer": directory_digest(run.tokenizer)}
        Fingerprint.of_domain(run, domain).model_copy(update=made_with).save(run.fingerprint(domain))


def commands(run: RunDir) -> dict[str, list[str]]:
    return {
        "generate": ["generate", str(run.root), "--prompt", "The", "--device", "cpu"],
        "ablate": ["ablate", str(run.root), "--expert", "docs", "--expert", "cpp", "--text", __file__],
        "evaluate": ["evaluate", str(run.root)],
        "prepare": ["prepare", str(run.config), "--out", str(run.root)],
    }


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["generate", "ablate", "evaluate", "prepare"])
def test_every_verb_that_uses_a_hostile_tokenizer_ends_with_a_message(
    verb: str, strange_run: RunDir, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(commands(strange_run)[verb])
    assert ended.value.code == 2
    shown = capfd.readouterr().err
    assert str(strange_run.tokenizer) in shown
    assert "non-zero" in shown
    assert "panicked" not in shown
    assert "Traceback" not in shown


@pytest.mark.slow
def test_a_report_of_results_does_not_load_the_tokenizer(
    scored_run: RunDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call("evaluate", scored_run.root) == 0
    make_strange(scored_run)
    monkeypatch.setattr(tokenizer_trial, "_try", lambda *arguments: pytest.fail("the report loaded the tokenizer"))
    assert call("report", scored_run.root) == 0
    assert scored_run.report.is_file()
    scored_run.results.unlink()
    assert call("report", scored_run.root) == 2
    shown = capfd.readouterr().err
    assert "btm-scale: There are no results" in shown
    assert "Traceback" not in shown
    assert "panicked" not in shown


@pytest.mark.slow
def test_lm_eval_ends_with_a_message_for_a_hostile_tokenizer(
    strange_run: RunDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from btm_scale.cli import lm_eval

    (strange_run.root / "canary.yaml").write_text(
        "task: canary\ndataset_path: json\noutput_type: loglikelihood_rolling\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {strange_run.root}/canary.jsonl}}}}\n"
        "doc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list: [{metric: word_perplexity}]\n"
    )
    (strange_run.root / "canary.jsonl").write_text('{"text": "some text"}\n')
    arguments = ["--model", "btm-scale", "--model_args", f"run={strange_run.root},method=uniform-ensemble"]
    monkeypatch.setattr(
        "sys.argv",
        ["btm-scale-lm-eval", "run", *arguments, "--tasks", "canary", "--include_path", str(strange_run.root)],
    )
    monkeypatch.setenv("PYTHONSAFEPATH", "")  # which the command sets
    with pytest.raises(SystemExit) as ended:
        lm_eval.main()
    shown = capfd.readouterr().err
    assert ended.value.code == 2, shown[-2000:]
    assert "panicked" not in shown


@pytest.mark.slow
def test_prepare_with_workers_refuses_a_hostile_tokenizer_and_leaves_nothing(
    text_root: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    strange = write(tmp_path / "strange", HOSTILE["normalizes with a catastrophic pattern"][0])
    sections = {"tokenizer": {"path": str(strange)}, "data": {"workers": 2}}
    config, run = make_config(text_root, {"code": CODE}, **sections), RunDir(tmp_path / "run")
    with pytest.raises(DataError, match="retry-limit"):
        prepare(config, run)
    assert not run.tokenizer.exists()
    assert not list(run.root.rglob("*.partial"))
