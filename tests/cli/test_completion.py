from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_run import save_card

from btm_scale.run_dir import RunDir

BIN = Path(sys.executable).parent


def completed(*words: str) -> list[str]:
    """What a shell offers for the last word, asked as the script of `--show-completion` asks."""
    environment = os.environ | {
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
        "_BTM_SCALE_COMPLETE": "complete_bash",
    }
    return subprocess.run(
        [BIN / "btm-scale"], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("me",), ["merge"]),
        (("forest", ""), ["list", "add", "remove", "lineage"]),
        (("run", "a.yaml", "--dry"), ["--dry-run"]),
        (("run", "a.yaml", "--launcher", "s"), ["slurm"]),
        (("generate", "RUN", "--posterior", "t"), ["token", "tempered"]),
        (("merge", "OUT", "A", "--method", "t"), ["task_arithmetic", "ties"]),
        (("convert", "A", "B", "--to", ""), ["huggingface", "megatron", "deepspeed", "universal"]),
    ],
    ids=" ".join,
)
def test_a_shell_completes_verbs_options_and_choices(words: tuple[str, ...], offered: list[str]) -> None:
    assert completed("btm-scale", *words) == offered


def test_a_shell_completes_the_models_of_a_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    for name in ("law", "med", "average/uniform", "seed"):
        save_card(run.model(name), name.rpartition("/")[2])
    assert completed("btm-scale", "generate", str(run.root), "--model", "") == ["seed", "law", "med", "average/uniform"]
    assert completed("btm-scale", "forest", "remove", str(run.root), "m") == ["med"]


def test_the_script_for_bash_completes_in_bash(tmp_path: Path) -> None:
    script = """
    btm-scale --install-completion > /dev/null && source ~/.bash_completions/btm-scale.sh
    complete -p btm-scale
    COMP_WORDS=(btm-scale sta) COMP_CWORD=1
    _btm_scale_completion btm-scale
    echo "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "-c", script],
        env=os.environ | {"HOME": str(tmp_path), "PATH": f"{BIN}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "complete -o default -F _btm_scale_completion btm-scale\nstatus\n"
