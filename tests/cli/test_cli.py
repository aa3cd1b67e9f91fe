from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from helpers.processes import command_line, is_alive
from helpers.tiny_run import btm_scale, save_card, tiny_values, write_config
from helpers.warm import Warm

from btm_scale import __version__
from btm_scale.cli.app import parse
from btm_scale.cli.verb import Call
from btm_scale.config.run import RunConfig
from btm_scale.run_dir import RunDir


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "absent.yaml"], "No config at absent.yaml"),
        (["status", "."], "is not a run folder: it has no run.yaml"),
        (["train", "CONFIG", "--model", "physics"], "Unknown model 'physics'. Choose one of seed, dense"),
        (["train", "CONFIG", "--model", "Pyhton"], "Unknown model 'Pyhton'. Did you mean 'python'?"),
        (["run", "CONFIG", "--set", "budget.batch_tokens=1000"], "use 1024"),
        (["run", "CONFIG", "--set", "text_root=/nowhere"], "/nowhere"),
        (["run", "CONFIG", "--out", "/etc/hostname"], "--out /etc/hostname is a file. The run needs a folder"),
        (["merge", "OUT", "DIR=heavy"], "must be a number"),
        (
            ["generate", ".", "--random-seed", "4294967296"],
            "Input should be less than or equal to 4294967295",
        ),
        (["merge", "OUT", "DIR", "--jobs", "0"], "'--jobs': Input should be greater than or equal to 1"),
        ([], "Usage: btm-scale [OPTIONS] VERB ..."),
        (["rnu"], "No such command 'rnu'. Did you mean 'run'?"),
        (["forest", "lst", "."], "No such command 'lst'. Did you mean 'list'?\nSee 'btm-scale forest --help'."),
        (["run", "CONFIG", "--ouy", "x"], "No such option: --ouy. Did you mean --out?"),
        (["run"], "Missing argument 'CONFIG'"),
        (["merge", "OUT", "DIR", "--method", "tie"], "Unknown merge method 'tie'. Did you mean 'ties'?"),
        (["merge", "OUT", "DIR", "--dtype", "float8"], "Unknown dtype 'float8'"),
        (["convert", "DIR", "OUT", "--to", "megatorn"], "Did you mean 'megatron'?"),
        (["run", "CONFIG", "--launcher", "slrum"], "Unknown launcher 'slrum'. Did you mean 'slurm'?"),
        (["status", ".", "--quiet", "--verbose"], "--quiet and --verbose exclude each other"),
        (["inspect", "no\x1b[2Jmodel"], r"no\x1b[2Jmodel does not exist"),
        (["convert", "absent", "OUT", "--to", "megatron"], "absent does not exist"),
        (["run", "CONFIG", "--set", "model={preset: llama-4M}"], "Unknown preset 'llama-4M'. Did you mean 'llama-4m'?"),
        (["plan", "CONFIG", "--nodes", "1", "--gpu", "H100PCIE"], "Unknown GPU 'H100PCIE'. Did you mean 'h100-pcie'?"),
        (
            ["convert", "DIR", "OUT", "--to", "megatron", "--tensor", "-1"],
            "'--tensor': Input should be greater than or equal to 1",
        ),
    ],
)
def test_a_users_mistake_exits_with_2_and_a_message(
    arguments: list[str], message: str, warm: Warm, tmp_path: Path, real_text: Path
) -> None:
    write_config(tmp_path / "CONFIG", tiny_values(real_text))
    given = [str(tmp_path / word) if word in ("CONFIG", "OUT", ".") else word for word in arguments]
    if arguments[:2] in (["run", "CONFIG"], ["train", "CONFIG"]) and "--out" not in arguments:
        given += ["--out", str(tmp_path / "made")]
    done = warm.run(*given)
    assert done.code == 2
    assert message in done.stderr
    assert arguments == [] or "\nbtm-scale: " in f"\n{done.stderr}"
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "made" / "data").exists()


def test_a_dry_run_lists_every_model_and_writes_nothing(warm: Warm, tmp_path: Path, real_text: Path) -> None:
    write_config(tmp_path / "run.yaml", tiny_values(real_text))
    done = warm.check("run", tmp_path / "run.yaml", "--dry-run", "--json", "--out", tmp_path / "made")
    assert list(json.loads(done.stdout)["models"]) == [
        "seed",
        "dense",
        "python",
        "licences",
        "random/0",
        "random/1",
    ]
    assert not (tmp_path / "made").exists()


@pytest.mark.slow
def test_status_and_forest_say_what_a_finished_run_holds(finished_run: tuple[RunConfig, RunDir], warm: Warm) -> None:
    _, run = finished_run
    status = json.loads(warm.check("status", run.root, "--json").stdout)["models"]
    assert {model: row["state"] for model, row in status.items()} == dict.fromkeys(
        ["seed", "dense", "python", "licences", "random/0", "random/1"], "done"
    )
    forest = json.loads(warm.check("forest", "list", run.root, "--json").stdout)["experts"]
    assert list(forest) == ["licences", "python"]
    assert forest["python"]["parents"] == {"seed": 1.0}


def test_json_is_alone_on_stdout_whatever_a_library_prints_there(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    write_config(run.config, tiny_values(tmp_path))
    save_card(run.model("friend"), "friend")
    # This verb imports DeepSpeed, which says on stdout which accelerator it has found.
    done = btm_scale("forest", "remove", run.root, "friend", "--json")
    assert json.loads(done.stdout) == {"removed": "friend"}


def test_a_reader_that_closes_the_pipe_early_is_not_an_error(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    write_config(run.config, tiny_values(tmp_path))
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "btm_scale.cli", "status", str(run.root), "--json"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_disk_that_refuses_is_told_in_a_line(tmp_path: Path) -> None:
    for name, content in (
        ("a.jsonl", '{"text": "some text"}\n' * 40),
        ("run.yaml", "domains: {a: {text: a.jsonl}}"),
    ):
        (tmp_path / name).write_text(content)
    command = f"ulimit -f 1; {sys.executable} -m btm_scale.cli prepare {tmp_path}/run.yaml --out {tmp_path}/run"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("btm-scale: ")
    assert f"Cannot use {tmp_path}/run/run.yaml: File too large. Completed work is kept" in done.stderr
    assert "Errno" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_exit_code_is_that_of_a_complaint_or_of_a_stop() -> None:
    code = (
        "import sys, typer\nfrom btm_scale.cli import app\nfrom btm_scale.cli.verb import Answer, verb\n"
        "@verb(app.app, 'complain')\ndef complain() -> Answer:\n    return Answer({'ill': True}, exit_code=1)\n"
        "@verb(app.app, 'stop')\ndef stop() -> Answer:\n    sys.exit(85)\n"
        "@verb(app.app, 'interrupt')\ndef interrupt() -> Answer:\n    raise KeyboardInterrupt\n"
        "app.main()"
    )

    def run(*words: str) -> tuple[int, str, str]:
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    assert run("complain") == (1, "ill: true\n", "")
    assert run("complain", "--json") == (1, '{\n  "ill": true\n}\n', "")
    assert run("stop") == (85, "", "")
    assert run("interrupt") == (130, "", "btm-scale: interrupted; rerun the same command to resume\n")
    assert run("--version")[:2] == (0, f"btm-scale {__version__}\n")


def test_text_is_escaped_on_a_terminal_and_unchanged_in_a_pipe() -> None:
    code = "from btm_scale.cli.verb import say; say('\\x1b[2J 北京', end='')"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True).stdout == "\x1b[2J 北京".encode()
    ours, theirs = pty.openpty()
    subprocess.run(command, stdout=theirs, check=True)
    os.close(theirs)
    assert os.read(ours, 100).decode() == "\\x1b[2J 北京"
    os.close(ours)


def test_a_list_option_takes_the_files_that_a_shell_puts_after_it() -> None:
    call = parse(["branch", "RUN", "--name", "law", "--text", "a.txt", "b.txt", "--replay", "0.5", "--text", "c.txt"])
    assert isinstance(call, Call)
    assert call.arguments["text"] == [Path("a.txt"), Path("b.txt"), Path("c.txt")]
    assert call.arguments["replay"] == 0.5


def test_a_killed_prepare_leaves_no_process_and_the_next_one_finishes(
    warm: Warm, tmp_path: Path, real_text: Path
) -> None:
    # As on a machine of two cores at least: with one worker there is no other process.
    write_config(tmp_path / "run.yaml", tiny_values(real_text, data={"dev": 0.1, "test": 0.1, "workers": 2}))
    made = tmp_path / "made"
    command = [
        sys.executable,
        "-m",
        "btm_scale.cli",
        "prepare",
        str(tmp_path / "run.yaml"),
        "--out",
        str(made),
    ]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    workers: list[psutil.Process] = []
    while not workers:
        assert process.poll() is None, "it ended before it could be killed"
        workers = [child for child in process.children() if "spawn_main" in command_line(child)]
    process.kill()
    process.wait()
    psutil.wait_procs(workers, timeout=60)
    assert not any(is_alive(worker) for worker in workers)
    done = warm.check("prepare", tmp_path / "run.yaml", "--out", made, "--json", "--set", "data.workers=1")
    assert set(json.loads(done.stdout)["domains"]) == {"python", "licences", "docs"}
    assert not list((made / "data").glob(".*.partial"))
