"""Training one model in one group."""
