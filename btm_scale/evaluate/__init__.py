"""Scores, every method's perplexity, averages and ablations."""
