"""Weights on disk: read, written, merged and converted where they lie, with no engine and flat memory."""
