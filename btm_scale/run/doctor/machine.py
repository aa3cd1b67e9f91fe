"""Check the machine without accelerators: system, Python, cores, memory, disk and shared memory."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from btm_scale.run.doctor.finding import Finding, guarded, size
from btm_scale.util.cores import cgroup_folders, cpu_quota, visible_cores

_PART = "machine"
_PYTHONS = ((3, 11), (3, 13))
_MIN_DISK = 10e9
_MIN_SHARED = 1e9  # Docker's default is 64 MB


def machine_findings(folder: Path, root: Path = Path("/")) -> list[Finding]:
    """Return the findings that need no library or program. `folder` is where runs are written."""
    checks: dict[str, Callable[[], Finding]] = {
        "system": _system,
        "Python": _python,
        "cores": lambda: _cores(root),
        "memory": lambda: _memory(root),
        "disk": lambda: _disk(folder),
        "/dev/shm": lambda: _shared_memory(root),
    }
    return [finding for name, check in checks.items() for finding in guarded(_PART, name, check)]


def memory_limit(root: Path = Path("/")) -> int | None:
    """Return the cgroups' memory limit in bytes; None without a limit."""
    limits = []
    for folder in cgroup_folders("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            if (folder / name).exists() and (text := (folder / name).read_text().strip()) != "max":
                limits.append(int(text))
    return min(limits, default=None)


def _system() -> Finding:
    if sys.platform != "linux":
        return Finding(_PART, "system", "broken", platform.platform(), "everything", "btm-scale runs on Linux")
    text = f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}, {platform.machine()}"
    return Finding(_PART, "system", "ok", text)


def _python() -> Finding:
    text = f"{platform.python_version()} at {sys.executable}"
    oldest, newest = _PYTHONS
    if oldest <= sys.version_info[:2] <= newest:
        return Finding(_PART, "Python", "ok", text)
    return Finding(_PART, "Python", "broken", text, "everything", "use Python 3.11, 3.12 or 3.13")


def _cores(root: Path) -> Finding:
    visible, all_cores, quota = len(os.sched_getaffinity(0)), os.cpu_count(), cpu_quota(root)
    text = f"{visible} visible by affinity, of {all_cores}"
    if quota is None or quota >= visible:
        return Finding(_PART, "cores", "ok", f"{text}; no lower cgroup quota")
    text += f"; the cgroup quota is {quota:g}, so {visible_cores(root)} are used"
    remedy = "raise the quota (docker --cpus), if this process is to use more"
    return Finding(_PART, "cores", "low", text, "training on CPU", remedy)


def _memory(root: Path) -> Finding:
    lines = (root / "proc/meminfo").read_text().splitlines()
    values = {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":", 1) for line in lines)}
    total, limit = values["MemTotal"], memory_limit(root)
    text = f"{size(values['MemAvailable'])} available, of {size(total)}"
    if limit is not None and limit < total:
        text += f"; the cgroup limit is {size(limit)}"
    return Finding(_PART, "memory", "ok", text)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"{size(free)} free at {folder.resolve()}"
    if not os.access(folder, os.W_OK):
        return Finding(_PART, "disk", "low", f"{text}, not writable", "run folders", "use --out with another folder")
    if free < _MIN_DISK:
        needed = "checkpoints (12 bytes per parameter)"
        return Finding(_PART, "disk", "low", text, needed, "free some space, or use --out with another folder")
    return Finding(_PART, "disk", "ok", text)


def _shared_memory(root: Path) -> Finding:
    needed = "ranks on one machine (NCCL, gloo) and worker processes"
    if not (root / "dev/shm").is_dir():
        return Finding(_PART, "/dev/shm", "missing", "", needed, "mount a tmpfs at /dev/shm")
    usage = shutil.disk_usage(root / "dev/shm")
    text = f"{size(usage.free)} free, of {size(usage.total)}"
    if usage.free < _MIN_SHARED:
        return Finding(_PART, "/dev/shm", "low", text, needed, "in Docker: --shm-size=8g, or --ipc=host")
    return Finding(_PART, "/dev/shm", "ok", text)
