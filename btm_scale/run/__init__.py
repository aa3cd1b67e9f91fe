"""A run: its stages, its state on disk, and the launchers that start its groups."""
