"""From what stops a verb to a message and an exit code: 2 for a user's mistake, 1 for any other failure."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Iterator
from typing import NoReturn

import typer

from btm_scale.errors import GroupFailed, UserError, WorkerLost
from btm_scale.util.disk_errors import sentence
from btm_scale.util.secrets import masked
from btm_scale.util.terminal import printable


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Around a command: end the process with a message for every error that a user can do something about."""
    try:
        yield
    except typer.TyperException as error:
        _end_with_usage(error)
    except UserError as error:
        end(error, 2)
    except GroupFailed as error:
        end(error, 2 if error.mistake else 1)
    except (WorkerLost, FloatingPointError) as error:  # the latter of a model that has diverged
        end(error, 1)
    except KeyboardInterrupt:
        end("interrupted; rerun the same command to resume", 130)
    except BrokenPipeError:
        # Another pipe than stdout may be broken, such as a worker's.
        if not _stdout_is_closed():
            raise
        sys.exit(1)
    except OSError as error:
        message = sentence(error)
        if message is None:
            raise
        end(message, 1)


def end(message: object, code: int) -> NoReturn:
    """End the process with a message on stderr."""
    print(f"btm-scale: {masked(printable(message))}", file=sys.stderr)
    sys.exit(code)


def _end_with_usage(error: typer.TyperException) -> NoReturn:
    """End the process because the arguments are wrong: which one, and where to read what is right."""
    context = getattr(error, "ctx", None)
    if context is None:
        end(error.format_message(), 2)
    if not context.args and error.format_message() == context.get_help():  # no arguments at all
        print(error.format_message(), file=sys.stderr)
        sys.exit(2)
    near = getattr(error, "possibilities", None)
    remedy = f" Did you mean {' or '.join(near)}?" if near else ""
    message = error.message if near else error.format_message()
    end(f"{message.rstrip('.')}.{remedy}\nSee '{context.command_path} --help'.".replace("?.", "?"), 2)


def _stdout_is_closed() -> bool:
    """Whether the reader of stdout, such as `head`, has gone; what is still buffered is then dropped."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed
