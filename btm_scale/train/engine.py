"""The DeepSpeed engine around the model: one optimizer step, and the state behind it, whatever the ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor

from btm_scale.config import OptimizerConfig
from btm_scale.group import ExpertGroup
from btm_scale.model.gpt import ExpertModel
from btm_scale.train.job import TrainingJob

# What a parameter's training state consists of; all float32.
MASTER, FIRST_MOMENT, SECOND_MOMENT = "master", "exp_avg", "exp_avg_sq"
KINDS = (MASTER, FIRST_MOMENT, SECOND_MOMENT)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step tells: mean loss in nats, and the gradient's norm before clipping."""

    loss: float
    gradient_norm: float


class Engine:
    """A model in training. All ranks of the group call every method together."""

    def __init__(
        self,
        group: ExpertGroup,
        model: ExpertModel,
        job: TrainingJob,
        optimizer: OptimizerConfig,
        overrides: Mapping[str, Any],
    ) -> None:
        self.group = group
        self.job = job
        adam = torch.optim.AdamW(
            _decayed_and_not(model, optimizer.weight_decay),
            lr=optimizer.lr,
            betas=optimizer.betas_at(job.batch_share),
            eps=optimizer.eps,
            fused=True,
        )
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=adam,
            config=_merged(deepspeed_config(job, optimizer), overrides),
            mpu=group.mpu,
            dist_init_required=False,
        )
        self.model: ExpertModel = self._engine.module
        self._make_moments()

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """This rank's parameters by their Megatron-core names."""
        return dict(self.model.named_parameters())

    def step(self, sequences: Tensor, rate: float) -> StepResult:
        """Train on this data rank's sequences, [job.sequences / data, length + 1], at learning rate `rate`."""
        for settings in self._engine.optimizer.param_groups:
            settings["lr"] = rate
        total = torch.zeros((), device=self.group.device)
        for micro in sequences.to(self.group.device).split(self.job.micro_batch):
            loss = self._engine(micro[:, :-1], micro[:, 1:])
            self._engine.backward(loss)
            self._engine.step()
            total += loss.detach()
        total /= self.job.accumulation
        if self.group.config.data > 1:
            dist.all_reduce(total, group=self.group.mpu.get_data_parallel_group())
            total /= self.group.config.data
        return StepResult(float(total), float(self._engine.get_global_grad_norm() or 0.0))

    def full(self, parameter: torch.nn.Parameter, kind: str) -> Tensor:
        """A parameter's state, float32 and of the parameter's shape on this tensor rank, on every data rank."""
        if self._is_plain:
            value = parameter if kind == MASTER else self._base.state[parameter][kind]
            return value.detach().float()
        if kind == MASTER:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, kind)

    def weights(self, parameter: torch.nn.Parameter) -> Tensor:
        """A parameter as the model computes with it."""
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            return parameter.detach().clone()

    def restore(self, parameter: torch.nn.Parameter, state: Mapping[str, Tensor]) -> None:
        """Set a parameter's whole state; what the model computes with follows the master weights."""
        if self._is_plain:
            parameter.data.copy_(state[MASTER].view_as(parameter))
            for kind in (FIRST_MOMENT, SECOND_MOMENT):
                self._base.state[parameter][kind].copy_(state[kind].view_as(parameter))
            return
        safe_set_full_fp32_param(parameter, state[MASTER])
        for kind in (FIRST_MOMENT, SECOND_MOMENT):
            safe_set_full_optimizer_state(parameter, state[kind], kind)
        partitioned = hasattr(parameter, "ds_id")
        # Under ZeRO 3 the weights are written whole and cut again; the writer is this tensor rank's first data rank.
        source = self.group.tensor_rank if partitioned else None
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=source, enabled=partitioned):
            parameter.data.copy_(state[MASTER].view_as(parameter))

    @property
    def adam_steps(self) -> int:
        """Steps that the optimizer has taken, its parents' included; its bias correction depends on them."""
        return int(self._base.state[next(self._flat_parameters())]["step"])

    @adam_steps.setter
    def adam_steps(self, steps: int) -> None:
        for flat in self._flat_parameters():
            self._base.state[flat]["step"].fill_(steps)

    def _make_moments(self) -> None:
        """Make the moments that AdamW would only make in its first step, so that a state can be put into them.

        Nor could DeepSpeed find them later: it looks for all parameter groups' moments after the first group's step.
        """
        for flat in self._flat_parameters():
            self._base.state[flat] = {
                "step": torch.zeros((), device=flat.device),
                FIRST_MOMENT: torch.zeros_like(flat, dtype=torch.float32),
                SECOND_MOMENT: torch.zeros_like(flat, dtype=torch.float32),
            }
        link = getattr(self._engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()

    @property
    def _base(self) -> torch.optim.Optimizer:
        return getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)

    @property
    def _is_plain(self) -> bool:
        """Whether DeepSpeed uses AdamW as it is: ZeRO 0 in float32."""
        return self._base is self._engine.optimizer

    def _flat_parameters(self) -> Iterator[Tensor]:
        """What AdamW takes for its parameters: under ZeRO, this rank's flat parts of them."""
        zero3 = getattr(self._engine.optimizer, "fp32_partitioned_groups_flat", None)
        if zero3 is not None:
            yield from zero3
        else:
            for settings in self._base.param_groups:
                yield from settings["params"]


def deepspeed_config(job: TrainingJob, optimizer: OptimizerConfig) -> dict[str, Any]:
    """DeepSpeed's config for a job; the run's own `deepspeed` section is merged over it."""
    return {
        "train_micro_batch_size_per_gpu": job.micro_batch,
        "gradient_accumulation_steps": job.accumulation,
        "gradient_clipping": optimizer.clip,
        "bf16": {"enabled": job.group.precision == "bf16"},
        "zero_optimization": {"stage": job.group.zero},
        "steps_per_print": 2**31,
    }


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        inner = base.get(key)
        if isinstance(value, Mapping) and isinstance(inner, Mapping):
            value = _merged(inner, value)
        result[key] = value
    return result


def _decayed_and_not(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases, which have one dimension, don't."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
