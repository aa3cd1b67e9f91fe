from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.fake_cpu import fake_fp16
from helpers.tiny_run import tiny_values, write_config
from helpers.warm import Warm

from btm_scale.config.run import RunConfig
from btm_scale.config.yaml import load_yaml
from btm_scale.distributed import precision as precision_module
from btm_scale.distributed.precision import DevicePrecisions, ask_device
from btm_scale.errors import ConfigError, LaunchError
from btm_scale.run import state as run_state
from btm_scale.run import worker
from btm_scale.run.state import open_run
from btm_scale.run_dir import RunDir

ask = ask_device.__wrapped__  # each call queries the device again


def auto_values(text: Path, **changes: object) -> dict[str, object]:
    return tiny_values(text, layout={"precision": "auto", "micro_batch": 4}, **changes)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that trains fast in fp32 and cannot train in fp16."""
    answer = DevicePrecisions("this CPU (any)", ("bf16", "fp32"), "fp32")
    monkeypatch.setattr(run_state, "ask_device", lambda device: answer)


def test_auto_is_fp32_on_a_cpu_whose_libraries_have_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    unrestricted = ask()
    assert unrestricted.fast in unrestricted.possible
    # Only x86-64 builds read these.
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert ask().fast == ("fp32" if os.uname().machine == "x86_64" else unrestricted.fast)


@pytest.mark.parametrize(("speedup", "fast"), [(13.0, "bf16"), (1.3, "bf16"), (1.1, "fp32"), (0.1, "fp32")])
def test_bf16_must_be_clearly_faster_on_a_cpu(speedup: float, fast: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(precision_module, "possible_precisions", lambda: ("bf16", "fp32"))
    monkeypatch.setattr(precision_module, "_bf16_speedup", lambda: speedup)
    assert precision_module.fast_precision() == fast


@pytest.mark.parametrize(
    ("native_bf16", "possible", "fast"),
    [
        (True, ("bf16", "fp16", "fp32"), "bf16"),
        (False, ("bf16", "fp16", "fp32"), "fp16"),
        (False, ("bf16", "fp32"), "fp32"),
    ],
)
def test_a_gpu_that_emulates_bf16_trains_in_fp16(
    native_bf16: bool, possible: tuple[str, ...], fast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: native_bf16)
    monkeypatch.setattr(precision_module, "possible_precisions", lambda: possible)
    assert precision_module.fast_precision() == fast


@pytest.mark.parametrize("is_supported", [True, False])
def test_a_dry_run_accepts_fp16_only_if_the_cpu_supports_it(
    is_supported: bool, real_text: Path, warm: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(tmp_path / "run.yaml", tiny_values(real_text))
    fake_fp16(monkeypatch, tmp_path / "fake", is_supported=is_supported)
    command = ("run", tmp_path / "run.yaml", "--out", tmp_path / "run", "--set", "seed_layout.precision=fp16")
    done = warm.run(*command, "--dry-run", "--json")
    if is_supported:
        assert json.loads(done.stdout)["models"]["seed"]["layout"].endswith("ZeRO 1, fp16")
        return
    for result in (done, warm.run(*command)):
        assert result.code == 2
        assert "Cannot train in fp16 on this CPU" in result.stderr
        assert "set it to bf16, fp32 or auto" in result.stderr
    assert not (tmp_path / "run").exists()
    # Groups of other launchers run elsewhere.
    warm.check(*command, "--dry-run", "--launcher", "mpi")


def test_a_rank_rejects_an_unsupported_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_fp16(monkeypatch, tmp_path / "fake", is_supported=False)
    code = (
        "from btm_scale.config.layout import Layout\nfrom btm_scale.distributed.group import ExpertGroup\n"
        "ExpertGroup.join(Layout(precision='fp16'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "btm_scale.errors.LaunchError: Cannot train in fp16 on this CPU" in done.stderr


@pytest.mark.usefixtures("device")
def test_auto_is_resolved_on_the_training_device_and_recorded(tmp_path: Path) -> None:
    values, run = auto_values(tmp_path, seed_layout={"precision": "auto"}), RunDir(tmp_path / "run")
    values["experts"] = {"python": {"layout": {"precision": "bf16"}}}
    config = write_config(tmp_path / "a.yaml", values)
    assert config.precisions == {"auto", "bf16"}
    opened = open_run(config, run, trains_here=True)
    assert opened == RunConfig.load(run.config)
    assert (opened.layout.precision, opened.shared_layout.precision) == ("fp32", "fp32")
    assert opened.expert_layout("python").precision == "bf16"


@pytest.mark.usefixtures("device")
def test_a_recorded_precision_is_kept_on_another_device(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    explicit = tiny_values(tmp_path, layout={"precision": "bf16", "micro_batch": 4})
    open_run(write_config(tmp_path / "a.yaml", explicit), run)
    kept = open_run(write_config(tmp_path / "b.yaml", auto_values(tmp_path)), run, trains_here=True)
    assert kept.layout.precision == RunConfig.load(run.config).layout.precision == "bf16"
    run.tokenizer.mkdir()  # from then on the config is fixed
    other = tiny_values(tmp_path, layout={"precision": "fp16", "micro_batch": 4})
    with pytest.raises(ConfigError, match=r"layout\.precision: bf16 there, fp16 here"):
        open_run(write_config(tmp_path / "c.yaml", other), run)


def test_auto_of_an_expert_resolves_to_the_recorded_precision_of_the_run(tmp_path: Path) -> None:
    run, experts = RunDir(tmp_path / "run"), {"python": {"layout": {"precision": "auto"}}}
    open_run(write_config(tmp_path / "a.yaml", tiny_values(tmp_path, layout={"precision": "bf16"})), run)
    later = write_config(tmp_path / "b.yaml", tiny_values(tmp_path, layout={"precision": "auto"}, experts=experts))
    assert open_run(later, run).precisions == {"bf16"}


@pytest.mark.usefixtures("device")
def test_a_run_whose_groups_run_elsewhere_leaves_auto_to_the_first_group(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    config = write_config(tmp_path / "a.yaml", auto_values(tmp_path))
    assert open_run(config, run).layout.precision == "auto"
    explicit = tiny_values(tmp_path, layout={"precision": "fp16", "micro_batch": 4})
    chosen = write_config(tmp_path / "b.yaml", explicit)
    assert open_run(chosen, run).layout.precision == "fp16", "nothing has been trained in another precision"
    with pytest.raises(LaunchError, match="set it to bf16, fp32 or auto"):
        open_run(chosen, run, trains_here=True)


def test_a_group_that_only_scores_does_not_record_a_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path / "run")
    config = open_run(write_config(tmp_path / "a.yaml", auto_values(tmp_path)), run)
    monkeypatch.setattr(worker, "fast_precision", lambda: "fp32")
    assert worker._resolved(config, run, records=False).layout.precision == "fp32"
    assert RunConfig.load(run.config).layout.precision == "auto"
    assert worker._resolved(config, run, records=True).layout.precision == "fp32"
    assert RunConfig.load(run.config).layout.precision == "fp32"


@pytest.mark.slow
def test_the_first_group_records_the_precision_of_auto(real_text: Path, warm: Warm, tmp_path: Path) -> None:
    """As under SLURM, where the node that opens a run does not train."""
    values = auto_values(
        real_text,
        budget={"tokens": 4096, "seed_share": 0.5, "sequence_length": 64, "batch_tokens": 1024},
        baselines={"dense": False},
    )
    write_config(tmp_path / "run.yaml", values)
    run = RunDir(tmp_path / "run")
    warm.check("prepare", tmp_path / "run.yaml", "--out", run.root)
    assert load_yaml(run.config)["layout"]["precision"] == "auto"
    command = [
        sys.executable,
        "-m",
        "btm_scale.cli",
        "train",
        run.config,
        "--model",
        "seed",
        "--out",
        run.root,
    ]
    subprocess.run(command, env=os.environ | {"RANK": "0", "WORLD_SIZE": "1"}, check=True, timeout=600)
    recorded = load_yaml(run.config)["layout"]["precision"]
    card = json.loads((run.model("seed") / "expert.json").read_text())
    assert recorded == card["layout"]["precision"] != "auto"
