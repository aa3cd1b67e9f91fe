"""Scoring: compute each model's log-probability of every target token once.

Evaluation needs nothing else of a model: posteriors, priors and mixtures are arithmetic on these numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from btm_scale.checkpoint.formats.open import open_model, with_head_names
from btm_scale.config.run import RunConfig
from btm_scale.data.eval_text import EvaluationText
from btm_scale.distributed.group import ExpertGroup
from btm_scale.errors import UnsupportedModelError
from btm_scale.evaluate.hf_score import TransformersModel
from btm_scale.forest.expert import read_expert
from btm_scale.forest.scores import Scores, evaluation_text, missing_scores
from btm_scale.kernels import combine_partials, last_path, token_logprob_partials
from btm_scale.model.gpt import ExpertModel, build_model
from btm_scale.model.hf_config import read_shape
from btm_scale.model.hf_weights import load_weights
from btm_scale.model.moe import Routing, take_routing
from btm_scale.run_dir import RunDir
from btm_scale.util.device_query import name_of

# Tokens that one rank scores at once; their hidden states are small compared with a model's weights.
_BATCH_TOKENS = 8192


def score_model(
    group: ExpertGroup,
    config: RunConfig,
    run: RunDir,
    model: str,
    texts: Iterable[tuple[str, str]],
    on_text: Callable[[str, str], None] = lambda domain, split: None,
) -> None:
    """Score a finished model on each (domain, split) without scores. All ranks call this together."""
    todo = group.decided(lambda: missing_scores(config, run, model, texts))
    if not todo:
        return
    directory = run.model(model)
    network = load_model(group, directory)
    scored_hash = read_expert(directory).scored_hash
    for domain, split in todo:
        text = evaluation_text(config, run, domain, split)
        log_probs = text_log_probs(group, network, text)
        routing = routing_of(group, network)
        if group.is_first:
            uses_kernels = isinstance(network, ExpertModel) or network.uses_kernels
            path = last_path("token_logprob_partials") if uses_kernels else None
            runs_on = name_of(group.device), path.backend if path else ""
            scores = Scores(
                log_probs,
                text.block_starts,
                scored_hash,
                text.fingerprint,
                *runs_on,
                routing=None if routing is None else np.array(routing.load),
                routing_entropy=None if routing is None else np.array(routing.entropy),
                counted=text.counted,
            )
            scores.save(run.scores(model, domain, split))
            on_text(domain, split)
    dist.barrier()


def load_model(group: ExpertGroup, directory: Path) -> ExpertModel | TransformersModel:
    """Load a Hugging Face directory as a model that is sharded over the group's tensor ranks.

    A model that Megatron-core does not compute here is loaded by transformers, completely on each rank.
    """
    try:
        shape = read_shape(directory)
    except UnsupportedModelError:
        return TransformersModel(directory, dtype=group.dtype, device=group.device)
    tensor = group.layout.tensor
    network = build_model(
        shape,
        tensor=tensor,
        dtype=group.dtype,
        on_cpu=group.device.type == "cpu",
        # Megatron-core's experts expect each tensor rank to have its part of the sequence.
        sequence_parallel=bool(shape.experts) and tensor > 1,
        draws=False,
    )
    with with_head_names(open_model(directory)) as tensors:
        load_weights(network, tensors.read, group.tensor_rank, group.layout.tensor)
    return network.eval()


def routing_of(group: ExpertGroup, network: ExpertModel | TransformersModel) -> Routing | None:
    """Return how tokens were routed since the last call; all ranks call it.

    None for a model that is not a mixture of experts, or that transformers computes.
    """
    if not isinstance(network, ExpertModel):
        return None
    return take_routing(network, dist.group.WORLD if group.size > 1 else None, group.device)


@torch.no_grad()
def text_log_probs(group: ExpertGroup, network: ExpertModel | TransformersModel, text: EvaluationText) -> np.ndarray:
    """Return the log-probability in nats of every target token, float32 [tokens]. All ranks call this together.

    Blocks are distributed over the context and data ranks, or over all ranks if each has the complete model; the
    context of a block starts with its own first token.
    """
    if isinstance(network, TransformersModel):
        ranks, rank, over = group.size, group.rank, None
    else:
        ranks, rank, over = group.layout.replicas, group.replica_rank, group.replica_group
    tokens = torch.as_tensor(text.tokens)
    starts = [int(start) for start in text.block_starts]
    ends = [*starts[1:], len(tokens) - 1]
    result = torch.zeros(len(tokens) - 1)
    blocks = list(zip(starts, ends, strict=True))
    # A mixture's routing would count the padding.
    pads = text.counted is not None and not (isinstance(network, ExpertModel) and network.shape.experts)
    for number, batch in enumerate(_batches(blocks, pads=pads)):
        if number % ranks != rank:
            continue
        rows = pad_sequence([tokens[start : end + 1] for start, end in batch], batch_first=True).to(group.device)
        scored = _log_probs(group, network, rows[:, :-1], rows[:, 1:]).cpu()
        for (start, end), row in zip(batch, scored, strict=True):
            result[start:end] = row[: end - start]
    if ranks > 1:
        result = result.to(group.device)
        dist.all_reduce(result, group=over)
    return result.cpu().numpy()


def _batches(blocks: list[tuple[int, int]], *, pads: bool) -> Iterator[list[tuple[int, int]]]:
    """Yield blocks, longest first, as many at once as fit: of one length, unless shorter ones are padded at the end."""
    blocks.sort(key=lambda block: block[0] - block[1])
    batch: list[tuple[int, int]] = []
    for begin, end in blocks:
        longest = batch[0][1] - batch[0][0] if batch else 0
        if batch and ((len(batch) + 1) * longest > _BATCH_TOKENS or (end - begin < longest and not pads)):
            yield batch
            batch = []
        batch.append((begin, end))
    yield batch


def _log_probs(group: ExpertGroup, network: ExpertModel | TransformersModel, inputs: Tensor, targets: Tensor) -> Tensor:
    if isinstance(network, TransformersModel):
        return network.log_probs(inputs, targets)
    hidden = network(inputs)
    partials = token_logprob_partials(
        hidden.reshape(-1, hidden.shape[-1]),
        network.head,
        targets.reshape(-1),
        vocab_start=network.first_token,
        vocab_size=network.shape.vocabulary,
    )
    if group.tensor_group is None:
        return combine_partials([partials]).view_as(targets)
    stacked = torch.stack(list(partials))
    shards = [torch.empty_like(stacked) for _ in range(group.layout.tensor)]
    dist.all_gather(shards, stacked, group=group.tensor_group)
    return combine_partials([tuple(shard) for shard in shards]).view_as(targets)
