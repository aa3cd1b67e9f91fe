"""PEFT adapters from strangers: read as data, whatever they name."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_families import write_family
from safetensors.torch import save_file

from btm_scale.checkpoint.convert import convert
from btm_scale.errors import CheckpointError

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
MATRICES = {f"{MODULE}.lora_A.weight": torch.ones(2, 32), f"{MODULE}.lora_B.weight": torch.ones(32, 2)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    write_family(folder, "olmo2")
    return folder


def write_adapter(folder: Path, **settings: Any) -> Path:
    folder.mkdir()
    save_file(MATRICES, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **settings}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def test_what_an_adapter_names_is_not_imported(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, packages = tmp_path / "ran", tmp_path / "packages"
    for name in ("peft", "canary"):
        (packages / name).mkdir(parents=True)
        (packages / name / "__init__.py").write_text(f"open({str(ran)!r}, 'a').write('{name}')\n")
    monkeypatch.syspath_prepend(str(packages))
    for name in ("peft", "canary"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    mapping = {"base_model_class": "Model", "parent_library": "canary"}
    adapter = write_adapter(
        tmp_path / "adapter", base_model_name_or_path=str(base), auto_mapping=mapping, megatron_core="canary"
    )
    (adapter / "canary.py").write_text(f"open({str(ran)!r}, 'a').write('own')\n")
    convert(adapter, tmp_path / "out", to="huggingface")
    assert not ran.exists()
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_the_pickle_of_an_adapter_calls_nothing(base: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    adapter = write_adapter(tmp_path / "adapter", base_model_name_or_path=str(base))
    (adapter / "adapter_model.safetensors").unlink()
    for content in (pickle.dumps(Payload()), pickle.dumps({"a": Payload()}, protocol=2)):
        (adapter / "adapter_model.bin").write_bytes(content)
        with pytest.raises(CheckpointError):
            convert(adapter, tmp_path / "out", to="huggingface")
    torch.save(MATRICES | {"x": Payload()}, adapter / "adapter_model.bin")
    with contextlib.suppress(CheckpointError):  # it may leave out values that are not tensors
        convert(adapter, tmp_path / "out", to="huggingface")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["https://evil.example/model", "evil/model", "/dev/stdin", "\u0000", "a" * 5000, 7, None]
)
def test_a_base_that_is_not_a_folder_here_is_reported_and_not_fetched(name: Any, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base_model_name_or_path=name)
    with pytest.raises(CheckpointError, match="give its folder"):
        convert(adapter, tmp_path / "out", to="huggingface")


def test_a_link_in_place_of_an_adapters_file_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base_model_name_or_path=str(base))
    secret = tmp_path / "secret.safetensors"
    (adapter / "adapter_model.safetensors").rename(secret)
    (adapter / "adapter_model.safetensors").symlink_to(secret)
    with pytest.raises(CheckpointError, match="is a link to"):
        convert(adapter, tmp_path / "out", to="huggingface")


def test_an_output_is_as_private_as_the_base_of_an_adapter(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base_model_name_or_path=str(base))
    weights = next(base.glob("*.safetensors"))
    weights.chmod(0o600)
    try:
        convert(adapter, tmp_path / "out", to="huggingface")
    finally:
        weights.chmod(0o644)
    assert all(file.stat().st_mode & 0o077 == 0 for file in (tmp_path / "out").iterdir())
