"""Train, save, convert to a universal checkpoint, and resume from it in DeepSpeed's engine around transformers' model.

The spec has a folder, the model's config.json and the numbers of steps before and after the checkpoint. The first rank
writes `losses.json`: of the uninterrupted run after the checkpoint, and of the engine at each ZeRO stage.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers.single_job import model_of, one_step
from helpers.worlds import fork_world, read_spec

from btm_scale.checkpoint.convert import convert
from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.config.layout import Layout
from btm_scale.config.training import OptimizerConfig
from btm_scale.distributed.group import ExpertGroup
from btm_scale.model.hf_config import shape_from_config
from btm_scale.train.checkpoint import save_state, state_path
from btm_scale.train.engine import Engine

RANKS, SEQUENCES, RATE = 2, 4, 2e-3
SETTINGS = OptimizerConfig()


class CountingAdam(torch.optim.AdamW):
    """AdamW that accepts a number of steps; PyTorch's own takes a tensor, and DeepSpeed's optimizers count in ints."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for state in self.state.values():
            if isinstance(state.get("step"), int):
                state["step"] = torch.tensor(float(state["step"]))
        return super().step(closure)


def batch(shape: Any, step: int) -> torch.Tensor:
    """This rank's part of the batch of a step."""
    generator = torch.Generator().manual_seed(step)
    sequences = torch.randint(0, shape.vocabulary, (SEQUENCES, shape.positions + 1), generator=generator)
    return sequences.chunk(RANKS)[dist.get_rank()]


def ours(group: ExpertGroup, shape: Any, folder: Path, steps: int, more: int) -> list[float]:
    """Train, save a checkpoint after `steps` steps, and return the losses of the next ones."""
    group.seed(1)
    engine = Engine(group, model_of(group, shape), one_step(group.layout, SEQUENCES), SETTINGS, {})
    losses = []
    for step in range(1, steps + more + 1):
        losses.append(engine.step(batch(shape, step), RATE).loss)
        if step == steps:
            save_state(engine, folder, step, keep=1)
    engine.close()
    return losses[steps:]


def resumed(folder: Path, config: dict[str, Any], shape: Any, stage: int, steps: int, more: int) -> list[float]:
    """Return the losses of DeepSpeed's engine after it loads a universal checkpoint."""
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(stage)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": SETTINGS.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=CountingAdam(groups, lr=RATE, betas=SETTINGS.betas_at(1.0), eps=SETTINGS.eps),
        config={
            "train_micro_batch_size_per_gpu": SEQUENCES // RANKS,
            "gradient_clipping": SETTINGS.clip,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "checkpoint": {"load_universal": True},
            "steps_per_print": 10**9,
        },
        dist_init_required=False,
    )
    engine.load_checkpoint(str(folder))
    assert engine.global_steps == steps
    _require_equal(engine, folder.parent / f"checkpoints/step-{steps:08d}", stage)
    losses = []
    for step in range(steps + 1, steps + more + 1):
        sequences = batch(shape, step)
        logits = engine(sequences[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean / RANKS))
    engine.destroy()
    return losses


def _require_equal(engine: Any, state: Path, stage: int) -> None:
    """Compare every weight and moment that the engine loaded with the training checkpoint."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    with SafetensorsModel(state) as saved:
        for name, parameter in engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                loaded = {
                    "master": safe_get_full_fp32_param(parameter),
                    "exp_avg": safe_get_full_optimizer_state(parameter, "exp_avg"),
                    "exp_avg_sq": safe_get_full_optimizer_state(parameter, "exp_avg_sq"),
                }
            for kind, tensor in loaded.items():
                assert tensor.reshape(-1).equal(saved.read(f"{kind}/{name}").reshape(-1)), f"{kind}/{name}"


def rank(spec: dict[str, Any]) -> None:
    folder, steps, more = Path(spec["folder"]), spec["steps"], spec["more"]
    shape = shape_from_config(spec["config"], folder / "config.json")
    group = ExpertGroup.join(Layout(data=RANKS, zero=1, precision="fp32"))
    losses = {"uninterrupted": ours(group, shape, folder / "checkpoints", steps, more)}
    if group.is_first:
        state = state_path(folder / "checkpoints", steps)
        (state / "config.json").write_text(json.dumps(spec["config"]))
        convert(state, folder / "universal", to="universal", verify=True)
    dist.barrier()
    for stage in spec["stages"]:
        losses[f"zero {stage}"] = resumed(folder / "universal", spec["config"], shape, stage, steps, more)
    if group.is_first:
        (folder / "losses.json").write_text(json.dumps(losses))
    group.leave()


if __name__ == "__main__":
    import transformers  # noqa: F401 (so that the ranks need not import it)

    fork_world(RANKS, rank, read_spec())
