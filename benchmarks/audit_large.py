"""Audit a shared object of a gigabyte, made of real fatbins: time beyond the disassembler, memory.

    python benchmarks/audit_large.py [--unit FILE.o] [--gigabytes 1] [--distinct 12] [--out FILE]

Without ``--unit`` a file of tensor-core kernels is compiled here for SM90a (nvcc, no GPU). The
library holds copies of the unit's cubin, of which ``--distinct`` differ by one machine word each
and the rest repeat them, as in a library of many instances. Also audited: the library cut in half,
an empty file and a text file, which must each give one sentence.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import struct
import subprocess
import tempfile
import time
from datetime import date
from pathlib import Path

from fp4tune.machine import codedigest, elf
from fp4tune.probes import audit
from fp4tune.probes.audit import disassemble

ALLOWED_SECONDS = 60.0
"""What the audit may take beyond its tools."""
INSTANCES = 48
SOURCE = r"""
#include <utility>
template <int N> __global__ void gemm(const unsigned* a, const unsigned* b, float* c, int k) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  float d[4 * (N % 8 + 1)] = {};
  for (int i = 0; i < k; ++i) {
#pragma unroll
    for (int j = 0; j <= N % 8; ++j) {
      unsigned x = a[(i * 37 + j * N) * 32 + threadIdx.x], y = b[(i + j) * (N + 1) + threadIdx.x];
#pragma unroll
      for (int r = 0; r < 24; ++r)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0,%1,%2,%3}, {%4,%4,%4,%4}, {%5,%5}, {%0,%1,%2,%3};"
            : "+f"(d[4*j]), "+f"(d[4*j+1]), "+f"(d[4*j+2]), "+f"(d[4*j+3])
            : "r"(x + r), "r"(y ^ r));
    }
  }
  for (int j = 0; j < 4 * (N % 8 + 1); ++j) c[(N * 64 + j) * 32 + threadIdx.x] = d[j];
}
template <int... N> void take(std::integer_sequence<int, N...>) {
  void* held[] = {(void*)gemm<N>...};
  asm volatile("" :: "r"(held) : "memory");
}
void all() { take(std::make_integer_sequence<int, INSTANCES>()); }
"""


def compiled(folder: Path) -> Path:
    """An object file of SOURCE's kernels."""
    source, to = folder / "kernels.cu", folder / "kernels.o"
    source.write_text(SOURCE)
    flags = ["-std=c++17", "-O2", "-arch=sm_90a", f"-DINSTANCES={INSTANCES}", "-c"]
    subprocess.run(["nvcc", *flags, "-o", to, source], check=True, capture_output=True)
    return to


def library(unit: Path, size: int, distinct: int, to: Path) -> None:
    """A shared object of about `size` bytes at `to`."""
    folder = to.parent
    with codedigest.extracted(unit) as (cubin, *_):
        data = bytearray(Path(cubin).read_bytes())
    parsed = elf.parse(bytes(data))
    sm = disassemble.sm_of(bytes(data), parsed)
    text = next(s for s in parsed.named(".text.") if s.size)
    places = []
    for number in range(distinct):
        # A number in the unused operand of the NOP that pads the end of the code.
        struct.pack_into("<I", data, text.offset + text.size - 12, number)
        image, fatbin = folder / f"{number}.cubin", folder / f"{number}.fatbin"
        image.write_bytes(data)
        command = ["fatbinary", f"--create={fatbin}", "-64", "--compress=false"]
        subprocess.run(
            [*command, f"--image3=kind=elf,sm={sm},file={image}"], check=True, capture_output=True
        )
        image.unlink()
        places.append(fatbin)
    each = places[0].stat().st_size
    lines = ['.section .nv_fatbin, "a"', ".align 8"]
    for number in range(size // each):
        lines += [f'.incbin "{places[number % distinct]}"', ".align 8"]
    source = folder / "large.s"
    source.write_text("\n".join([*lines, ""]))
    subprocess.run(["cc", "-shared", "-nostdlib", "-o", to, source], check=True)


def measured(path: Path) -> dict:
    """The audit of one file: time in all and beyond the tools, peak memory of us and of them."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    code = disassemble.machine_code_of(path)
    wall = time.monotonic() - start
    # Several tools run at once: at least this much of the wall time was theirs.
    tools = code.tool_seconds / max(1, len(os.sched_getaffinity(0)))
    return {
        "bytes": path.stat().st_size,
        "kernels": len(code.kernels),
        "problem": code.problem,
        "wall_seconds": round(wall, 1),
        "tool_seconds_summed": round(code.tool_seconds, 1),
        "beyond_tools_seconds_at_most": round(wall - tools, 1),
        "within_allowed": wall - tools <= ALLOWED_SECONDS,
        "own_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "own_peak_before_mib": before >> 10,
        "largest_tool_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10,
    }


def sentences(whole: Path) -> dict[str, list[str]]:
    """What is said of files that cannot be read, each from a copy of its own."""
    half = whole.with_name("half.so")
    os.truncate(whole, whole.stat().st_size // 2)  # it has been measured: no second gigabyte
    whole.rename(half)
    wrong = {"half.so": half}
    for name, data in (("empty.so", b""), ("text.so", b"this is no library\n")):
        wrong[name] = whole.with_name(name)
        wrong[name].write_bytes(data)
    return {name: list(audit.audit([path])[0].evidence) for name, path in wrong.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--unit", type=Path, help="an object with a cubin, instead of our own")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--distinct", type=int, default=12)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fp4tune-") as scratch:
        folder = Path(scratch)
        unit = asked.unit or compiled(folder)
        whole = folder / "large.so"
        library(unit, int(asked.gigabytes * (1 << 30)), asked.distinct, whole)
        found = {"large": measured(whole), "unreadable": sentences(whole)}
    tool = codedigest.disassembler("nvdisasm") or "nvdisasm"
    said = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
    found["machine"] = {
        "date": date.today().isoformat(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, no GPU",
        "python": platform.python_version(),
        "nvdisasm": said.strip().splitlines()[-2].partition("release ")[2],
        "distinct_cubins": asked.distinct,
        "unit": unit.name,
    }
    print(json.dumps(found, indent=1))
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
