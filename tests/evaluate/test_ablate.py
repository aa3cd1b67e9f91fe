from __future__ import annotations

import json
import math
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.handmade_run import DOMAINS, train
from transformers import AutoModelForCausalLM

from btm_scale.cli.app import main
from btm_scale.config.run import RunConfig
from btm_scale.errors import ForestError, UserError
from btm_scale.evaluate.ablate import Subset, ablate, choose_subsets, file_text, run_texts
from btm_scale.evaluate.hf_score import block_log_probs
from btm_scale.model.hf_decoder import Decoder
from btm_scale.run_dir import RunDir


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values)).astype(float)


def test_a_subset_is_evaluated_by_the_mean_of_its_experts_parameters(
    handmade: tuple[RunConfig, RunDir], tmp_path: Path
) -> None:
    config, run = handmade
    (tmp_path / "sample.txt").write_text("def merge(one, other):\n    return one + other\n" * 9)
    text = file_text(config, run, tmp_path / "sample.txt")
    answer = ablate(run, {"sample": text}, [("python",), ("cpp", "python")])
    means = {tuple(row["experts"]): row["mean"] for row in answer["ranking"]}
    one, other = (AutoModelForCausalLM.from_pretrained(run.model(name)) for name in ("cpp", "python"))
    for subset, models in {("python",): [other], ("cpp", "python"): [one, other]}.items():
        average = AutoModelForCausalLM.from_pretrained(run.model("python"))
        for name, parameter in average.named_parameters():
            parameter.data = torch.stack([model.get_parameter(name) for model in models]).mean(0)
        nats = []
        for begin in range(0, len(text.tokens) - 1, 64):
            block = torch.tensor(text.tokens[begin : begin + 65])
            log_probs = average(block[None, :-1]).logits[0].log_softmax(-1)
            nats += log_probs.gather(1, block[1:, None])[:, 0].tolist()
        assert means[subset] == pytest.approx(math.exp(-np.mean(nats)), rel=1e-4)
    assert [row["mean"] for row in answer["ranking"]] == sorted(means.values())
    assert not list(run.root.glob(".ablation*"))


def test_measured_subsets_are_not_measured_again(
    handmade: tuple[RunConfig, RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = handmade
    (tmp_path / "a.txt").write_text("one text")
    (tmp_path / "b.txt").write_text("another text")
    texts = {name: file_text(config, run, tmp_path / f"{name}.txt") for name in "ab"}
    first = ablate(run, texts, [("cpp",)])
    monkeypatch.setattr("btm_scale.evaluate.ablate._average_losses", None)
    assert ablate(run, texts, [("cpp",)]) == first
    shutil.copytree(run.root, tmp_path / "run")
    other = RunDir(tmp_path / "run")
    other.model("cpp").rename(other.model("renamed"))
    [row] = ablate(other, texts, [("renamed",)])["ranking"]
    assert (row["experts"], row["mean"]) == (["renamed"], first["ranking"][0]["mean"])
    with pytest.raises(TypeError):
        ablate(run, {"b": texts["b"]}, [("cpp",)])


def test_sampled_subsets_are_distinct_and_include_each_expert_alone_and_all_together(
    handmade: tuple[RunConfig, RunDir],
) -> None:
    _, run = handmade
    assert len(choose_subsets(run, (), most=15)) == len(set(choose_subsets(run, (), most=15))) == 15
    sampled = choose_subsets(run, (), most=9, random_seed=1)
    assert len(set(sampled)) == 9
    assert {(name,) for name in DOMAINS} | {tuple(sorted(DOMAINS))} <= set(sampled)
    assert sampled == choose_subsets(run, (), most=9, random_seed=1)
    assert choose_subsets(run, ["python", "cpp"], most=3) == [("cpp",), ("python",), ("cpp", "python")]
    with pytest.raises(UserError, match="3 subsets are too few for 4 experts"):
        choose_subsets(run, (), most=3)
    with pytest.raises(ForestError, match="Unknown expert 'law'"):
        choose_subsets(run, ["law"], most=3)


def test_the_command_line_prints_a_ranking_and_rejects_an_unknown_domain(
    handmade: tuple[RunConfig, RunDir], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = handmade
    (tmp_path / "text.txt").write_text("import os\n" * 20)
    command = [
        "ablate",
        str(run.root),
        "--text",
        str(tmp_path / "text.txt"),
        "--expert",
        "python",
        "--expert",
        "cpp",
    ]
    main([*command, "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert [row["rank"] for row in answer["ranking"]] == [1, 2, 3]
    main(command)
    assert "cpp + python" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["ablate", str(run.root), "--domain", "law"])
    assert ended.value.code == 2
    assert "Unknown domain 'law'. Choose one of python, cpp" in capsys.readouterr().err


@pytest.mark.slow
def test_the_ranking_of_averages_is_that_of_models_trained_on_the_mixtures(
    handmade: tuple[RunConfig, RunDir],
) -> None:
    """Spearman's correlation over all mixtures of two and more domains; single ones are equal by construction."""
    config, run = handmade
    texts = run_texts(config, run, (), "dev")
    mixtures: list[Subset] = [subset for size in (2, 3, 4) for subset in combinations(sorted(DOMAINS), size)]
    averaged = {tuple(row["experts"]): row["perplexity"] for row in ablate(run, texts, mixtures)["ranking"]}
    trained = {}
    for mixture in mixtures:
        name = "-".join(mixture)
        train(config, run, f"average/{name}", mixture, steps=50)
        decoder = Decoder.load(run.model(f"average/{name}"))
        trained[mixture] = {
            domain: math.exp(-block_log_probs(decoder, text.tokens, text.block_starts).mean())
            for domain, text in texts.items()
        }
    correlations = [
        np.corrcoef(
            ranks([averaged[mixture][domain] for mixture in mixtures]),
            ranks([trained[mixture][domain] for mixture in mixtures]),
        )[0, 1]
        for domain in texts
    ]
    print(f"Spearman's correlations: {dict(zip(texts, correlations, strict=True))}")
    assert np.mean(correlations) > 0.7
    assert min(correlations) > 0.3
