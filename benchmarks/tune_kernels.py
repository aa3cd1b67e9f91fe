"""Time block shapes on this machine's GPU and write the fastest to kernels/tuning_table.py.

python benchmarks/tune_kernels.py            # prints the best rows
python benchmarks/tune_kernels.py --write    # and replaces the table's rows of this GPU
python benchmarks/tune_kernels.py --small    # runs the script under Triton's interpreter: prints only
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from btm_scale.kernels.tuning_table import MixConfig, ScoreConfig, ScoreRule

TABLE = Path(__file__).parent.parent / "kernels" / "tuning_table.py"
# (min tokens, min hidden size) of a rule, and the problem on which it is tuned: tokens, hidden, vocabulary.
SCORE_CLASSES = {(0, 0): (32, 2048, 32_000), (65, 0): (8192, 1024, 50_304), (65, 3072): (8192, 4096, 128_256)}


def main() -> None:
    """Time the candidates and report, or write, the fastest of each class."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the rows of this GPU in the table")
    parser.add_argument("--small", action="store_true", help="two small candidates under the interpreter")
    options = parser.parse_args()
    if options.small:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

    import torch

    from btm_scale.kernels.hardware import hardware, interpreter_problem
    from btm_scale.kernels.tuning import row_name
    from btm_scale.kernels.tuning_table import SCORE_RULES, MixConfig, ScoreConfig, ScoreRule

    if options.small and (problem := interpreter_problem()):
        sys.exit(problem)
    device = "cpu" if options.small else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no GPU here to tune for. Use --small to prove the script.")
    gpu = hardware(torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device("cpu"))
    arch = row_name(gpu)
    if arch != gpu.arch:
        sys.exit(f"{gpu.arch} uses the rows of {arch}, which another GPU would share. Give it rows in {TABLE.name}.")
    if options.small:
        scores = [ScoreConfig(16, 64, 32, 128, 2, 4, 1), ScoreConfig(32, 128, 32, 128, 2, 4, 1)]
        mixes = [MixConfig(128, 512, 4), MixConfig(256, 512, 4)]
        classes = {(0, 0): (17, 32, 300)}
    else:
        scores = [config.with_resident(16, gpu.shared_bytes) for config in score_candidates()]
        mixes, classes = mix_candidates(), SCORE_CLASSES
    rules = [
        ScoreRule(arch, 16, *least, True, best_score(device, scores, *problem)) for least, problem in classes.items()
    ]
    # Rows that are not timed keep their place before the timed ones: a GPU that refuses the latter falls back on them.
    smallest = min(rule.config.block_t * rule.config.block_v for rule in rules)
    kept = [
        rule
        for rule in SCORE_RULES
        if rule.arch == arch and (not rule.aligned or rule.config.block_t * rule.config.block_v < smallest)
    ]
    mix = best_mix(device, mixes, *((2, 3, 1000) if options.small else (8, 64, 128_256)))
    print(*kept, *rules, mix, sep="\n")
    if options.write and not options.small:
        TABLE.write_text(rewritten(TABLE.read_text(encoding="utf-8"), arch, kept + rules, mix), encoding="utf-8")
        print(f"{TABLE} changed; `pytest tests/kernels` says whether a row spills.")


def score_candidates() -> list[ScoreConfig]:
    """Block shapes worth timing; those that do not fit a GPU fail to launch and are skipped."""
    from btm_scale.kernels.tuning_table import ScoreConfig

    blocks = [(32, 128), (64, 128), (64, 256), (128, 128), (128, 256), (256, 128)]
    return [
        ScoreConfig(block_t, block_v, block_k, split, group, warps, stages)
        for (block_t, block_v), block_k, split, group, warps, stages in itertools.product(
            blocks, (32, 64), (2048, 8192), (8, 16), (4, 8), (3, 4)
        )
    ]


def mix_candidates() -> list[MixConfig]:
    """Block shapes worth timing."""
    from btm_scale.kernels.tuning_table import MixConfig

    return [
        MixConfig(block, split, warps)
        for block, split, warps in itertools.product((1024, 2048, 4096), (4096, 8192, 16384), (4, 8))
    ]


def best_score(device: str, candidates: Iterable[ScoreConfig], tokens: int, hidden: int, vocab: int) -> ScoreConfig:
    """The fastest configuration of `score_kernel` for one expert in bfloat16."""
    import torch

    from btm_scale.kernels import triton_launch

    states = torch.randn(1, tokens, hidden, device=device).bfloat16()
    heads = [torch.randn(vocab, hidden, device=device).bfloat16()]
    targets = torch.randint(vocab, (tokens,), device=device)
    return _fastest(
        device, candidates, lambda config: triton_launch.score_partials(states, heads, targets, config=config)
    )


def best_mix(device: str, candidates: Iterable[MixConfig], experts: int, batch: int, vocab: int) -> MixConfig:
    """The fastest configuration of the mixing kernels, from bfloat16 logits."""
    import torch

    from btm_scale.kernels import triton_launch

    logits = torch.randn(experts, batch, vocab, device=device).bfloat16()
    log_weights = torch.randn(batch, experts, device=device)
    return _fastest(device, candidates, lambda config: triton_launch.mix_logits(logits, log_weights, config=config))


def _fastest(device: str, candidates: Iterable[Any], run: Any) -> Any:
    from kernels_timing import seconds
    from triton.runtime.errors import OutOfResources

    times = []
    for config in candidates:
        try:
            times.append((seconds(lambda config=config: run(config), device, repeats=5), config))
        except OutOfResources:
            continue
        print(f"{times[-1][0]:.3e} s {config}")
    return min(times)[1]


def rewritten(table: str, arch: str, rules: list[ScoreRule], mix: MixConfig) -> str:
    """The table's source with the rows of one GPU replaced."""
    lines = table.splitlines(keepends=True)
    ours = [number for number, line in enumerate(lines) if line.startswith(f'    ScoreRule("{arch}", ')]
    rows = [
        f'    ScoreRule("{rule.arch}", {rule.bits}, {rule.min_tokens}, {rule.min_hidden}, {rule.aligned}, '
        f"ScoreConfig{tuple(rule.config)}),\n"
        for rule in rules
    ]
    lines[ours[0] : ours[-1] + 1] = rows
    return "".join(
        f'    "{arch}": MixConfig{tuple(mix)},\n' if line.startswith(f'    "{arch}": ') else line for line in lines
    )


if __name__ == "__main__":
    main()
