"""The peer of training speed: a Llama-like model and loop in plain PyTorch, without an engine.

bf16 weights with float32 master weights, fused AdamW, gradient accumulation and clipping.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from btm_scale.model.shape import ModelShape


class Layer(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.heads, self.groups = shape.heads, shape.kv_heads
        size = shape.head_size
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.norm_epsilon)
        self.qkv = nn.Linear(shape.hidden, (shape.heads + 2 * shape.kv_heads) * size, bias=False)
        self.out = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(shape.hidden, eps=shape.norm_epsilon)
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        heads = self.qkv(self.norm(hidden)).view(batch, length, self.heads + 2 * self.groups, -1).transpose(1, 2)
        query, key, value = heads.split([self.heads, self.groups, self.groups], dim=1)
        attended = functional.scaled_dot_product_attention(
            rotated(query, cos, sin),
            rotated(key, cos, sin),
            value,
            is_causal=True,
            enable_gqa=self.heads != self.groups,
        )
        hidden = hidden + self.out(attended.transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, dim=-1)
        return hidden + self.down(functional.silu(gate) * up)


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-right, left), dim=-1) * sin


class PlainModel(nn.Module):
    def __init__(self, shape: ModelShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.norm_epsilon)
        frequencies = shape.rope_theta ** (-torch.arange(0, shape.head_size, 2) / shape.head_size)
        angles = torch.outer(torch.arange(shape.positions), frequencies).repeat(1, 2)
        self.to(dtype)
        self.register_buffer("cos", angles.cos().to(dtype))
        self.register_buffer("sin", angles.sin().to(dtype))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden, self.cos, self.sin)
        logits = functional.linear(self.norm(hidden), self.embedding.weight)
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class PlainLoop:
    """Takes one optimizer step per call."""

    def __init__(
        self,
        shape: ModelShape,
        dtype: torch.dtype,
        micro_batch: int,
        device: torch.device,
        *,
        ranks: int = 1,
        compiled: bool = False,
    ) -> None:
        self.model: nn.Module = PlainModel(shape, dtype).to(device)
        self.micro_batch = micro_batch
        self.weights = list(self.model.parameters())
        self.masters = [weight.detach().float().clone().requires_grad_() for weight in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        if compiled:
            self.model = torch.compile(self.model)
        if ranks > 1:
            self.model = DistributedDataParallel(self.model)

    def step(self, sequences: Tensor) -> float:
        parts = sequences.split(self.micro_batch)
        total = torch.zeros((), device=sequences.device)
        for number, part in enumerate(parts):
            waits = isinstance(self.model, DistributedDataParallel) and number + 1 < len(parts)
            with self.model.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator,union-attr]
                loss = self.model(part[:, :-1], part[:, 1:]) / len(parts)
                loss.backward()
            total += loss.detach()
        for master, weight in zip(self.masters, self.weights, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        return float(total)
