from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.errors import CheckpointError
from btm_scale.util.inside import copy_inside, file_inside


def write_model(folder: Path, *, shard: str = "part.safetensors") -> Path:
    """A sharded model whose index names `shard`, which is written if it is a plain name."""
    folder.mkdir(parents=True)
    if "/" not in shard:
        save_file({"weight": torch.ones(4)}, folder / shard)
    index = {"metadata": {}, "weight_map": {"weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/etc/passwd", "", "a\0b"])
def test_a_name_that_leaves_the_directory_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="only to its own files"):
        file_inside(tmp_path, name)


def test_a_name_longer_than_the_file_system_allows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be resolved: .*File name too long"):
        file_inside(tmp_path, "x" * 300)


def test_a_link_within_the_directory_is_followed_and_one_out_of_it_is_not(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of another")
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (model / "sub" / "file").touch()
    (model / "inside").symlink_to("sub/file")
    (model / "outside").symlink_to(tmp_path / "secret")
    (model / "folder").symlink_to(tmp_path)
    (model / "loop").symlink_to("loop")
    assert file_inside(model, "inside") == model / "inside"
    for name in ("outside", "folder/secret"):
        with pytest.raises(CheckpointError, match="outside of the model directory"):
            file_inside(model, name)


def test_a_model_directory_may_be_a_link_itself(tmp_path: Path) -> None:
    model = write_model(tmp_path / "actual")
    (tmp_path / "link").symlink_to(model)
    with open_model(tmp_path / "link") as reader:
        assert reader.names == ("weight",)


def test_links_of_the_hugging_face_cache_into_its_own_blobs_work(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--a--b"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    write_model(snapshot)
    for number, file in enumerate(list(snapshot.iterdir())):
        shutil.move(file, blobs / str(number))
        file.symlink_to(f"../../blobs/{number}")
    with open_model(snapshot) as reader:
        assert reader.names == ("weight",)
    other = tmp_path / "hub" / "models--c--d" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(snapshot / "part.safetensors", other / "0")
    (snapshot / "part.safetensors").unlink()
    (snapshot / "part.safetensors").symlink_to(other / "0")
    with pytest.raises(CheckpointError, match="outside of the model directory"):
        open_model(snapshot)


@pytest.mark.parametrize("shard", ["../other/part.safetensors", "/{root}/other/part.safetensors"])
def test_an_index_that_names_a_shard_elsewhere_is_refused(shard: str, tmp_path: Path) -> None:
    write_model(tmp_path / "other")
    model = write_model(tmp_path / "model", shard=shard.format(root=str(tmp_path).strip("/")))
    with pytest.raises(CheckpointError, match="only to its own files"):
        open_model(model)


def test_a_sidecar_that_links_elsewhere_is_not_copied_into_a_merge(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of another")
    model = write_model(tmp_path / "model")
    (model / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside of the model directory"):
        merge(tmp_path / "out", [(model, 1.0)])
    assert not (tmp_path / "out").exists()


def test_a_copy_is_readable_by_no_more_users_than_its_source(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    before = os.umask(0o022)
    try:
        for name, mode, expected in (("private", 0o600, 0o600), ("group", 0o640, 0o640), ("all", 0o666, 0o644)):
            (source / name).touch()
            (source / name).chmod(mode)
            copy_inside(source, name, target)
            assert (target / name).stat().st_mode & 0o777 == expected
    finally:
        os.umask(before)
