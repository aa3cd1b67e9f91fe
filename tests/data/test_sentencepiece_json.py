"""A sentencepiece model alone, without a tokenizer.json, is a tokenizer."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from helpers.text_samples import prose_texts, python_texts

from btm_scale.data.adopt_tokenizer import adopt_tokenizer, loss_of
from btm_scale.data.sentencepiece_json import write_json
from btm_scale.data.tokenizer import Tokenizer, TransformersTokenizer, directory_digest
from btm_scale.errors import DataError

KINDS: dict[str, dict[str, Any]] = {
    "BPE with bytes": {"model_type": "bpe", "byte_fallback": True, "vocab_size": 600},
    "unigram": {"model_type": "unigram", "vocab_size": 400},
    "unigram with bytes and every space": {
        "model_type": "unigram",
        "vocab_size": 600,
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
    },
}
PROBES = [
    " Naïve café, 北京, 🎉 and an ellipsis … at the end \n\n",
    "\ufb01ne \uff21\uff42\uff43 x\u00a0y",
    "",
    " ",
    "a",
    *prose_texts(10),
    *python_texts(5),
]


def model_alone(folder: Path, **options: Any) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prose_texts(200)), model_writer=model, minloglevel=3, **options
    )
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_sentencepiece_model_alone_is_published_with_a_tokenizer_of_the_same_ids(kind: str, tmp_path: Path) -> None:
    source = model_alone(tmp_path / "source", **KINDS[kind])
    for name in ("one", "again"):
        (tmp_path / name).mkdir()
        adopt_tokenizer(tmp_path / name, source)
    assert directory_digest(tmp_path / "one") == directory_digest(tmp_path / "again")
    own, published = Tokenizer.load(tmp_path / "one"), TransformersTokenizer.of(tmp_path / "one")
    for probe in PROBES:
        assert own.encode(probe) == published.encode(probe)
    assert (own.eos, own.vocab_size) == (published.eos, published.vocab_size)


@pytest.mark.parametrize("kind", ["word", "char"])
def test_a_sentencepiece_model_that_tokenizer_json_cannot_describe_is_refused(kind: str, tmp_path: Path) -> None:
    source = model_alone(tmp_path / "source", model_type=kind, vocab_size=40, hard_vocab_limit=False)
    (tmp_path / "adopted").mkdir()
    with pytest.raises(DataError, match=r"tokenizer\.model cannot have one: it is neither a BPE nor a unigram model"):
        adopt_tokenizer(tmp_path / "adopted", source)


def test_a_lossy_tokenizer_is_reported_with_an_example(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lossy = model_alone(tmp_path / "source", **KINDS["BPE with bytes"])
    (tmp_path / "adopted").mkdir()
    adopt_tokenizer(tmp_path / "adopted", lossy)
    assert r"is lossy: it decodes 'def f(x):\n\treturn  x" in caplog.text
    assert "as 'def f(x): return x ** 2 # 1234'. Models generate" in caplog.text
    exact = model_alone(tmp_path / "source", **KINDS["unigram with bytes and every space"])
    assert loss_of(Tokenizer.load(exact), exact) == ""


def test_a_model_with_spaces_as_suffixes_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"model_type": "unigram", "vocab_size": 200, "treat_whitespace_as_suffix": True}
    source = model_alone(tmp_path / "source", **options)
    with pytest.raises(ValueError, match="it treats spaces in a way that"):
        write_json(source / "tokenizer.model", tmp_path)
