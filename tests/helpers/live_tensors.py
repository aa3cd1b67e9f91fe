"""The bytes of tensors that are alive in this process."""

from __future__ import annotations

import gc

import torch


def living_bytes() -> int:
    """Return the bytes of all tensors that are alive, each storage once, after collecting garbage."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None, getattr(thing, "ds_tensor", None)):
                if tensor is not None and tensor.device.type != "meta":
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
