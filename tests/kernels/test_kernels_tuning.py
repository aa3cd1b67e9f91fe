"""The tuning table is complete, and the tuning script replaces only the rows of its GPU."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import pytest

from btm_scale.kernels import tuning_table
from btm_scale.kernels.hardware import INTERPRETER, Hardware
from btm_scale.kernels.pieces import ceil_div, split_columns
from btm_scale.kernels.tuning import mix_configs, row_name, score_configs
from btm_scale.kernels.tuning_table import MIX_RULES, SCORE_RULES, MixConfig, ScoreConfig, ScoreRule

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tune_kernels.py"
H100 = Hardware("nvidia", "sm_90", 227 << 10, 132)
MI300X = Hardware("amd", "gfx942", 64 << 10)


def hardware_of(arch: str) -> Hardware:
    if arch == "interpreter":
        return INTERPRETER
    return Hardware("amd" if arch.startswith("gfx") else "nvidia", arch, 64 << 10)


@pytest.mark.parametrize("arch", sorted(MIX_RULES))
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("tokens", [1, 64, 8192])
def test_every_problem_size_has_shapes_that_get_smaller(arch, bits, aligned, tokens):
    configs = score_configs(hardware_of(arch), bits, tokens, 2048, aligned=aligned)
    assert configs
    sizes = [config.block_t * config.block_v for config in configs]
    assert sizes == sorted(sizes, reverse=True)
    assert all(config.split % config.block_v == 0 for config in configs)


def test_unaligned_rows_never_use_blocks_for_wide_loads():
    aligned_only = [rule.config for rule in SCORE_RULES if rule.aligned]
    assert score_configs(H100, 16, 8192, 2048)[0] in aligned_only
    assert not set(score_configs(H100, 16, 8192, 2048, aligned=False)) & set(aligned_only)


def test_a_card_of_the_same_major_version_and_another_vendor_has_its_own_rows():
    """PyTorch reports (9, 4) for an MI300X and (9, 0) for an H100, which has 3.5 times its shared memory."""
    assert row_name(MI300X) == "gfx942"
    for config in score_configs(MI300X, 16, 8192, 4096):
        assert config.shared_bytes(16) <= MI300X.shared_bytes
    assert score_configs(H100, 16, 8192, 4096)[0].shared_bytes(16) > MI300X.shared_bytes


@pytest.mark.parametrize(
    ("unknown", "row"),
    [
        (Hardware("nvidia", "sm_75", 64 << 10), "sm_89"),
        (Hardware("nvidia", "sm_103", 227 << 10), "sm_100"),
        (Hardware("nvidia", "sm_120", 99 << 10), "sm_89"),
        (Hardware("nvidia", "sm_200", 300 << 10), "sm_89"),
        (Hardware("amd", "gfx1201", 64 << 10), "gfx90a"),
    ],
)
def test_an_architecture_without_rows_uses_those_of_a_similar_one_or_the_smallest(unknown, row):
    assert row_name(unknown) == row
    assert score_configs(unknown, 16, 8192, 4096)
    assert mix_configs(unknown)[0] == MIX_RULES[row]


def test_a_device_that_reports_little_shared_memory_gets_what_fits():
    tiny = Hardware("nvidia", "sm_100", 32 << 10)
    configs = score_configs(tiny, 16, 8192, 4096)
    assert configs
    assert all(config.shared_bytes(16) <= 32 << 10 for config in configs)


@pytest.mark.parametrize("columns", [4000, 32_000, 50_257, 128_256])
def test_programs_fill_every_multiprocessor_of_an_h100_in_whole_waves(columns):
    for tokens in (1, 2, 16, 64, 65, 128, 200, 256, 500, 1000, 1024, 2048, 3000, 4096, 8192):
        config = score_configs(H100, 16, tokens, 2048)[0]
        split = split_columns(tokens, columns, config, H100.multiprocessors)
        assert split % config.block_v == 0
        token_blocks, blocks = ceil_div(tokens, config.block_t), ceil_div(columns, config.block_v)
        programs = token_blocks * ceil_div(columns, split)
        waves = ceil_div(programs, H100.multiprocessors * config.resident)
        if token_blocks * blocks >= H100.multiprocessors:
            assert programs >= H100.multiprocessors
        # The blocks of a wave are a fraction of what its multiprocessors could run in the same time.
        busy = token_blocks * blocks / (waves * split // config.block_v * H100.multiprocessors * config.resident)
        if token_blocks * blocks >= 2 * H100.multiprocessors * config.resident:
            assert busy >= 0.9, (tokens, columns, busy)


def test_a_program_has_no_more_columns_than_there_are_or_than_its_row_allows():
    config = ScoreConfig(128, 128, 64, 8192, 16, 4, 3, 2)
    assert split_columns(1, 1, config, 132) == 128
    assert split_columns(1, 0, config, 132) == 128
    assert split_columns(1_000_000, 10_000_000, config, 132) <= 8192


def test_blocks_of_four_warps_run_in_pairs_where_shared_memory_suffices():
    config = ScoreConfig(128, 128, 64, 8192, 16, 4, 3)  # 96 KiB in 16 bits
    assert config.with_resident(16, 228 << 10).resident == 2
    assert config.with_resident(16, 164 << 10).resident == 1
    assert config._replace(warps=8).with_resident(16, 228 << 10).resident == 1


def test_replacing_the_rows_of_a_gpu_keeps_the_others(tmp_path):
    spec = importlib.util.spec_from_file_location("tune_kernels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rule = ScoreRule("sm_90", 16, 0, 0, True, ScoreConfig(1, 2, 3, 4, 5, 6, 7))
    mix = MixConfig(8, 9, 10)
    table = tmp_path / "table.py"
    table.write_text(script.rewritten(Path(tuning_table.__file__).read_text(), "sm_90", [rule], mix))
    renewed = runpy.run_path(str(table))
    assert [tuple(row) for row in renewed["SCORE_RULES"] if row.arch == "sm_90"] == [tuple(rule)]
    others = [tuple(row) for row in SCORE_RULES if row.arch != "sm_90"]
    assert [tuple(row) for row in renewed["SCORE_RULES"] if row.arch != "sm_90"] == others
    assert renewed["MIX_RULES"] == {**MIX_RULES, "sm_90": mix}
