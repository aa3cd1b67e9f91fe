from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from btm_scale.cli import lm_eval
from btm_scale.config.run import RunConfig
from btm_scale.config.yaml import dump_text
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.generate.lm_eval import ForestLM
from btm_scale.generate.loglikelihood import generator_of_method, score_windows
from btm_scale.run_dir import RunDir

DOCUMENTS = [
    {"text": "import os\nimport sys\n", "before": "import", "after": [" os", " =="], "right": 0},
    {
        "text": "for name in names:\n    print(name)\n",
        "before": "for name",
        "after": [" licence", " in"],
        "right": 1,
    },
]
TASKS: dict[str, dict[str, Any]] = {
    "btm_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{before}}",
        "doc_to_choice": "{{after}}",
        "doc_to_target": "{{right}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "btm_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "btm_writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{before}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def harness(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "btm_scale.cli.lm_eval", *map(str, arguments)]
    offline = os.environ | {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=offline, timeout=600)


@pytest.mark.slow
def test_the_harness_evaluates_an_ensemble_on_local_tasks(handmade: tuple[RunConfig, RunDir], tmp_path: Path) -> None:
    config, run = handmade
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
    }
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(dump_text({"task": name} | source | task))
    done = harness(
        "run",
        "--model",
        "btm-scale",
        "--model_args",
        f"run={run.root},method=ensemble",
        "--device",
        "cpu",
        "--tasks",
        ",".join(TASKS),
        "--include_path",
        tmp_path,
        "--output_path",
        tmp_path / "out",
        "--log_samples",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text())["results"]
    generator = generator_of_method(config, run, "ensemble")
    tokenizer = Tokenizer.load(run.tokenizer)
    texts = [[tokenizer.eos, *tokenizer.encode(document["text"])] for document in DOCUMENTS]
    nats = score_windows(generator, [(text, len(text) - 1) for text in texts])
    bits = -sum(nats) / math.log(2) / sum(len(document["text"].encode()) for document in DOCUMENTS)
    assert results["btm_rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-3)
    assert 0 <= results["btm_choice"]["acc,none"] <= 1
    assert "exact_match,none" in results["btm_writing"]
    (samples,) = (tmp_path / "out").rglob("samples_btm_writing_*.jsonl")
    for line in samples.read_text().splitlines():
        assert "\n" not in json.loads(line)["resps"][0][0]


def test_repeats_are_different_samples_and_the_same_sequence_of_requests_repeats_them(
    handmade: tuple[RunConfig, RunDir],
) -> None:
    def texts(**arguments: Any) -> list[str]:
        model = ForestLM(str(handmade[1].root), device="cpu")
        request = Instance("generate_until", {}, ("import", {"max_gen_toks": 8, **arguments}), 0)
        return [text for _ in range(2) for text in model.generate_until([request] * 3, disable_tqdm=True)]

    sampled = texts(do_sample=True, temperature=1.0)
    assert len(set(sampled)) == 6
    assert texts(do_sample=True, temperature=1.0) == sampled
    assert len(set(texts())) == 1


@pytest.mark.parametrize(
    ("arguments", "message"), [("run=/nowhere", "is not a run folder"), ("method=blend", "Unknown method 'blend'")]
)
def test_user_errors_exit_with_2(
    arguments: str,
    message: str,
    handmade: tuple[RunConfig, RunDir],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model_args = arguments if "run=" in arguments else f"run={handmade[1].root},{arguments}"
    (tmp_path / "data.jsonl").write_text(json.dumps(DOCUMENTS[0]) + "\n")
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
    }
    (tmp_path / "task.yaml").write_text(
        dump_text({"task": "btm_choice", "test_split": "test"} | source | TASKS["btm_choice"])
    )
    words = ("run", "--model", "btm-scale", "--model_args", model_args, "--tasks", "btm_choice")
    monkeypatch.setattr(sys, "argv", ["btm-scale-lm-eval", *words, "--include_path", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        lm_eval.main()
    shown = capsys.readouterr()
    assert ended.value.code == 2, shown.err[-3000:]
    assert message in shown.err
