"""The DeepSpeed engine around the model: one optimizer step, and the training state at any ZeRO stage."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor

from btm_scale.config.training import OptimizerConfig
from btm_scale.distributed.group import ExpertGroup
from btm_scale.model.gpt import ExpertModel
from btm_scale.model.partition import complete, is_partitioned
from btm_scale.train.deepspeed_config import deepspeed_config
from btm_scale.train.diloco import OuterStep
from btm_scale.train.fp32_gradients import Float32Sums
from btm_scale.train.gradient_sums import sum_in_products
from btm_scale.train.jobs import TrainingJob
from btm_scale.train.monitors import Monitors
from btm_scale.train.parameter_groups import RATE_SCALE, empty, parameter_groups, scaler_attributes
from btm_scale.train.routers import Routers
from btm_scale.train.step_result import StepResult
from btm_scale.train.targets import has_flags, inputs_and_targets, targets_per_loss
from btm_scale.util.imports import import_uncompiled

# DeepSpeed's engine imports Muon only to check the type of each optimizer.
with contextlib.suppress(ModuleNotFoundError):
    import_uncompiled("deepspeed.runtime.zero.muon.muon_optimizer")

# The kinds of tensors in a parameter's training state, all float32.
MASTER, FIRST_MOMENT, SECOND_MOMENT = "master", "exp_avg", "exp_avg_sq"
KINDS = (MASTER, FIRST_MOMENT, SECOND_MOMENT)
# The outer momentum, if data ranks take local steps.
OUTER = "outer"


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
            parameter_groups(model, optimizer.weight_decay, job.router_rate),
            lr=0.0,  # set by each step; some of DeepSpeed's optimizers read it at construction
            betas=optimizer.betas_at(job.batch_share),
            eps=optimizer.eps,
            fused=True,
        )
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=adam,
            config=deepspeed_config(job, optimizer, overrides),
            mpu=group.alone() if job.layout.sync_every > 1 else group.mpu,
            dist_init_required=False,
        )
        self.model: ExpertModel = self._engine.module
        self.routers = Routers(group, self.model, job.mixture)
        self.monitors = Monitors(self._engine, job.model)
        self._masters = self._replicated_masters()
        if self._masters is not None and group.layout.precision != "fp32" and job.accumulation > 1:
            Float32Sums(self.model, self._engine.is_gradient_accumulation_boundary)
        if isinstance(self._engine.optimizer, BF16_Optimizer) and not self._engine.optimizer.immediate_grad_update:
            sum_in_products(self.model, self._engine.optimizer)
        self._make_moments()
        self._outer = self._outer_step()
        self._first_loss_scale = self.loss_scale

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """This rank's parameters by their Megatron-core names."""
        return dict(self.model.named_parameters())

    def step(self, sequences: Tensor, rate: float) -> StepResult:
        """Train on this data rank's sequences, [job.sequences / data, length + 1], at learning rate `rate`."""
        for settings in self._engine.optimizer.param_groups:
            settings["lr"] = rate * settings[RATE_SCALE]
        self.routers.begin_step()
        scale = self._scale  # the step may change it
        total = torch.zeros((), device=self.group.device)
        self.model.target_count = targets_per_loss(sequences, self.group, self.job)
        for micro in sequences.to(self.group.device, non_blocking=True).split(self.job.micro_batch):
            loss = self._engine(*inputs_and_targets(micro, flagged=self.model.target_count is not None))
            # Without ZeRO, DeepSpeed divides gradients by the loss scale but leaves it to us to multiply the loss.
            self._engine.backward(loss if self._masters is None else loss * self._scale)
            self._engine.step()
            total += loss.detach()
        total /= self.job.accumulation
        norm = float(self._engine.get_global_grad_norm() or 0.0)
        if self.group.layout.data > 1:
            # Norms differ only between local steps; the mean gives every rank the same verdict.
            both = torch.stack([total, total.new_tensor(norm)])
            dist.all_reduce(both, group=self.group.mpu.get_data_parallel_group())
            both /= self.group.layout.data
            total = both[0]
            norm = norm if self._outer is None else float(both[1])
        if self._masters is not None:
            norm /= scale
        overflowed = self._scaler is not None and not self._engine.was_step_applied()
        return StepResult(float(total), norm, overflowed, self.routers.end_step())

    @torch.no_grad()
    def loss_of(self, sequences: Tensor) -> Tensor:
        """Return the mean loss in nats of sequences [count, length + 1]; data ranks call this equally often."""
        self._engine.eval()
        self.model.target_count = None
        loss = self._engine(*inputs_and_targets(sequences, flagged=has_flags(sequences)))
        self._engine.train()
        return loss

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of tensors in this engine's training state."""
        return KINDS if self._outer is None else (*KINDS, OUTER)

    def kinds_of(self, parameter: torch.nn.Parameter) -> tuple[str, ...]:
        """Return the kinds of tensors in a parameter's state; a frozen one has only its weights."""
        return self.kinds if parameter.requires_grad else (MASTER,)

    def is_whole_after(self, step: int) -> bool:
        """Return whether the data ranks are in sync after this step, so that a checkpoint can be saved."""
        return self._outer is None or step % self.job.layout.sync_every == 0 or step == self.job.steps

    def outer_step(self) -> None:
        """Synchronize the data ranks if they take local steps."""
        if self._outer is None:
            return
        for parameter in self._trained_parameters():
            moments = {kind: self.full(parameter, kind) for kind in (FIRST_MOMENT, SECOND_MOMENT)}
            weights, moments = self._outer(parameter, self.full(parameter, MASTER), moments)
            self._set(parameter, {MASTER: weights, **moments})

    def full(self, parameter: torch.nn.Parameter, kind: str) -> Tensor:
        """Return one tensor of a parameter's state on every data rank, float32, in its shape on this tensor rank."""
        if not parameter.requires_grad:
            weights = self.weights(parameter).float()
            return weights if kind == MASTER else torch.zeros_like(weights)  # it has no moments
        if kind == OUTER:
            assert self._outer is not None
            return self._outer.momentum(parameter)
        if self._masters is not None:
            master = self._masters[parameter]
            value = master if kind == MASTER else self._base.state[master][kind]
            return value.detach().float()
        if kind == MASTER:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, kind)

    def is_divided(self, parameter: torch.nn.Parameter) -> bool:
        """Return whether each data rank stores a part of a parameter's state; otherwise all store all of it."""
        if not parameter.requires_grad:
            return is_partitioned(parameter)
        return self._masters is None and self._outer is None

    def own_part(self, parameter: torch.nn.Parameter, kind: str) -> tuple[int, Tensor]:
        """Return the part of `full` that this data rank stores, flat, and the index of its first element.

        Ranks don't communicate.
        """
        if not parameter.requires_grad and not is_partitioned(parameter):
            return 0, parameter.detach().float().reshape(-1)
        if self._masters is not None or kind == OUTER:
            return 0, self.full(parameter, kind).reshape(-1)
        if is_partitioned(parameter):  # ZeRO 3: equal parts, of which the last are padded
            local = safe_get_local_fp32_param, safe_get_local_optimizer_state
            if not parameter.requires_grad:
                part = parameter.ds_tensor.detach().float().reshape(-1)  # type: ignore[attr-defined]
            else:
                part = local[0](parameter) if kind == MASTER else local[1](parameter, kind)
            start = part.numel() * parameter.ds_zero_partition_rank  # type: ignore[attr-defined]
            return start, part[: max(0, parameter.ds_numel - start)]  # type: ignore[attr-defined]
        fragment = parameter._hp_mapping  # type: ignore[attr-defined]
        if fragment is None:
            return 0, torch.empty(0)
        return fragment.lp_fragment_address.start, fragment.get_hp_fragment(None if kind == MASTER else kind).detach()

    def weights(self, parameter: torch.nn.Parameter) -> Tensor:
        """Return a parameter in the dtype that the model computes in."""
        with complete(parameter):
            return parameter.detach().clone()

    def restore(self, parameter: torch.nn.Parameter, state: Mapping[str, Tensor]) -> None:
        """Set a parameter's complete state; the model's own weights follow the master weights."""
        self._set(parameter, state)
        if self._outer is not None and parameter.requires_grad:
            self._outer.begin(parameter, state[MASTER], state.get(OUTER))

    def _set(self, parameter: torch.nn.Parameter, state: Mapping[str, Tensor]) -> None:
        if not parameter.requires_grad:
            with complete(parameter, changes=True):
                parameter.data.copy_(state[MASTER].view_as(parameter))
            return
        if self._masters is not None:
            master = self._masters[parameter]
            for tensor in (master, parameter):
                tensor.data.copy_(state[MASTER].view_as(parameter))
            for kind in (FIRST_MOMENT, SECOND_MOMENT):
                self._base.state[master][kind].copy_(state[kind].view_as(parameter))
            return
        safe_set_full_fp32_param(parameter, state[MASTER])
        for kind in (FIRST_MOMENT, SECOND_MOMENT):
            safe_set_full_optimizer_state(parameter, state[kind], kind)
        with complete(parameter, changes=True):
            parameter.data.copy_(state[MASTER].view_as(parameter))

    def reset(self, model: ExpertModel) -> None:
        """Restart from a model of the same shape and layout that no engine has wrapped."""
        parameters = self.parameters
        for name, parameter in model.named_parameters():
            with complete(parameter):
                master = parameter.detach().float().clone()
            zeros = torch.zeros_like(master)
            self.restore(parameters[name], {MASTER: master, FIRST_MOMENT: zeros, SECOND_MOMENT: zeros})
        self.adam_steps = 0
        self.loss_scale = self._first_loss_scale
        self.routers.load = ()

    @property
    def adam_steps(self) -> int:
        """Steps that the optimizer has taken, including its parents'; Adam's bias correction depends on them."""
        return int(self._base.state[next(self._flat_parameters())]["step"])

    @adam_steps.setter
    def adam_steps(self, steps: int) -> None:
        for flat in self._flat_parameters():
            self._base.state[flat]["step"].fill_(steps)

    def close(self) -> None:
        """Release the model, its gradients and the optimizer's state. The engine cannot be used afterwards.

        DeepSpeed's engine, its optimizer and the hooks of the parameters hold each other through PyTorch's autograd
        nodes, which the garbage collector cannot see into. Emptying these objects breaks every such cycle.
        """
        engine = self._engine
        parameters = list(self.model.parameters())
        holders = [*parameters, *self.model.modules(), engine, engine.optimizer, self._base, self]
        engine.destroy()
        empty(parameters, holders)
        del engine, parameters, holders
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _make_moments(self) -> None:
        """Create the moments that AdamW would only create in its first step, so that a checkpoint can be loaded.

        DeepSpeed would not find them later: it looks for all parameter groups' moments after the first group's step.
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
    def loss_scale(self) -> dict[str, float]:
        """The state of fp16 loss scaling; empty in other precisions."""
        scaler = self._scaler
        return {} if scaler is None else {name: getattr(scaler, name) for name in scaler_attributes(scaler)}

    @loss_scale.setter
    def loss_scale(self, state: Mapping[str, float]) -> None:
        if self._scaler is not None:
            for name in scaler_attributes(self._scaler):
                if name in state:
                    setattr(self._scaler, name, state[name])

    @property
    def _scaler(self) -> Any:
        """The object that holds the loss scale; None if the loss is not scaled."""
        if self.group.layout.precision != "fp16":
            return None
        optimizer = self._engine.optimizer
        return optimizer.loss_scale_config if self._masters is not None else optimizer.loss_scaler

    @property
    def _scale(self) -> float:
        return 1.0 if self._scaler is None else float(self._scaler.cur_scale)

    def _replicated_masters(self) -> dict[torch.nn.Parameter, Tensor] | None:
        """Return each parameter's float32 weights: the parameter itself or DeepSpeed's copy. None with ZeRO."""
        if self.group.layout.zero > 0:
            return None
        optimizer = self._engine.optimizer
        if self._base is optimizer:
            return {parameter: parameter for parameter in self._trained_parameters()}
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return {parameter: master for group in pairs for parameter, master in zip(*group, strict=True)}

    def _outer_step(self) -> OuterStep | None:
        layout = self.job.layout
        if layout.sync_every == 1:
            return None
        data = self.group.mpu.get_data_parallel_group()
        outer = OuterStep(data, layout.outer_lr, layout.outer_momentum)
        for parameter in self._trained_parameters():
            outer.begin(parameter, self.full(parameter, MASTER))
        return outer

    def _trained_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _flat_parameters(self) -> Iterator[Tensor]:
        """Yield the tensors that AdamW updates: with ZeRO, this rank's flat partitions of the parameters."""
        zero3 = getattr(self._engine.optimizer, "fp32_partitioned_groups_flat", None)
        if zero3 is not None:
            yield from zero3
        else:
            for settings in self._base.param_groups:
                yield from settings["params"]
