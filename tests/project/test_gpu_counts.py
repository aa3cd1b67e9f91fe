"""The committed counts of training on a GPU are those of this code, and meet their goals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
COUNTS: dict[str, Any] = json.loads((ROOT / "benchmarks/results/gpu_counts.json").read_text())
OLDER: dict[str, Any] = json.loads((ROOT / "benchmarks/results/gpu_counts_older.json").read_text())
MOST_LOSS_BYTES = {"paper-125m": 21e9, "llama-1.3b": 4e9, "llama-3.1-8b": 20e9}


@pytest.mark.parametrize("name", MOST_LOSS_BYTES)
def test_the_loss_moves_what_is_committed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu_counting.cases import CASES, loss_counts

    count = loss_counts(CASES[name]).total()
    committed = COUNTS["ours"]["loss"][name]
    assert (count.kernels, count.bytes) == (committed["kernels"], committed["bytes"])
    assert count.bytes <= MOST_LOSS_BYTES[name]


@pytest.mark.parametrize("name", MOST_LOSS_BYTES)
def test_the_loss_moves_less_than_other_fused_losses_and_an_older_version(name: str) -> None:
    ours = COUNTS["ours"]["loss"][name]
    for others in (COUNTS["liger"], COUNTS["pytorch"], OLDER):
        assert ours["bytes"] < 0.6 * others["loss"][name]["bytes"]


def test_other_fused_losses_move_what_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu_counting.cases import CASES, Case
    from gpu_counting.loss_peers import liger_count, pytorch_counts

    case = CASES["llama-1.3b"]
    for peer, count in (("pytorch", pytorch_counts(case).total()), ("liger", liger_count(case))):
        committed = COUNTS[peer]["loss"]["llama-1.3b"]
        assert (count.kernels, count.bytes) == (committed["kernels"], committed["bytes"])
    # 16,384 tokens of width 4,096 in chunks of 2,048, the example in Liger-Kernel's own description.
    assert liger_count(Case("llama-3.1-8b", 8, 2048, 32_000)).kernels == 3 + 4 * 8


def test_an_older_checkout_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu_counts.py", "--older", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{tmp_path}/btm_scale/model/loss.py does not exist. --older takes the folder of a checkout" in done.stderr


def test_a_layer_and_the_sums_of_gradients_move_no_more_than_their_goals() -> None:
    layer = COUNTS["ours"]["layer"]["llama-1.3b"]
    assert layer["kernels"] <= 24
    assert layer["bytes"] <= 1.9e9
    assert COUNTS["ours"]["training"]["llama-1.3b"]["bytes"]["sums"] <= 8e9


LAYERS = """
import json
from gpu_counting.cases import CASES, float8_layer_counts, layer_counts, megatron_layer_counts
from gpu_counts import become_a_rank

become_a_rank()
counts = {"ours": layer_counts, "megatron": megatron_layer_counts, "float8": float8_layer_counts}
totals = {whose: count(CASES["llama-1.3b"]).total(products=False) for whose, count in counts.items()}
print(json.dumps({whose: [total.kernels, total.bytes] for whose, total in totals.items()}))
"""


def test_a_layer_moves_what_is_committed() -> None:
    # In another process, because Megatron-core's process groups are global.
    done = subprocess.run(
        [sys.executable, "-c", LAYERS], cwd=ROOT / "benchmarks", check=True, capture_output=True, text=True
    )
    committed = {whose: COUNTS[whose]["layer"]["llama-1.3b"] for whose in ("ours", "megatron")}
    committed["float8"] = COUNTS["ours"]["float8"]["llama-1.3b"]["layer"]
    assert json.loads(done.stdout) == {whose: [count["kernels"], count["bytes"]] for whose, count in committed.items()}


def test_float8_pays_for_large_models_only() -> None:
    for name, count in COUNTS["ours"]["float8"].items():
        assert count["without"]["bytes"] < count["layer"]["bytes"]
        for added in count["seconds"]["added"].values():
            assert (count["seconds"]["saved"] > 2 * added) == (name != "paper-125m")


# Above the plain model under torch.compile.
LEAST = {"llama-1.3b": {"H100": 0.50, "H200": 0.53}, "paper-125m": {"H100": 0.45, "H200": 0.45}}


@pytest.mark.parametrize("name", LEAST)
def test_counted_bytes_allow_the_utilization_that_is_aimed_at(name: str) -> None:
    for gpu, least in LEAST[name].items():
        ours, peer = (COUNTS[key]["training"][name][gpu]["utilization"] for key in ("ours", "compiled"))
        assert ours >= least
        assert ours > peer


def test_offloading_moves_and_frees_what_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu_counting.offload import offload_counts

    assert offload_counts() == COUNTS["ours"]["offload"]
    for name, count in COUNTS["ours"]["offload"].items():
        assert count["offloaded_bytes"] < 0.5 * count["kept_bytes"]
        # But for tensor ranks that each copy the complete input of a layer that they share.
        assert (count["copy_seconds"] < 0.4 * count["layer_seconds"]) == (
            not name.startswith("tensor 8,") or "parallel" in name
        )


@pytest.mark.full
def test_layers_and_peers_count_what_is_committed(tmp_path: Path) -> None:
    result = tmp_path / "counts.json"
    command = [sys.executable, "benchmarks/gpu_counts.py", "--result", str(result)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    counted = json.loads(result.read_text())
    del counted["environment"]
    assert counted == {part: counts for part, counts in COUNTS.items() if part != "environment"}


def test_a_token_of_a_mixture_of_stacked_experts_takes_the_committed_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu_counting.decoding import DECODINGS, stacked_counts

    for name, case in DECODINGS.items():
        assert (case.experts, case.shape.layers) == (8, 24)
        count, committed = stacked_counts(case).total(), COUNTS["ours"]["decoding"][name]
        assert (count.kernels, count.bytes) == (committed["kernels"], committed["bytes"])
        assert count.kernels <= 900
        assert COUNTS["transformers"]["decoding"][name]["kernels"] > 8 * 900


def test_a_prompt_is_scored_from_hidden_states_with_the_committed_kernels_and_no_logits_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu_counting.decoding import READINGS, reading_counts

    for name, case in READINGS.items():
        committed = COUNTS["ours"]["reading"][name]
        counts = reading_counts(case)
        total = counts.total()
        assert (total.kernels, total.bytes) == (committed["states"]["kernels"], committed["states"]["bytes"])
        assert counts.kernels["token_logprobs"] == 2  # for all experts: their partials, and the sum of the partials
        logits = 4 * case.experts * case.batch * case.columns * case.shape.vocabulary
        assert committed["logits"]["bytes"] - total.bytes > logits
