"""Weights on disk: read, written, merged and converted in place, without an engine, in bounded memory."""
