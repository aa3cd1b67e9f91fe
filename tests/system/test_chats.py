"""Conversations from YAML to page: a pretrained model is fine-tuned on the answers of two domains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.chat_samples import QWEN3, conversations, turns, write_chats, write_tokenizer
from helpers.cuts import full
from helpers.tiny_run import tiny_values, write_config
from helpers.warm import Warm

from btm_scale.forest.scores import Scores, evaluation_text
from btm_scale.run_dir import RunDir

pytestmark = pytest.mark.slow


def write_pretrained(folder: Path) -> Path:
    """Write a random Llama model whose end of text ends turns too, as instruction-tuned models have it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    write_tokenizer(folder, QWEN3, eos="<|im_end|>")
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": 280}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).save_pretrained(folder)
    return folder


def values(folder: Path, *, with_all: bool) -> dict[str, Any]:
    """Return a run of two experts; `with_all` adds the dense baseline, a mixture of experts and a second rank."""
    support = {"text": "support.jsonl", "chat": "messages"}
    tutor = {"text": "tutor.jsonl", "chat": "sharegpt", "loss": "last"}
    layout = {"precision": "fp32", "micro_batch": 2}
    rest: dict[str, Any] = {}
    if with_all:
        rest = {
            "experts": {"tutor": {"layout": {"data": 2, "zero": 1}}},
            "moe": {"train": {"budget_share": 0.25}},
        }
    return tiny_values(
        folder,
        domains={"support": support, "tutor": tutor},
        novel_domains={},
        model={"pretrained": str(write_pretrained(folder / "pretrained"))},
        tokenizer={},
        data={"dev": 0.15, "test": 0.15, "workers": 1, "separate_documents": True},
        budget={"tokens": 32 * 1024, "seed_share": 0.25, "sequence_length": 256, "batch_tokens": 2048},
        layout=layout,
        baselines={"dense": with_all, "random_split": with_all},
        dev_loss={"every": 4, "tokens": 62 * 256},
        evaluate={"tokens_per_domain": 16_000, "dev_blocks": 62, "averages": ["uniform", "greedy"]},
        **rest,
    )


@pytest.mark.parametrize("with_all", [pytest.param(False, id="experts"), full(True, id="every model")])
def test_a_fine_tune_on_two_domains_of_conversations_runs_from_yaml_to_page(
    with_all: bool, warm: Warm, tmp_path: Path
) -> None:
    write_chats(tmp_path / "support.jsonl", conversations(160))
    write_chats(tmp_path / "tutor.jsonl", conversations(120, skip=200), "sharegpt")
    config = write_config(tmp_path / "run.yaml", values(tmp_path, with_all=with_all))
    run = RunDir(tmp_path / "run")
    warm.check("run", tmp_path / "run.yaml", "--out", run.root)

    results = json.loads(run.results.read_text())
    for domain in ("support", "tutor"):
        text = evaluation_text(config, run, domain, "test")
        assert text.counted is not None
        assert results["domains"][domain]["tokens"] == np.count_nonzero(text.counted)
        models = {"seed": "seed", f"expert:{domain}": domain} | ({"dense": "dense", "moe": "moe"} if with_all else {})
        for method, model in models.items():
            log_probs = Scores.load(run.scores(model, domain, "test")).log_probs
            expected = np.exp(-np.mean(log_probs[text.counted], dtype=np.float64))
            assert results["methods"][method]["perplexity"][domain] == pytest.approx(expected, rel=1e-9)
    perplexity = {method: values["perplexity"] for method, values in results["methods"].items()}
    assert perplexity["expert:support"]["support"] < perplexity["seed"]["support"]
    assert (run.root / "report.html").is_file()
    rows = [json.loads(line) for line in run.metrics("support").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    # Packed conversations do not attend to each other, so the dev loss is that of each alone, as it is scored.
    dev = evaluation_text(config, run, "support", "dev")
    log_probs = Scores.load(run.scores("support", "support", "dev")).log_probs
    assert rows[-1]["dev_loss/support"] == pytest.approx(-np.mean(dev.of_targets(log_probs)), abs=1e-4)

    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": turns("What is an answer?")}) + "\n")
    done = warm.check("generate", run.root, "--chat", chat, "--max-tokens", 5, "--json")
    [generation] = json.loads(done.stdout)["generations"]
    assert generation["prompt"] == "<|im_start|>user\nWhat is an answer?<|im_end|>\n<|im_start|>assistant\n"
    assert len(generation["tokens"]) <= 5
    assert "<|im_end|>" not in generation["text"]
