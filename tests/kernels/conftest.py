"""Triton decides at its import whether it interprets: `interpreted/` runs in a process of its own."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
