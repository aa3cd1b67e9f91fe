"""Groups of several ranks through the `deepspeed` launcher: training does not depend on the layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cuts import full
from helpers.in_process import answer
from helpers.tiny_run import btm_scale, share_text, tiny_values, write_config
from helpers.warm import Warm

from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.run_dir import RunDir

pytestmark = pytest.mark.slow

STEPS = 20


def values(text: Path, layout: dict[str, Any]) -> dict[str, Any]:
    budget = {"tokens": 2 * STEPS * 1024, "seed_share": 0.5, "sequence_length": 64, "batch_tokens": 1024}
    layout = {"precision": "fp32", "micro_batch": 4, **layout}
    # A realistic learning rate: at that of tiny_values, rounding differences between layouts grow chaotically.
    optimizer = {"lr": 1e-3}
    return tiny_values(
        text,
        budget=budget,
        layout=layout,
        optimizer=optimizer,
        evaluate={"tokens_per_domain": 500, "dev_blocks": 5},
    )


def train_seed(
    folder: Path, text: Path, prepared: RunDir, layout: dict[str, Any], run_command: Callable[..., object]
) -> RunDir:
    """Train the seed LM on existing token files."""
    write_config(folder / "tiny.yaml", values(text, layout))
    run = RunDir(folder / "run")
    share_text(run, prepared)
    run_command("train", folder / "tiny.yaml", "--model", "seed", "--out", run.root)
    return run


def losses(run: RunDir, model: str = "seed") -> list[float]:
    return [json.loads(line)["loss"] for line in run.metrics(model).read_text().splitlines()]


@pytest.fixture(scope="module")
def one_rank(real_text: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("one")
    write_config(folder / "tiny.yaml", values(real_text, {}))
    answer("prepare", folder / "tiny.yaml", "--out", folder / "prepared")
    return train_seed(folder, real_text, RunDir(folder / "prepared"), {}, warm.check)


def test_a_group_of_four_ranks_matches_the_losses_and_weights_of_one_rank(
    one_rank: RunDir, real_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train on real text, as a user would; test_layout_matrix.py covers other layouts."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    layout = {"tensor": 2, "data": 2, "zero": 1}
    run = train_seed(tmp_path, real_text, one_rank, layout, btm_scale)
    expected, actual = losses(one_rank), losses(run)
    assert len(expected) == STEPS
    assert actual == pytest.approx(expected, abs=1e-5)
    with SafetensorsModel(one_rank.model("seed")) as ours, SafetensorsModel(run.model("seed")) as theirs:
        assert ours.specs() == theirs.specs()
        for name in ours.names:
            torch.testing.assert_close(theirs.read(name), ours.read(name), atol=2e-4, rtol=1e-3)
    assert not list(tmp_path.glob("extensions/*")), "nothing was compiled for a group without a GPU"


@pytest.mark.parametrize("layout", [{"tensor": 2}, full({"tensor": 2, "data": 2})], ids=["two ranks", "four ranks"])
def test_an_expert_can_branch_into_another_layout_than_the_seeds(
    layout: dict[str, int], one_rank: RunDir, real_text: Path, warm: Warm, tmp_path: Path
) -> None:
    """The seed's checkpoint, including moments, is loaded from one rank into a group of several."""
    losses_by_layout = {}
    for name, own in {"one": {}, "several": layout}.items():
        folder = tmp_path / name
        write_config(folder / "tiny.yaml", values(real_text, {}) | {"experts": {"python": {"layout": own}}})
        run = RunDir(folder / "run")
        run.train("seed").parent.mkdir(parents=True)
        for ours, theirs in (
            (run.data, one_rank.data),
            (run.tokenizer, one_rank.tokenizer),
            (run.train("seed"), one_rank.train("seed")),
        ):
            ours.symlink_to(theirs.resolve())
        warm.check("train", folder / "tiny.yaml", "--model", "python", "--out", run.root)
        losses_by_layout[name] = losses(run, "python")
    assert losses_by_layout["several"] == pytest.approx(losses_by_layout["one"], abs=1e-5)
