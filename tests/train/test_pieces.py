"""The runs of Hugging Face tensors that hold a rank's part of a Megatron-core tensor."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.small_models import TINY_SHAPE

from btm_scale.model.families import FAMILIES
from btm_scale.model.hf_names import cut, table, to_huggingface
from btm_scale.model.hf_weights import huggingface_shapes
from btm_scale.model.shape import ModelShape
from btm_scale.train import pieces as pieces_module
from btm_scale.train.pieces import Placement, Span


def full_tensors(shape: ModelShape, tensor: int) -> dict[str, torch.Tensor]:
    """Return complete Megatron-core tensors with the vocabulary padded, every element another number."""
    sizes = huggingface_shapes(shape)
    result = {}
    for entry in table(shape):
        elements = [torch.Size(sizes[name]) for name in entry.huggingface]
        first = elements[0]
        rows, *tail = sum(size[0] for size in elements), *first[1:]
        if entry.form in ("transposed", "query_key_value_fused") and len(first) == 2:
            rows, tail = first[1], [first[0]]
        if entry.form == "vocabulary":
            rows = -(-rows // tensor) * tensor
        size = (rows, *tail)
        result[entry.megatron] = torch.arange(torch.Size(size).numel()).view(size)
    return result


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small matrices have many tiles, some as narrow as a column."""
    monkeypatch.setattr(pieces_module, "_TILE", 100)


@pytest.mark.parametrize("complete", [False, True], ids=["own part", "complete shard"])
@pytest.mark.parametrize("parts", [1, 2, 7])
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_of_all_ranks_are_every_element_once(family: str, tensor: int, parts: int, complete: bool) -> None:
    heads = {"kv_heads": 4} if family == "gpt2" else {}
    shape = ModelShape.model_validate({"family": family, **TINY_SHAPE, **heads})
    for entry in table(shape):
        full = full_tensors(shape, tensor)[entry.megatron]
        expected = to_huggingface(entry, full, shape)
        placed = {name: torch.full((value.numel(),), -1) for name, value in expected.items()}
        written = 0
        shards = cut(entry, full, tensor)
        for rank in range(tensor if entry.cut is not None else 1):
            flat = shards[rank].reshape(-1)
            placement = Placement(entry, tuple(shards[rank].shape), shape, rank, tensor)
            bounds = [flat.numel() * i // parts for i in range(parts + 1)]
            for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
                pieces = placement.share(index, parts) if complete else placement.pieces(start, stop)
                for piece in pieces:
                    tiles = piece.tiles(flat if complete else flat[start:stop])
                    values = torch.cat(list(tiles)).view(piece.span.count, piece.span.length)
                    for begin, run in zip(piece.span.starts, values, strict=True):
                        placed[piece.name][begin : begin + len(run)] = run
                    written += piece.span.elements
        assert written == sum(value.numel() for value in expected.values())
        assert all(torch.equal(placed[name], value.reshape(-1)) for name, value in expected.items()), entry


def test_a_complete_tensor_is_one_run() -> None:
    shape = ModelShape.model_validate({"family": "gpt2", **TINY_SHAPE, "kv_heads": 4})
    for entry in table(shape):
        full = full_tensors(shape, 1)[entry.megatron]
        pieces = list(Placement(entry, tuple(full.shape), shape).pieces(0, full.numel()))
        assert [(piece.name, piece.span) for piece in pieces] == [
            (name, Span(0, value.numel())) for name, value in to_huggingface(entry, full, shape).items()
        ]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_share_of_a_complete_shard_has_no_short_runs(family: str) -> None:
    heads = {"kv_heads": 4} if family == "gpt2" else {}
    shape = ModelShape.model_validate({"family": family, **TINY_SHAPE, **heads})
    for entry in table(shape):
        full = full_tensors(shape, 1)[entry.megatron]
        for piece in Placement(entry, tuple(full.shape), shape).share(1, 2):
            complete = huggingface_shapes(shape)[piece.name]
            assert piece.span.count == 1, (piece.name, piece.span, complete)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_with_the_same_state_write_half_each(family: str) -> None:
    heads = {"kv_heads": 4} if family == "gpt2" else {}
    shape = ModelShape.model_validate({"family": family, **TINY_SHAPE, **heads})
    written = [0, 0]
    for entry in table(shape):
        full = full_tensors(shape, 1)[entry.megatron]
        placement = Placement(entry, tuple(full.shape), shape)
        for index in range(2):
            written[index] += sum(piece.span.elements for piece in placement.share(index, 2))
    assert max(written) <= 0.51 * sum(written)


@pytest.mark.parametrize("span", [Span(0, 5), Span(7, 2, 3, 10)])
def test_a_span_is_read_as_it_is_written(span: Span) -> None:
    assert Span.parse(str(span)) == span


@pytest.mark.parametrize("text", ["", "5", "1+2*3", "-1+2", "1+2 ", "1+2*3/", "1+0", "1+2*0/4", "1+5*3/4"])
def test_other_text_is_not_a_span(text: str) -> None:
    with pytest.raises(ValueError, match="not a span"):
        Span.parse(text)
