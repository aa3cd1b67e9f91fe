"""Generation speed on CPU: one expert and a mixture of four, beside transformers' `generate` with one of the experts.

    python benchmarks/generate.py [--presets llama-1m llama-30m] [--rounds 5] [--tokens 128]

Random weights, prompts of 32 tokens, sampling at temperature 1. All generate the same number of tokens in turns, so
that other load meets all alike. Each round has new models, whose place in memory decides up to 5% of a rate; rates are
medians over the rounds. E models that run one after the other generate 1 / E of one model's
rate, with which the mixture of E experts is compared. Writes results/generate.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import describe

from btm_scale.config.model import ModelConfig
from btm_scale.forest.posterior.evidence import RunningPosterior
from btm_scale.generate.device_posterior import DevicePosterior
from btm_scale.generate.sampling import Sampling, decode, from_mixture
from btm_scale.generate.together import Together
from btm_scale.model.hf_config import config_json
from btm_scale.model.hf_decoder import Decoder

RESULT = Path(__file__).parent / "results" / "generate.json"
VOCABULARY, PROMPT, EXPERTS = 2048, 32, 4
TRANSFORMERS, ONE, MIXTURE = "transformers", "one_expert", "mixture"


def main() -> None:
    """Measure every preset and batch, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["llama-1m", "llama-30m"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = [
        measure(preset, batch, options.tokens, options.rounds)
        for preset in options.presets
        for batch in options.batches
    ]
    settings = {"vocabulary": VOCABULARY, "prompt": PROMPT, "experts": EXPERTS, "tokens": options.tokens}
    result = {"environment": describe(), "settings": settings | {"threads": torch.get_num_threads()}, "runs": rows}
    options.result.write_text(json.dumps(result, indent=1) + "\n")


def measure(preset: str, batch: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Return tokens per second of each way in each round, and the ratios of their medians."""
    random = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, VOCABULARY, (batch, PROMPT), generator=random)
    rates: dict[str, list[float]] = {}
    forwards = 0
    for _ in range(rounds):
        ways, forwards = _ways(preset, prompts, tokens)
        for way in ways.values():
            way(8)
        for name, way in ways.items():
            begin = time.perf_counter()
            way(tokens)
            rates.setdefault(name, []).append(batch * tokens / (time.perf_counter() - begin))
    usual = {name: statistics.median(own) for name, own in rates.items()}
    result = {
        "preset": preset,
        "batch": batch,
        "forwards_per_token": forwards,
        "tokens_per_second": rates,
        "one_expert_to_transformers": usual[ONE] / usual[TRANSFORMERS],
        "mixture_to_part_of_one_expert": usual[MIXTURE] * EXPERTS / usual[ONE],
        "mixture_to_part_of_transformers": usual[MIXTURE] * EXPERTS / usual[TRANSFORMERS],
    }
    print({name: value for name, value in result.items() if name != "tokens_per_second"}, usual, flush=True)
    return result


def _ways(preset: str, prompts: torch.Tensor, tokens: int) -> tuple[dict[str, Callable[[int], None]], int]:
    """Return each way to generate, with new models, and the mixture's forward passes per token."""
    peer = _model(preset, 0, PROMPT + tokens)
    single = Together([_decoder(preset, 0, PROMPT + tokens)])
    mixture = Together([_decoder(preset, seed, PROMPT + tokens) for seed in range(EXPERTS)])
    return {
        TRANSFORMERS: lambda count: _with_transformers(peer, prompts, count),
        ONE: lambda count: _with_experts(single, prompts, count),
        MIXTURE: lambda count: _with_experts(mixture, prompts, count),
    }, len(mixture.parts)


def _with_transformers(model: Any, prompts: torch.Tensor, tokens: int) -> None:
    written = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,
    )
    assert written.shape == (len(prompts), PROMPT + tokens)


def _with_experts(together: Together, prompts: torch.Tensor, tokens: int) -> None:
    """Read the prompts, and continue them by the experts' mixture, as a Generator does."""
    experts, batch = len(together.decoders), len(prompts)
    reading = together.read(prompts.tolist(), score=experts > 1)
    steps = decode(
        reading,
        DevicePosterior(RunningPosterior(np.zeros(experts), batch), reading.device),
        from_mixture(Sampling()),
        limits=np.full(batch, tokens),
        end=None,
        finished=np.zeros(batch, dtype=bool),
        generator=torch.Generator().manual_seed(0),
    )
    assert sum(len(step.tokens) for step in steps) == batch * tokens


def _decoder(preset: str, seed: int, positions: int) -> Decoder:
    return Decoder(_model(preset, seed, positions))


def _model(preset: str, seed: int, positions: int) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    shape = ModelConfig(preset=preset).shape(VOCABULARY, positions)
    config = AutoConfig.for_model(**config_json(shape, dtype="float32", end_of_text=None))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


if __name__ == "__main__":
    main()
