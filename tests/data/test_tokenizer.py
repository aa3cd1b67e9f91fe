"""Ids equal to those of transformers, exact decoding, and existing tokenizers."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from helpers.text_samples import prose_texts, python_texts
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from btm_scale.config.data import DataConfig, DomainConfig
from btm_scale.config.run import RunConfig
from btm_scale.data.adopt_tokenizer import adopt_tokenizer
from btm_scale.data.sources import resolve_domain
from btm_scale.data.tokenizer import SentencePieceTokenizer, Tokenizer, TransformersTokenizer
from btm_scale.data.train_tokenizer import balanced_sample, train_tokenizer
from btm_scale.errors import DataError
from btm_scale.run_dir import RunDir

HARD = [
    "def f(x):\n\treturn  x ** 2\n\n\n    # tabs\tand    spaces   \n",
    r"Let $\mathcal{O}_X$ be a sheaf; \emph{see} \S 3.14159 and $a_{i,j}^{2n}$.",
    "🎉👩‍👩‍👧‍👦 naïve Ω≈ç√ 中文字符 ẞ \u00a0 \u200b",
    " leading space",
    "\n",
    "\r\n windows \r\n",
    "   ",
    "",
    "0123456789 12.5e-3",
    "a" * 3_000,
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(directory, python_texts(60) + prose_texts(100), vocab_size=1_000)
    return directory


def test_ids_are_those_of_auto_tokenizer_and_decoding_restores_the_text(trained: Path) -> None:
    ours, theirs = Tokenizer.load(trained), AutoTokenizer.from_pretrained(str(trained))
    assert ours.vocab_size == len(theirs) == 1_000
    assert ours.eos == theirs.eos_token_id == 2
    for text in HARD + python_texts(120)[60:] + prose_texts(150):
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert ours.decode(ids) == text
        assert theirs.decode(ids) == text


def test_ids_are_those_of_auto_tokenizer_on_eight_corpora(trained: Path, corpora: Path) -> None:
    ours, theirs = Tokenizer.load(trained), AutoTokenizer.from_pretrained(str(trained))
    for path in sorted(corpora.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in islice(file, 12):
                text = json.loads(line)["text"]
                ids = ours.encode(text)
                assert theirs(text)["input_ids"] == ids
                assert ours.decode(ids) == text


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\0")))
def test_any_text_is_decoded_exactly(prepared: tuple[RunConfig, RunDir], text: str) -> None:
    tokenizer = Tokenizer.load(prepared[1].tokenizer)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_text_that_quotes_the_end_token_does_not_end_there(trained: Path) -> None:
    tokenizer = Tokenizer.load(trained)
    assert tokenizer.eos not in tokenizer.encode("before </s> after")


def test_too_little_text_for_the_vocabulary_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Cannot train a tokenizer of 4096 tokens .*: it has .* at most 2\d\d\. Add"):
        train_tokenizer(tmp_path, ["a little text"], vocab_size=4_096)
    with pytest.raises(DataError, match="it has no line with a character"):
        train_tokenizer(tmp_path, ["\n\n"], vocab_size=4_096)
    assert not list(tmp_path.iterdir())
    texts = prose_texts(10)
    with pytest.raises(DataError, match=r"Set tokenizer\.vocab_size to at most \d+, add text") as refused:
        train_tokenizer(tmp_path, texts, vocab_size=40_000)
    most = int(str(refused.value).partition("to at most ")[2].partition(",")[0])
    train_tokenizer(tmp_path, texts, vocab_size=most)


def test_a_long_document_at_the_beginning_is_not_all_of_a_larger_sample(tmp_path: Path) -> None:
    rows = [json.dumps({"text": text}) + "\n" for text in ("x" * 300_000, *prose_texts(100))]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    source = resolve_domain("d", DomainConfig(text=("a.jsonl",)), tmp_path)
    data = DataConfig(dev=0.1, test=0.1)
    with pytest.raises(DataError, match=r"Add text, raise tokenizer\.sample_bytes if there is more"):
        train_tokenizer(tmp_path, balanced_sample([source], 200_000, data), vocab_size=400)
    train_tokenizer(tmp_path, balanced_sample([source], 1_000_000, data), vocab_size=400)


def test_an_error_in_the_text_is_not_reported_as_a_vocabulary_error(tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield from prose_texts(50)
        raise DataError("line 51 is broken")

    with pytest.raises(DataError, match=r"^line 51 is broken$"):
        train_tokenizer(tmp_path, texts(), vocab_size=320)


def byte_level_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Write a byte-level tokenizer like GPT-2's."""
    fast = FastTokenizer(BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(prose_texts(50), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(str(directory))
    return tokenizer


def test_a_request_to_stop_while_text_is_sampled_is_not_a_mistake_in_the_text(tmp_path: Path) -> None:
    """SLURM would not start a job again that ends with a mistake."""

    def texts() -> Iterator[str]:
        yield from prose_texts(50)
        raise SystemExit(85)  # as the handler of SIGUSR1 does

    with pytest.raises(SystemExit):
        train_tokenizer(tmp_path, texts(), vocab_size=400)


def test_a_byte_level_tokenizer_is_adopted(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    reference = byte_level_tokenizer(tmp_path / "given")
    (tmp_path / "given" / "config.json").write_text("{}")
    adopt_tokenizer(tmp_path / "own", tmp_path / "given")
    ours = Tokenizer.load(tmp_path / "own")
    assert isinstance(ours, TransformersTokenizer)
    assert not (tmp_path / "own" / "config.json").exists()
    assert ours.vocab_size == 600
    assert ours.eos == reference.eos_token_id
    for text in HARD:
        assert ours.encode(text) == reference(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == text
    assert ours.eos not in ours.encode("before <|endoftext|> after")
    assert ours.encode_special("before<|endoftext|>")[-1] == ours.eos
    # A server encodes chats and text in several threads: a chat must not change how the library encodes text.
    assert ours._tokenizer.backend_tokenizer.encode_special_tokens


def test_settings_for_batches_in_tokenizer_json_change_no_document(tmp_path: Path) -> None:
    reference = byte_level_tokenizer(tmp_path / "given")
    fast = FastTokenizer.from_file(str(tmp_path / "given" / "tokenizer.json"))
    fast.enable_truncation(max_length=4)
    fast.enable_padding(length=900)
    end = ("<|endoftext|>", reference.eos_token_id)
    fast.post_processor = processors.TemplateProcessing(single="$A <|endoftext|>", special_tokens=[end])
    fast.save(str(tmp_path / "given" / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path / "given")
    texts = prose_texts(3)
    assert [ours.encode(text) for text in texts] == [reference(text)["input_ids"] for text in texts]


def test_a_sentencepiece_tokenizer_is_copied_unchanged(trained: Path, tmp_path: Path) -> None:
    adopt_tokenizer(tmp_path, trained)
    assert isinstance(Tokenizer.load(tmp_path), SentencePieceTokenizer)
    assert Tokenizer.load(tmp_path).digest == Tokenizer.load(trained).digest


def test_transformers_decides_if_the_two_libraries_disagree(trained: Path, tmp_path: Path) -> None:
    given, own = tmp_path / "given", tmp_path / "own"
    byte_level_tokenizer(given)
    shutil.copy(trained / "tokenizer.model", given)
    own.mkdir()
    adopt_tokenizer(own, given)
    assert isinstance(Tokenizer.load(own), TransformersTokenizer)


def test_a_directory_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer in"):
        Tokenizer.load(tmp_path / "gone")
    with pytest.raises(DataError, match=r"cannot be loaded: .*tokenizer.model"):
        Tokenizer.load(tmp_path)


def many_letters() -> list[str]:
    """Return texts of 1,500 different characters, most of which are rare."""
    draw = random.Random(1)
    letters = [chr(0x4E00 + i) for i in range(1_500)]
    return ["".join(draw.choices(letters, [1 / (i + 3) for i in range(1_500)], k=200)) for _ in range(200)]


def test_the_rarest_characters_of_a_large_alphabet_are_encoded_as_bytes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = many_letters()
    train_tokenizer(tmp_path, texts, vocab_size=1_600)
    tokenizer = Tokenizer.load(tmp_path)
    for ids, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
        assert tokenizer.decode(ids.tolist()) == text
    assert f"{len(set(''.join(texts))):,} different characters: with 1,600 tokens the rarest are" in caplog.text


@pytest.mark.parametrize("again", [True, False], ids=["texts read again", "texts read once"])
def test_a_vocabulary_too_small_for_the_alphabet_is_refused_with_one_that_suffices(tmp_path: Path, again: bool) -> None:
    texts = many_letters()
    with pytest.raises(DataError, match=r"800 tokens is too small for the different characters") as refused:
        train_tokenizer(tmp_path, texts if again else iter(texts), vocab_size=800)
    assert ("98%" if again else "99.95%") in str(refused.value)
    assert not list(tmp_path.iterdir())
    needed = int(str(refused.value).partition("tokenizer.vocab_size to at least ")[2].partition(",")[0])
    with pytest.raises(DataError, match="is too small"):
        train_tokenizer(tmp_path, texts if again else iter(texts), vocab_size=needed - 1)
    train_tokenizer(tmp_path, texts if again else iter(texts), vocab_size=needed)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]
