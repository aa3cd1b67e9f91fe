"""`tokenizer.bos`: each document of a run begins with the BOS token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.text_samples import MakeConfig, prose_texts, write_jsonl
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import processors

from btm_scale.config.run import RunConfig
from btm_scale.data.eval_text import EvaluationText
from btm_scale.data.existing_tokens import read_existing
from btm_scale.data.prepare import prepare
from btm_scale.data.token_files import TokenFileWriter
from btm_scale.data.tokenizer import Tokenizer, TransformersTokenizer
from btm_scale.data.tokenizer_fit import require_fit
from btm_scale.errors import DataError
from btm_scale.model.hf_load import load_tokenizer
from btm_scale.run_dir import RunDir


@pytest.fixture
def config(make_config: MakeConfig, prose_tokenizer: Path, tmp_path: Path) -> RunConfig:
    write_jsonl(tmp_path / "a.jsonl", prose_texts(150))
    return make_config(tmp_path, {"a": {"text": "a.jsonl"}}, tokenizer={"path": prose_tokenizer, "bos": True})


def without_bos(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update={"bos": False})})


def documents(run: RunDir, split: str = "train") -> list[list[int]]:
    return [document.tolist() for document in IndexedDataset(str(run.tokens("a", split)))]


def test_documents_begin_with_bos_only_if_asked(config: RunConfig, tmp_path: Path) -> None:
    run, plain = RunDir(tmp_path / "run"), RunDir(tmp_path / "plain")
    prepare(config, run)
    prepare(without_bos(config), plain)
    tokenizer = Tokenizer.load(run.tokenizer)
    assert tokenizer.start == tokenizer.bos == 1
    assert documents(run) == [[1, *document] for document in documents(plain)]
    assert Tokenizer.load(plain.tokenizer).start == tokenizer.eos
    prepare(config, run)  # the same again


def test_a_trained_tokenizer_has_a_bos_token_too(make_config: MakeConfig, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", prose_texts(150))
    run = RunDir(tmp_path / "run")
    prepare(make_config(tmp_path, {"a": {"text": "a.jsonl"}}, tokenizer={"bos": True}), run)
    assert all(document[0] == 1 for document in documents(run))


def test_bytes_of_evaluated_text_do_not_count_bos(config: RunConfig, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    sizes = prepare(config, run)["a"].splits["test"]
    text = EvaluationText.load(run, "a", "test", tokens=10**6, sequence_length=64)
    # Every token of text is a target: what nothing predicts is the first BOS.
    assert (text.bytes, len(text.targets)) == (sizes.bytes, sizes.tokens - 1)


def test_bos_cannot_change_in_a_prepared_run(config: RunConfig, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    prepare(config, run)
    with pytest.raises(DataError, match=r"has documents with BOS, and tokenizer\.bos is false"):
        prepare(without_bos(config), run)


def test_existing_tokens_with_bos_keep_one(config: RunConfig, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    prepare(config, run)
    for prefix, start in (("with", [1]), ("without", [])):
        writer = TokenFileWriter(tmp_path / prefix, 400)
        writer.add(np.array([*start, 300, 301, 2], np.uint16))
        writer.close()
        (_, _, ids), *_ = read_existing(tmp_path / f"{prefix}.bin", run.tokenizer)
        assert ids.tolist() == [300, 301]


def test_a_tokenizer_without_bos_is_refused(config: RunConfig, prose_tokenizer: Path, tmp_path: Path) -> None:
    fast = load_tokenizer(prose_tokenizer)
    fast.bos_token = None
    fast.save_pretrained(str(tmp_path / "none"))
    changed = config.tokenizer.model_copy(update={"path": tmp_path / "none"})
    with pytest.raises(DataError, match=r"tokenizer\.bos is true, but the tokenizer in .*none has no bos_token"):
        prepare(config.model_copy(update={"tokenizer": changed}), RunDir(tmp_path / "run"))


def test_a_pretrained_tokenizer_that_adds_bos_is_noted(
    prose_tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fast = load_tokenizer(prose_tokenizer)
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast.save_pretrained(str(tmp_path))
    assert TransformersTokenizer.of(tmp_path).adds_bos()
    (tmp_path / "config.json").write_text(
        '{"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 8, "vocab_size": 400, '
        '"layer_norm_epsilon": 1e-5}'
    )
    require_fit(tmp_path, tmp_path, bos=True)
    assert "BOS" not in caplog.text
    require_fit(tmp_path, tmp_path)
    assert "begins each text with its BOS token, and the documents of this run begin without" in caplog.text
