"""What is submitted when SLURM, or the way to it, is not at its best; sbatch and squeue are stand-ins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.tiny_run import tiny_values, write_config

from btm_scale.config.run import RunConfig
from btm_scale.errors import ConfigError, LaunchError
from btm_scale.run.slurm import submit_run
from btm_scale.run_dir import RunDir

# The queue is a folder with a file a job, which holds its line; as in SLURM, SQUEUE_STATES leaves out the others.
SBATCH = """#!/bin/bash
number=$(($(ls "$QUEUE" | wc -l) + 1))
script=${*: -1}
name=$(sed -n 's/^#SBATCH --job-name=//p' "$script")
tasks=$(printf '%s\\n' "$@" | sed -n 's/^--array=//p')
for task in ${tasks//,/ }; do places+=("_$task"); done
for place in "${places[@]:-}"; do
    echo "$number$place|PENDING|Dependency||$name|$script" >> "$QUEUE/$number"
done
[[ ! -e $QUEUE/../deaf ]] || { echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1; }
echo "$number"
"""
SQUEUE = """#!/bin/bash
[[ $* == *--user=$UID* ]] || exit 0
cat "$QUEUE"/* 2>/dev/null | grep -F "|${SQUEUE_STATES:-}" || true
"""


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the queue that sbatch and squeue know."""
    programs, folder = tmp_path / "bin", tmp_path / "queue"
    for made in (programs, folder):
        made.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setenv("QUEUE", str(folder))
    return folder


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    for name in ("python", "licences", "docs"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"text {i} " * 20}) + "\n" for i in range(60))
        )
    return write_config(tmp_path / "run.yaml", tiny_values(tmp_path, baselines={"dense": False}))


def submitted(config: RunConfig, folder: Path) -> dict[str, str]:
    return dict(submit_run(config, RunDir(folder / "run"), dry_run=False)["submitted"])


@pytest.mark.parametrize(("name", "value"), [("SQUEUE_STATES", "RUNNING"), ("USER", "another"), ("LOGNAME", "another")])
def test_variables_of_the_user_do_not_hide_queued_jobs(
    name: str, value: str, queue: Path, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert list(submitted(config, tmp_path)) == ["prepare", "seed", "experts", "evaluate"]
    assert submitted(config, tmp_path) == {}


@pytest.mark.parametrize("answered", [0, 2], ids=["of a job", "of an array"])
def test_a_job_whose_answer_was_lost_is_not_submitted_again(
    answered: int, queue: Path, config: RunConfig, tmp_path: Path
) -> None:
    (tmp_path / "deaf").touch()
    for call in range(answered + 1):
        with pytest.raises(LaunchError, match="Socket timed out"):
            submitted(config, tmp_path)
        assert len(list(queue.iterdir())) == call + 1
    (tmp_path / "deaf").unlink()
    assert list(submitted(config, tmp_path)) == ["prepare", "seed", "experts", "evaluate"][answered + 1 :]
    assert len(list(queue.iterdir())) == 4
    assert submitted(config, tmp_path) == {}


def test_a_job_that_will_never_start_is_not_in_progress(queue: Path, config: RunConfig, tmp_path: Path) -> None:
    first = submitted(config, tmp_path)
    (queue / first["seed"]).write_text("")  # it has failed, and those that wait for it are not yet taken out
    for name in ("experts", "evaluate"):
        job = queue / first[name]
        job.write_text(job.read_text().replace("|Dependency|", "|DependencyNeverSatisfied|"))
    assert list(submitted(config, tmp_path)) == ["seed", "experts", "evaluate"]


def test_a_queue_that_does_not_answer_is_reported_in_a_line_with_its_remedy(
    queue: Path, config: RunConfig, tmp_path: Path
) -> None:
    answers = "squeue: error: resolve_ctls_from_dns_srv: Unknown host\nsqueue: fatal: no configuration source"
    (tmp_path / "bin" / "squeue").write_text(f"#!/bin/bash\necho '{answers}' >&2; exit 1\n")
    with pytest.raises(LaunchError) as raised:
        submitted(config, tmp_path)
    assert str(raised.value) == (
        "squeue failed: error: resolve_ctls_from_dns_srv: Unknown host. No job was submitted. Check that this host can "
        "reach SLURM (SLURM_CONF), or only write the scripts: --dry-run."
    )
    assert not any(queue.iterdir())


def test_a_corrected_config_is_accepted_once_no_job_of_the_first_is_queued(
    queue: Path, config: RunConfig, tmp_path: Path
) -> None:
    submitted(config, tmp_path)
    corrected = config.model_copy(update={"random_seed": 4})
    with pytest.raises(ConfigError, match="holds a run with a different config"):
        submitted(corrected, tmp_path)
    for job in queue.iterdir():
        job.unlink()
    assert "prepare" in submitted(corrected, tmp_path)
