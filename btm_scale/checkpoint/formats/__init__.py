"""Readers and writers of checkpoint formats; all read tensors in place."""
