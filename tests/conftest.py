"""What tests of several parts share: real text, a prepared run and a finished one."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.failures_at_once import FailuresAtOnce
from helpers.shared_folder import shared_folder
from helpers.text_samples import CODE, PROSE, MakeConfig, prose_texts, python_texts, write_jsonl
from helpers.tiny_run import btm_scale, tiny_values, write_config
from helpers.warm import Warm, warm_process
from hypothesis import settings

from btm_scale.config.run import RunConfig
from btm_scale.data import tokenizer_trial
from btm_scale.run_dir import RunDir
from btm_scale.util.devices import DEVICE
from btm_scale.util.logs import LEVEL

# Tests run side by side: a thread that waits for another must not spin on the core that the other needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs of a machine that has some from all tests but those in tests/gpu, and print failures at once."""
    if not hasattr(config, "workerinput"):  # the processes of pytest-xdist print nothing
        config.pluginmanager.register(FailuresAtOnce(config))
    if not any("gpu" in Path(argument).parts for argument in config.args):
        # Also from the ranks of DeepSpeed's launcher, which sets CUDA_VISIBLE_DEVICES itself.
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", DEVICE: "cpu"}


# Few examples, the same every time, for `make test`; many new ones for `make test-full`.
settings.register_profile("quick", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("full", max_examples=2_000, deadline=None, print_blob=True)
settings.load_profile("quick")


@pytest.fixture(autouse=True)
def process_as_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what a command in this process set up, for a test or a fixture: its level would hide later messages."""
    logger = logging.getLogger("btm_scale")
    logger.handlers[:] = [handler for handler in logger.handlers if isinstance(handler, logging.NullHandler)]
    logger.setLevel(logging.NOTSET)
    monkeypatch.delenv(LEVEL, raising=False)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)


@pytest.fixture(scope="session", autouse=True)
def forked_trials() -> Iterator[None]:
    """Try tokenizers in forks, beside the thread in which pytest-xdist waits for messages."""
    at_start = threading.active_count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_trial, "may_fork", lambda: threading.active_count() <= at_start)
        yield


@pytest.fixture(scope="session")
def warm() -> Warm:
    """Runs commands in forks of a process that has imported everything."""
    return warm_process()


@pytest.fixture(scope="session")
def real_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with python.jsonl, cpp.jsonl, licences.jsonl and docs.jsonl of this installation."""
    from btm_scale.data.demo_text import write_installed_text

    # Documents are so short, and so many, that none of a domain's splits stays empty, whatever is installed.
    def make(folder: Path) -> None:
        write_installed_text(folder, bytes_per_domain=400_000, longest=4_000)

    return shared_folder(tmp_path_factory, "text", make)


@pytest.fixture(scope="session")
def make_config() -> MakeConfig:
    """A small config for a folder of text; keywords are sections of the YAML."""

    def make(root: Path, domains: dict[str, Any], **sections: Any) -> RunConfig:
        values: dict[str, Any] = {
            "text_root": root,
            "domains": domains,
            "tokenizer": {"vocab_size": 512, "sample_bytes": 200_000},
            "data": {"workers": 1, "dev": 0.1, "test": 0.1},
            "budget": {"sequence_length": 64, "batch_tokens": 1024, "tokens": 100_000},
        }
        for name, section in sections.items():
            values[name] = values.get(name, {}) | section
        return RunConfig.model_validate(values)

    return make


@pytest.fixture(scope="session")
def text_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """code.jsonl, grouped by `file`, and prose.jsonl."""
    root = tmp_path_factory.mktemp("text")
    write_jsonl(root / "code.jsonl", python_texts(200), file=lambda i: f"module{i // 4}.py#{i}")
    write_jsonl(root / "prose.jsonl", prose_texts(300))
    return root


@pytest.fixture(scope="session")
def prepared(
    text_root: Path, make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, RunDir]:
    """A run with the domains code and prose, ready to train on. Tests must not change it."""
    from btm_scale.data.prepare import prepare

    config = make_config(text_root, {"code": CODE, "prose": PROSE})
    run = RunDir(tmp_path_factory.mktemp("run"))
    prepare(config, run)
    return config, run


@pytest.fixture(scope="session")
def finished_run(real_text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, RunDir]:
    """A tiny run from text to page, by the command line and the real launcher."""

    def make(folder: Path) -> None:
        write_config(folder / "tiny.yaml", tiny_values(real_text, data={"dev": 0.1, "test": 0.1}))  # several workers
        done = btm_scale("run", folder / "tiny.yaml", "--out", folder / "run", "--json")
        assert json.loads(done.stdout) == json.loads(RunDir(folder / "run").results.read_text())

    folder = shared_folder(tmp_path_factory, "finished", make)
    return RunConfig.load(folder / "tiny.yaml"), RunDir(folder / "run")


@pytest.fixture(scope="session")
def handmade(real_text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, RunDir]:
    """Four experts of one seed with their scores of dev text, trained in this process in seconds."""
    from helpers.handmade_run import handmade_run

    return handmade_run(real_text, tmp_path_factory.mktemp("handmade"))
