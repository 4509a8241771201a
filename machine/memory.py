"""What memory the host has left, and when there was too little. Standard library only: workers ask
it in an engine's interpreter, which need not have psutil."""

from __future__ import annotations

import errno
import signal
from pathlib import Path

_UNKNOWN = 2 << 30
"""Bytes taken to be free where nothing says."""
_CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes that can be taken without swapping, by the kernel's own estimate; within the memory
    limit of this container, where there is one."""
    free = _UNKNOWN
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                free = int(line.split()[1]) * 1024
    except OSError:
        return free
    try:
        limit, used = ((_CGROUP / name).read_text() for name in ("memory.max", "memory.current"))
        return max(0, min(free, int(limit) - int(used)))
    except (OSError, ValueError):  # no cgroup of version 2, or no limit: "max"
        return free


_SAID = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "unable to allocate",
    "failed to allocate",
    "std::bad_alloc",
    "_alloc_failed",
    "insufficient memory",
    "failed to map segment",
    "can't start new thread",
)
"""How allocators say it, in lower case: torch's on a CPU and on a GPU, CUDA's, NumPy's, C++'s, what
loads shared objects, and Python of a thread's stack."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this was raised since there was no memory left, by whatever asked for it: that says
    nothing of the code that did."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        if isinstance(each, MemoryError) or type(each).__name__ == "OutOfMemoryError":
            return True
        if isinstance(each, OSError) and each.errno == errno.ENOMEM:
            return True
        if any(words in str(each).lower() for words in _SAID):
            return True
        each = each.__cause__ or each.__context__
    return False


_ENDED = (
    "std::bad_alloc",
    "thread creation failed",
    "omp: system error #11",
    "omp: system error #12",
    "what():  resource temporarily unavailable",
    "cannot allocate memory",
)
"""What libraries print that end their process, where there is no memory or no thread to be had:
C++'s runtime, libgomp, libomp, glibc."""
_FAULTS = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE})


def ended_for_want(printed: str, status: int | None) -> bool:
    """Whether the end of what a process `printed` says that it ended since memory or threads were
    lacking. `status` is how it ended, a signal as a negative number: a fault is one whatever was
    said before."""
    if status is not None and -status in _FAULTS:
        return False
    lines = printed.strip().lower().splitlines()
    return any(words in line for line in lines[-2:] for words in _ENDED)


_COUNTS = (
    _CGROUP / "memory.events",
    _CGROUP / "memory" / "memory.oom_control",
    Path("/proc/vmstat"),
)


def kills() -> tuple[int, ...]:
    """How often the kernel has ended a process to get memory back: in this container, as either
    version of cgroups counts it, and on this host. Any of them rises by one that was."""
    return tuple(_count_kills(path) for path in _COUNTS)


def _count_kills(path: Path) -> int:
    try:
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    except (OSError, ValueError):
        pass
    return 0


def readable(size: float) -> str:
    """Bytes for people: ``21.5 GB``."""
    size = min(size, 1e30)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1000
    return f"{size:,.0f} PB"
