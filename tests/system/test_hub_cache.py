"""A model in the Hugging Face cache, whose files are links to blobs, works in every verb; other links out do not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.tiny_run import tiny_values

from btm_scale.cli.app import main
from btm_scale.config.run import RunConfig
from btm_scale.config.yaml import dump_text
from btm_scale.run_dir import RunDir

pytestmark = pytest.mark.slow
VERBS = ["merge", "convert", "inspect", "forest add", "prepare", "pretrained"]


def snapshot_of(model: Path, cache: Path) -> Path:
    """Store a model as huggingface_hub does: blobs, and a snapshot of links to them."""
    blobs, snapshot = cache / "models--a--b" / "blobs", cache / "models--a--b" / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def arguments(verb: str, model: Path, config: RunConfig, run: RunDir, out: Path) -> list[str]:
    if verb in ("prepare", "pretrained"):
        own = {"tokenizer": {"path": str(model)}} if verb == "prepare" else {"model": {"pretrained": str(model)}}
        values = tiny_values(config.text_root, domains={"docs": {"text": "docs.jsonl"}}, novel_domains={}, **own)
        (out / "own.yaml").write_text(dump_text(values))
        last = [] if verb == "prepare" else ["--dry-run"]
        return ["prepare" if verb == "prepare" else "run", str(out / "own.yaml"), "--out", str(out / "run"), *last]
    return {
        "merge": ["merge", str(out / "out"), str(model), str(run.model("cpp"))],
        "convert": ["convert", str(model), str(out / "out"), "--to", "megatron"],
        "inspect": ["inspect", str(model)],
        "forest add": ["forest", "add", str(run.root), str(model), "--name", "newcomer"],
    }[verb]


@pytest.fixture
def run(handmade: tuple[RunConfig, RunDir], tmp_path: Path) -> RunDir:
    shutil.copytree(handmade[1].root, tmp_path / "copy")
    return RunDir(tmp_path / "copy")


@pytest.mark.parametrize("verb", VERBS)
def test_a_snapshot_of_the_cache_works(
    verb: str, handmade: tuple[RunConfig, RunDir], run: RunDir, tmp_path: Path
) -> None:
    snapshot = snapshot_of(run.model("docs"), tmp_path / "hub")
    main(arguments(verb, snapshot, handmade[0], run, tmp_path))
    for folder in (tmp_path / "out", tmp_path / "run", run.root):
        assert not [path for path in folder.rglob("*") if path.is_symlink()], "links are copied as files"


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_link_to_a_file_of_another_folder_is_refused(
    verb: str,
    name: str,
    handmade: tuple[RunConfig, RunDir],
    run: RunDir,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = run.model("docs")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(model / name, tmp_path / "elsewhere" / name)
    (model / name).symlink_to(tmp_path / "elsewhere" / name)
    if (verb, name) in {
        ("prepare", "model.safetensors"),  # a tokenizer has no weights
        ("inspect", "tokenizer.json"),  # not read
        ("pretrained", "tokenizer.json"),  # read when it is prepared
    }:
        main(arguments(verb, model, handmade[0], run, tmp_path))
        return
    with pytest.raises(SystemExit) as ended:
        main(arguments(verb, model, handmade[0], run, tmp_path))
    assert ended.value.code == 2
    assert "outside of the model directory" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not run.model("newcomer").exists()
