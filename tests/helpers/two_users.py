"""Two users of a group who share a folder: they are created for a test, and act in forked processes."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

WHY_NOT = next(
    (
        why
        for why, holds in {
            "only root can create users": os.geteuid() == 0,
            "useradd is not installed": shutil.which("useradd") is not None and shutil.which("userdel") is not None,
        }.items()
        if not holds
    ),
    "",
)


@dataclass(frozen=True)
class User:
    """A user of the machine, whose private folder is `home`."""

    name: str
    uid: int
    gid: int
    home: Path

    def does(self, do: Callable[[], object], output: Path | None = None) -> int:
        """Call `do` as this user in a forked process; returns its exit code, 99 for an exception."""
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        code = 99
        try:
            if output is not None:
                file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
                os.dup2(file, 1)
                os.dup2(file, 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            os.setgroups([self.gid])
            os.setgid(self.gid)
            os.setuid(self.uid)
            os.umask(0o002)
            os.environ["HOME"] = str(self.home)
            do()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)


@contextlib.contextmanager
def two_users(folder: Path) -> Iterator[tuple[User, User]]:
    """Create a group with two users whose homes are in a folder that all may enter, and remove them afterwards."""
    group = f"btm{os.getpid()}"
    names = [f"{group}a", f"{group}b"]
    subprocess.run(["groupadd", group], check=True)
    try:
        for name in names:
            subprocess.run(["useradd", "--gid", group, "--no-create-home", name], check=True)
        gid, users = grp.getgrnam(group).gr_gid, []
        for name in names:
            home = folder / name
            home.mkdir(mode=0o700)
            users.append(User(name, pwd.getpwnam(name).pw_uid, gid, home))
            os.chown(home, users[-1].uid, gid)
        yield users[0], users[1]
    finally:
        for name in names:
            subprocess.run(["userdel", name], check=False, capture_output=True)
        subprocess.run(["groupdel", group], check=False, capture_output=True)


def give(folder: Path, user: User) -> None:
    """Make a folder one that a user shares with the group."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user.uid, user.gid, follow_symlinks=False)
        if not path.is_symlink():
            path.chmod(0o2775 if path.is_dir() else 0o664)
