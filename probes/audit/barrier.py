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
from dataclasses import replace
from pathlib import Path

from . import sass
from .disassemble import examine
from .judge import FLAG, Barrier
from .ninja import Build

HEADER = Path("cutlass/arch/grid_dependency_control.h")
SECONDS = 120.0
_PROGRAM = f"""#include "{HEADER}"
extern "C" __global__ void barrier(float* data) {{
  cutlass::arch::wait_on_dependent_grids();
  data[threadIdx.x] += 1.0f;
}}
"""
_CODE = re.compile(r"code=\[?\"?sm_(\d+)")


def of(build: Build, sm: int) -> Barrier | None:
    """For the module that `build` builds; None where its CUTLASS has no such header."""
    header = next((d / HEADER for d in build.includes if (d / HEADER).is_file()), None)
    if header is None:
        return None
    if not any(int(m) // 10 == sm // 10 for m in _CODE.findall(" ".join(build.flags))):
        return Barrier(None, "flags", f"its flags build nothing for SM{sm}")
    return _compiled(build, sm) or _read(build.flags, header, sm)


def flag_works(build: Build, sm: int) -> bool | None:
    """Whether the barrier waits on `sm` once FLAG is added; None where that cannot be tried."""
    if not any((folder / HEADER).is_file() for folder in build.includes):
        return None
    tried = _compiled(replace(build, flags=(*build.flags, FLAG)), sm)
    return tried.waits if tried else None


def _compiled(build: Build, sm: int) -> Barrier | None:
    nvcc = build.nvcc if os.access(build.nvcc, os.X_OK) else shutil.which("nvcc")
    if not nvcc:
        return None
    # Files that the build writes beside its objects are not wanted here.
    flags = [flag for flag in build.flags if not flag.startswith("--generate-dependencies")]
    with tempfile.TemporaryDirectory(prefix="fp4tune-") as folder:
        source, object_ = Path(folder, "barrier.cu"), Path(folder, "barrier.o")
        source.write_text(_PROGRAM)
        try:
            done = subprocess.run(
                [nvcc, *flags, "-c", str(source), "-o", str(object_)],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode != 0:
            return None
        kernels = [k.kernel for k in examine(object_, sm).kernels]
    if not kernels:
        return None
    waits = all(kernel.wait != sass.NO_WAIT for kernel in kernels)
    what = "waits (ACQBULK)" if waits else "is empty (no ACQBULK)"
    return Barrier(
        waits,
        "barrier",
        f"CUTLASS's launch barrier, compiled for SM{sm} with these flags and disassembled, {what}",
    )


def _read(flags: tuple[str, ...], header: Path, sm: int) -> Barrier:
    macro = f"CUTLASS_ENABLE_GDC_FOR_SM{90 if sm < 100 else 100}"
    given = any(re.match(rf"-D{macro}(=|$)", flag) for flag in flags)
    text = header.read_text(errors="replace")
    # Each SM stands there by its __CUDA_ARCH__; Hopper as everything from 900 on.
    listed = bool(re.search(rf"__CUDA_ARCH__\s*(?:==|>=)\s*{sm}0\b", text)) and macro in text
    said = f"-D{macro} is {'given' if given else 'missing'}"
    told = f"its CUTLASS {'knows' if listed else 'ignores'} it on SM{sm}"
    return Barrier(given and listed, "flags", f"flags: {said}, and {told} (nothing was compiled)")
