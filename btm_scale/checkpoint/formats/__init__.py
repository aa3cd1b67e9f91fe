"""Readers and writers of checkpoint formats; every reader reads tensors in place."""
