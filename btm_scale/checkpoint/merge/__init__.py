"""Merging: methods, planning, workers and the journal that makes a merge resumable."""
