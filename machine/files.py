"""The one way to open a file that this process did not make: never waiting, never somewhere else,
never without an end.

What lies at a path may be a pipe that nobody writes to, a device, a socket, a folder, a link to
any of them, or a file that grows for ever. Standard library only: the engine's reader imports this.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


class Irregular(OSError, ValueError):
    """What is at the path is not a file that may be read; the message says why, in one clause.

    An OSError too, so that who reads a file that cannot be read says the same of one like this.
    """

    def __init__(self, why: str) -> None:
        super().__init__(errno.EINVAL, why)

    def __str__(self) -> str:
        return str(self.strerror)

    def __reduce__(self) -> tuple[type[Irregular], tuple[str]]:
        return type(self), (str(self),)


def descriptor(
    path: str | os.PathLike[str], links: bool = False, flags: int = _READ, mode: int = 0o600
) -> int:
    """A descriptor of the regular file at `path`, opened with `flags` (and `mode`, where those make
    it); the caller closes it.

    A pipe, a device, a socket or a folder is refused without being waited for; so is a link as the
    last part of the path, unless `links`. Raises Irregular, and OSError.
    """
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    try:
        fd = os.open(path, flags if links else flags | os.O_NOFOLLOW, mode)
    except OSError:
        if not links and os.path.islink(path):
            raise Irregular("it is a link, and none is followed here") from None
        if is_special(path):
            raise Irregular("it is no regular file") from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Irregular("it is no regular file")
    except BaseException:
        os.close(fd)
        raise
    return fd


def folder(path: str | os.PathLike[str]) -> int:
    """A descriptor of the folder at `path`, which is no link; the caller closes it. What is done
    through it is done there, whatever is put in its place meanwhile. Raises OSError."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def within(fd: int) -> str:
    """A path of the folder that `fd` is a descriptor of."""
    return f"/proc/self/fd/{fd}"


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`: a disk or a limit may take a part of it. Raises OSError."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def settle(folder: str) -> None:
    """Have a rename within the folder outlive a power cut, as far as that can be: it is there for
    everyone already, and what fails here does not take it back."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def opened(path: str | os.PathLike[str], links: bool = True) -> BinaryIO:
    """The regular file at `path`, to be read in pieces; `descriptor` says what is refused.

    Links are followed as a rule: what is read in pieces was named by somebody, or installed.
    """
    return os.fdopen(descriptor(path, links), "rb")


def whole(path: str | os.PathLike[str], most: int, links: bool = False) -> bytes:
    """All bytes of the regular file at `path`, `most` of them at the most.

    Raises Irregular, also for a file that is longer, and OSError.
    """
    with os.fdopen(descriptor(path, links), "rb") as file:
        if os.fstat(file.fileno()).st_size > most:
            raise Irregular(f"it has more than {most} bytes")
        data = file.read(most + 1)
    if len(data) > most:
        raise Irregular(f"it has more than {most} bytes")
    return data


def text(path: str | os.PathLike[str], most: int = 16 << 20, errors: str = "strict") -> str:
    """The UTF-8 text of a file that somebody named or installed; links are followed.

    Raises Irregular, UnicodeDecodeError (both are ValueErrors), and OSError.
    """
    return whole(path, most, links=True).decode("utf-8", errors)


def is_special(path: str | os.PathLike[str]) -> bool:
    """Whether there is something at `path` that is no file: a socket cannot even be opened."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False
