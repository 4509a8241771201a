"""Build SGLang's Marlin kernels from the sources of an installed SGLang, without importing it.

SGLang compiles them on first use: a generated unit includes ``csrc/gemm/marlin/*.cuh`` and exports
``gptq_marlin_gemm<dtype>`` and ``gptq_marlin_repack`` through TVM FFI. The same is done here with
the same compiler flags, in one nvcc call instead of ninja, and with one difference: the GEMM's
kernel table also names integer and FP8 weights, which an FP4 GEMM never selects, and leaving them
out cuts the build from minutes to about 30 s. The FP4 kernels themselves are the same templates.

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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ... import settings

MARLIN = Path("csrc", "gemm", "marlin")
GEMM_SOURCE = "gptq_marlin.cuh"
REPACK_SOURCE = "gptq_marlin_repack.cuh"

UNITS = {
    "gemm_bf16": (GEMM_SOURCE, "gptq_marlin_gemm", "gptq_marlin_gemm<bf16_t>"),
    "gemm_fp16": (GEMM_SOURCE, "gptq_marlin_gemm", "gptq_marlin_gemm<fp16_t>"),
    "repack": (REPACK_SOURCE, "gptq_marlin_repack", "gptq_marlin_repack"),
}
"""What can be built: the file included, the name exported, and the C++ function behind it."""

FFI_HEADERS = ("container/tensor.h", "dtype.h", "error.h", "extra/c_env_api.h", "function.h")

_OTHER_WEIGHTS = re.compile(r"^[ \t]*(?!FP4)[A-Z0-9]+_GET_IF\(host::\w+\)[ \t]*$", re.MULTILINE)
_FP4_WEIGHTS = re.compile(r"^[ \t]*FP4_GET_IF\(host::\w+\)[ \t]*$", re.MULTILINE)

_loading = threading.Lock()
_loaded: dict[tuple[str, int], tuple[Path, Any]] = {}


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


def missing() -> str | None:
    """What keeps Marlin from being built here, in one sentence; None if nothing does."""
    if kernel_root() is None:
        try:
            have = f"the installed SGLang {version('sglang')} does not have"
        except PackageNotFoundError:
            have = "SGLang is not installed (pip install sglang), which has"
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


def fp4_only(source: str) -> str:
    """The GEMM's source with every weight type but FP4 taken out of its kernel table.

    Raises ValueError if the table is not the one this was written for.
    """
    if len(_FP4_WEIGHTS.findall(source)) != 1:
        raise ValueError("this SGLang's Marlin does not name its FP4 kernels as FP4_GET_IF once")
    return _OTHER_WEIGHTS.sub("", source)


def unit_source(unit: str) -> str:
    """The translation unit that exports one entry point of `UNITS`."""
    included, exported, function = UNITS[unit]
    lines = [f"#include <tvm/ffi/{header}>" for header in FFI_HEADERS]
    lines += [f'#include "{included}"', "namespace sglang {"]
    lines += [f"TVM_FFI_DLL_EXPORT_TYPED_FUNC({exported}, ({function}));", "}"]
    return "\n".join(lines) + "\n"


def cache_root() -> Path:
    """Where built modules are kept."""
    own = settings.value("FP4TUNE_CACHE")
    if own:
        return Path(own).expanduser() / "marlin"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fp4tune" / "marlin"


def build(units: list[str], sm: int, workers: int = 1) -> list[Path]:
    """Compile and load `units` for one compute capability; those already loaded cost nothing.

    Raises RuntimeError with the compiler's words if a unit does not compile, or with what is
    missing.
    """
    with ThreadPoolExecutor(max_workers=max(1, min(workers, len(units)))) as pool:
        list(pool.map(lambda unit: product(unit, sm), units))
    return [load(unit, sm)[0] for unit in units]


def load(unit: str, sm: int) -> tuple[Path, Any]:
    """The shared object of a unit and its entry point, built first if it is not there."""
    with _loading:
        if (unit, sm) not in _loaded:
            from tvm_ffi import load_module

            path = product(unit, sm)
            # The module owns the code its functions point into, so it is kept with them.
            module = load_module(str(path), keep_module_alive=True)
            _loaded[unit, sm] = (path, getattr(module, UNITS[unit][1]))
        return _loaded[unit, sm]


def loaded_files() -> list[Path]:
    """The shared objects this process has loaded."""
    return sorted({path for path, _ in _loaded.values()})


def product(unit: str, sm: int) -> Path:
    """The path of a unit's shared object, compiling it if the cache does not have it."""
    reason = missing()
    if reason:
        raise RuntimeError(reason)
    root, compiler = kernel_root(), nvcc()
    assert root is not None and compiler is not None
    flags = compile_flags(sm, nvcc_version(compiler))
    path = (
        cache_root() / _build_key(root, compiler, tuple(flags), unit) / f"marlin_{unit}_sm{sm}.so"
    )
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        if not path.is_file():
            _compile_unit(unit, root, compiler, flags, path)
    return path


def _compile_unit(unit: str, root: Path, compiler: Path, flags: list[str], path: Path) -> None:
    from tvm_ffi.libinfo import find_dlpack_include_path, find_include_path, find_libtvm_ffi

    library = Path(find_libtvm_ffi())
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        work = Path(name)
        shutil.copytree(root / MARLIN, work / "marlin")
        gemm = work / "marlin" / GEMM_SOURCE
        gemm.write_text(fp4_only(gemm.read_text()))
        (work / "marlin" / f"{unit}.cu").write_text(unit_source(unit))
        includes = [find_include_path(), find_dlpack_include_path(), str(root / "include")]
        command = [str(compiler), *flags, *(f"-I{i}" for i in dict.fromkeys(includes))]
        command += [str(work / "marlin" / f"{unit}.cu"), "-shared", "-o", str(work / path.name)]
        command += [f"-L{library.parent}", f"-l{library.stem.removeprefix('lib')}"]
        # The runtime torch has loaded, as SGLang links it, and not a second, static copy.
        command += ["--cudart=shared"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            words = (done.stderr or done.stdout)[-4000:]
            raise RuntimeError(f"nvcc failed on Marlin's {unit} for SM{sm_of(flags)}:\n{words}")
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
def _build_key(root: Path, compiler: Path, flags: tuple[str, ...], unit: str) -> str:
    digest = hashlib.sha256()
    files = sorted((root / MARLIN).rglob("*")) + sorted((root / "include").rglob("*"))
    for file in (f for f in files if f.is_file()):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    host = shutil.which(os.environ.get("CXX", "c++")) or ""
    told = [unit_source(unit), *flags, _OTHER_WEIGHTS.pattern, version("apache-tvm-ffi")]
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
