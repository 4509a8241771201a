"""Who holds a lock on a file (`flock`), and whether that is one who computes: from /proc.

What cannot be told (no /proc, another's process, another container's) is None, never a guess.
Standard library only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from .processes import descendants, processes

_LOCKS = "/proc/locks"
_GPU = "/dev/nvidia"
_COMPUTES = "libtorch"
"""What a process has mapped that computes on the CPU, as its GPU is what it has open there."""


@dataclass(frozen=True, slots=True)
class LockHolder:
    """A process that holds a lock: its number, name, and users (real, effective), both None where
    they cannot be read; `alone`: whether it holds the lock exclusively."""

    pid: int
    name: str
    users: tuple[int, int] | None
    alone: bool

    def __str__(self) -> str:
        who = f"process {self.pid}" + (f" ({self.name})" if self.name else "")
        return who if self.users is None else f"{who} of user {self.users[0]}"


def holders(path: str | os.PathLike[str]) -> list[LockHolder]:
    """Those who hold the file at `path`, as the kernel lists them; those in other process
    namespaces are not listed. Empty where it cannot be asked.

    A process that ended and left its lock to a child is listed by its own number.
    """
    try:
        there = os.stat(path)
        with open(_LOCKS, encoding="ascii", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    exact: list[LockHolder] = []
    alike: list[LockHolder] = []
    for line in lines:
        # "7: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF"; one who waits has "->" in front.
        words = line.split()
        if len(words) < 8 or words[1] != "FLOCK":
            continue
        major, _, rest = words[5].partition(":")
        minor, _, inode = rest.partition(":")
        if inode != str(there.st_ino):
            continue
        found = _lock_holder(int(words[4]), words[3] == "WRITE")
        same = os.makedev(int(major, 16), int(minor, 16)) == there.st_dev
        (exact if same else alike).append(found)
    # Some file systems show another device number to stat than the kernel has in its list.
    return exact or alike


def all_holders(path: str | os.PathLike[str]) -> list[LockHolder]:
    """Every process that can be looked at and holds the file at `path`, also by what one that is
    gone gave it. Looks at every process there is."""
    return [_lock_holder(pid, False) for pid in processes() if holds(pid, path)]


def holds(pid: int, path: str | os.PathLike[str]) -> bool | None:
    """Whether a process has that file open and locked; None where it cannot be looked at."""
    try:
        there = os.stat(path)
        names = os.listdir(f"/proc/{pid}/fd")
    except FileNotFoundError:
        return False
    except OSError:
        return None
    for name in names:
        try:
            found = os.stat(f"/proc/{pid}/fd/{name}")
            if (found.st_dev, found.st_ino) == (there.st_dev, there.st_ino):
                with open(f"/proc/{pid}/fdinfo/{name}", encoding="ascii") as file:
                    if any("FLOCK" in line for line in file):
                        return True
        except OSError:
            continue  # closed meanwhile
    return False


def computes(pid: int, cpu: bool = False) -> bool | None:
    """Whether a process, or one below it, has a GPU open, or with `cpu` has torch loaded; None
    where that cannot be told."""
    answers = [_computes(each, cpu) for each in (pid, *descendants(pid))]
    if any(answers):
        return True
    return None if None in answers else False


def _computes(pid: int, cpu: bool) -> bool | None:
    try:
        if cpu:
            with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file:
                return any(_COMPUTES in line for line in file)
        return any(link.startswith(_GPU) for link in _links_of_open_files(pid))
    except (FileNotFoundError, ProcessLookupError):
        return False  # it has ended
    except OSError:
        return None


def _links_of_open_files(pid: int) -> Iterator[str]:
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            yield os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue  # closed meanwhile


def _lock_holder(pid: int, alone: bool) -> LockHolder:
    name, users = "", None
    try:
        # Not the owner of /proc/PID: that is root for any process that asks not to be dumped.
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key == "Name":
                    name = "".join(c if c.isprintable() else "?" for c in value.strip())[:32]
                elif key == "Uid":
                    real, effective = value.split()[:2]
                    users = int(real), int(effective)
                    break
    except (OSError, ValueError):
        users = None
    return LockHolder(pid, name, users, alone)
