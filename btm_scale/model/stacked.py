"""Models of one architecture as one model: their weights stacked, one forward for the rows of all of them.

The weights exist once. Each model's own parameters become views of the stacks, so it can still be used alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from btm_scale.model.stacked_modules import Weights, can_stack, stacked_module

# Settings of a config that no computation reads.
_NAMES = (
    "_name_or_path",
    "name_or_path",
    "architectures",
    "transformers_version",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
)


def are_alike(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two models compute the same function of their weights, which have the same shapes and device."""
    if type(one) is not type(other) or _settings(one) != _settings(other):
        return False
    if _layout(one) != _layout(other):
        return False
    ours, theirs = dict(one.named_buffers()), dict(other.named_buffers())
    return ours.keys() == theirs.keys() and all(_equal(buffer, theirs[name]) for name, buffer in ours.items())


def can_stack_model(model: nn.Module) -> bool:
    """Return whether every parameter of a model is in a module that has a stacked form."""
    holders = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    return all(can_stack(module) for module in holders)


@torch.no_grad()
def stack_models(models: Sequence[nn.Module]) -> nn.Module:
    """Return one model for the rows of several that are alike, and make their parameters views of its weights.

    Args:
        models: at least two, for which `are_alike` and `can_stack_model` hold.

    Returns:
        A model of the same class for batches [experts x rows, ...], one expert after the other.
    """
    weights = _stacked_parameters(models)
    first = models[0]
    body = copy.deepcopy(first, {id(parameter): parameter for parameter in first.parameters()})
    for name, module in list(body.named_modules()):
        own = {key: weights[_joined(name, key)] for key, _ in module.named_parameters(recurse=False)}
        if own:
            parent, _, attribute = name.rpartition(".")
            setattr(body.get_submodule(parent), attribute, stacked_module(module, own))
    return body.eval()


@torch.no_grad()
def unstack_models(models: Sequence[nn.Module]) -> None:
    """Give models of one stack their own weights again, so that its memory can be freed.

    If nothing else holds the stack, that of each parameter is freed before the next one is copied.
    """
    copies: dict[Any, Tensor] = {}
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        for parameter in parameters:
            place = _place(parameter)
            if place not in copies:
                copies[place] = parameter.detach().clone()
            parameter.data = copies[place]


def _stacked_parameters(models: Sequence[nn.Module]) -> Weights:
    """Return [experts, ...] of every parameter by name. Tied parameters stay tied; each old one is freed at once."""
    named = [dict(model.named_parameters(remove_duplicate=False)) for model in models]
    tied: dict[Any, list[str]] = {}
    for name, parameter in named[0].items():
        tied.setdefault(_place(parameter), []).append(name)
    stacks: dict[str, Tensor] = {}
    for names in tied.values():
        first = named[0][names[0]]
        stack = torch.empty(len(models), *first.shape, dtype=first.dtype, device=first.device)
        for row, parameters in zip(stack, named, strict=True):
            row.copy_(parameters[names[0]])
            for name in names:
                parameters[name].data = row
        stacks |= dict.fromkeys(names, stack)
    return stacks


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Identify the memory of a tensor; tensors on `meta` have no address."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.dtype


def _layout(model: nn.Module) -> list[Any]:
    """Return name, shape, dtype and device of every parameter, and which of them are tied."""
    places: dict[Any, int] = {}
    return [
        (name, value.shape, value.dtype, value.device, places.setdefault(_place(value), len(places)))
        for name, value in model.named_parameters(remove_duplicate=False)
    ]


def _settings(model: Any) -> dict[str, Any]:
    return {name: value for name, value in model.config.to_dict().items() if name not in _NAMES}


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.is_meta or other.is_meta:
        return one.shape == other.shape
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _joined(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter
