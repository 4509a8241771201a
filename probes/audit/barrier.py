"""Does CUTLASS's launch barrier do anything under a module's build flags, for one SM?

``cutlass/arch/grid_dependency_control.h`` turns ``wait_on_dependent_grids`` into nothing unless a
macro is set and the SM is in its list. Both are tried out: a kernel of one line is compiled with
the module's own flags and disassembled (a few seconds). Without a compiler the header is read.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from ...machine import files
from . import sass
from .disassemble import machine_code_of
from .judge import FLAG, MACRO, BarrierTrial
from .ninja import NinjaBuild

HEADER = Path("cutlass/arch/grid_dependency_control.h")
SECONDS, CPU_SECONDS = 1800.0, 240
"""Longest time nvcc may take, and seconds of CPU of each of its processes; it needs 6 in all."""
_PROGRAM = f"""#include "{HEADER}"
extern "C" __global__ void barrier(float* data) {{
  cutlass::arch::wait_on_dependent_grids();
  data[threadIdx.x] += 1.0f;
}}
"""
_ONE_AT_A_TIME = threading.Lock()
_CODE = re.compile(r"code=\[?\"?sm_(\d+)")


def of(build: NinjaBuild, sm: int) -> BarrierTrial | None:
    """For the module that `build` builds; None where its CUTLASS has no such header."""
    header = next((d / HEADER for d in build.includes if (d / HEADER).is_file()), None)
    if header is None:
        return None
    if not any(int(m) // 10 == sm // 10 for m in _CODE.findall(" ".join(build.flags))):
        return BarrierTrial(None, "flags", f"its flags build nothing for SM{sm}")
    trial, why = _compiled(build, sm)
    return trial or _barrier_trial(build.flags, header, sm, why)


def flag_works(build: NinjaBuild, sm: int) -> bool | None:
    """Whether the barrier waits on `sm` once FLAG is added; None where that cannot be tried."""
    if not any((folder / HEADER).is_file() for folder in build.includes):
        return None
    tried, _ = _compiled(replace(build, flags=(*build.flags, FLAG)), sm)
    return tried.waits if tried else None


def _compiled(build: NinjaBuild, sm: int) -> tuple[BarrierTrial | None, str]:
    """What came of the compiled barrier, or why it could not be tried."""
    nvcc = build.nvcc if os.access(build.nvcc, os.X_OK) else shutil.which("nvcc")
    if not nvcc:
        return None, "there is no nvcc here"
    with _ONE_AT_A_TIME:  # modules with the same flags share what the first of them found
        return _tried(nvcc, tuple(_relevant(build.flags, sm)), sm)


def _relevant(flags: Sequence[str], sm: int) -> Iterator[str]:
    """The flags that decide about the barrier: one target, where to include from, its macros."""
    target = ""
    after = [*flags[1:], ""]
    for flag, following in zip(flags, after, strict=True):
        if flag in ("-isystem", "-I", "-include"):
            yield from (flag, following)
        elif flag.startswith(("-I", "-std=", MACRO, "-U")):
            yield flag
        code = _CODE.search(flag)
        if code and int(code[1]) // 10 == sm // 10 and (not target or int(code[1]) == sm):
            target = flag
    yield target


@lru_cache(maxsize=64)
def _tried(nvcc: str, flags: tuple[str, ...], sm: int) -> tuple[BarrierTrial | None, str]:
    """Compile for the device alone, on one core: a few seconds. Only its own CPU time is limited,
    so that what comes of it does not depend on what else the machine does."""
    with tempfile.TemporaryDirectory(prefix="fp4tune-") as folder:
        source, cubin = Path(folder, "barrier.cu"), Path(folder, "barrier.cubin")
        source.write_text(_PROGRAM)
        limited = f'ulimit -t {CPU_SECONDS}; exec "$0" "$@"'
        command = [nvcc, *flags, "-cubin", "-o", str(cubin), str(source)]
        try:
            done = subprocess.run(
                ["/bin/sh", "-c", limited, *command],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=SECONDS,
            )
        except OSError as error:
            return None, f"nvcc could not be run: {error.strerror or error}"
        except subprocess.TimeoutExpired:
            return None, f"nvcc was not done after {SECONDS:g} s"
        if done.returncode != 0:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            said = next((line for line in lines if "error" in line), (lines or ["?"])[-1])
            return None, f"nvcc failed: {said[:200]}"
        code = machine_code_of(cubin, sm)
    if not code.kernels:
        return None, code.problem or "what nvcc made holds no kernel"
    waits = all(found.kernel.wait != sass.NO_WAIT for found in code.kernels)
    what = "waits (ACQBULK)" if waits else "is empty (no ACQBULK)"
    return BarrierTrial(
        waits,
        "barrier",
        f"CUTLASS's launch barrier, compiled for SM{sm} with these flags and disassembled, {what}",
    ), ""


def _barrier_trial(flags: tuple[str, ...], header: Path, sm: int, why: str) -> BarrierTrial:
    macro = f"CUTLASS_ENABLE_GDC_FOR_SM{90 if sm < 100 else 100}"
    given = any(re.match(rf"-D{macro}(=|$)", flag) for flag in flags)
    text = files.text(header, errors="replace")
    # Each SM stands there by its __CUDA_ARCH__; Hopper as everything from 900 on.
    listed = bool(re.search(rf"__CUDA_ARCH__\s*(?:==|>=)\s*{sm}0\b", text)) and macro in text
    said = f"-D{macro} is {'given' if given else 'missing'}"
    told = f"its CUTLASS {'knows' if listed else 'ignores'} it on SM{sm}"
    line = f"flags: {said}, and {told} (nothing was compiled: {why})"
    return BarrierTrial(given and listed, "flags", line)
