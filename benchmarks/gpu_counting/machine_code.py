"""Registers, shared memory and instructions of a compiled kernel, read from its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

_REGISTERS_PER_MULTIPROCESSOR = {"nvidia": 65_536, "amd": 4 * 512 * 64}
_THREADS_PER_MULTIPROCESSOR = 2048
_SYSTEM_SHARED_BYTES = 1024  # per block, on NVIDIA's GPUs

_SASS_LABEL = re.compile(r"^(\.L_x_\d+):")
_SASS_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_SASS_BRANCH = re.compile(r"^(?:@\S+ )?BRA\b.*`\((\.L_x_\d+)\)")
_AMD_LABEL = re.compile(r"^(\.L\w+):")
_AMD_INSTRUCTION = re.compile(r"^\t([a-z]+_.*?)\s*(?:;.*)?$")
_AMD_BRANCH = re.compile(r"^s_c?branch\S*\s+(\.L\w+)")


class Resources(NamedTuple):
    """What a block needs, and how many of its warps' instructions the kernel's main loop has per step.

    `always` leaves out what most steps of the loop jump over.
    """

    registers: int
    shared_bytes: int
    stack_bytes: int
    resident: int
    always: int
    at_most: int


def resources(kernel: Any, warps: int, shared_per_multiprocessor: int, tools: Path) -> Resources:
    """Return the resources of what Triton's compiler returned; `tools` is the folder of NVIDIA's disassembler."""
    shared = kernel.metadata.shared
    if "cubin" in kernel.asm:
        usage = _disassembled(kernel, tools / "cuobjdump", "--dump-resource-usage")
        registers, stack = (int(_found(rf"{word}:(\d+)", usage)) for word in ("REG", "STACK"))
        vendor, lanes, system = "nvidia", 32, _SYSTEM_SHARED_BYTES
    else:
        words = ("vgpr_count", "private_segment_fixed_size")
        registers, stack = (int(_found(rf"\.{word}:\s*(\d+)", kernel.asm["amdgcn"])) for word in words)
        vendor, lanes, system = "amd", 64, 0
    limits = [
        _REGISTERS_PER_MULTIPROCESSOR[vendor] // (-(-registers // 8) * 8 * lanes * warps),
        _THREADS_PER_MULTIPROCESSOR // (warps * lanes),
    ]
    if shared:
        limits.append(shared_per_multiprocessor // (shared + system))
    return Resources(registers, shared, stack, min(limits), *main_loop(kernel, tools))


def main_loop(kernel: Any, tools: Path) -> tuple[int, int]:
    """Return the instructions of the longest loop, or of the kernel if it has none: those of every step, and all.

    Loops inside of it, such as that over the hidden size, are left out.
    """
    if "cubin" in kernel.asm:
        code = _disassembled(kernel, tools / "nvdisasm", "-c")
        label, instruction, branch = _SASS_LABEL, _SASS_INSTRUCTION, _SASS_BRANCH
    else:
        code = kernel.asm["amdgcn"]
        label, instruction, branch = _AMD_LABEL, _AMD_INSTRUCTION, _AMD_BRANCH
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in code.splitlines():
        if found := label.match(line):
            labels[found[1]] = len(instructions)
        elif found := instruction.match(line):
            instructions.append(found[1])
    jumps = [
        (index, labels[found[1]])
        for index, text in enumerate(instructions)
        if (found := branch.match(text)) and found[1] in labels
    ]
    loops = sorted({(to, index) for index, to in jumps if to < index}, key=lambda loop: loop[0] - loop[1])
    first, last = loops[0] if loops else (0, len(instructions) - 1)
    every = set(range(first, last + 1))
    for start, end in loops[1:]:
        if first <= start and end <= last:
            every -= set(range(start, end + 1))
    always = set(every)
    for index, to in jumps:
        if loops and first <= index < to <= last and instructions[index].startswith(("@", "s_cbranch")):
            always -= set(range(index + 1, to))
    return len(always), len(every)


def _disassembled(kernel: Any, tool: Path, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"The compiler's output has no '{pattern}'.")
    return found[1]
