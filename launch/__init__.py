"""Starting groups: their only job is to start worlds."""
