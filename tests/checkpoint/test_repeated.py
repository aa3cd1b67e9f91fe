"""A merge or conversion that is repeated after it has finished."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.small_models import Save, random_weights
from helpers.tiny_forest import write_experts

from btm_scale.checkpoint.convert import convert
from btm_scale.checkpoint.merge import sidecars
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.cli.app import parse
from btm_scale.cli.verb import Call
from btm_scale.errors import CheckpointError


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """Return what a verb prints under --json."""
    call = parse([*map(str, arguments), "--json"])
    assert isinstance(call, Call)
    assert call.run() == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.rglob("*") if file.is_file()}


def test_repeating_a_finished_merge_succeeds_and_writes_nothing(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("merge", tmp_path / "out", f"{models[0]}=0.7", f"{models[1]}=0.3", "--method", "ties", "--base", models[2])
    first = answer(capsys, *words)
    before = state(tmp_path)
    again = answer(capsys, *words)
    assert again.pop("already_complete") is True
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    assert state(tmp_path) == before


def test_a_different_merge_into_the_same_output_is_refused_with_the_differences(
    models: list[Path], tmp_path: Path
) -> None:
    out, inputs = tmp_path / "out", [(models[0], 0.7), (models[1], 0.3)]
    merge(out, inputs, random_seed=1)
    before = state(out)

    def refusal(inputs: list[tuple[Path, float]], **settings: Any) -> str:
        with pytest.raises(CheckpointError) as raised:
            merge(out, inputs, **{"random_seed": 1, **settings})
        assert state(out) == before
        return str(raised.value)

    assert "made from m0=0.7, m1=0.3 and not from m0=0.5, m1=0.5" in refusal([(models[0], 0.5), (models[1], 0.5)])
    assert "m2 is not m1" in refusal([(models[0], 0.7), (models[2], 0.3)])
    assert "method was 'linear' and is now 'slerp'" in refusal(inputs, method="slerp")
    assert "dtype was not given and is now 'bfloat16'" in refusal(inputs, dtype="bf16")
    assert "seed was 1 and is now 2" in refusal(inputs, random_seed=2)
    assert "max_shard_bytes was 5000000000.0 and is now 1000.0" in refusal(inputs, max_shard_bytes=1000)
    weights = models[1] / "model.safetensors"
    data = weights.read_bytes()  # which ends with the nine bytes of the mask
    weights.write_bytes(data[:-10] + bytes([data[-10] ^ 1]) + data[-9:])
    message = refusal(inputs)
    assert "m1 has changed since" in message
    assert "merge does not overwrite: choose another output, or remove it first" in message


@pytest.mark.parametrize("recorded", [True, False])
def test_a_merge_of_inputs_that_were_only_touched_is_complete(
    recorded: bool, models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They may have been copied. An earlier version has recorded less of them."""
    words = ("merge", tmp_path / "out", f"{models[0]}=0.7", f"{models[1]}=0.3")
    answer(capsys, *words)
    record = tmp_path / "out/provenance.json"
    if not recorded:
        content = json.loads(record.read_text())
        for one in content["inputs"]:
            del one["sizes"]
        record.write_text(json.dumps(content))
    before = {name: file for name, (_, file) in state(tmp_path / "out").items() if name != str(record)}
    os.utime(models[1] / "model.safetensors", (1, 1))
    assert answer(capsys, *words)["already_complete"] is True
    assert {name: file for name, (_, file) in state(tmp_path / "out").items() if name != str(record)} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    settled = state(tmp_path)
    assert answer(capsys, *words)["already_complete"] is True  # without a comparison
    assert state(tmp_path) == settled


def test_a_sidecar_that_changed_at_the_same_size_is_a_change(models: list[Path], tmp_path: Path) -> None:
    inputs = [(models[0], 1.0), (models[1], 1.0)]
    (models[0] / "chat_template.jinja").write_text("{{ a }}")
    merge(tmp_path / "out", inputs)
    before = state(tmp_path / "out")
    (models[0] / "chat_template.jinja").write_text("{{ b }}")
    with pytest.raises(CheckpointError, match="m0 has changed since"):
        merge(tmp_path / "out", inputs)
    assert state(tmp_path / "out") == before


def test_an_output_that_was_changed_later_is_not_called_complete(models: list[Path], tmp_path: Path) -> None:
    inputs = [(models[0], 1.0), (models[1], 1.0)]
    merge(tmp_path / "out", inputs)
    (tmp_path / "out/README.md").write_text("A card that its owner wrote.")
    assert merge(tmp_path / "out", inputs).already_complete
    (tmp_path / "out/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"its model\.safetensors was changed or removed after merge"):
        merge(tmp_path / "out", inputs)


def test_a_merge_of_copies_or_from_another_folder_is_the_same_merge(save: Save, tmp_path: Path) -> None:
    """Neither paths nor anything else of this machine is in the record, which is published with the model."""
    models = [save(f"m{i}", random_weights(i)) for i in range(2)]
    merge(tmp_path / "out", [(model, 1.0) for model in models])
    assert str(tmp_path) not in (tmp_path / "out/provenance.json").read_text()
    moved = tmp_path / "moved"
    moved.mkdir()
    for model in models:
        model.rename(moved / model.name)
    assert merge(tmp_path / "out", [(moved / model.name, 1.0) for model in models]).already_complete


def test_an_output_that_another_user_planted_is_not_called_complete(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record may claim anything."""
    merge(tmp_path / "out", [(models[0], 1.0), (models[1], 1.0)])
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(CheckpointError, match="belongs to another user, whose record of it is not trusted"):
        merge(tmp_path / "out", [(models[0], 1.0), (models[1], 1.0)])


@pytest.mark.parametrize("to", ["huggingface", "megatron", "deepspeed"])
def test_repeating_a_finished_conversion_succeeds_and_a_different_one_is_refused(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_experts(tmp_path, 1)["expert0"]
    words = ("convert", model, tmp_path / "out", "--to", to)
    first = answer(capsys, *words)
    before = state(tmp_path)
    assert answer(capsys, *words) == {**first, "already_complete": True}
    assert answer(capsys, *words, "--verify") == {**first, "already_complete": True, "verified": True}
    with pytest.raises(CheckpointError, match=f"already exists, and to was '{to}' and is now"):
        convert(model, tmp_path / "out", to="megatron" if to != "megatron" else "deepspeed")
    with pytest.raises(CheckpointError, match="dtype was not given and is now 'float16'"):
        convert(model, tmp_path / "out", to=to, dtype="fp16")
    with pytest.raises(CheckpointError, match="it was made by convert"):
        merge(tmp_path / "out", [(model, 1.0)])
    assert state(tmp_path) == before


@pytest.mark.parametrize("to", ["huggingface", "megatron", "deepspeed"])
def test_a_conversion_of_an_input_that_was_only_touched_is_complete(to: str, tmp_path: Path) -> None:
    model = write_experts(tmp_path, 1)["expert0"]
    convert(model, tmp_path / "out", to=to)
    record = str(tmp_path / "out/provenance.json")
    before = {name: file for name, (_, file) in state(tmp_path).items() if name != record}
    os.utime(model / "model.safetensors", (1, 1))
    assert convert(model, tmp_path / "out", to=to).already_complete
    assert {name: file for name, (_, file) in state(tmp_path).items() if name != record} == before
    changed = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(changed[:-1] + bytes([changed[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="has changed since"):
        convert(model, tmp_path / "out", to=to)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("command", "change"),
    [
        ("merge", "overwritten"),
        ("merge", "removed"),
        ("huggingface", "overwritten"),
        ("megatron", "replaced"),
        ("deepspeed", "overwritten"),
    ],
)
def test_an_input_that_changes_while_it_is_read_is_refused(
    command: str, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_experts(tmp_path, 1)["expert0"]
    weights, other = model / "model.safetensors", tmp_path / "other"
    other.write_bytes(weights.read_bytes()[:-1] + b"\x3e")
    plain, times = sidecars.carry_sidecars, []

    def changing(*arguments: Any, **settings: Any) -> None:
        """Copy config and tokenizer, which comes after the weights, and change the weights."""
        plain(*arguments, **settings)
        times.append(weights.stat().st_mtime_ns)
        if change == "overwritten":
            weights.write_bytes(other.read_bytes())
        elif change == "replaced":
            other.replace(weights)
        else:
            weights.unlink()

    monkeypatch.setattr("btm_scale.checkpoint.merge.output.carry_sidecars", changing)
    monkeypatch.setattr("btm_scale.checkpoint.convert.carry_sidecars", changing)
    happened = "removed" if change == "removed" else "changed"
    run: Callable[[], object] = partial(convert, model, tmp_path / "out", to=command)
    if command == "merge":
        run = partial(merge, tmp_path / "out", [(model, 1.0)])
    with pytest.raises(CheckpointError, match=rf"model\.safetensors was {happened} while \w+ read it"):
        run()
    assert times
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
