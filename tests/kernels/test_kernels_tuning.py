"""The tuning table is complete, and the tuning script replaces only the rows of its GPU."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import pytest

from btm_scale.kernels import tuning
from btm_scale.kernels.tuning import MIX_RULES, SCORE_RULES, MixConfig, ScoreConfig, ScoreRule, score_config

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tune_kernels.py"


@pytest.mark.parametrize("arch", sorted(MIX_RULES))
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("tokens", [1, 64, 8192])
def test_every_problem_size_has_a_rule(arch, bits, aligned, tokens):
    config = score_config(arch, bits, tokens, 2048, aligned=aligned)
    assert config.split % config.block_v == 0


def test_unaligned_rows_never_use_blocks_for_wide_loads():
    aligned_only = [rule.config for rule in SCORE_RULES if rule.aligned]
    assert score_config("sm_90", 16, 8192, 2048) in aligned_only
    assert score_config("sm_90", 16, 8192, 2048, aligned=False) not in aligned_only


def test_replacing_the_rows_of_a_gpu_keeps_the_others(tmp_path):
    spec = importlib.util.spec_from_file_location("tune_kernels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rule = ScoreRule("sm_90", 16, 0, 0, True, ScoreConfig(1, 2, 3, 4, 5, 6, 7))
    mix = MixConfig(8, 9, 10, 11)
    table = tmp_path / "table.py"
    table.write_text(script.rewritten(Path(tuning.__file__).read_text(), "sm_90", [rule], mix))
    renewed = runpy.run_path(str(table))
    assert [tuple(row) for row in renewed["SCORE_RULES"] if row.arch == "sm_90"] == [tuple(rule)]
    others = [tuple(row) for row in SCORE_RULES if row.arch != "sm_90"]
    assert [tuple(row) for row in renewed["SCORE_RULES"] if row.arch != "sm_90"] == others
    assert renewed["MIX_RULES"] == {**MIX_RULES, "sm_90": mix}
