"""A tokenizer.json for a sentencepiece model without one: the same pieces, normalization and spaces.

Experts are published with a tokenizer.json. Few fields of the model's protocol buffer are needed for it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, decoders, normalizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE, Unigram

_SPACE = "\u2581"
_TRAINER, _NORMALIZER = 2, 3  # fields of a model
_MODEL_TYPE, _SUFFIX_SPACE, _BYTE_FALLBACK = 3, 24, 35  # fields of its trainer's settings
_CHARSMAP, _DUMMY_PREFIX, _NO_EXTRA_SPACES, _ESCAPE = 2, 3, 4, 5  # fields of its normalizer's settings
_UNIGRAM, _BPE = 1, 2


def write_json(model_file: Path, directory: Path) -> None:
    """Write tokenizer.json and its config for a sentencepiece model. Raises ValueError for a kind that has none."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    fields = dict(_fields(model_file.read_bytes()))
    trainer, normalizer = dict(_fields(fields.get(_TRAINER, b""))), dict(_fields(fields.get(_NORMALIZER, b"")))
    if trainer.get(_SUFFIX_SPACE) or not normalizer.get(_ESCAPE, 1):
        raise ValueError("it treats spaces in a way that tokenizer.json cannot describe")
    pieces = [model.id_to_piece(token) for token in range(model.get_piece_size())]
    kind = trainer.get(_MODEL_TYPE, _UNIGRAM)
    if kind not in (_UNIGRAM, _BPE):
        raise ValueError("it is neither a BPE nor a unigram model")
    tokenizer = FastTokenizer(_bpe(model, pieces) if kind == _BPE else _unigram(model, pieces))
    steps: list[Any] = []
    if charsmap := normalizer.get(_CHARSMAP):
        steps.append(normalizers.Precompiled(charsmap))
    if normalizer.get(_NO_EXTRA_SPACES, 1):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    has_prefix = bool(normalizer.get(_DUMMY_PREFIX, 1))
    steps += [normalizers.Prepend(_SPACE)] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    special = [token for token in range(len(pieces)) if model.is_control(token) or model.is_unknown(token)]
    tokenizer.add_special_tokens([AddedToken(pieces[token], normalized=False, special=True) for token in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, token in {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id()}.items():
        settings |= {f"{name}_token": pieces[token]} if token >= 0 else {}
    text = json.dumps(settings | {"add_bos_token": False}, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _bpe(model: Any, pieces: list[str]) -> BPE:
    ids = {piece: token for token, piece in enumerate(pieces)}
    learned = [
        token
        for token in range(len(pieces))
        if not (model.is_control(token) or model.is_unknown(token) or model.is_byte(token) or model.is_unused(token))
    ]
    merges = sorted(
        (-model.get_score(token), ids[pieces[token][:cut]], ids[pieces[token][cut:]])
        for token in learned
        for cut in range(1, len(pieces[token]))
        if pieces[token][:cut] in ids and pieces[token][cut:] in ids
    )
    return BPE(
        vocab=ids,
        merges=[(pieces[left], pieces[right]) for _, left, right in merges],
        unk_token=pieces[model.unk_id()],
        fuse_unk=True,
        byte_fallback=any(model.is_byte(token) for token in range(len(pieces))),
    )


def _unigram(model: Any, pieces: list[str]) -> Unigram:
    def score(token: int) -> float:
        is_piece = not (model.is_control(token) or model.is_unknown(token) or model.is_byte(token))
        return float(model.get_score(token)) if is_piece else 0.0

    vocabulary = [(piece, score(token)) for token, piece in enumerate(pieces)]
    has_bytes = any(model.is_byte(token) for token in range(len(pieces)))
    return Unigram(vocabulary, unk_id=model.unk_id(), byte_fallback=has_bytes)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of each field of a protocol buffer: integers, floats and bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        value: Any
        if wire == 0:
            value, at = _varint(message, at)
        elif wire == 2:
            length, at = _varint(message, at)
            value, at = message[at : at + length], at + length
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            [value], at = struct.unpack("<d" if wire == 1 else "<f", message[at : at + size]), at + size
        else:
            raise ValueError("its protocol buffer is damaged")
        yield key >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise ValueError("its protocol buffer is damaged")
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
