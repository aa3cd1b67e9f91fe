"""The command `generate`: what it prints, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from helpers.warm import Warm
from safetensors.torch import load_file, save_file

from btm_scale.cli.app import main
from btm_scale.cli.generate import prompts_of
from btm_scale.config.run import RunConfig
from btm_scale.errors import UserError
from btm_scale.generate.generator import Generator
from btm_scale.generate.sampling import Sampling
from btm_scale.run_dir import RunDir

PROMPTS = ["--prompt", "import os", "--prompt", "THE SOFTWARE IS PROVIDED"]


@pytest.mark.slow
def test_generate_prints_one_json_document(handmade: tuple[RunConfig, RunDir], warm: Warm) -> None:
    _, run = handmade
    document = json.loads(warm.check("generate", run.root, *PROMPTS, "--max-tokens", "6", "--json").stdout)
    first, second = document["generations"]
    assert first["expert"] in first["posterior"]
    assert set(first["posterior"]) == {"cpp", "docs", "licences", "python"}
    assert second["prompt"] == "THE SOFTWARE IS PROVIDED"
    assert len(second["tokens"]) <= 6


def test_the_text_of_a_single_prompt_is_streamed(
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
    (generation,) = generator.generate(["import os"], max_tokens=9)
    assert capsys.readouterr().out == generation.text + "\n"
    seed = Generator.of_run(config, run, models=["seed"])
    assert [generation.posterior for generation in seed.generate(["import os"], max_tokens=2)] == [{"seed": 1.0}]


def test_a_diverged_expert_ends_the_command_with_a_sentence(
    handmade: tuple[RunConfig, RunDir], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(handmade[1].root, run.root)
    file = run.model("python") / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"model.norm.weight": weights["model.norm.weight"] * math.nan}, file, {"format": "pt"})
    for more in ([], ["--method", "mixture"], ["--model", "python"]):
        with pytest.raises(SystemExit) as ended:
            main(["generate", str(run.root), *PROMPTS, "--max-tokens", "2", *more])
        assert ended.value.code == 1
        assert capsys.readouterr().err == (
            "btm-scale: An expert's logits contain NaN or exclude every token. Check for a diverged expert.\n"
        )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--method", "beam"], "Unknown generation method 'beam'"),
        (["--posterior", "suffix"], "Unknown posterior 'suffix'"),
        (["--prior", "known"], "Unknown prior 'known'"),
        (["--domain", "law"], "Unknown domain 'law'"),
        (["--domain", "python", "--prior", "uniform"], "does not depend on a domain. Remove --domain python, or use"),
        (["--model", "absent"], "Unknown model 'absent'. Choose one of seed, "),
        (["--model", "Pyton"], "Unknown model 'Pyton'. Did you mean 'python'?"),
        (["--prompt", "word " * 100], "shorten it"),
        (["--prompts", "/absent.txt"], "Cannot read prompts"),
        (["--max-memory", "much"], "Invalid size 'much'"),
        (["--max-memory", "10KB"], "Increase --max-memory"),
        (["--device", "abacus"], "Cannot use device 'abacus'"),
        (["--top-k", "5"], "temperature 1, without top-k"),
        (["--batch", "0"], "at least 0 tokens and 1 prompt"),
    ],
)
def test_user_errors_exit_with_2_and_a_message(
    wrong: list[str], message: str, handmade: tuple[RunConfig, RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(handmade[1].root), "--prompt", "x", *wrong])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_prompt_that_is_not_utf8_is_rejected() -> None:
    assert prompts_of(["naïve 北京 🎉"], None) == ["naïve 北京 🎉"]
    with pytest.raises(UserError, match=r"the prompt 'a\\udcff' is not UTF-8"):
        prompts_of(["a\udcff"], None)


def test_a_file_has_one_prompt_per_line_whatever_characters_it_has(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("a\fb\x0b\r\nc\x85d\n\ne\u2028f\rg\n".encode())
    assert prompts_of(["first"], file) == ["first", "a\fb\x0b", "c\x85d", "", "e\u2028f\rg"]
    for content, prompts in ((b"", ["first"]), (b"\n", ["first", ""])):
        file.write_bytes(content)
        assert prompts_of(["first"], file) == prompts
