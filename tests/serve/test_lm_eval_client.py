"""lm-evaluation-harness as a client: its `local-completions` against a served run."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.served_forest import running
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from btm_scale.config.run import RunConfig
from btm_scale.generate.lm_eval import ForestLM
from btm_scale.model import hf_decoder
from btm_scale.run_dir import RunDir
from btm_scale.serve.server import local_planner

PAIRS = [("import", " os"), ("import", " =="), ("", "import os\nimport sys\n"), ("def main(", "args):\n    return")]


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def test_the_mixture_has_the_numbers_of_our_own_harness_model(
    finished_run: tuple[RunConfig, RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    # 16-bit states are rounded differently when other tokens are read with them.
    load = hf_decoder.load_causal_lm
    monkeypatch.setattr(hf_decoder, "load_causal_lm", lambda directory: load(directory).float())
    config, run = finished_run
    ours = ForestLM(run=str(run.root), method="ensemble:prefix", device="cpu")
    with running(*local_planner(config, run)) as server:
        theirs = LocalCompletionsAPI(
            model="forest:mixture",
            base_url=f"{server.url}/v1/completions",
            tokenizer=str(run.tokenizer),
            max_length=config.budget.sequence_length,
            batch_size=3,
            custom_prefix_token_id=ours.eot_token_id,  # with which a document begins
        )
        found = theirs.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
        text = [("import", {"until": ["\n"], "max_gen_toks": 8})]
        written = theirs.generate_until(instances("generate_until", text), disable_tqdm=True)
    expected = ours.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    for (value, greedy), (other, greedy_too) in zip(found, expected, strict=True):
        assert value == pytest.approx(other, abs=1e-3)
        assert greedy == greedy_too
    assert written == ours.generate_until(instances("generate_until", text), disable_tqdm=True)
