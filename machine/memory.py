"""What memory the host has left. Standard library only: workers ask it in an engine's interpreter,
which need not have psutil."""

from __future__ import annotations

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
