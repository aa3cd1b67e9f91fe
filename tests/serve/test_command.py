"""`btm-scale serve` on a finished run."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import httpx2
import psutil
import pytest
from helpers.in_process import refusal
from helpers.tiny_run import start_btm_scale

from btm_scale.config.run import RunConfig
from btm_scale.run_dir import RunDir
from btm_scale.serve.server import local_planner

Finished = tuple[RunConfig, RunDir]


def states_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file, but for caches and the note that the tokenizer was tried."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.mark.slow
def test_a_run_is_served_until_sigterm(finished_run: Finished) -> None:
    _, run = finished_run
    before = states_of(run.root)
    process = start_btm_scale("serve", run.root, "--port", "0", stdout=subprocess.PIPE)
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if "All models are loaded" in line:
            break
    url = re.findall(r"http://127\.0\.0\.1:\d+", "".join(lines))[0]
    listening = [one.laddr.ip for one in psutil.Process(process.pid).net_connections("inet") if one.status == "LISTEN"]
    assert listening == ["127.0.0.1"]
    names = [model["id"] for model in httpx2.get(f"{url}/v1/models").json()["data"]]
    assert names[:4] == ["forest", "forest:mixture", "licences", "python"]
    assert {"seed", "average/uniform"} <= set(names)
    answer = httpx2.post(f"{url}/v1/completions", json={"model": "forest", "prompt": "import os\n", "seed": 1}).json()
    assert answer["btm"]["expert"] in ("licences", "python")
    chat = httpx2.post(f"{url}/v1/chat/completions", json={"model": "forest", "messages": [{"role": "user"}]})
    assert chat.json()["error"]["code"] == "no_chat_template"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, ""), err
    assert "Traceback" not in "".join(lines) + err
    assert states_of(run.root) == before


def test_mistakes_are_reported_before_anything_is_served(finished_run: Finished, tmp_path) -> None:
    _, run = finished_run
    assert "Increase --max-memory" in refusal("serve", run.root, "--port", "0", "--max-memory", "10KB")
    (tmp_path / "keys").touch(mode=0o600)
    assert "has no API key" in refusal("serve", run.root, "--port", "0", "--api-key-file", tmp_path / "keys")
    (tmp_path / "engines.yaml").write_text("pyton: http://host/v1\n")
    message = refusal("serve", run.root, "--port", "0", "--backend", tmp_path / "engines.yaml")
    assert "Unknown expert 'pyton'. Did you mean 'python'?" in message
    local = ("--method", "mixture", "--batch", "4", "--prefix-cache", "0", "--device", "cpu")
    for option in zip(local[::2], local[1::2], strict=True):
        message = refusal("serve", run.root, "--port", "0", "--backend", tmp_path / "engines.yaml", *option)
        assert f"{option[0]} cannot be combined with --backend" in message


def test_a_mixture_that_does_not_fit_into_memory_is_refused(finished_run: Finished) -> None:
    config, run = finished_run
    size = sum(file.stat().st_size for file in run.model("python").glob("*.safetensors"))
    message = refusal("serve", run.root, "--port", "0", "--method", "mixture", "--max-memory", str(int(1.5 * size)))
    assert "A mixture needs all 2 experts in memory" in message
    planner, _ = local_planner(config, run, max_bytes=1.5 * size)
    assert planner.catalog.experts == ("licences", "python")
