"""The sections of a run's YAML."""
