"""SLURM's commands as small scripts, and the scripts of jobs started as SLURM starts them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from btm_scale.config.run import RunConfig
from btm_scale.run.slurm_jobs import write_scripts
from btm_scale.run_dir import RunDir
from helpers.tiny_run import tiny_values, write_config

# The queue is a folder with one file per job, which holds its lines; as in SLURM, SQUEUE_STATES leaves out the others.
SBATCH = """#!/bin/bash
cat "$QUEUE/../banner" 2> /dev/null
echo "$*" >> "$QUEUE/../calls"
number=$(($(ls "$QUEUE" | wc -l) + 1))
script=${*: -1}
name=$(sed -n 's/^#SBATCH --job-name=//p' "$script")
tasks=$(printf '%s\\n' "$@" | sed -n 's/^--array=//p' | sed 's/%.*//')
for part in ${tasks//,/ }; do
    for task in $(seq "${part%-*}" "${part#*-}"); do places+=("_$task"); done
done
most=$(cat "$QUEUE/../limit" 2> /dev/null || echo 1000)
if (($(cat "$QUEUE"/* 2> /dev/null | wc -l) + ${#places[@]} + (${#places[@]} == 0) > most)); then
    cat "$QUEUE/../refusal" >&2
    echo "$number: ${#places[@]} tasks" >> "$QUEUE/../refused"
    exit 1
fi
for place in "${places[@]:-}"; do
    echo "$number$place|PENDING|Dependency||$name|$script" >> "$QUEUE/$number"
done
[[ ! -e $QUEUE/../deaf ]] || { echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1; }
echo "$number"
"""
SQUEUE = """#!/bin/bash
[[ $* == *--user=$UID* ]] || exit 0
form=$(printf '%s\\n' "$@" | sed -n 's/^--format=//p')
cat "$QUEUE"/* 2>/dev/null | grep -F "|${SQUEUE_STATES:-}" |
while IFS='|' read -r number state reason nodes name script; do
    line=${form//%i/$number} line=${line//%T/$state} line=${line//%r/$reason} line=${line//%N/$nodes}
    line=${line//%j/$name} line=${line//%o/$script}
    printf '%b\\n' "$line"
done
"""
CLUSTER = """#!/bin/bash
echo "MaxArraySize            = $(cat "$QUEUE/../max" 2> /dev/null || echo 1001)"
"""
# What a job asks, beside the questions about its nodes, is noted in the file `asked`.
SCONTROL = """#!/bin/bash
case "$1 $2" in
"show hostnames") echo node7 ;;
"show node") echo "NodeName=node7 NodeAddr=10.0.0.7 State=UP" ;;
*) echo "$@" >> asked ;;
esac
"""


def queue_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the queue that sbatch and squeue know from now on."""
    programs, queue = folder / "bin", folder / "queue"
    for made in (programs, queue):
        made.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scontrol", CLUSTER)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setenv("QUEUE", str(queue))
    return queue


def config_with(folder: Path, slurm: dict[str, Any], **changes: Any) -> RunConfig:
    values = tiny_values(folder, layout={"data": 4, "tensor": 2, "micro_batch": 1}, launch={"slurm": slurm}, **changes)
    return write_config(folder / "run.yaml", values)


def run_job(
    folder: Path,
    srun: str,
    job: str = "seed",
    *,
    scontrol: str = SCONTROL,
    slurm: dict[str, Any] | None = None,
    big: tuple[str, ...] = (),
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run the script of a job as SLURM does, with another srun."""
    for name, text in (("srun", srun), ("scontrol", scontrol)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    config = config_with(folder, {"cpus_per_rank": 6} | (slurm or {}))
    script = write_scripts(config, RunDir(folder / "made"), big=big)[job]
    surroundings = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node7",
    }
    environment = os.environ | surroundings | variables
    return subprocess.run([script], cwd=folder, env=environment, capture_output=True, text=True, check=False)
