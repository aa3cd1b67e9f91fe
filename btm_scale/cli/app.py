"""The btm-scale command: dispatch and exit codes. Its arguments are in parser.py."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import sys
import warnings
from collections.abc import Sequence

from btm_scale.cli import checkpoint, forest, run
from btm_scale.cli.parser import build_parser
from btm_scale.errors import GroupFailed, UserError, WorkerLost

_VERBS = {
    "demo": run.demo,
    "run": run.run,
    "prepare": run.prepare,
    "train": run.train,
    "plan": run.plan,
    "status": run.status,
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


# What a disk or its owner refuses is told in a line.
_OF_THE_DISK = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0 on success, 2 on a user's mistake, 1 on any other failure."""
    options = build_parser(_VERBS).parse_args(arguments)
    _silence_megatron()
    # Libraries print on stdout too, DeepSpeed as soon as it is imported.
    only_the_answer = contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext()
    try:
        with only_the_answer:
            answer = options.verb(options)
        if options.json and answer is not None:
            print(json.dumps(answer, indent=2))
        print(end="", flush=True)
    except UserError as error:
        print(f"btm-scale: {error}", file=sys.stderr)
        sys.exit(2)
    except (GroupFailed, WorkerLost) as error:
        print(f"btm-scale: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("btm-scale: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        sys.exit(1)
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        told = f"{error}. What was finished is kept: mend this, and run the same command again."
        print(f"btm-scale: {told}", file=sys.stderr)
        sys.exit(1)


def _nobody_reads() -> bool:
    """Whether the reader of stdout, such as `head`, has had enough; what is still buffered then goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def _silence_megatron() -> None:
    # At every import, in every process, Megatron-core says which optional packages it does without.
    for message in ("Transformer Engine and Apex", "Apex is not installed"):
        warnings.filterwarnings("ignore", message)
        others = os.environ.get("PYTHONWARNINGS")
        if message not in (others or ""):
            os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [others, f"ignore:{message}"]))


if __name__ == "__main__":
    main()
