"""The model: its shape, its Megatron-core implementation and its Hugging Face names."""
