"""The btm-scale command: its verbs, their options and exit codes."""
