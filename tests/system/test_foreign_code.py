"""Code that comes with a model never runs: canaries in every file that a library could take code from."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_run import tiny_values, write_config

from btm_scale.cli.app import main
from btm_scale.config.run import RunConfig
from btm_scale.config.yaml import dump_text
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.generate.loglikelihood import generator_of_method
from btm_scale.run_dir import RunDir

AUTO_MAP = {
    "AutoConfig": "canary.Config",
    "AutoModel": "canary.Model",
    "AutoModelForCausalLM": "canary.Model",
    "AutoTokenizer": ["canary.Tokenizer", "canary.Tokenizer"],
}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def plant(directory: Path, song: Path, *, known_type: bool) -> None:
    """Make a model directory hostile; with `known_type`, transformers has classes for all that it names."""
    code = f"open({str(song)!r}, 'a').write('sung')\n"
    classes = "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, LlamaTokenizer as Tokenizer\n"
    for name in ("canary.py", "custom_generate/generate.py", "configuration_canary.py", "handler.py", "setup.py"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(code + classes)
    (directory / "chat_template.jinja").write_text(
        "{{ cycler.__init__.__globals__.os.system('touch " + str(song) + "') }}"
    )
    changes: dict[str, Any] = {"auto_map": AUTO_MAP, "trust_remote_code": True}
    edit(
        directory / "config.json",
        **changes,
        attn_implementation="stranger/kernel",
        custom_pipelines={"text-generation": {"impl": "canary.Pipeline", "pt": ["AutoModelForCausalLM"]}},
        **({} if known_type else {"model_type": "yellowbird"}),
    )
    edit(
        directory / "tokenizer_config.json",
        **changes,
        **({} if known_type else {"tokenizer_class": "YellowbirdTokenizer"}),
    )


Door = Callable[[RunConfig, RunDir, Path, Path], list[str]]


def values_of(config: RunConfig, **changes: Any) -> dict[str, Any]:
    return tiny_values(config.text_root, domains={"docs": {"text": "docs.jsonl"}}, novel_domains={}, **changes)


def generate(config: RunConfig, run: RunDir, model: Path, out: Path) -> list[str]:
    shutil.rmtree(run.model("docs"))
    shutil.copytree(model, run.model("docs"))
    return ["generate", str(run.root), "--prompt", "The", "--max-tokens", "2", "--model", "docs", "--device", "cpu"]


def forest_add(config: RunConfig, run: RunDir, model: Path, out: Path) -> list[str]:
    return ["forest", "add", str(run.root), str(model), "--name", "newcomer"]


def existing_tokenizer(config: RunConfig, run: RunDir, model: Path, out: Path) -> list[str]:
    write_config(out / "own.yaml", values_of(config, tokenizer={"path": str(model)}))
    return ["prepare", str(out / "own.yaml"), "--out", str(out / "run")]


def pretrained(config: RunConfig, run: RunDir, model: Path, out: Path) -> list[str]:
    changes = {"model": {"pretrained": str(model)}, "tokenizer": {"path": str(model)}}
    (out / "own.yaml").write_text(dump_text(values_of(config, **changes)))  # not checked yet
    return ["run", str(out / "own.yaml"), "--out", str(out / "run"), "--dry-run"]


DOORS: dict[str, Door] = {
    "generate": generate,
    "forest add": forest_add,
    "prepare": existing_tokenizer,
    "pretrained": pretrained,
    "merge": lambda config, run, model, out: ["merge", str(out / "out"), str(model), str(run.model("cpp"))],
    "convert": lambda config, run, model, out: ["convert", str(model), str(out / "out"), "--to", "megatron"],
    "inspect": lambda config, run, model, out: ["inspect", str(model)],
    "ablate": lambda config, run, model, out: [
        *("ablate", str(run.root), "--expert", "docs", "--expert", "cpp", "--text", __file__, "--device", "cpu"),
    ],
}


@pytest.fixture
def hostile(
    handmade: tuple[RunConfig, RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[RunConfig, RunDir, Path]:
    """A copy of a run whose tokenizer and expert `docs` are yet to be planted, and where the canaries would sing."""
    config, original = handmade
    run = RunDir(tmp_path / "run")
    shutil.copytree(original.root, run.root)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 1000))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return config, run, tmp_path / "song"


def ended_with(arguments: list[str]) -> int:
    try:
        main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("known_type", [True, False], ids=["known type", "unknown type"])
@pytest.mark.parametrize("door", DOORS)
def test_no_code_of_a_model_directory_runs(
    door: str,
    known_type: bool,
    hostile: tuple[RunConfig, RunDir, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, run, song = hostile
    model = tmp_path / "stranger"
    shutil.copytree(run.model("docs"), model)
    plant(model, song, known_type=known_type)
    if door == "ablate":
        plant(run.model("docs"), song, known_type=known_type)
    out = tmp_path / "out"
    out.mkdir()
    code = ended_with(DOORS[door](config, run, model, out))
    shown = capsys.readouterr()
    assert not song.exists(), f"{door}: {song.read_text()}"
    assert "Traceback" not in shown.err
    assert code == (0 if known_type else code)
    if not known_type and door in ("generate", "ablate", "pretrained", "convert", "forest add"):
        assert code == 2
        assert "yellowbird" in shown.err


@pytest.mark.slow
def test_no_code_of_a_runs_own_tokenizer_or_of_an_evaluated_expert_runs(
    hostile: tuple[RunConfig, RunDir, Path],
) -> None:
    config, run, song = hostile
    plant(run.model("docs"), song, known_type=True)
    changes = {"auto_map": AUTO_MAP, "tokenizer_class": "YellowbirdTokenizer"}
    (run.tokenizer / "canary.py").write_text(f"open({str(song)!r}, 'a').write('sung')\n")
    edit(run.tokenizer / "tokenizer_config.json", **changes)
    (run.tokenizer / "tokenizer.model").unlink(missing_ok=True)  # without it transformers loads the tokenizer
    Tokenizer.load(run.tokenizer)  # from its tokenizer.json
    assert not song.exists()
    edit(run.tokenizer / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    generator_of_method(config, run, "ensemble", device="cpu")
    assert not song.exists()


def adapter(directory: Path, base: Path) -> None:
    """Let a model directory look like an adapter of a base elsewhere, as peft writes it."""
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "auto_mapping": None,
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    shutil.copy(directory / "model.safetensors", directory / "adapter_model.safetensors")


def plant_peft(folder: Path, song: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install packages that transformers imports if they are installed: each reports that it was imported."""
    for name in ("peft", "accelerate", "bitsandbytes", "mistral_common"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"open({str(song)!r}, 'a').write('{name}')\n")
        (folder / f"{name}-99.0.0.dist-info").mkdir()
        (folder / f"{name}-99.0.0.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 99.0.0\n")
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("door", ["generate", "forest add", "pretrained", "ablate"])
def test_an_adapter_in_a_model_directory_loads_no_base(
    door: str,
    hostile: tuple[RunConfig, RunDir, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, run, song = hostile
    base, model = tmp_path / "base", tmp_path / "stranger"
    shutil.copytree(run.model("docs"), base)
    plant(base, song, known_type=False)
    shutil.copytree(run.model("docs"), model)
    adapter(model, base)
    if door == "ablate":
        adapter(run.model("docs"), base)
    plant_peft(tmp_path / "packages", song, monkeypatch)
    out = tmp_path / "out"
    out.mkdir()
    assert ended_with(DOORS[door](config, run, model, out)) == 2
    assert " an adapter" in capsys.readouterr().err
    assert not song.exists(), song.read_text()


@pytest.mark.slow
def test_no_code_of_a_dataset_script_runs(
    hostile: tuple[RunConfig, RunDir, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm_eval loads the data of its tasks with datasets, which ran Python files beside the data in old versions."""
    from btm_scale.cli import lm_eval

    _, run, song = hostile
    data = tmp_path / "canary"
    data.mkdir()
    (data / "canary.py").write_text(f"open({str(song)!r}, 'a').write('sung')\n")
    (data / "test.jsonl").write_text('{"text": "some text"}\n' * 3)
    (tmp_path / "canary.yaml").write_text(
        f"task: canary\ndataset_path: {data}\noutput_type: loglikelihood_rolling\ntest_split: test\n"
        "doc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list: [{metric: word_perplexity}]\n"
    )
    arguments = [
        "run",
        "--model",
        "btm-scale",
        "--model_args",
        f"run={run.root},method=uniform-ensemble",
        "--limit",
        "1",
    ]
    arguments += ["--tasks", "canary", "--include_path", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["btm-scale-lm-eval", *arguments])
    monkeypatch.setenv("PYTHONSAFEPATH", "")  # which the command sets
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with contextlib.suppress(Exception, SystemExit):  # it may refuse the folder, or read the lines beside the script
        lm_eval.main()
    assert not song.exists()
