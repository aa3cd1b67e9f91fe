"""Models with different vocabularies: rows are matched by token, as an independent small computation does it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers.small_models import Save
from helpers.small_tokenizers import as_text, bpe
from safetensors.torch import load_file
from tokenizers import Tokenizer

from btm_scale.checkpoint.hashing import content_hash
from btm_scale.checkpoint.merge import journal
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.checkpoint.merge.planning import make_plan
from btm_scale.errors import CheckpointError

WIDTH = 6
OURS = bpe(["a", "b", "c", "ab"], ["a b"], ["<s>"])
THEIRS = bpe(["c", "a", "b", "d", "cd"], ["c d"], ["<s>", "<call>"])
TENSORS = ("model.embed_tokens.weight", "lm_head.weight")


def tokens_of(tokenizer: dict[str, object]) -> list[str]:
    """Return the tokens of a tokenizer.json by id."""
    ids = Tokenizer.from_str(json.dumps(tokenizer)).get_vocab()
    return sorted(ids, key=lambda token: ids[token])


def weights(seed: int, rows: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {TENSORS[0]: (rows, WIDTH), TENSORS[1]: (rows, WIDTH), "model.norm.weight": (WIDTH,)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


@pytest.fixture
def pair(save: Save) -> tuple[Path, Path]:
    """Two models: the first has two rows of padding, the second other tokens in another order."""
    config = {"model_type": "llama", "vocab_size": 7, "eos_token_id": 4, "bos_token_id": [4]}
    one = save("one", weights(0, 7), config=config, files={"tokenizer.json": as_text(OURS)})
    two = save("two", weights(1, 7), config=config | {"eos_token_id": 5}, files={"tokenizer.json": as_text(THEIRS)})
    return one, two


def row_of(model: dict[str, torch.Tensor], name: str, vocabulary: Sequence[str], token: str) -> torch.Tensor | None:
    return model[name][vocabulary.index(token)].double() if token in vocabulary else None


@pytest.mark.parametrize("new_rows", ["mean", "zero"])
def test_a_union_is_the_mean_of_rows_of_one_token(pair: tuple[Path, Path], tmp_path: Path, new_rows: str) -> None:
    merge(tmp_path / "out", [(pair[0], 0.3), (pair[1], 0.7)], tokenizer="union", new_rows=new_rows, chunk_bytes=20)
    tokens = tokens_of(json.loads((tmp_path / "out/tokenizer.json").read_text()))
    assert tokens == ["a", "b", "c", "ab", "<s>", "d", "cd", "<call>"]
    ours, theirs = weights(0, 7), weights(1, 7)
    merged = load_file(tmp_path / "out/model.safetensors")
    for name in TENSORS:
        assert merged[name].shape == (8, WIDTH)
        for i, token in enumerate(tokens):
            rows = [row_of(ours, name, tokens_of(OURS), token), row_of(theirs, name, tokens_of(THEIRS), token)]
            has = [row for row in rows if row is not None]
            new = torch.zeros(WIDTH, dtype=torch.float64) if new_rows == "zero" else sum(has) / len(has)
            one, two = (new if row is None else row for row in rows)
            torch.testing.assert_close(merged[name][i], (0.3 * one + 0.7 * two).float(), rtol=0, atol=1e-7)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"], config["bos_token_id"]) == (8, 4, [4])


def test_a_union_tokenizer_encodes_the_texts_of_both(pair: tuple[Path, Path], tmp_path: Path) -> None:
    merge(tmp_path / "out", [(pair[0], 1), (pair[1], 1)], tokenizer="union")
    union = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert union.encode("abcd<call>").tokens == ["ab", "cd", "<call>"]


def test_the_base_tokenizer_decides_rows_and_ids(pair: tuple[Path, Path], save: Save, tmp_path: Path) -> None:
    one, two = pair
    merge(
        tmp_path / "out",
        [(one, 0.5), (two, 0.25)],
        method="task_arithmetic",
        base=two,
        tokenizer="base",
        dtype="float64",
    )
    merged = load_file(tmp_path / "out/model.safetensors")
    ours, theirs = weights(0, 7), weights(1, 7)
    for name in TENSORS:
        for i, token in enumerate(tokens_of(THEIRS)):
            base = theirs[name][i].double()
            row = row_of(ours, name, tokens_of(OURS), token)
            # A model that lacks a token does not change its row.
            expected = base if row is None else base + 0.5 * (row - base)
            torch.testing.assert_close(merged[name][i], expected, rtol=0, atol=1e-12)
    assert json.loads((tmp_path / "out/tokenizer.json").read_text()) == THEIRS
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["eos_token_id"], config["vocab_size"]) == (5, 7)  # <s> has id 5 in the base's vocabulary


def test_a_token_that_every_model_lacks_gets_the_mean_of_the_rows_of_tokens(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    wanted = bpe(["<new>", "b", "ab"])
    (tmp_path / "wanted").mkdir()
    (tmp_path / "wanted/tokenizer.json").write_text(as_text(wanted))
    merge(tmp_path / "out", [(pair[0], 1)], tokenizer=tmp_path / "wanted")
    ours, merged = weights(0, 7), load_file(tmp_path / "out/model.safetensors")
    for name in TENSORS:
        expected = torch.stack([ours[name][[1, 3]].double().mean(0), ours[name][1].double(), ours[name][3].double()])
        torch.testing.assert_close(merged[name], expected.float(), rtol=0, atol=1e-7)


def test_a_union_of_one_vocabulary_changes_no_byte_and_keeps_padding(save: Save, tmp_path: Path) -> None:
    files = {"tokenizer.json": as_text(OURS)}
    models = [(save(f"m{i}", weights(i, 9), files=files), 1.0) for i in range(2)]
    plain = merge(tmp_path / "plain", models)
    assert merge(tmp_path / "union", models, tokenizer="union").content_hash == plain.content_hash
    longer = save("longer", weights(2, 12), files=files)
    merge(tmp_path / "padded", [models[0], (longer, 1)], tokenizer="union")
    assert load_file(tmp_path / "padded/model.safetensors")[TENSORS[0]].shape == (9, WIDTH)


def test_the_pieces_and_processes_do_not_change_a_byte(pair: tuple[Path, Path], tmp_path: Path) -> None:
    hashes = set()
    for i, options in enumerate(({}, {"chunk_bytes": 4}, {"jobs": 2})):
        report = merge(tmp_path / f"out{i}", [(pair[0], 0.3), (pair[1], 0.7)], tokenizer="union", **options)
        hashes |= {report.content_hash, content_hash(tmp_path / f"out{i}")}
    assert len(hashes) == 1


def test_the_choice_belongs_to_the_identity_of_a_merge(pair: tuple[Path, Path], tmp_path: Path) -> None:
    inputs = [(path, 1.0) for path in pair]
    merge(tmp_path / "out", inputs, tokenizer="union")
    assert merge(tmp_path / "out", inputs, tokenizer="union").already_complete
    with pytest.raises(CheckpointError, match="new_rows was 'mean' and is now 'zero'"):
        merge(tmp_path / "out", inputs, tokenizer="union", new_rows="zero")
    with pytest.raises(CheckpointError, match="tokenizer was 'union' and is now"):
        merge(tmp_path / "out", inputs, tokenizer=pair[1])

    def fingerprint(tokenizer: str | Path, new_rows: str = "mean") -> str:
        settings = {"parameters": None, "base": None, "dtype": None, "max_shard_bytes": 5e9, "seed": 0}
        return make_plan(inputs, method="linear", tokenizer=tokenizer, new_rows=new_rows, **settings).fingerprint()

    assert len({fingerprint("union"), fingerprint("union", "zero"), fingerprint(pair[0]), fingerprint(pair[1])}) == 4
    assert fingerprint("union") == fingerprint("union")


def test_an_interrupted_union_resumes_to_the_same_bytes(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from btm_scale.checkpoint.merge import output as module
    from btm_scale.errors import WorkerLost

    inputs = [(path, 1.0) for path in pair]
    expected = merge(tmp_path / "whole", inputs, tokenizer="union").content_hash

    def lost(*_: object) -> str:
        raise WorkerLost("killed")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_publish", lost)
        with pytest.raises(WorkerLost):
            merge(tmp_path / "out", inputs, tokenizer="union")
    partial = next(path for path in tmp_path.iterdir() if path.is_dir() and ".partial" in path.name)
    assert journal.finished(partial)
    assert merge(tmp_path / "out", inputs, tokenizer="union").content_hash == expected


def test_pieces_of_a_list_vocabulary_move_the_added_tokens_behind_them(save: Save, tmp_path: Path) -> None:
    def unigram(pieces: list[str]) -> dict[str, object]:
        model = {"type": "Unigram", "unk_id": 0, "vocab": [[piece, -float(i)] for i, piece in enumerate(pieces)]}
        return bpe([], added=[], pre_tokenizer={"type": "Metaspace", "replacement": "▁"}) | {
            "model": model,
            "added_tokens": [bpe(pieces, added=["<s>"])["added_tokens"][0]],
        }

    tokenizers = [unigram(["<unk>", "▁a"]), unigram(["<unk>", "▁b", "▁a"])]
    models = [
        save(f"m{i}", weights(i, rows), files={"tokenizer.json": as_text(tokenizers[i])})
        for i, rows in enumerate((3, 4))
    ]
    merge(tmp_path / "out", [(model, 1.0) for model in models], tokenizer="union")
    union = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert [union.token_to_id(token) for token in ("<unk>", "▁a", "▁b", "<s>")] == [0, 1, 2, 3]
    merged = load_file(tmp_path / "out/model.safetensors")[TENSORS[0]]
    torch.testing.assert_close(merged[3], (weights(0, 3)[TENSORS[0]][2] + weights(1, 4)[TENSORS[0]][3]) / 2)
    assert merged[2].equal(weights(1, 4)[TENSORS[0]][1])


def test_a_choice_that_is_impossible_says_why(pair: tuple[Path, Path], save: Save, tmp_path: Path) -> None:
    inputs = [(path, 1.0) for path in pair]
    for choice, message in (("base", "needs a base"), (tmp_path / "nope", "nope does not exist. Give --tokenizer")):
        with pytest.raises(CheckpointError, match=message):
            merge(tmp_path / "out", inputs, tokenizer=choice)
    bare = save("bare", weights(3, 7), config={"model_type": "llama"})
    with pytest.raises(CheckpointError, match="bare has no tokenizer"):
        merge(tmp_path / "out", [*inputs, (bare, 1.0)], tokenizer="union")
    with pytest.raises(CheckpointError, match=r"--tokenizer union\|base\|PATH"):
        merge(tmp_path / "out", inputs)
