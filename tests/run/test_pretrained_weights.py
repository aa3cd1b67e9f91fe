"""`model.pretrained` is checked before text is prepared, a dry run included: its weights must be there and readable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.complete_models import LLAMA, complete_weights, quantize, write_model

from btm_scale.config.run import RunConfig
from btm_scale.errors import CheckpointError
from btm_scale.run.state import require_pretrained
from btm_scale.run_dir import RunDir

FP8 = LLAMA | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}


def lacking(folder: Path) -> Path:
    write_model(folder, {name: value for name, value in complete_weights(0).items() if "layers.1" not in name})
    return folder


def without_weights(folder: Path) -> Path:
    write_model(folder, complete_weights(0))
    (folder / "vocab.json").write_text("{}")
    (folder / "model.safetensors").unlink()
    return folder


def without_scales(folder: Path) -> Path:
    stored = {name: value for name, value in quantize(complete_weights(0))[0].items() if not name.endswith("_inv")}
    return write_model(folder, stored, FP8)


def of_gptq(folder: Path) -> Path:
    stored = {"model.layers.0.mlp.up_proj.qweight": torch.ones(4, 8).int()}
    return write_model(folder, stored, LLAMA | {"quantization_config": {"quant_method": "gptq"}})


def check(folder: Path, run: Path, **how: bool) -> None:
    values = {"domains": {"math": {"text": "math"}}, "model": {"pretrained": str(folder)}}
    budget = {"seed_share": 0.0, "sequence_length": 16}
    require_pretrained(RunConfig.model_validate(values | {"budget": budget}), RunDir(run), **how)


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (without_weights, "has a config.json but no weights"),
        (lacking, "lacks the tensor 'model.layers.1.input_layernorm.weight'"),
        (without_scales, "is quantized to fp8, but has no scales"),
        (of_gptq, "is quantized with GPTQ"),
    ],
)
def test_weights_that_cannot_be_read_are_refused(
    write: Callable[[Path], Path], message: str, dry: bool, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        check(write(tmp_path / "model"), tmp_path / "run", may_lack_weights=dry)
    assert not (tmp_path / "run").exists()


def test_complete_weights_and_fp8_with_scales_are_accepted(tmp_path: Path) -> None:
    check(write_model(tmp_path / "plain", complete_weights(0)), tmp_path / "run")
    check(write_model(tmp_path / "fp8", quantize(complete_weights(0))[0], FP8), tmp_path / "run")
