"""A seeded fuzzer of every reader: `PYTHONPATH=tests python -m fuzz.runner --seed N` repeats one input."""
