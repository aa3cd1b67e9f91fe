"""The verbs and readers that get a mutated folder, each with an independent reader of what it accepted."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file as load_arrays
from torch.distributed.checkpoint.api import CheckpointException

from btm_scale.checkpoint.merge import journal
from btm_scale.cli.app import main
from btm_scale.config.data import DomainConfig
from btm_scale.data.clustering import Clustering
from btm_scale.data.documents import BadLines, read_documents
from btm_scale.data.sources import resolve_domain
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.errors import UserError
from btm_scale.evaluate.ablate import Ablation
from btm_scale.evaluate.mixture_record import MixtureRecord
from btm_scale.evaluate.results import load_results
from btm_scale.evaluate.soups import Soups
from btm_scale.forest.branch import Branch
from btm_scale.forest.open import open_config, open_folder
from btm_scale.forest.scores import Stack, scored_model
from btm_scale.launch.hostfile import read_hostfile
from btm_scale.run_dir import SEED, RunDir
from btm_scale.train.metrics import read_metrics
from fuzz import foreign_checkpoints as foreign
from fuzz import oracles
from fuzz.corpus import TEXTS

ORIGINAL = "original"  # a link to the unmutated folder, beside the mutated one


@dataclass(frozen=True)
class Target:
    """A folder of the corpus, the files in it that are mutated, and what reads them."""

    kind: str
    files: Sequence[str]  # globs
    read: Callable[[Path], object]
    weight: float = 1.0


class RefusedError(UserError):
    """A verb ended with exit code 2 and a message."""


def verb(*arguments: object) -> Any:
    """Return the answer of a verb under --json. Raises `RefusedError` for exit code 2, AssertionError for others."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([*map(str, arguments), "--json", "--quiet"])
        except SystemExit as stop:
            code = stop.code
    if code == 2 and err.getvalue().startswith("btm-scale: ") and not out.getvalue():
        raise RefusedError(err.getvalue())
    assert code == 0, f"{arguments[0]} ended with {code}: {err.getvalue()}"
    return json.loads(out.getvalue())


def _checkpoint(
    read: Callable[[Path], oracles.Tensors], *, converts: bool = True, counts: bool = True
) -> Callable[[Path], None]:
    """Return the check of a checkpoint; `counts`: its stored tensors are those that are read."""

    def check(path: Path) -> None:
        facts = verb("inspect", path)
        ours = oracles.read_ours(path)
        oracles.require_equal(ours, _independent(read, path), "reader")
        if counts and not any(name.startswith("0/") for name in ours):
            assert facts["tensors"] == len(ours)
            assert facts["parameters"] == sum(tensor.numel() for tensor in ours.values())
        out = path.parent / "out"
        verb("convert", path, out, "--to", "huggingface")
        if converts:
            copy = oracles.read_safetensors(out)
            oracles.require_equal(copy, {name: ours[name] for name in copy}, "convert")
        shutil.rmtree(out)

    return check


def _independent(read: Callable[[Path], oracles.Tensors], path: Path) -> oracles.Tensors:
    """Return another library's reading. If it refuses the file, the mutation must not have changed a number."""
    try:
        return read(path)
    except (Exception, CheckpointException):  # the latter is a BaseException
        return read(path.parent / ORIGINAL)


def _merge(path: Path) -> None:
    out = path.parent / "out"
    verb("merge", out, path, path)
    source = oracles.read_safetensors(path)
    for name, mean in oracles.read_safetensors(out).items():
        assert mean.dtype == source[name].dtype
        assert mean.shape == source[name].shape
        assert mean.allclose(source[name], rtol=0, atol=0, equal_nan=True), name
    shutil.rmtree(out)
    verb("convert", path, out, "--to", "megatron", "--tensor", "1", "--verify")
    shutil.rmtree(out)


def _refused(path: Path) -> None:
    """Try what cannot be read, and require that every verb refuses it."""
    out = path.parent / "out"
    for words in (("inspect", path), ("convert", path, out, "--to", "huggingface"), ("merge", out, path)):
        try:
            verb(*words)
        except RefusedError:
            continue
        raise AssertionError(f"{words[0]} read a pipeline's files")


def _add(path: Path) -> None:
    """Add a model to the run beside it."""
    answer = verb("forest", "list", path)
    verb("forest", "lineage", path)
    for name, expert in answer["experts"].items():
        card = json.loads((path / "experts" / name / "expert.json").read_text())
        assert expert["content_hash"] == card["content_hash"]
        assert expert["tokens"] == card["tokens"]


def _text(path: Path) -> None:
    for file in sorted(path.iterdir()):
        source = resolve_domain("d", DomainConfig(text=(file.name,)), path)
        list(read_documents(source, BadLines("skip")))
        ours = [document.text for document in read_documents(source, BadLines())]
        assert ours == oracles.documents(file), file.name


def _tokenizer(path: Path) -> None:
    tokenizer = Tokenizer.load(path)
    for ids in tokenizer.encode_batch(TEXTS):
        assert all(0 <= token < tokenizer.vocab_size for token in ids.tolist())
        tokenizer.decode(ids.tolist())


def _config(path: Path) -> None:
    open_config(path / "tiny.yaml")
    verb("plan", path / "tiny.yaml", "--nodes", 1)


def _status(path: Path) -> None:
    answer = verb("status", path)
    for model, row in answer["models"].items():
        metrics = RunDir(path).metrics(model)
        content = metrics.read_bytes() if metrics.is_file() else b""
        steps = [json.loads(line)["step"] for line in content.split(b"\n")[:-1][-20:] if _is_row(line)]
        # Of a long file only the end is read.
        assert len(content) > 8192 or row["step"] == (steps[-1] if steps else 0), row


def _is_row(line: bytes) -> bool:
    try:
        row = json.loads(line.decode())
        pairs = json.loads(line, object_pairs_hook=list)
        json.dumps(row, ensure_ascii=False).encode()  # has no half of a surrogate pair
    except (ValueError, RecursionError):
        return False
    if not isinstance(row, dict) or len(row) != len(pairs):
        return False
    numbers = [value for name, value in row.items() if not (name in ("device", "kernels") and isinstance(value, str))]
    return (
        type(row.get("step")) is int
        and 0 < row["step"] < 1 << 31
        and all(isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 62) for value in numbers)
    )


def _report(path: Path) -> None:
    verb("report", path)
    shown = load_results(RunDir(path)).document()
    written = json.loads(RunDir(path).results.read_text())
    valid = json.dumps(written, ensure_ascii=False).encode("utf-8", "replace")  # half a surrogate pair is read as "?"
    assert shown["methods"] == json.loads(valid)["methods"]


def _records(path: Path) -> None:
    config, run = open_folder(path)
    for model in (SEED, *config.domains):
        Branch.find(run.branch(model))
        read_metrics(run.metrics(model))
    Soups.find(run.soups)
    Ablation.find(run.results.with_name("ablation.json"))
    MixtureRecord.find(run.mixture)


def _scores(path: Path) -> None:
    config, run = open_folder(path)
    names = list(config.domains)
    for domain in names:
        stack = Stack.load(run, names, domain, "dev")
        for i, name in enumerate(names):
            file = run.scores(name, domain, "dev")
            content = file.read_bytes()
            metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
            assert stack.log_probs[i].tobytes() == load_arrays(file)["log_probs"].tobytes()
            assert scored_model(file) == metadata["model"]


def _clustering(path: Path) -> None:
    clustering = Clustering.load(path)
    assert len(clustering.assign(TEXTS)) == len(TEXTS)
    assert clustering.terms == json.loads((path / "vocabulary.json").read_text())


TARGETS = [
    Target("model", ("model.safetensors", "config.json", "expert.json"), _checkpoint(oracles.read_safetensors), 2),
    Target("model", ("model.safetensors", "config.json"), _merge),
    Target("sharded", ("*.safetensors", "*.index.json"), _checkpoint(oracles.read_safetensors), 2),
    Target("bin", ("pytorch_model.bin",), _checkpoint(oracles.read_bin), 3),
    Target("bins", ("*.bin", "*.index.json"), _checkpoint(oracles.read_bin)),
    Target("deepspeed", ("*/*.pt", "latest", "config.json"), _checkpoint(oracles.read_deepspeed, converts=False), 2),
    Target("zero2", ("latest", "global_step3/*.pt"), _checkpoint(oracles.read_zero), 2),
    Target("zero3", ("latest", "global_step3/*.pt"), _checkpoint(oracles.read_zero), 2),
    Target("universal", ("zero/*/fp32.pt",), _checkpoint(oracles.read_universal)),
    Target(
        "torch_dist",
        ("**/.metadata", "**/.metadata", "**/*.distcp", "**/*.pt", "*.txt"),
        _checkpoint(oracles.read_torch_dist, converts=False),
        3,
    ),
    Target("state", ("model.safetensors", "state.json", "config.json"), _checkpoint(oracles.read_state)),
    Target("text", ("*",), _text, 3),
    Target("sentencepiece", ("tokenizer.model", "tokenizer_config.json", "*"), _tokenizer),
    Target("fast", ("tokenizer.json", "tokenizer_config.json", "*"), _tokenizer),
    Target("config", ("tiny.yaml",), _config, 2),
    Target("run", ("experts/*/expert.json", "seed/expert.json"), _add),
    Target("run", ("run.yaml", "train/*/metrics.jsonl", "train/*/metrics.jsonl"), _status),
    Target("run", ("evaluation/results.json", "evaluation/mixture.json", "run.yaml", "train/*/metrics.jsonl"), _report),
    Target("run", ("run.yaml", "train/*/branch.json", "evaluation/*.json", "train/*/metrics.jsonl"), _records),
    Target("run", ("scores/*/*.safetensors",), _scores),
    Target("hostfile", ("hostfile",), lambda path: read_hostfile(path / "hostfile"), 0.5),
    Target("journal", ("*.jsonl",), journal.finished, 0.5),
    Target("clustering", ("*",), _clustering, 0.5),
]

# Drawn by seeds from FOREIGN_SEEDS on, so that earlier seeds keep their meaning.
FOREIGN_SEEDS = 1_000_000
FOREIGN = [
    Target("peft", ("adapter_config.json", "adapter_config.json", "*.safetensors"), _checkpoint(foreign.read_peft), 2),
    Target("dcp", (".metadata", ".metadata", "*.distcp", "config.json"), _checkpoint(foreign.read_dcp), 2),
    Target("legacy", ("**/*.pt", "**/*.pt", "*.txt"), _checkpoint(foreign.read_legacy, converts=False), 2),
    Target("fp8", ("*.safetensors", "config.json"), _checkpoint(foreign.read_fp8, counts=False), 2),
    Target("universal3", ("**/*.pt", "latest_universal"), _checkpoint(foreign.read_flat_universal)),
    Target("pipeline", ("**/*.pt", "latest"), _refused, 0.5),
]


def targets_of(seed: int) -> list[Target]:
    """Return the targets that an input is drawn from."""
    return FOREIGN if seed >= FOREIGN_SEEDS else TARGETS
