"""The demo from text to page, killed and resumed; generation; checkpoints; a layout that the machine cannot serve."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from gpu_phases.ledger import Row, Site, UnavailableError, kill_tree
from gpu_phases.training import become_a_rank, case_of

_DEMO = "demo"
_TOKENS = 3_000_000
_TOY_BYTES = 200_000  # of text per domain
_TOY_SETTINGS = (
    "budget.tokens=8000",
    "budget.batch_tokens=512",
    "budget.sequence_length=64",
    "tokenizer.vocab_size=512",
    "evaluate.tokens_per_domain=1024",
)
_GENERATED, _TOY_GENERATED = 128, 8
_EXPERTS, _TOY_EXPERTS = 8, 2
_PRESET, _TOY_PRESET = "llama-1.3b", "llama-1m"
_POLL_S = 0.2


def rows(site: Site) -> list[Row]:
    """Return the rows in the order of their dependence: the demo's run is used by those after it."""
    listed = [
        Row("demo", 500, _demo),
        Row("demo killed and resumed", 530, _killed_demo),
        Row("two ranks on one GPU", 120, _two_ranks),
        Row(f"checkpoint {_PRESET}", 300, _checkpoint),
    ]
    batches = (1, 2) if site.simulated else (1, 32)
    for method in ("expert", "mixture"):
        listed.append(Row(f"generate demo {method}", 120, partial(_generate_demo, method)))
    return listed + [
        Row(f"generate {_PRESET} batch {batch}", 300, partial(_generate_large, batch)) for batch in batches
    ]


def _command(site: Site, name: str, *settings: str) -> list[str]:
    command = [sys.executable, "-m", "btm_scale.cli", "demo", "--out", str(site.out / name)]
    settings += _TOY_SETTINGS if site.simulated else (f"budget.tokens={_TOKENS}",)
    for setting in (*settings, "health.deterministic=true"):
        command += ["--set", setting]
    return command


def _write_text(site: Site, name: str) -> None:
    """Give a demo at toy size less text than it would write itself."""
    from btm_scale.data.demo_text import write_installed_text

    text, other = site.out / name / "text", site.out / _DEMO / "text"
    if not site.simulated or text.exists():
        return
    if other.exists():
        shutil.copytree(other, text)
    else:
        write_installed_text(text, bytes_per_domain=_TOY_BYTES, longest=4_000)


def _demo(site: Site) -> dict[str, Any]:
    """Run the demo, or what is left of it, to the end."""
    _write_text(site, _DEMO)
    began = time.monotonic()
    subprocess.run(_command(site, _DEMO), check=True)
    return {"command_seconds": time.monotonic() - began, **_results(site.out / _DEMO)}


def _results(run: Path) -> dict[str, Any]:
    from btm_scale.evaluate.results import load_results
    from btm_scale.run_dir import RunDir
    from btm_scale.train.metrics import read_metrics

    document = load_results(RunDir(run)).document()
    rates = {
        path.parent.name: rows[-1]["tokens_per_second"]
        for path in sorted(run.glob("train/*/metrics.jsonl"))
        if (rows := read_metrics(path))
    }
    return {"results": document, "tokens_per_second": rates}


def _killed_demo(site: Site) -> dict[str, Any]:
    """Kill the demo in the first expert after the seed, resume it, and compare its weights with the other run's."""
    name = "demo-killed"
    run = site.out / name
    _write_text(site, name)
    process = subprocess.Popen(_command(site, name))
    while process.poll() is None and not _is_past_the_seed(run):
        time.sleep(_POLL_S)
    was_running = process.poll() is None
    kill_tree(process.pid)
    process.wait()
    began = time.monotonic()
    subprocess.run(_command(site, name), check=True)
    ours, theirs = _digests(run), _digests(site.out / _DEMO)
    return {
        "killed": was_running,
        "resumed_seconds": time.monotonic() - began,
        "same_bits": ours == theirs,
        "models_that_differ": sorted(model for model in ours if ours[model] != theirs.get(model)),
    }


def _is_past_the_seed(run: Path) -> bool:
    return any(path.parent.name != "seed" and path.stat().st_size for path in run.glob("train/*/metrics.jsonl"))


def _digests(run: Path) -> dict[str, str]:
    return {
        str(path.relative_to(run).parent): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in run.rglob("model.safetensors")
        if "checkpoints" not in path.parts
    }


def _two_ranks(site: Site) -> dict[str, Any]:
    """Return the message about a layout of more ranks than GPUs."""
    import torch

    if site.simulated or torch.cuda.device_count() != 1:
        raise UnavailableError("this row needs a machine with exactly one GPU")
    command = _command(site, "two-ranks", "layout.data=2")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    print(result.stdout, result.stderr)
    if result.returncode != 2:
        raise RuntimeError(f"exit code {result.returncode} instead of 2")
    return {"exit_code": 2, "message": result.stderr.strip().splitlines()[-1]}


def _checkpoint(site: Site) -> dict[str, Any]:
    """Return the seconds to save and to load a training checkpoint of one rank, and its size."""
    from training_peers import engine_of

    from btm_scale.train.checkpoint import load_state, save_state, state_path

    become_a_rank()
    engine = engine_of(case_of(_TOY_PRESET if site.simulated else _PRESET, site))
    folder = site.folder("checkpoints")
    try:
        began = time.monotonic()
        save_state(engine, folder, 1, 1)
        saved = time.monotonic()
        load_state(engine, state_path(folder, 1))
        loaded = time.monotonic()
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    finally:
        shutil.rmtree(folder)  # 16 GB that the results do not need
    return {"save_seconds": saved - began, "load_seconds": loaded - saved, "bytes": size}


def _generate_demo(method: str, site: Site) -> dict[str, Any]:
    """Return the rate of generation with the demo's experts."""
    from btm_scale.forest.open import open_folder
    from btm_scale.generate.generator import Generator

    config, run = open_folder(site.out / _DEMO)
    generator = Generator.of_run(config, run, method=method, device=site.device)
    return _rate(generator, ["def main():", "The license"], site)


def _generate_large(batch: int, site: Site) -> dict[str, Any]:
    """Return the rate of a mixture of untrained models of real size, with the demo's tokenizer."""
    from btm_scale.data.tokenizer import Tokenizer
    from btm_scale.forest.open import open_folder
    from btm_scale.generate.generator import Generator

    _, run = open_folder(site.out / _DEMO)
    tokenizer = Tokenizer.load(run.tokenizer)
    model = _untrained_model(site, tokenizer.vocab_size, run.tokenizer)
    models = {f"expert {number}": model for number in range(_TOY_EXPERTS if site.simulated else _EXPERTS)}
    generator = Generator(models, tokenizer, method="mixture", device=site.device)
    return {"experts": len(models), **_rate(generator, ["The license"] * batch, site)}


def _untrained_model(site: Site, vocabulary: int, tokenizer: Path) -> Path:
    """Write a Hugging Face model with random weights, once."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from btm_scale.config.model import ModelConfig

    folder = site.out / "untrained"
    if not (folder / "complete").exists():
        shape = ModelConfig(preset=_TOY_PRESET if site.simulated else _PRESET).shape(vocabulary, 2048)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        with torch.device(site.device):
            model = LlamaForCausalLM(config).bfloat16()
        model.save_pretrained(folder)
        for file in tokenizer.iterdir():
            shutil.copy(file, folder)
        (folder / "complete").touch()
    return folder


def _rate(generator: Any, prompts: list[str], site: Site) -> dict[str, Any]:
    """Generate once to compile kernels, then again; return tokens and steps per second."""
    limit = _TOY_GENERATED if site.simulated else _GENERATED
    generator.generate(prompts, max_tokens=4, random_seed=0)
    began = time.monotonic()
    generations = generator.generate(prompts, max_tokens=limit, random_seed=1)
    seconds = time.monotonic() - began
    lengths = [len(generation.tokens) for generation in generations]
    return {
        "prompts": len(prompts),
        "tokens": sum(lengths),
        "tokens_per_second": sum(lengths) / seconds,
        "steps_per_second": max(lengths) / seconds,
    }
