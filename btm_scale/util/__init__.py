"""Files, locks, processes and logs, for every layer above."""
