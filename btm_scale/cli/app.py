"""The btm-scale command: from its arguments, which parser.py knows, to the verb and its answer."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence

from btm_scale.cli import checkpoint, forest, run
from btm_scale.cli.exit_codes import exit_codes
from btm_scale.cli.parser import build_parser
from btm_scale.util.imports import silence_megatron

_VERBS = {
    "demo": run.demo,
    "run": run.run,
    "prepare": run.prepare,
    "train": run.train,
    "plan": run.plan,
    "status": run.status,
    "doctor": run.doctor,
    "discover": forest.discover,
    "forest list": forest.forest_list,
    "forest add": forest.forest_add,
    "branch": forest.branch,
    "forest remove": forest.forest_remove,
    "forest lineage": forest.forest_lineage,
    "score": forest.score,
    "evaluate": forest.evaluate,
    "report": forest.report,
    "ablate": forest.ablate,
    "generate": forest.generate,
    "merge": checkpoint.merge,
    "convert": checkpoint.convert,
    "inspect": checkpoint.inspect,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0 on success, 2 on a user's mistake, 1 on any other failure."""
    options = build_parser(_VERBS).parse_args(arguments)
    silence_megatron()
    # Libraries print on stdout too, DeepSpeed as soon as it is imported.
    only_the_answer = contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext()
    with exit_codes():
        with only_the_answer:
            answer = options.verb(options)
        if options.json and answer is not None:
            print(json.dumps(answer, indent=2))
        print(end="", flush=True)
    if options.exit_code:  # of a verb whose answer is a complaint
        sys.exit(options.exit_code)


if __name__ == "__main__":
    main()
