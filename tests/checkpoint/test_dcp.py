"""Checkpoints that FSDP2 and torch.distributed.checkpoint saved, read without them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.worlds import run_script
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from btm_scale.checkpoint.convert import convert
from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.inspect import inspect
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.errors import CheckpointError

SAVER = Path(__file__).with_name("save_with_dcp.py")
# Not divisible by the three ranks, so that their shards differ in size.
CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=50,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with config.json and the checkpoints below it."""
    folder = tmp_path_factory.mktemp("dcp")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32).save_pretrained(folder / "base")
    CONFIG.save_pretrained(folder)
    run_script(SAVER, {"base": str(folder / "base"), "folder": str(folder)}, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model-and-optimizer", "app", "compiled", "bare", "accelerate"])
def test_the_model_is_read_from_whatever_it_was_saved_in(saved: Path, kind: str) -> None:
    expected = load_file(saved / "expected.safetensors")
    with open_model(saved / kind) as model:
        assert set(model.names) == set(expected)
        for name in model.names:
            assert model.read(name).equal(expected[name]), name
            assert model.read_range(name, 7, 20).equal(expected[name].reshape(-1)[7:20])
    facts = inspect(saved / kind)
    assert (facts.format, facts.family, facts.problem) == ("dcp", "llama", None)
    assert facts.files


@pytest.mark.slow
def test_a_converted_checkpoint_gives_the_original_logits(saved: Path, tmp_path: Path) -> None:
    convert(saved / "model-and-optimizer", tmp_path / "out", to="huggingface", verify=True)
    convert(saved / "model-and-optimizer", tmp_path / "megatron", to="megatron", verify=True)
    merged = merge(tmp_path / "merged", [(saved / "app", 0.5), (tmp_path / "out", 0.5)])
    assert merged.tensors == len(load_file(saved / "expected.safetensors"))
    original = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)
    original.load_state_dict(load_file(saved / "expected.safetensors"))
    tokens = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        for folder in ("out", "merged"):
            logits = AutoModelForCausalLM.from_pretrained(tmp_path / folder)(tokens).logits
            assert logits.equal(original(tokens).logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reason"),
    [("optimizer-only", "no tensors of a model"), ("two-models", "several models: 'student', 'teacher'")],
)
def test_a_checkpoint_without_exactly_one_model_is_refused(saved: Path, kind: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        open_model(saved / kind)


def changed_metadata(folder: Path, change: Callable[[object], None]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("lost", ["a chunk", "a tensor"])
def test_a_checkpoint_that_lacks_a_chunk_is_refused(tmp_path: Path, lost: str) -> None:
    import torch.distributed.checkpoint as dcp

    weights = {"a.weight": torch.randn(4, 3), "b.weight": torch.randn(5)}
    dcp.save({"model": weights}, checkpoint_id=tmp_path, no_dist=True)
    with open_model(tmp_path) as model:
        assert {name: model.read(name).tolist() for name in model.names} == {
            name: tensor.tolist() for name, tensor in weights.items()
        }

    def drop(metadata: object) -> None:
        stored = metadata.storage_data  # type: ignore[attr-defined]
        if lost == "a tensor":
            del stored[next(index for index in stored if index.fqn == "model.a.weight")]
        else:
            metadata.state_dict_metadata["model.a.weight"].chunks *= 2  # type: ignore[attr-defined]

    changed_metadata(tmp_path, drop)
    with pytest.raises(CheckpointError, match=r"model\.a\.weight\.chunks"):
        open_model(tmp_path)


def native(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Return a tensor as torchtitan's Llama has it: `name` without `model.`, and neighbouring rows are rotated."""
    for ours, theirs in {
        "model.": "",
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }.items():
        name = name.replace(ours, theirs)
    if name.endswith(("wq.weight", "wk.weight")):
        rows = [head * 8 + half * 4 + i for head in range(len(tensor) // 8) for i in range(4) for half in range(2)]
        tensor = tensor[rows]
    return name, tensor


@pytest.mark.parametrize("holder", ["model", None])
def test_the_names_of_torchtitan_become_those_of_hugging_face(tmp_path: Path, holder: str | None) -> None:
    import torch.distributed.checkpoint as dcp

    torch.manual_seed(0)
    weights = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32).state_dict()
    content = dict(native(name, tensor) for name, tensor in weights.items())
    content |= {"freqs_cis": torch.zeros(3)}
    dcp.save(
        ({holder: content} if holder else content) | {"train_state": {"step": torch.tensor(1)}},
        checkpoint_id=tmp_path / "step-1",
        no_dist=True,
    )
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_model(tmp_path / "step-1")
    CONFIG.save_pretrained(tmp_path)
    with open_model(tmp_path / "step-1") as model:
        assert set(model.names) == set(weights)
        for name, tensor in weights.items():
            assert model.read(name).equal(tensor), name
    convert(tmp_path / "step-1", tmp_path / "out", to="huggingface", verify=True)
    tokens = torch.arange(12).reshape(1, 12)
    original = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)
    original.load_state_dict(weights)
    with torch.no_grad():
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits.equal(original(tokens).logits)
