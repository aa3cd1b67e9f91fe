from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.small_models import Save, random_weights
from safetensors.torch import load_file, save_file

from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.formats.safetensors_writer import INDEX, ShardedWriter
from btm_scale.checkpoint.formats.tensors import DTYPES, TensorSpec, dtype_of, same_bits
from btm_scale.checkpoint.hashing import content_hash
from btm_scale.errors import CheckpointError
from btm_scale.util import files
from btm_scale.util.files import publish_directory, require_space


def specs_of(weights: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec.of(tensor) for name, tensor in weights.items()}


@pytest.mark.parametrize("shard", [5e9, 1500])
def test_the_safetensors_library_loads_written_models(save: Save, shard: float) -> None:
    weights = random_weights(0) | {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5)}
    directory = save("m", weights, shard=shard)
    loaded = {}
    for file in directory.glob("*.safetensors"):
        loaded |= load_file(file)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert (directory / INDEX).is_file() == (shard < 5e9)


@pytest.mark.parametrize("dtype", [dtype_of(code) for code in DTYPES], ids=str)
def test_every_dtype_that_the_safetensors_library_writes_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {"a": torch.arange(15).reshape(3, 5).to(dtype), "b": torch.ones(7).to(dtype)}
    save_file(weights, tmp_path / "model.safetensors")
    with SafetensorsModel(tmp_path) as model:
        for name, tensor in weights.items():
            assert model.spec(name) == TensorSpec.of(tensor)
            assert model.read(name).view(torch.uint8).equal(tensor.view(torch.uint8))
            assert model.read_range(name, 2, 5).view(torch.uint8).equal(tensor.reshape(-1)[2:5].view(torch.uint8))


@pytest.mark.parametrize("metadata", [None, {}, {"format": "mlx"}])
def test_any_metadata_that_the_library_reads_is_read(tmp_path: Path, metadata: object) -> None:
    weights = {"a": torch.arange(6.0)}
    save_file(weights, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps({"__metadata__": metadata, **json.loads(data[8 : 8 + length])}).encode()
    content = len(header).to_bytes(8, "little") + header + data[8 + length :]
    (tmp_path / "model.safetensors").write_bytes(content)
    assert load_file(tmp_path / "model.safetensors")["a"].equal(weights["a"])
    assert SafetensorsModel(tmp_path).read("a").equal(weights["a"])


def test_tensors_behind_gigabytes_of_others_are_read(tmp_path: Path) -> None:
    """The file has holes, so it takes no space."""
    sizes = {"a": 3 << 30, "b": 1 << 40, "c": 8}
    header, position = {}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [position, position + size]}
        position += size
    content = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.seek(position - 8, 1)
        file.write(bytes(range(8)))
    with SafetensorsModel(tmp_path) as model:
        assert {name: model.spec(name).nbytes for name in model.names} == sizes
        assert model.read("c").tolist() == list(range(8))
        assert model.read_range("b", (1 << 40) - 2, 1 << 40).tolist() == [0, 0]


def test_pieces_in_any_order_give_the_same_file_as_complete_tensors(tmp_path: Path) -> None:
    weights = random_weights(1)
    with ShardedWriter(tmp_path / "complete", specs_of(weights)) as writer:
        for name, tensor in weights.items():
            writer.write(name, tensor)
    with ShardedWriter(tmp_path / "pieces", specs_of(weights)) as writer:
        for name, tensor in reversed(weights.items()):
            flat = tensor.reshape(-1)
            for start in reversed(range(0, flat.numel(), 7)):
                writer.write_range(name, start, flat[start : start + 7])
    files = [tmp_path / name / "model.safetensors" for name in ("complete", "pieces")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_two_writers_can_write_one_file(tmp_path: Path) -> None:
    weights = random_weights(1)
    first = ShardedWriter(tmp_path, specs_of(weights))
    second = ShardedWriter(tmp_path, specs_of(weights), attach=True)
    for i, (name, tensor) in enumerate(weights.items()):
        (first, second)[i % 2].write(name, tensor)
        first.mark_written(name)
    second.detach()
    first.close()
    assert SafetensorsModel(tmp_path).read("model.norm.weight").equal(weights["model.norm.weight"])


def test_an_incomplete_writer_raises_and_leaves_no_files(tmp_path: Path) -> None:
    weights = random_weights(2)
    writer = ShardedWriter(tmp_path, specs_of(weights), max_shard_bytes=1500)
    for name, tensor in weights.items():
        writer.write_range(name, 0, tensor.reshape(-1)[:-1])
    with pytest.raises(RuntimeError, match="are incomplete"):
        writer.close()
    assert not list(tmp_path.iterdir())


def test_no_file_is_visible_before_the_writer_closes_or_after_it_fails(tmp_path: Path) -> None:
    weights = random_weights(3)
    writer = ShardedWriter(tmp_path, specs_of(weights))
    writer.write("model.norm.weight", weights["model.norm.weight"])
    assert not list(tmp_path.glob("model*"))
    with pytest.raises(ZeroDivisionError), writer:
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_differs_from_its_spec_is_rejected(tmp_path: Path) -> None:
    with ShardedWriter(tmp_path, {"a": TensorSpec(torch.float32, (2, 3))}) as writer:
        with pytest.raises(ValueError, match="but its spec says"):
            writer.write("a", torch.zeros(3, 2))
        with pytest.raises(ValueError, match="outside of"):
            writer.write_range("a", 5, torch.zeros(2))
        writer.write("a", torch.zeros(2, 3))


def test_too_little_disk_space_raises_before_the_first_byte(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Nothing was written"):
        ShardedWriter(tmp_path / "out", {"a": TensorSpec(torch.float32, (1 << 50,))})
    assert not list(tmp_path.iterdir())
    require_space(tmp_path / "not" / "yet", 1)


@pytest.mark.parametrize("count", [1, 40, 90])
def test_tensors_begin_at_the_border_of_a_block(tmp_path: Path, count: int) -> None:
    tensors = {f"tensor{i}": torch.full((i,), float(i)) for i in range(count)}
    with ShardedWriter(tmp_path, {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert (8 + int.from_bytes(raw[:8], "little")) % 4096 == 0
    read = load_file(tmp_path / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in read.items()} == {k: v.tolist() for k, v in tensors.items()}


def edit_header(file: Path, **changes: object) -> None:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["a"] |= changes
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_offsets": [0, 24]}, "24 bytes|bytes, not 24"),
        ({"data_offsets": [4, 20]}, "gap before it|overlaps"),
        ({"dtype": "Q4"}, "invalid header entry"),
        ({"shape": [5]}, "20 bytes, not 16"),
        ({"shape": [-2, -2]}, "invalid header entry"),
        ({"shape": [4.5]}, "invalid header entry"),
        ({"data_offsets": ["0", "16"]}, "invalid header entry"),
        ({"data_offsets": [0.0, 16.0]}, "invalid header entry"),
    ],
)
def test_an_inconsistent_header_raises(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4), "b": torch.zeros(4)}, file)
    edit_header(file, **changes)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsModel(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_file_raises_when_opened(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100)}, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"(?i)copy it again"):
        SafetensorsModel(tmp_path)


def test_an_index_that_disagrees_with_its_shards_raises(save: Save) -> None:
    directory = save("m", random_weights(4), shard=1500)
    index = json.loads((directory / INDEX).read_text())
    shard = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.ghost"] = shard
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"only the index has 'model\.ghost'"):
        SafetensorsModel(directory)
    (directory / shard).unlink()
    with pytest.raises(CheckpointError, match="which is missing"):
        SafetensorsModel(directory)


@pytest.mark.parametrize("name", [INDEX, "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": "x"}', '{"weight_map": {"a": 3}}'])
def test_a_malformed_index_raises(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"{name} (is not valid JSON|is not a shard index|is a JSON list)"):
        open_model(tmp_path)


def test_a_directory_without_weights_and_an_unknown_tensor_raise(save: Save, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has neither"):
        SafetensorsModel(tmp_path)
    with pytest.raises(CheckpointError, match="no tensor 'x'"):
        SafetensorsModel(save("m", random_weights(0))).read("x")


def test_the_content_hash_ignores_sharding_but_covers_names_shapes_dtypes_and_every_bit(save: Save) -> None:
    weights = random_weights(5)
    expected = content_hash(save("one", weights))
    assert content_hash(save("many", dict(reversed(weights.items())), shard=1500)) == expected
    norm = weights["model.norm.weight"]
    flipped = norm.clone()
    flipped.view(torch.int16)[-1] ^= 1
    others = [
        weights | {"model.norm.weight": flipped},
        weights | {"model.norm.weight": norm.reshape(4, 4)},
        weights | {"model.norm.weight": norm.view(torch.float16)},
        {name.replace("norm", "ln"): tensor for name, tensor in weights.items()},
    ]
    hashes = {content_hash(save(f"other{i}", other)) for i, other in enumerate(others)}
    assert len(hashes | {expected}) == 5


def test_publishing_never_deletes_before_the_replacement_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("new", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(CheckpointError, match="exists already"):
        publish_directory(tmp_path / "new", tmp_path / "final")
    removed: list[str] = []
    monkeypatch.setattr(files.shutil, "rmtree", lambda path: removed.append((tmp_path / "final/file").read_text()))
    publish_directory(tmp_path / "new", tmp_path / "final", replace=True)
    assert removed == ["new"]


def test_the_same_bits_are_those_of_the_bytes_not_of_the_numbers() -> None:
    nan = torch.tensor([1.0, float("nan")], dtype=torch.bfloat16)
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.ones(2), torch.ones(3))
    assert same_bits(torch.ones(2, 2), torch.ones(4))
