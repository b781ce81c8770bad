"""What the compiler made of a kernel: registers, spills, shared memory, instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton

_BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)
_GLOBAL = ("LDG", "LDGSTS", "STG")


def read(kernel: Any) -> dict[str, int]:
    """registers and spills (bytes or registers: any is too many), shared bytes; on NVIDIA also instruction counts."""
    found = {"shared": int(kernel.metadata.shared), "warps": int(kernel.metadata.num_warps)}
    return found | (_nvidia(kernel) if "cubin" in kernel.asm else _amd(kernel))


def _nvidia(kernel: Any) -> dict[str, int]:
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", kernel.asm["cubin"], "-res-usage"))
    if usage is None:
        raise RuntimeError("cuobjdump named no registers")
    opcodes = Counter(_INSTRUCTION.findall(_tool("nvdisasm", kernel.asm["cubin"], "-c")))
    if not opcodes:
        raise RuntimeError("nvdisasm named no instructions")

    def count(*prefixes: str) -> int:
        return sum(number for opcode, number in opcodes.items() if opcode.startswith(prefixes))

    wide = sum(number for opcode, number in opcodes.items() if opcode.startswith(_GLOBAL) and ".128" in opcode)
    return {
        "registers": int(usage[1]),
        "spills": count("LDL", "STL"),
        "warp_group_mma": count("HGMMA", "UTCHMMA"),
        "mma": count("HMMA", "HGMMA", "UTCHMMA"),
        "global_128": wide,
        "global_narrow": count(*_GLOBAL) - wide,
        "instructions": sum(opcodes.values()),
    }


def _amd(kernel: Any) -> dict[str, int]:
    text = kernel.asm["amdgcn"]
    text = text.decode() if isinstance(text, bytes) else text

    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[0])

    return {
        "registers": field("vgpr_count"),
        "spills": field("vgpr_spill_count"),  # a spilled scalar register goes to a vector one, not to memory
        "mma": len(re.findall(r"^\s*v_mfma", text, re.M)),
        "instructions": len(re.findall(r"^\s+[vsgdb]\w*_\w+", text, re.M)),
    }


def _tool(name: str, blob: bytes, *flags: str) -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(blob)
        file.flush()
        return subprocess.run([_BIN / name, *flags, file.name], capture_output=True, text=True, check=True).stdout
