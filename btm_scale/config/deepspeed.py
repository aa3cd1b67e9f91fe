"""The keys of the section `deepspeed` that decide how a model is trained, not what it becomes."""

from __future__ import annotations

MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")

_REPORTS = (
    *("flops_profiler", "comms_logger", "wall_clock_breakdown", "memory_breakdown", "steps_per_print", "dump_state"),
    "timers",
)

# Sizes of buckets, what overlaps with what, and where tensors are kept.
_ZERO = (
    *("stage", "allgather_partitions", "allgather_bucket_size", "overlap_comm", "reduce_scatter", "reduce_bucket_size"),
    *("contiguous_gradients", "round_robin_gradients", "use_multi_rank_bucket_allreduce", "sub_group_size"),
    *("offload_param", "offload_optimizer", "cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory"),
    *("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters"),
    *("max_reuse_distance", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
    *("stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
    *("stage3_module_granularity_threshold", "module_granularity_threshold", "log_trace_cache_warnings"),
    *("zero_hpz_partition_size", "memory_efficient_linear", "elastic_checkpoint"),
)

# Others may change between two calls only if they are added here: DeepSpeed has keys that quantize or skip steps.
MAY_CHANGE = frozenset({*MONITORS, *_REPORTS, "aio", *(f"zero_optimization.{key}" for key in _ZERO)})
