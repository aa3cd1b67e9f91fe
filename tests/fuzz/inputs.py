"""Run inputs in a script of `run_script`, a process without other threads: `inputs.py SPEC.json`.

There, a damaged tokenizer is tried in a fork, which takes milliseconds, instead of in a new interpreter.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from helpers.worlds import read_spec

from fuzz.runner import check_corpus, run_input

spec = read_spec()
corpus = Path(spec["corpus"])
check_corpus(corpus)
outcomes = [run_input(corpus, seed) for seed in spec["seeds"]]
Path(spec["outcomes"]).write_text(json.dumps([dataclasses.asdict(outcome) for outcome in outcomes]))
