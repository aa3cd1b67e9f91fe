"""The model: its shape, its Megatron-core form, and its names elsewhere."""
