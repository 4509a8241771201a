"""The C shim around CUPTI's callbacks: found, compiled once a node, loaded; its records as values.

Headers come with CUDA, with Triton's wheel or with NVIDIA's; libcupti is the one this process has
loaded already (torch brings it), since two copies in a process get in each other's way. The
library is kept in ``$FP4TUNE_CACHE``, else ``$XDG_CACHE_HOME/fp4tune``, else ``~/.cache/fp4tune``,
by a hash of its source, the headers and the compiler; where that cannot be written, in a folder
of this process.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .. import settings

SOURCE = Path(__file__).with_name("shim.c")
MOST_BYTES = 384 << 20
"""Machine code that is held at once, in bytes; what does not fit is counted and said."""
COMPILE_SECONDS = 60.0
_HEADERS = ("cuda.h", "cuda_runtime_api.h", "cupti_callbacks.h")
_WHEELS = (
    "triton/backends/nvidia/include",
    "nvidia/cu*/include",
    "nvidia/cuda_cupti/include",
    "nvidia/cuda_runtime/include",
)
_LIBRARIES = (
    "nvidia/cu*/lib/libcupti.so.*",
    "nvidia/cuda_cupti/lib/libcupti.so.*",
    "triton/backends/nvidia/lib/cupti/libcupti.so*",
)
FLAGS = ("-O1", "-shared", "-fPIC", "-std=gnu11")


class CannotSee(Exception):
    """The census has no CUPTI here; the message says why, in one sentence."""


def headers() -> tuple[str, ...]:
    """The folders that hold CUPTI's and CUDA's headers. Raises CannotSee."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    homes += ["/usr/local/cuda", *sorted(glob.glob("/usr/local/cuda-*"), reverse=True)]
    toolkits = [
        tuple(os.path.join(home, part) for part in ("include", "extras/CUPTI/include"))
        for home in homes
        if home
    ]
    wheels = [
        tuple(
            found
            for pattern in _WHEELS
            for found in sorted(glob.glob(os.path.join(glob.escape(base or "."), pattern)))
        )
        for base in sys.path
    ]
    for folders in (*toolkits, *wheels):
        if all(any(os.path.isfile(os.path.join(f, name)) for f in folders) for name in _HEADERS):
            return tuple(f for f in folders if os.path.isdir(f))
    raise CannotSee(
        "no CUPTI headers: cupti_callbacks.h and cuda.h are not in CUDA_HOME, /usr/local/cuda or an"
        " installed wheel (triton, nvidia-cuda-cupti)"
    )


def library() -> str:
    """The libcupti of this process, or one that can be loaded. Raises CannotSee."""
    loaded = _mapped()
    if loaded:
        return loaded
    found = [
        path
        for base in sys.path
        for pattern in _LIBRARIES
        for path in sorted(glob.glob(os.path.join(glob.escape(base or "."), pattern)))
    ]
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    for part in ("lib64", "lib", "extras/CUPTI/lib64"):
        found += sorted(glob.glob(os.path.join(glob.escape(home), part, "libcupti.so.*")))
    if not found:
        raise CannotSee("no libcupti: torch did not load one, and no wheel or CUDA here has it")
    return found[0]


def _mapped() -> str | None:
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if "/libcupti.so" in line}
    except OSError:
        return None
    return min(paths, default=None)


def cache_folder() -> Path:
    own = settings.value("FP4TUNE_CACHE")
    if own:
        return Path(own).expanduser() / "census"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fp4tune" / "census"


@lru_cache(maxsize=1)
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fp4tune-census-")


def compiled() -> Path:
    """The shim as a shared object, compiled if it is not there yet. Raises CannotSee."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "gcc", "cc"))), None)
    if compiler is None:
        raise CannotSee("no C compiler: the census compiles a small library with gcc")
    folders = headers()
    key = hashlib.sha256(SOURCE.read_bytes())
    for part in (compiler, *FLAGS, *folders):
        key.update(part.encode() + b"\0")
    for folder in folders:
        for name in _HEADERS:
            path = Path(folder, name)
            if path.is_file():
                key.update(str(path.stat().st_size).encode() + b"\0")
    name = f"shim-{key.hexdigest()[:32]}.so"
    for folder_of in (cache_folder, lambda: Path(_own_folder().name)):
        place = folder_of() / name
        if place.is_file():
            return place
        try:
            place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=place.parent, prefix="build-") as folder:
                made = Path(folder, name)
                _compile_shim(compiler, folders, made)
                os.replace(made, place)
            return place
        except OSError:
            continue  # read-only, or full
    raise CannotSee("nowhere to write the census's library: set FP4TUNE_CACHE")


def _compile_shim(compiler: str, folders: tuple[str, ...], made: Path) -> None:
    includes = [part for folder in folders for part in ("-isystem", folder)]
    command = [compiler, *FLAGS, *includes, "-o", str(made), str(SOURCE), "-ldl", "-lpthread"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMPILE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise CannotSee(f"{compiler} took longer than {COMPILE_SECONDS:g} s") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        said = (lines or done.stderr.splitlines() or ["no message"])[0]
        raise CannotSee(f"{os.path.basename(compiler)} failed: {said.strip()[:200]}")


class CLaunch(ctypes.Structure):
    _fields_ = (
        ("seq", ctypes.c_uint64),
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("via", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("other", ctypes.c_uint32),
        ("result", ctypes.c_int32),
        ("name", ctypes.c_char_p),
    )


class CFunction(ctypes.Structure):
    _fields_ = (
        ("seq", ctypes.c_uint64),
        ("handle", ctypes.c_uint64),
        ("owner", ctypes.c_uint64),
        ("kind", ctypes.c_uint32),
        ("parameters", ctypes.c_int32),
        ("sizes", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
    )


class CBlob(ctypes.Structure):
    _fields_ = (
        ("seq", ctypes.c_uint64),
        ("owner", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("source", ctypes.c_uint32),
        ("loader", ctypes.c_uint32),
        ("loads", ctypes.c_int32),
        ("data", ctypes.c_void_p),
    )


_COUNTS = (
    "launches",
    "functions",
    "blobs",
    "graphs",
    "lost_launches",
    "lost_functions",
    "lost_blobs",
    "kernels",
    "driver",
    "runtime",
)


class CCounts(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in _COUNTS)


@dataclass(frozen=True, slots=True)
class Counts:
    """Events so far. `lost_*` did not fit; `driver`, `runtime`: launches each interface told of."""

    launches: int
    functions: int
    blobs: int
    graphs: int
    lost_launches: int
    lost_functions: int
    lost_blobs: int
    kernels: int
    driver: int
    runtime: int


@dataclass(frozen=True, slots=True)
class RawLaunch:
    """A launch as CUPTI told it. `seq` orders all events; `arguments` is None where unknown."""

    seq: int
    function: int
    stream: int
    arguments: int | None
    grid: tuple[int, ...]
    block: tuple[int, ...]
    cluster: tuple[int, ...]
    shared: int
    via: int
    flags: int
    other: int
    result: int
    name: str


@dataclass(frozen=True, slots=True)
class RawFunction:
    """A handle came out of a module (`kind` 1), a library (2), or is a library's module (3)."""

    seq: int
    handle: int
    owner: int
    kind: int
    name: str


@dataclass(frozen=True, slots=True)
class RawBlob:
    """Machine code that was loaded. `owner` is 0 where unknown; `data` is empty where not kept."""

    seq: int
    owner: int
    loads: bool
    data: bytes


class Shim:
    """The loaded library. One subscription a process: `open`, `watch`, `close`."""

    def __init__(self, path: Path | None = None) -> None:
        """Raises CannotSee where it cannot be compiled or loaded."""
        try:
            self._c = ctypes.CDLL(str(path or compiled()))
        except OSError as error:
            raise CannotSee(f"the census's library does not load: {error}") from None
        c = self._c
        c.census_open.argtypes = (ctypes.c_char_p, ctypes.c_uint64)
        c.census_open.restype = c.census_watch.restype = ctypes.c_char_p
        c.census_watch.argtypes = (ctypes.c_int,)
        c.census_counts.restype = CCounts
        c.census_close.restype = c.census_finalize.restype = None
        c.census_clear.restype = c.census_free_blob.restype = None
        for name, kind in (("launch", CLaunch), ("function", CFunction), ("blob", CBlob)):
            function = getattr(c, f"census_{name}")
            function.argtypes, function.restype = (ctypes.c_uint64,), kind
        c.census_free_blob.argtypes = (ctypes.c_uint64,)
        c.census_sizes.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(ctypes.c_uint32))

    def open(self, cupti: str | None = None, most_bytes: int = MOST_BYTES) -> None:
        """Subscribe, and record what is loaded from now on. Raises CannotSee."""
        _raise(self._c.census_open((cupti or library()).encode(), most_bytes))

    @property
    def is_open(self) -> bool:
        return bool(self._c.census_is_open())

    def watch(self, on: bool) -> None:
        """Record launches, or stop to. Raises CannotSee."""
        _raise(self._c.census_watch(int(on)))

    def close(self) -> None:
        """Unsubscribe: nothing of CUPTI's is called any more. Records stay."""
        self._c.census_close()

    def finalize(self) -> None:
        """Close, and end CUPTI: after launches were recorded it keeps about 30 bytes of each one
        that follows, closed or not (CUDA 13.0, measured). The device must be idle."""
        self._c.census_finalize()

    def clear(self) -> None:
        """Forget the launches."""
        self._c.census_clear()

    def counts(self) -> Counts:
        found = self._c.census_counts()
        return Counts(*(int(getattr(found, name)) for name in _COUNTS))

    def sizes(self, name: str, sizes: Sequence[int]) -> None:
        """Tell the sizes of a kernel's parameters, in bytes: its arguments are hashed then."""
        self._c.census_sizes(name.encode(), len(sizes), (ctypes.c_uint32 * len(sizes))(*sizes))

    def launches(self) -> list[RawLaunch]:
        return [_raw_launch(self._c.census_launch(i)) for i in range(self.counts().launches)]

    def functions(self, start: int = 0) -> list[RawFunction]:
        """Those from the `start`-th on."""
        found = (self._c.census_function(i) for i in range(start, self.counts().functions))
        return [
            RawFunction(f.seq, f.handle, f.owner, f.kind, _decoded_bytes(f.name)) for f in found
        ]

    def take_blobs(self, start: int = 0) -> list[RawBlob]:
        """Those from the `start`-th on; the shim's own copy of their bytes is given back."""
        taken = []
        for index in range(start, self.counts().blobs):
            blob = self._c.census_blob(index)
            data = ctypes.string_at(blob.data, blob.size) if blob.data else b""
            taken.append(RawBlob(blob.seq, blob.owner, bool(blob.loads), data))
            self._c.census_free_blob(index)
        return taken


def _raw_launch(raw: CLaunch) -> RawLaunch:
    return RawLaunch(
        raw.seq,
        raw.function,
        raw.stream,
        raw.arguments or None,
        tuple(raw.grid),
        tuple(raw.block),
        tuple(raw.cluster),
        raw.shared,
        raw.via,
        raw.flags,
        raw.other,
        raw.result,
        _decoded_bytes(raw.name),
    )


def _decoded_bytes(raw: bytes | None) -> str:
    return (raw or b"").decode(errors="replace")


def _raise(why: bytes | None) -> None:
    if why:
        raise CannotSee(_decoded_bytes(why))
