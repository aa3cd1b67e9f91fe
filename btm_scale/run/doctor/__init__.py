"""What a machine has, what is missing and for what, and which parts of btm-scale work there.

Nothing here imports a library that may be broken: those are imported by a child process with a time limit.
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

    Takes a few seconds, and a little over `seconds` at most if libraries hang.
    """
    with ThreadPoolExecutor(2) as pool:
        programs = pool.submit(program_findings)
        of_driver = pool.submit(gpus_of_driver)
        replies = ask(names_to_ask(), seconds)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    findings = [
        *machine_findings(folder),
        *guarded("devices", "driver", driver_findings),
        *guarded("devices", "GPU", lambda: device_findings(replies, of_driver.result(), visible)),
        *library_findings(replies),
        *programs.result(),
        *guarded("programs", "ptxas", lambda: triton_finding(replies)),
    ]
    made = verdicts(findings)
    return {
        "works": core_works(made),
        "findings": [asdict(finding) for finding in findings],
        "verdicts": [asdict(verdict) for verdict in made],
    }
