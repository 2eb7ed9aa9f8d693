"""The instructions for byte products that this processor has."""

from __future__ import annotations

from pathlib import Path

# CPU flags for byte products with 32-bit sums, the fastest first: without them int8 is no faster.
INT8_FLAGS = {"amx_int8": "AMX", "avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX VNNI", "asimddp": "Arm dot products"}


def int8_instructions() -> str | None:
    """Name of this CPU's int8 instructions; None if it has none of `INT8_FLAGS`."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    return next((name for flag, name in INT8_FLAGS.items() if flag in flags), None)
