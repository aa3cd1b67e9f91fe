"""Check what a machine has, what is missing, and which parts of btm-scale work on it.

Nothing here imports a library that may be broken; a child process with a time limit does.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from btm_scale.run.doctor.ask import SECONDS, ask
from btm_scale.run.doctor.devices import device_findings, triton_finding
from btm_scale.run.doctor.finding import guarded
from btm_scale.run.doctor.libraries import library_findings, names_to_ask
from btm_scale.run.doctor.machine import machine_findings
from btm_scale.run.doctor.programs import driver_findings, gpus_of_driver, program_findings
from btm_scale.run.doctor.verdict import core_works, verdicts


def examine(folder: Path, seconds: float = SECONDS) -> dict[str, Any]:
    """Return the findings and verdicts for this machine; `works` is whether it can train or merge.

    Takes a few seconds, and at most a little over `seconds` if libraries hang.
    """
    with ThreadPoolExecutor(2) as pool:
        programs = pool.submit(program_findings)
        driver_gpus = pool.submit(gpus_of_driver)
        replies = ask(names_to_ask(), seconds)
    findings = [
        *machine_findings(folder),
        *guarded("devices", "driver", driver_findings),
        *guarded("devices", "GPU", lambda: device_findings(replies, driver_gpus.result(), os.environ)),
        *library_findings(replies),
        *programs.result(),
        *guarded("programs", "ptxas", lambda: triton_finding(replies)),
    ]
    results = verdicts(findings)
    return {
        "works": core_works(results),
        "findings": [asdict(finding) for finding in findings],
        "verdicts": [asdict(verdict) for verdict in results],
    }
