"""Build SGLang's Marlin kernels from the sources of an installed SGLang, without importing it.

SGLang compiles them on first use: a generated unit includes a file of ``csrc`` and exports a
function of it, ``gptq_marlin_gemm<dtype>`` and the like, through TVM FFI. The same is done here
with the same compiler flags, in one nvcc call instead of ninja, and with one difference: a GEMM's
kernel table also names weights of other types, which a GEMM of this one never selects, and leaving
them out cuts the build from minutes to about 30 s. The kernels left are the same templates.

Products go to ``$FP4TUNE_CACHE``, else ``$XDG_CACHE_HOME/fp4tune``, else ``~/.cache/fp4tune``, in a
folder named by a hash of all that decides the machine code: sources, headers, flags, compilers
and the TVM FFI version. Nothing is built on import.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ... import settings

CSRC = Path("csrc")
MARLIN = CSRC / "gemm" / "marlin"
EXPERTS = CSRC / "gemm" / "marlin_moe"
GEMM_SOURCE = "gptq_marlin.cuh"
REPACK_SOURCE = "gptq_marlin_repack.cuh"
EXPERTS_SOURCE = "moe_wna16_marlin.cuh"


@dataclass(frozen=True, slots=True)
class KernelUnit:
    """What is built at once: functions of some of SGLang's files, exported under names.

    sources    the files, below SGLang's kernels
    exports    by name: the function in C++, where ``PDL`` stands for whether the target has
               programmatic dependent launch
    kernels    which of the file's kernel table are kept, as that calls them; empty without one
    flags      of the compiler, beside SGLang's common ones
    """

    sources: tuple[Path, ...]
    exports: dict[str, str]
    kernels: str = ""
    flags: tuple[str, ...] = ()


def experts_unit(gemm: int, kernels: str, parallel: bool, biased: bool) -> str:
    """The name of the unit with an experts' GEMM, 1 or 2, of ``nvfp4`` or ``mxfp4``, as SGLang
    specialises it: with experts on other ranks or without, and with biases or without."""
    return f"{kernels}_experts{gemm}{'_ep' if parallel else ''}{'_bias' if biased else ''}"


def _experts_kernels(gemm: int, kernels: str, parallel: bool, biased: bool) -> KernelUnit:
    # Expert parallelism, biases, sorted blocks, inactive rows set to zero, a count of those.
    chosen = (parallel, biased, not parallel, gemm == 2, not parallel)
    arguments = ", ".join(["bf16_t", *(str(each).lower() for each in chosen)])
    name = "moe_wna16_marlin_gemm"
    return KernelUnit((EXPERTS / EXPERTS_SOURCE,), {name: f"{name}<{arguments}>"}, kernels.upper())


_GEMM = (MARLIN / GEMM_SOURCE,)
_ROUTING = (CSRC / "moe" / "moe_align_kernel.cu", CSRC / "moe" / "align_single_token.cuh")
_ACTIVATION = CSRC / "elementwise" / "activation.cuh"
UNITS = {
    "gemm_bf16": KernelUnit(_GEMM, {"gptq_marlin_gemm": "gptq_marlin_gemm<bf16_t>"}, "FP4"),
    "gemm_fp16": KernelUnit(_GEMM, {"gptq_marlin_gemm": "gptq_marlin_gemm<fp16_t>"}, "FP4"),
    "repack": KernelUnit((MARLIN / REPACK_SOURCE,), {"gptq_marlin_repack": "gptq_marlin_repack"}),
    **{
        experts_unit(gemm, kernels, parallel, biased): _experts_kernels(
            gemm, kernels, parallel, biased
        )
        for gemm in (1, 2)
        for kernels in ("nvfp4", "mxfp4")
        for parallel in (False, True)
        for biased in (False, True)
    },
    "routing": KernelUnit(
        (*_ROUTING, _ACTIVATION),
        {
            "align": "MoeAlignBlockSizeKernel<int32_t, true>::run",
            "align_ep": "MoeAlignBlockSizeKernel<int32_t>::run",
            "align_one": "AlignSingleTokenKernel<PDL, true>::run",
            "silu_limited": "ActivationKernel<bf16_t, PDL>::run_activation_with_rounding",
        },
    ),
    "around": KernelUnit(
        (_ACTIVATION, CSRC / "moe" / "topk_sum.cuh"),
        {
            "silu": "ActivationKernel<bf16_t, PDL>::run_activation",
            "sum": "TopkSumKernel<256, PDL>::run",
        },
        flags=("--use_fast_math",),
    ),
}

FFI_HEADERS = ("container/tensor.h", "dtype.h", "error.h", "extra/c_env_api.h", "function.h")

_TABLE = r"^[ \t]*%s_GET_IF\(host::\w+\)[ \t]*$"

_loading = threading.Lock()
_loaded: dict[tuple[str, int], tuple[Path, dict[str, Any]]] = {}


def kernel_root() -> Path | None:
    """The folder ``sglang/kernels/jit`` of the installed SGLang, if it holds Marlin's sources."""
    try:
        spec = importlib.util.find_spec("sglang")  # of a top-level name: imports nothing
    except (ImportError, ValueError):
        return None
    for place in (spec.submodule_search_locations or ()) if spec else ():
        root = Path(place) / "kernels" / "jit"
        if (root / MARLIN / GEMM_SOURCE).is_file() and (root / MARLIN / REPACK_SOURCE).is_file():
            return root
    return None


def nvcc() -> Path | None:
    """The compiler SGLang would take: CUDA_HOME or CUDA_PATH, then PATH, then /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc") if home is None else str(Path(home, "bin", "nvcc"))
    path = Path(found or "/usr/local/cuda/bin/nvcc")
    return path if path.is_file() else None


def missing(units: Sequence[str] = ()) -> str | None:
    """What keeps Marlin, or these units, from being built here, in one sentence; None if nothing
    does."""
    root = kernel_root()
    wanted = [source for unit in units for source in UNITS[unit].sources]
    lacking = [source for source in wanted if root and not (root / source).is_file()]
    if root is None or lacking:
        try:
            have = f"the installed SGLang {version('sglang')} does not have"
        except PackageNotFoundError:
            have = "SGLang is not installed (pip install sglang), which has"
        if lacking:
            return f"{have} sglang/kernels/jit/{lacking[0].as_posix()}"
        return f"{have} the Marlin sources in sglang/kernels/jit/{MARLIN.as_posix()}"
    if importlib.util.find_spec("tvm_ffi") is None:
        return (
            "TVM FFI, which SGLang's kernels are called through, is not installed "
            "(pip install apache-tvm-ffi)"
        )
    if nvcc() is None:
        return (
            "nvcc is not on PATH, in CUDA_HOME or in /usr/local/cuda, "
            "and Marlin is compiled on first use"
        )
    return None


def target(sm: int, compiler: tuple[int, int]) -> str:
    """SGLang's compile target for a compute capability (90 is 9.0): ``90a``, ``120f``, ``80``.

    From SM90 on the architecture-specific target; SM120's family target needs nvcc 12.9.
    """
    if sm < 90:
        return str(sm)
    return f"{sm}{'f' if sm == 120 and compiler >= (12, 9) else 'a'}"


def compile_flags(sm: int, compiler: tuple[int, int]) -> list[str]:
    """SGLang's nvcc flags for its JIT kernels, without include paths."""
    name = target(sm, compiler)
    return [
        "-Xcompiler",
        "-fPIC",
        f"-gencode=arch=compute_{name},code=sm_{name}",
        f"-DSGL_CUDA_ARCH={10 * sm}",
        "-std=c++20",
        "-O3",
        "--expt-relaxed-constexpr",
    ]


def cut_table(source: str, kernels: str) -> str:
    """A GEMM's source with all others taken out of its kernel table, ``..._GET_IF(host::...)``.

    Raises ValueError if the table is not the one this was written for.
    """
    found = len(re.findall(_TABLE % kernels, source, re.MULTILINE))
    if found != 1:
        raise ValueError(f"this SGLang's Marlin names {kernels}_GET_IF {found} times and not once")
    return re.sub(_TABLE % f"(?!{kernels}_)[A-Z0-9]+", "", source, flags=re.MULTILINE)


def unit_source(unit: str, sm: int) -> str:
    """The translation unit that exports the entry points of one of `UNITS`."""
    dependent = str(sm >= 90).lower()
    lines = [f"#include <tvm/ffi/{header}>" for header in FFI_HEADERS]
    lines += [f'#include "{s.relative_to(CSRC).as_posix()}"' for s in UNITS[unit].sources]
    lines += ["namespace sglang {"]
    for exported, function in UNITS[unit].exports.items():
        function = function.replace("PDL", dependent)
        lines += [f"TVM_FFI_DLL_EXPORT_TYPED_FUNC({exported}, ({function}));"]
    lines += ["}"]
    return "\n".join(lines) + "\n"


def cache_root() -> Path:
    """Where built modules are kept."""
    own = settings.value("FP4TUNE_CACHE")
    if own:
        return Path(own).expanduser() / "marlin"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fp4tune" / "marlin"


def build(units: Sequence[str], sm: int, workers: int = 1) -> None:
    """Compile and load `units` for one compute capability; those already loaded cost nothing.

    Raises RuntimeError with the compiler's words if a unit does not compile, or with what is
    missing.
    """
    with ThreadPoolExecutor(max_workers=max(1, min(workers, len(units)))) as pool:
        list(pool.map(lambda unit: product(unit, sm), units))
    for unit in units:
        load(unit, sm)


def load(unit: str, sm: int) -> dict[str, Any]:
    """A unit's entry points by name, built first if it is not there."""
    with _loading:
        if (unit, sm) not in _loaded:
            from tvm_ffi import load_module

            path = product(unit, sm)
            # The module owns the code its functions point into, so it is kept with them.
            module = load_module(str(path), keep_module_alive=True)
            names = UNITS[unit].exports
            _loaded[unit, sm] = (path, {name: getattr(module, name) for name in names})
        return _loaded[unit, sm][1]


def loaded_files() -> list[Path]:
    """The shared objects this process has loaded."""
    return sorted({path for path, _ in _loaded.values()})


def product(unit: str, sm: int) -> Path:
    """The path of a unit's shared object, compiling it if the cache does not have it."""
    reason = missing((unit,))
    if reason:
        raise RuntimeError(reason)
    root, compiler = kernel_root(), nvcc()
    assert root is not None and compiler is not None
    flags = [*compile_flags(sm, nvcc_version(compiler)), *UNITS[unit].flags]
    code = unit_source(unit, sm)
    path = (
        cache_root()
        / _build_key(root, compiler, tuple(flags), unit, code)
        / f"marlin_{unit}_sm{sm}.so"
    )
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        if not path.is_file():
            _compile_unit(UNITS[unit], code, root, compiler, flags, path)
    return path


def _compile_unit(
    unit: KernelUnit, code: str, root: Path, compiler: Path, flags: list[str], path: Path
) -> None:
    from tvm_ffi.libinfo import find_dlpack_include_path, find_include_path, find_libtvm_ffi

    library = Path(find_libtvm_ffi())
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        work = Path(name)
        if unit.kernels:  # found before SGLang's own file, and beside what that includes
            (source,) = unit.sources
            for folder in {MARLIN, source.parent}:
                shutil.copytree(root / folder, work / folder)
            cut = work / source
            cut.write_text(cut_table(cut.read_text(), unit.kernels))
        (work / "unit.cu").write_text(code)
        own = [str(work / CSRC), str(root / CSRC), str(root / "include")]
        includes = [*own, find_include_path(), find_dlpack_include_path()]
        command = [str(compiler), *flags, *(f"-I{i}" for i in dict.fromkeys(includes))]
        command += [str(work / "unit.cu"), "-shared", "-o", str(work / path.name)]
        command += [f"-L{library.parent}", f"-l{library.stem.removeprefix('lib')}"]
        # The runtime torch has loaded, as SGLang links it, and not a second, static copy.
        command += ["--cudart=shared"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            words = (done.stderr or done.stdout)[-4000:]
            raise RuntimeError(f"nvcc failed on {path.stem} for SM{sm_of(flags)}:\n{words}")
        (work / path.name).replace(path)


def sm_of(flags: list[str]) -> str:
    """The target named in nvcc's flags, for messages."""
    return next(f.rpartition("sm_")[2] for f in flags if f.startswith("-gencode"))


@functools.cache
def nvcc_version(compiler: Path) -> tuple[int, int]:
    """``(13, 0)`` of an nvcc. Raises RuntimeError if it does not say."""
    match = re.search(r"release (\d+)\.(\d+)", _version_text(str(compiler)))
    if match is None:
        raise RuntimeError(f"{compiler} --version names no release")
    return int(match[1]), int(match[2])


@functools.cache
def _version_text(program: str) -> str:
    return subprocess.run([program, "--version"], capture_output=True, text=True).stdout


@functools.cache
def _build_key(root: Path, compiler: Path, flags: tuple[str, ...], unit: str, code: str) -> str:
    digest = hashlib.sha256()
    sources = UNITS[unit].sources
    folders = (MARLIN, EXPERTS, Path("include"))
    files = [root / source for source in sources]
    files += [file for folder in folders for file in sorted((root / folder).rglob("*"))]
    for file in (f for f in files if f.is_file()):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    host = shutil.which(os.environ.get("CXX", "c++")) or ""
    told = [code, *flags, _TABLE, UNITS[unit].kernels, version("apache-tvm-ffi")]
    told += [_version_text(str(compiler)), _version_text(host) if host else ""]
    digest.update("\0".join(told).encode())
    return digest.hexdigest()[:20]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file lock, so that several workers of one node compile a unit once."""
    # 0600: whoever can read a file can hold its lock.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), "wb") as handle:
        os.fchmod(handle.fileno(), 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
