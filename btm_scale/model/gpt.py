"""Build the Megatron-core GPT of a ModelShape, with btm-scale's attention and loss."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from btm_scale.model.attention import CausalAttention, HeadNorm
from btm_scale.model.context_parallel import ContextAttention, ContextPart
from btm_scale.model.cpu_layer import CpuLayer
from btm_scale.model.float8 import Float8Column, Float8Row
from btm_scale.model.fused_layer import (
    AddLayerNorm,
    AddRMSNorm,
    BiasedAttention,
    BiasedQkv,
    FusedAttention,
    FusedLayer,
    LastLayerNorm,
    LastRMSNorm,
)
from btm_scale.model.loss import head_loss
from btm_scale.model.moe import GradientScale, mixture_settings, mixture_spec, routers_of, with_recorded_scale
from btm_scale.model.norm import LayerNorm, RMSNorm
from btm_scale.model.offload import HostInputs
from btm_scale.model.packing import first_tokens, positions_in_documents, visible
from btm_scale.model.partition import Partition, is_partitioned
from btm_scale.model.recompute import (
    RecomputedAttention,
    RecomputedFusedLayer,
    RecomputedLayer,
    TiledFusedLayer,
    TiledLayer,
)
from btm_scale.model.rotary import Rotary
from btm_scale.model.shape import ModelShape
from btm_scale.util.imports import run_uncompiled_without_compiler


def padded_vocabulary(vocabulary: int, tensor: int) -> int:
    """Return the rows of the embedding: the vocabulary rounded up to a multiple of the tensor parallel degree."""
    return -(-vocabulary // tensor) * tensor


class ExpertModel(GPTModel):
    """A GPTModel that returns its loss or last hidden states; the logits of a full batch are never materialized."""

    def __init__(
        self,
        shape: ModelShape,
        config: TransformerConfig,
        layers: TransformerBlockSubmodules,
        context: ContextPart | None = None,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=layers,
            vocab_size=padded_vocabulary(shape.vocabulary, config.tensor_model_parallel_size),
            max_sequence_length=shape.positions,
            share_embeddings_and_output_weights=shape.tied,
            # CausalAttention rotates queries and keys.
            position_embedding_type="none" if shape.rotary else "learned_absolute",
        )
        self.shape = shape
        self.context = context
        # If set, tokens attend only within their document.
        self.end_of_text: int | None = None
        # Whether each of these documents then begins at position 0.
        self.restarts_positions = False
        # If some targets are left out: what the sum of the others' losses is divided by; None: their number.
        self.target_count: float | None = None
        self._leaves_out_targets = False
        self.tensor_group = self.pg_collection.tp if config.tensor_model_parallel_size > 1 else None
        self._gradient_scale = GradientScale()
        for router in routers_of(self):
            router.gradient_scale = self._gradient_scale

    def forward(self, tokens: Tensor, targets: Tensor | None = None, starts: Tensor | None = None) -> Tensor:
        """Return the mean loss in nats of `targets` [batch, length]; without them, hidden [batch, length, hidden].

        With `starts`, bool [batch, length] of the first tokens of documents, targets below 0 are left out. Every
        context rank is given complete sequences, and returns the result of its part of them.
        """
        self._leaves_out_targets = starts is not None
        length = tokens.shape[1]
        if targets is None and self.config.sequence_parallel:
            # Padding at the end, which no token attends to.
            parts = 1 if self.context is None else self.context.parts
            tokens = functional.pad(tokens, (0, -length % (parts * self.config.tensor_model_parallel_size)))
        seen = visible(tokens, end_of_text=self.end_of_text, window=self.shape.window, starts=starts)
        positions = self._positions(tokens, starts)
        if self.context is not None:
            tokens, positions = self.context(tokens), self.context(positions)
            targets = None if targets is None else self.context(targets)
        output: Tensor = super().forward(tokens, positions, attention_mask=seen, labels=targets)
        return output if targets is not None else output[:, :length]

    def _positions(self, tokens: Tensor, starts: Tensor | None) -> Tensor:
        """Return the positions for learned embeddings, [batch, length]. Rotary ones depend on distances alone."""
        if self.shape.rotary or not self.restarts_positions or self.end_of_text is None:
            return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return positions_in_documents(first_tokens(tokens, self.end_of_text) if starts is None else starts)

    @property
    def head(self) -> Tensor:
        """This rank's rows of the LM head: [rows, hidden]."""
        return self.shared_embedding_or_output_weight() if self.shape.tied else self.output_layer.weight

    @property
    def first_token(self) -> int:
        """Token id of this rank's first row of the LM head."""
        return 0 if self.tensor_group is None else dist.get_rank(self.tensor_group) * len(self.head)

    def _postprocess(self, hidden_states: Tensor, labels: Tensor | None = None, **_: Any) -> Tensor:
        if self.config.sequence_parallel:
            # The loss already gives every rank the full gradient; each keeps its part of the sequence.
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        hidden = hidden_states.transpose(0, 1)
        if labels is None:
            return hidden
        states, targets, factor = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1), None
        if self._leaves_out_targets:
            states, targets, factor = _with_targets(states, targets, self.target_count)
        loss = head_loss(
            states,
            self.head,
            targets,
            first_token=self.first_token,
            vocabulary=self.shape.vocabulary,
            group=self.tensor_group,
        )
        loss = loss if factor is None else loss * factor
        return with_recorded_scale(loss, self._gradient_scale) if self.shape.experts else loss


def _with_targets(states: Tensor, targets: Tensor, count: float | None) -> tuple[Tensor, Tensor, float]:
    """Return the states [trained, hidden] and targets [trained] that are not left out, and a factor of their mean loss.

    If all are left out, one remains with the factor 0, so that every rank still computes all gradients.
    """
    rows = (targets >= 0).nonzero()[:, 0]
    trained = len(rows)
    factor = float(trained > 0) if count is None else trained / count
    rows = rows if trained else rows.new_zeros(1)
    return states.index_select(0, rows), targets[rows].clamp(min=0), factor


def build_model(
    shape: ModelShape,
    *,
    tensor: int,
    dtype: torch.dtype,
    on_cpu: bool,
    sequence_parallel: bool = False,
    recompute: Literal["none", "selective", "full", "tiled"] = "none",
    offload_activations: bool = False,
    context: dist.ProcessGroup | None = None,
    partition: Partition | None = None,
    releases_weights: bool = False,
    float8: bool = False,
    draws: bool = True,
) -> ExpertModel:
    """Return this rank's part of a randomly initialized model; the process groups must be initialized.

    Without `draws`, matrices are zero, for a model whose weights will be loaded. Weights are drawn from the process's
    CPU RNG and are the same at any tensor parallel degree. With `sequence_parallel`, sequence lengths must be multiples
    of `tensor`. `recompute` saves memory in training: the activations of attention (selective) or of complete layers
    (full) are recomputed in the backward pass, and of MLPs tile by tile (tiled; of a mixture of experts it is full).
    With `offload_activations`, the inputs of layers that are recomputed are kept in host memory.
    `context` are the ranks that share each sequence. With `partition`, no rank ever holds more than its part of the
    model and one matrix; `releases_weights` says that an engine will keep a module's weights only while it runs (both
    ZeRO 3). With `float8`, the products of layers train in float8; `dtype` is bfloat16 and the model no mixture.
    """
    fused = not on_cpu and not shape.experts
    if fused:
        run_uncompiled_without_compiler()  # Megatron-core compiles SwiGLU and GELU
    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_size,
        ffn_hidden_size=shape.ffn,
        tensor_model_parallel_size=tensor,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        normalization="RMSNorm" if shape.traits.rms_norm else "LayerNorm",
        layernorm_epsilon=shape.norm_epsilon,
        # Fused, Megatron-core's GELU is the one with tanh.
        activation_func=functional.silu if shape.traits.gated else functional.gelu if fused else _gelu_tanh,
        gated_linear_unit=shape.traits.gated,
        add_bias_linear=shape.traits.linear_bias,
        add_qkv_bias=shape.query_key_value_bias,
        qk_layernorm=shape.head_norms,
        window_size=None if shape.window is None else (shape.window - 1, 0),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        perform_initialization=True,
        bias_dropout_fusion=False,
        bias_activation_fusion=fused,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        init_method=partial(_draw, rows=padded_vocabulary(shape.vocabulary, tensor), vocabulary=shape.vocabulary)
        if draws
        else torch.nn.init.zeros_,
        output_layer_init_method=None if draws else torch.nn.init.zeros_,
        **mixture_settings(shape),
    )
    part = None if context is None else ContextPart.of(context)
    spec = _layer_spec(shape, config, recompute, part, fused=fused, releases_weights=releases_weights, float8=float8)
    if offload_activations:
        assert recompute in ("full", "tiled"), "other layers keep more than their input"
        spec.params = {**(spec.params or {}), "host_inputs": HostInputs(shape.layers)}  # of all layers
    _, last_norm = _norms(config, fused=fused)
    layers = TransformerBlockSubmodules(layer_specs=[spec] * shape.layers, layer_norm=last_norm)
    if sequence_parallel:
        # The tracker separates the ranks' RNG states for dropout, which is unused here; a CPU has no CUDA state.
        initialize_rng_tracker(inference_rng_tracker=True)
    with contextlib.nullcontext() if partition is None else partition.of_new_modules():
        model = ExpertModel(shape, config, layers, part)
    # A partition has its dtype and device already; what the parameter itself holds is empty.
    rest = [parameter for parameter in model.parameters() if not is_partitioned(parameter)]
    device = torch.device("cpu") if on_cpu else gpu()
    for parameter in rest:
        parameter.data = parameter.data.to(device, dtype)
    if model.tensor_group is not None:
        _sum_partial_gradients(model, model.tensor_group)
    return model


def gpu() -> torch.device:
    """Return this rank's GPU."""
    return torch.device("cuda", torch.cuda.current_device())


def _layer_spec(
    shape: ModelShape,
    config: TransformerConfig,
    recompute: str,
    part: ContextPart | None,
    *,
    fused: bool,
    releases_weights: bool,
    float8: bool,
) -> ModuleSpec:
    """Return the modules of a layer.

    `fused`: those for a GPU; `releases_weights` and `float8`: as for `build_model`.
    """
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    norm, _ = _norms(config, fused=fused)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
    rotary = Rotary(shape) if shape.rotary else None
    attention = spec.submodules.self_attention
    # Recomputed attention saves its input, the output of the QKV projection before it is rotated.
    splits = fused and rotary is not None and not shape.head_norms and recompute != "selective"
    if splits:
        attention.module = FusedAttention
        # It rotates before the context ranks exchange heads, when each has its part of the sequence.
        split_rotary = rotary if part is None else Rotary(shape, part.index)
        attention.params = {**(attention.params or {}), "rotary": split_rotary}
    elif (
        fused
        and shape.query_key_value_bias
        and not shape.head_norms
        and not releases_weights
        and not float8
        and config.tensor_model_parallel_size == 1
        and shape.head_size % 2 == 0
    ):
        attention.module, attention.submodules.linear_qkv = BiasedAttention, BiasedQkv
    core: Any = RecomputedAttention if recompute == "selective" else CausalAttention
    params: dict[str, Any] = {"rotary": None if splits else rotary}
    if part is not None:
        core, params = ContextAttention, params | {"core": core, "part": part}
    attention.submodules.core_attention = ModuleSpec(module=core, params=params)
    if shape.head_norms:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = HeadNorm
    if float8:
        attention.submodules.linear_qkv = spec.submodules.mlp.submodules.linear_fc1 = Float8Column
        attention.submodules.linear_proj = spec.submodules.mlp.submodules.linear_fc2 = Float8Row
    if shape.experts:
        spec.submodules.mlp = mixture_spec(shape)
    if recompute == "tiled" and not shape.experts:
        spec.module = TiledFusedLayer if fused else TiledLayer
    elif recompute in ("full", "tiled"):
        spec.module = RecomputedFusedLayer if fused else RecomputedLayer
    else:
        spec.module = FusedLayer if fused else CpuLayer
    if fused:
        spec.params = {**(spec.params or {}), "adds": releases_weights or recompute in ("full", "tiled")}
    return spec


def _norms(config: TransformerConfig, *, fused: bool) -> tuple[Any, Any]:
    """Return the norms in a layer, and the norm after the last layer."""
    if config.normalization == "RMSNorm":
        return (AddRMSNorm, LastRMSNorm) if fused else (RMSNorm, RMSNorm)
    return (AddLayerNorm, LastLayerNorm) if fused else (LayerNorm, LayerNorm)


def _draw(weight: Tensor, *, rows: int, vocabulary: int) -> None:
    """Initialize a weight like Megatron-core, but draw the padding of `rows` rows from a forked RNG."""
    std = 0.02
    if len(weight) != rows:
        vocabulary = len(weight)
    torch.nn.init.normal_(weight[:vocabulary], std=std)
    if vocabulary < len(weight):
        with torch.random.fork_rng(devices=[]):
            torch.nn.init.normal_(weight[vocabulary:], std=std)


def _sum_partial_gradients(model: torch.nn.Module, group: dist.ProcessGroup) -> None:
    """All-reduce the gradients of norms and biases, which each tensor rank applied only to its part of the sequence."""

    def summed(gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total, group=group)
        return total

    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(summed)


def _gelu_tanh(values: Tensor) -> Tensor:
    return functional.gelu(values, approximate="tanh")
