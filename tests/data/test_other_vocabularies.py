"""Tokenizers in other forms than tokenizer.json and sentencepiece: tekken.json and tiktoken files."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.text_samples import prose_texts, python_texts
from tokenizers import Regex, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

from btm_scale.checkpoint.merge.tokenizer_files import BYTE_LETTERS
from btm_scale.data.adopt_tokenizer import adopt_tokenizer
from btm_scale.data.tokenizer import Tokenizer, TransformersTokenizer
from btm_scale.errors import DataError

PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ("<unk>", "<s>", "</s>", "[INST]")
BYTES = {letter: byte for byte, letter in BYTE_LETTERS.items()}


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerFast:
    """A tokenizer whose special tokens come first, as in tekken.json."""
    from tokenizers.models import BPE

    fast = FastTokenizer(BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(prose_texts(80), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tokens_of(reference: PreTrainedTokenizerFast) -> list[bytes]:
    """Return the bytes of the tokens that are not special, by rank."""
    ids = sorted((row, token) for token, row in reference.get_vocab().items() if token not in SPECIAL)
    return [bytes(BYTES[letter] for letter in token) for _, token in ids]


def tekken(reference: PreTrainedTokenizerFast) -> dict[str, Any]:
    tokens = tokens_of(reference)
    return {
        "config": {
            "pattern": PATTERN,
            "num_vocab_tokens": len(tokens) + 20,
            "default_vocab_size": len(tokens) + len(SPECIAL),
            "default_num_special_tokens": len(SPECIAL),
            "version": "v7",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for rank, token in enumerate(tokens)
        ],
        "special_tokens": [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(SPECIAL)],
    }


def tiktoken(reference: PreTrainedTokenizerFast) -> str:
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens_of(reference)))


def test_a_tekken_file_alone_is_adopted_with_its_ids(reference: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source, own = tmp_path / "source", tmp_path / "own"
    source.mkdir()
    own.mkdir()
    (source / "tekken.json").write_text(json.dumps(tekken(reference)))
    adopt_tokenizer(own, source, bos=True)
    assert (own / "tokenizer.json").is_file()
    for tokenizer in (Tokenizer.load(source), Tokenizer.load(own)):
        assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (1, 2, 600)
        for text in ["", " x  1234\n\n", "[INST] </s>", "🎉 naïve 北京", *prose_texts(100)[80:], *python_texts(3)]:
            assert tokenizer.encode(text) == reference(text, split_special_tokens=True)["input_ids"], text
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tekken_file_of_the_first_format_is_refused(reference: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    content = tekken(reference)
    del content["special_tokens"]
    (tmp_path / "tekken.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"tekken\.json lists no special tokens.* Add the tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["own.tiktoken", "tokenizer.model", "tiktoken.model"])
def test_a_tiktoken_file_alone_is_refused_by_name(
    reference: PreTrainedTokenizerFast, name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(tiktoken(reference))
    with pytest.raises(DataError, match=rf"{re.escape(name)} is a tiktoken file: .*copy the tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["own.tiktoken", "tokenizer.model", "tekken.json"])
@pytest.mark.parametrize("same", [True, False])
def test_a_tokenizer_json_is_used_and_the_other_file_is_named(
    reference: PreTrainedTokenizerFast, name: str, same: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, own = tmp_path / "source", tmp_path / "own"
    own.mkdir()
    reference.save_pretrained(str(source))
    content = tekken(reference)
    if not same:
        last = content["vocab"][-2:]
        last[0]["token_bytes"], last[1]["token_bytes"] = last[1]["token_bytes"], last[0]["token_bytes"]
    if name == "tekken.json":
        text = json.dumps(content)
    else:
        text = "".join(f"{one['token_bytes']} {one['rank'] + len(SPECIAL)}\n" for one in content["vocab"])
    (source / name).write_text(text)
    with caplog.at_level("INFO"):
        adopt_tokenizer(own, source)
    assert isinstance(Tokenizer.load(own), TransformersTokenizer)
    assert not (own / name).exists()
    assert f"{source / name} is not used: its tokenizer.json is" in caplog.text
    assert ("with the same tokens" in caplog.text) == same
    assert ("in which 2 of the " in caplog.text) != same


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "GPT2Tokenizer"])
def test_tokenizer_json_decides_although_another_class_is_named(
    reference: PreTrainedTokenizerFast, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, own = tmp_path / "source", tmp_path / "own"
    own.mkdir()
    reference.save_pretrained(str(source))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": name}))
    adopt_tokenizer(own, source)
    for tokenizer in (Tokenizer.load(source), Tokenizer.load(own)):
        for text in ["hello  there 2023", *prose_texts(85)[80:], *python_texts(3)]:
            assert tokenizer.encode(text) == reference(text)["input_ids"]
            assert tokenizer.decode(tokenizer.encode(text)) == text
    if name == "GPT2Tokenizer":
        assert "whose ids differ from those of tokenizer.json. The latter are used" in caplog.text


def test_a_tokenizer_json_is_used_although_there_is_code(
    reference: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference.save_pretrained(str(tmp_path))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OddTokenizer", "auto_map": {"AutoTokenizer": ["odd.OddTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer.load(tmp_path).encode("hello 2023") == reference("hello 2023")["input_ids"]
    assert "names Python code, which is never run: its tokenizer.json is used" in caplog.text
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"its tokenizer is Python code, which is never run"):
        Tokenizer.load(tmp_path)


def test_a_unigram_tokenizer_json_is_adopted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fast = FastTokenizer(Unigram())
    fast.normalizer = normalizers.NFKC()
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    fast.train_from_iterator(prose_texts(60), trainer)
    source, own = tmp_path / "source", tmp_path / "own"
    own.mkdir()
    given = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", unk_token="<unk>")
    given.save_pretrained(str(source))
    adopt_tokenizer(own, source)
    for text in prose_texts(70)[60:]:
        assert Tokenizer.load(own).encode(text) == given(text, add_special_tokens=False)["input_ids"]
    assert "is lossy: it decodes 'def f(x)" in caplog.text
