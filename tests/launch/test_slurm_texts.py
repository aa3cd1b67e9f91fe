"""Big domains under SLURM: the tasks of an array prepare them side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.fake_slurm import config_with, queue_folder, run_job
from helpers.text_samples import prose_texts, write_jsonl
from helpers.tiny_run import tiny_values, write_config

from btm_scale.config.run import RunConfig
from btm_scale.data.sources import resolve_sources
from btm_scale.run.slurm import submit_run
from btm_scale.run.slurm_jobs import big_domains, jobs, write_scripts
from btm_scale.run_dir import RunDir

SIZES = {"python": 60, "licences": 80, "small": 20}


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return queue_folder(tmp_path, monkeypatch)


def config(folder: Path, domains: tuple[str, ...] = tuple(SIZES), **settings: Any) -> RunConfig:
    texts = prose_texts(160)
    for name in domains:
        write_jsonl(folder / f"{name}.jsonl", texts[: SIZES[name]])
    values = tiny_values(
        folder,
        domains={name: {"text": f"{name}.jsonl"} | settings.get(name, {}) for name in domains},
        novel_domains={},
        baselines={"dense": False},
        launch={"slurm": {"big_domain": (folder / "python.jsonl").stat().st_size}},
    )
    return write_config(folder / "run.yaml", values)


def big(config: RunConfig) -> tuple[str, ...]:
    return big_domains(config, resolve_sources(config.all_domains, config.text_root))


def test_several_big_domains_are_prepared_side_by_side(tmp_path: Path) -> None:
    assert big(config(tmp_path)) == ("python", "licences")
    assert big(config(tmp_path, licences={"split_by": "file"})) == ()  # then one is big, and waits for nothing
    assert big(config(tmp_path, ("python", "licences"))) == ()  # one is left to the job that makes the tokenizer
    listed = jobs(config(tmp_path), 1, ("python", "licences"))
    assert [job.name for job in listed][:4] == ["prepare", "texts-0", "texts-1", "seed"]
    assert listed[3].after == ("texts-0", "texts-1")


def test_the_tasks_come_between_the_tokenizer_and_training(queue: Path, tmp_path: Path) -> None:
    own, run = config(tmp_path), RunDir(tmp_path / "run")
    submitted = submit_run(own, run, dry_run=False)["submitted"]
    assert list(submitted) == ["prepare", "texts", "seed", "experts", "evaluate"]
    calls = [line.split(" /")[0] for line in (tmp_path / "calls").read_text().splitlines()]
    assert "--dependency=afterok:1 --array=0-1" in calls[1]
    assert "--dependency=afterok:2" in calls[2]
    assert submit_run(own, run, dry_run=False)["submitted"] == {}
    # Of a domain that is prepared there is nothing to do.
    for job in queue.iterdir():
        job.write_text("")
    (run.domain("python")).mkdir(parents=True)
    run.fingerprint("python").touch()
    assert list(submit_run(own, run, dry_run=False)["submitted"])[:2] == ["prepare", "texts"]
    assert "--array=1 " in (tmp_path / "calls").read_text().splitlines()[6]


def test_each_job_prepares_its_domains(tmp_path: Path) -> None:
    note = '#!/bin/bash\necho "${@: -2}" >> said\n'
    assert run_job(tmp_path, note, "prepare", big=("python",)).returncode == 0
    assert run_job(tmp_path, note, "texts", big=("python",), SLURM_ARRAY_TASK_ID="0").returncode == 0
    said = (tmp_path / "said").read_text().splitlines()
    assert said == ["--domain docs", "--domain python"]  # the last of those that are left, and the task's
    scripts = write_scripts(config_with(tmp_path, {"gres": "gpu:8", "ranks_per_node": 8}), RunDir(tmp_path / "made"))
    assert "gres" not in scripts["prepare"].read_text()


def test_a_task_is_requeued_until_it_was_started_too_often(tmp_path: Path) -> None:
    task = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "0"}
    codes = [run_job(tmp_path, "#!/bin/bash\nexit 85\n", "texts", big=("python",), **task).returncode for _ in range(4)]
    assert codes == [0, 0, 0, 85]
    assert (tmp_path / "asked").read_text().splitlines() == ["requeue 6_0"] * 3
    note = "mkdir -p made/stages; echo '{\"mistake\": true}' > made/stages/prepare-python.failed-0.json\nexit 143\n"
    assert run_job(tmp_path, f"#!/bin/bash\n{note}", "texts", big=("python",), **task).returncode == 143


def test_a_task_that_encodes_more_text_is_not_given_up(tmp_path: Path) -> None:
    """A shard counts for the start that encoded it."""
    task = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "0"}

    def encode(shard: int) -> int:
        journal = "made/data/.python.partial/journal"
        srun = f"#!/bin/bash\nmkdir -p {journal}; touch {journal}/shard-{shard}\nexit 85\n"
        return run_job(tmp_path, srun, "texts", big=("python",), **task).returncode

    assert [encode(0) for _ in range(4)] == [0, 0, 0, 85]
    assert encode(1) == 0


def test_a_mistake_in_one_of_several_domains_is_not_retried(tmp_path: Path) -> None:
    note = "mkdir -p made/stages; echo '{\"mistake\": true}' > made/stages/prepare-docs.failed-0.json\nexit 143\n"
    assert run_job(tmp_path, f"#!/bin/bash\n{note}", "prepare", big=("python",)).returncode == 143
    # The record of an earlier start does not keep this one from being requeued.
    assert run_job(tmp_path, "#!/bin/bash\nexit 143\n", "prepare", big=("python",)).returncode == 0
