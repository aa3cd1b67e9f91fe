"""Units of a long benchmark: each is written when it ends, and one that is in the file is not measured again."""

from __future__ import annotations

import fnmatch
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from environment import describe


def matching(patterns: Sequence[str], known: Collection[str]) -> list[str]:
    """Return the units that match any pattern, in their order. Raises SystemExit for a pattern that matches none."""
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise SystemExit(f"'{pattern}' matches no unit. See --list.")
    return [name for name in known if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def measure(names: Collection[str], known: Mapping[str, Callable[[], dict[str, Any]]], result: Path) -> None:
    """Measure the units that a result lacks, and write each as it ends."""
    for name in names:
        if name in measured_units(result):
            continue
        environment, begin = describe(), time.monotonic()
        measured = known[name]()
        # Read again: another process may have measured a unit meanwhile.
        document = {"units": measured_units(result)}
        document["units"][name] = {"seconds": round(time.monotonic() - begin), "environment": environment, **measured}
        document["environment"] = environment
        result.parent.mkdir(parents=True, exist_ok=True)
        unfinished = result.with_suffix(".part")
        unfinished.write_text(json.dumps(document, indent=1) + "\n")
        unfinished.rename(result)
        print(f"{name}: {document['units'][name]['seconds']} s", flush=True)


def measured_units(result: Path) -> dict[str, dict[str, Any]]:
    """Return the units of a result by name; none if there is no file."""
    return json.loads(result.read_text())["units"] if result.is_file() else {}


def print_units(names: Collection[str], result: Path, minutes: Callable[[str], float] | None = None) -> None:
    """Print each unit: the minutes that it took, or about how many it will take on two idle cores."""
    done = measured_units(result)
    for name in names:
        state = "not measured" if minutes is None else f"about {minutes(name):g} min"
        if name in done:
            state = f"measured in {done[name]['seconds'] / 60:.1f} min"
        print(f"{name:28} {state}")
