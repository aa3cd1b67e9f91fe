"""Arithmetic on log-probabilities: priors, posteriors and mixtures. Imports no torch."""
