from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_forest import POSITIONS, Letters, Oracle, write_experts
from helpers.tiny_run import btm_scale
from transformers import AutoModelForCausalLM

from btm_scale.cli.app import main
from btm_scale.cli.forest import prompts_of
from btm_scale.config.evaluation import Tempering
from btm_scale.config.run import RunConfig
from btm_scale.errors import CheckpointError, UserError
from btm_scale.generate.generator import Generator
from btm_scale.generate.request import Batch
from btm_scale.generate.sampling import Sampling, cut
from btm_scale.model import hf_decoder
from btm_scale.run_dir import RunDir

PRIOR = np.log([0.8, 0.2])
TEMPERING = Tempering(power=0.4, forgetting=0.9, share=0.05)
MODES: list[dict[str, Any]] = [
    {"posterior": "prefix"},
    {"posterior": "token"},
    {"posterior": "tempered", "tempering": TEMPERING},
]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_experts(tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def oracle(experts: dict[str, Path]) -> Oracle:
    return Oracle(experts)


def continuations(generator: Generator, prompt: str, count: int, length: int) -> Counter[tuple[int, ...]]:
    """How often each continuation is drawn."""
    ids = [0, *generator.tokenizer.encode(prompt)]
    texts = np.full((count, length), -1)
    batch = Batch([ids] * count, np.full(count, length))
    places = np.zeros(count, dtype=np.int64)
    for step in generator.steps(batch, torch.Generator().manual_seed(7)):
        texts[step.texts, places[step.texts]] = step.tokens
        places[step.texts] += 1
    kinds, counts = np.unique(texts, axis=0, return_counts=True)
    return Counter({tuple(kind[kind >= 0].tolist()): int(n) for kind, n in zip(kinds, counts, strict=True)})


def chance(drawn: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Of a chi-squared this large, if the draws are from `expected` (Wilson and Hilferty's approximation)."""
    assert set(drawn) <= set(expected)
    total = sum(drawn.values())
    common = [text for text, probability in expected.items() if probability * total >= 10]
    cells = [(drawn[text], expected[text] * total) for text in common]
    rest = (total - sum(cell[0] for cell in cells), total - sum(cell[1] for cell in cells))
    if rest[1] >= 10:
        cells.append(rest)
    squared = sum((found - wanted) ** 2 / wanted for found, wanted in cells)
    freedom = len(cells) - 1
    normal = ((squared / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(normal / math.sqrt(2))


def test_drawing_one_expert_samples_the_mixture_exactly_and_swapped_priors_do_not(
    experts: dict[str, Path], oracle: Oracle
) -> None:
    expected = oracle.continuations([0, 1, 2], 2, log_prior=PRIOR)
    right = continuations(Generator(experts, Letters(), log_prior=PRIOR), "ab", 200_000, 2)
    assert sum(right.values()) == 200_000
    assert chance(right, expected) > 1e-3
    swapped = continuations(Generator(experts, Letters(), log_prior=PRIOR[::-1]), "ab", 20_000, 2)
    assert chance(swapped, expected) < 1e-6


@pytest.mark.parametrize("method", ["per-token", "mixture"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["posterior"])
def test_token_by_token_methods_sample_their_own_posteriors_mixture(
    method: str, mode: dict[str, Any], experts: dict[str, Path], oracle: Oracle
) -> None:
    settings = {"mode": mode["posterior"], "tempering": mode.get("tempering")}
    expected = oracle.continuations([0, 1, 2], 3, log_prior=PRIOR, **settings)
    drawn = continuations(Generator(experts, Letters(), log_prior=PRIOR, method=method, **mode), "ab", 40_000, 3)
    assert chance(drawn, expected) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "unlike"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["posterior"])
def test_greedy_mixture_of_a_ragged_batch_equals_brute_force(
    family: str, mode: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Few logits at once: the longest prompt is read in pieces, the first of which are all padding for the others.
    monkeypatch.setattr(hf_decoder, "_LOGITS_AT_ONCE", 3 * 4 * len("abcde"))
    experts = write_experts(tmp_path, 3, family)
    oracle, prior = Oracle(experts), np.log([0.2, 0.5, 0.3])
    generator = Generator(
        experts, Letters(), log_prior=prior, method="mixture", sampling=Sampling(temperature=0), **mode
    )
    prompts = ["abcdabcdaa", "d", "", "bbbb"]
    settings = {"log_prior": prior, "mode": mode["posterior"], "tempering": mode.get("tempering")}
    for prompt, found in zip(prompts, generator.generate(prompts, max_tokens=8), strict=True):
        text = [0, *Letters().encode(prompt)]
        wanted: list[int] = []
        while len(wanted) < 8 and wanted[-1:] != [0]:
            wanted.append(int(np.argmax(oracle.mixture_after(text + wanted, **settings))))
        assert found.tokens + [0] * (found.finished == "end") == wanted
        assert found.text == Letters().decode(found.tokens)


def test_a_batch_equals_its_prompts_one_by_one(experts: dict[str, Path]) -> None:
    prompts = ["abcdabcd", "d", "bbb"]
    for method, sampling in [("mixture", Sampling(temperature=0)), ("mixture", Sampling(0.7, top_k=1))]:
        generator = Generator(experts, Letters(), log_prior=PRIOR, method=method, sampling=sampling)
        together = generator.generate(prompts, max_tokens=10)
        for prompt, whole in zip(prompts, together, strict=True):
            (alone,) = generator.generate([prompt], max_tokens=10)
            assert alone.posterior == pytest.approx(whole.posterior, rel=1e-4)
            assert replace(alone, posterior=whole.posterior) == whole


def test_the_stream_tells_what_generate_returns_and_the_same_seed_writes_the_same(
    experts: dict[str, Path],
) -> None:
    generator = Generator(experts, Letters(), log_prior=PRIOR)
    texts = ["", "", ""]
    for piece in generator.stream(["abc", "d", "dd"], max_tokens=12, random_seed=5):
        texts[piece.prompt] += piece.text
    wholes = generator.generate(["abc", "d", "dd"], max_tokens=12, random_seed=5)
    assert [whole.text for whole in wholes] == texts
    assert all(whole.expert in experts and sum(whole.posterior.values()) == pytest.approx(1) for whole in wholes)
    others = generator.generate(["abc", "d", "dd"], max_tokens=12, random_seed=6)
    assert [whole.text for whole in others] != texts


def test_a_continuation_ends_at_a_stop_string_the_limit_or_the_end_of_the_context(
    experts: dict[str, Path],
) -> None:
    generator = Generator(experts, Letters(), method="mixture", sampling=Sampling(temperature=0))
    (free,) = generator.generate(["ab"], max_tokens=5)
    (stopped,) = generator.generate(["ab"], max_tokens=5, stop=[free.text[1:3]])
    assert (stopped.finished, stopped.text) == ("stop", free.text[: free.text.index(free.text[1:3])])
    (empty,) = generator.generate(["ab"], max_tokens=0)
    assert (empty.finished, empty.text) == ("length", "")
    # Ids that no tokenizer ends: every text runs into the context's end.
    endless = Letters()
    endless.eos = 4
    generator = Generator(experts, endless, method="mixture", sampling=Sampling(temperature=0, top_k=1))
    long = generator.generate(["a" * (POSITIONS - 3), "a" * (POSITIONS - 1)], max_tokens=100)
    assert [len(whole.tokens) for whole in long if whole.finished == "context"] == [
        3 if index == 0 else 1 for index, whole in enumerate(long) if whole.finished == "context"
    ]
    assert {whole.finished for whole in long} <= {"context", "end"}


def test_experts_come_one_by_one_where_memory_holds_no_more(experts: dict[str, Path]) -> None:
    size = sum(file.stat().st_size for file in experts["expert0"].glob("*.safetensors"))
    free = Generator(experts, Letters(), log_prior=PRIOR)
    narrow = Generator(experts, Letters(), log_prior=PRIOR, max_bytes=1.5 * size)
    assert narrow.generate(["ab"] * 5, max_tokens=6) == free.generate(["ab"] * 5, max_tokens=6)
    assert len(narrow.shelf.loaded) == 1
    assert len(free.shelf.loaded) == 2
    with pytest.raises(UserError, match="needs all 2 experts in memory"):
        Generator(experts, Letters(), method="mixture", max_bytes=1.5 * size)
    with pytest.raises(UserError, match="raise --max-memory"):
        Generator(experts, Letters(), max_bytes=size / 2)


def test_log_probabilities_of_a_bfloat16_model_are_not_rounded(experts: dict[str, Path], tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(experts["expert0"], dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    decoder = hf_decoder.Decoder.load(tmp_path / "bf16")
    reading = decoder.read([[0, 1, 2, 3]])
    assert decoder.model.dtype == torch.bfloat16
    assert reading.logits.dtype == torch.float32
    assert not torch.equal(reading.logits, reading.logits.bfloat16().float())
    base = decoder.model.base_model(torch.tensor([[0, 1, 2, 3]])).last_hidden_state[0, -1]
    head = decoder.model.get_output_embeddings().weight
    assert reading.logits[0].tolist() == pytest.approx((base.double() @ head.double().T).tolist(), abs=1e-5)


def test_top_k_and_top_p_leave_the_likeliest_tokens() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.97, 0.01, 0.01, 0.01]]).log()
    kept = [row.isfinite().nonzero().flatten().tolist() for row in cut(scores, 2, None)]
    assert kept[0] == [1, 3]
    assert [row.isfinite().sum().item() for row in cut(scores, None, 0.65)] == [2, 1]
    assert [row.isfinite().sum().item() for row in cut(scores, None, 0.75)] == [3, 1]
    assert torch.equal(cut(scores, 9, 1.0), scores)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "beam"}, "no generation method is called 'beam'"),
        ({"posterior": "token"}, "use 'per-token'"),
        ({"method": "mixture", "posterior": "suffix"}, "no posterior is called 'suffix'"),
        ({"sampling": Sampling(temperature=0.5)}, "temperature 1, no top-k"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    settings: dict[str, Any], message: str, experts: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match=message):
        Generator(experts, Letters(), **settings)


@pytest.mark.parametrize("values", [{"temperature": -1}, {"temperature": math.nan}, {"top_k": 0}, {"top_p": 1.5}])
def test_impossible_sampling_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"temperature|top-k|top-p"):
        Sampling(**values)


def test_weights_that_were_cut_short_are_told(experts: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(next(iter(experts.values())), tmp_path / "copy")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"transformers cannot load .*; copy it or train it again"):
        hf_decoder.Decoder.load(copy)


def test_a_prompt_longer_than_the_context_is_refused(experts: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=f"prompt 2 has {POSITIONS + 1} tokens .* at most {POSITIONS}"):
        Generator(experts, Letters()).generate(["a", "a" * POSITIONS])


PROMPTS = ["--prompt", "import os", "--prompt", "THE SOFTWARE IS PROVIDED"]


@pytest.mark.slow
def test_the_command_line_writes_text_and_one_json_document(handmade: tuple[RunConfig, RunDir]) -> None:
    _, run = handmade
    document = json.loads(btm_scale("generate", run.root, *PROMPTS, "--max-tokens", "6", "--json").stdout)
    first, second = document["generations"]
    assert first["expert"] in first["posterior"]
    assert set(first["posterior"]) == {"cpp", "docs", "licences", "python"}
    assert second["prompt"] == "THE SOFTWARE IS PROVIDED"
    assert len(second["tokens"]) <= 6


def test_one_prompt_is_streamed_as_it_is_written(
    handmade: tuple[RunConfig, RunDir], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config, run = handmade
    (tmp_path / "prompts.txt").write_text("import os\n")
    greedy = ["--method", "mixture", "--posterior", "tempered", "--temperature", "0", "--domain", "python"]
    main(
        [
            "generate",
            str(run.root),
            "--prompts",
            str(tmp_path / "prompts.txt"),
            *greedy,
            "--max-memory",
            "1GB",
            "--max-tokens",
            "9",
        ]
    )
    generator = Generator.of_run(
        config, run, domain="python", method="mixture", posterior="tempered", sampling=Sampling(temperature=0)
    )
    (whole,) = generator.generate(["import os"], max_tokens=9)
    assert capsys.readouterr().out == whole.text + "\n"
    seed = Generator.of_run(config, run, models=["seed"])
    assert [whole.posterior for whole in seed.generate(["import os"], max_tokens=2)] == [{"seed": 1.0}]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--method", "beam"], "no generation method is called 'beam'"),
        (["--posterior", "suffix"], "no posterior is called 'suffix'"),
        (["--prior", "known"], "no prior is called 'known'"),
        (["--domain", "law"], "the run has no domain 'law'"),
        (["--domain", "python", "--prior", "uniform"], "is of no domain"),
        (["--model", "absent"], "not a finished expert"),
        (["--prompt", "word " * 100], "shorten it"),
        (["--prompts", "/absent.txt"], "no prompts can be read"),
        (["--max-memory", "much"], "Invalid size 'much'"),
        (["--max-memory", "10KB"], "raise --max-memory"),
        (["--device", "abacus"], "the device 'abacus' cannot be used"),
        (["--top-k", "5"], "temperature 1, no top-k"),
        (["--batch", "0"], "at least 0 tokens and 1 prompt"),
    ],
)
def test_a_users_mistake_exits_with_2_and_a_message(
    wrong: list[str], message: str, handmade: tuple[RunConfig, RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(handmade[1].root), "--prompt", "x", *wrong])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_prompt_of_bytes_that_are_no_text_is_refused() -> None:
    assert prompts_of(["naïve 北京 🎉"], None) == ["naïve 北京 🎉"]
    with pytest.raises(UserError, match=r"the prompt 'a\\udcff' is not UTF-8"):
        prompts_of(["a\udcff"], None)
