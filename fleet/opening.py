"""Opening files that this process did not make: never waiting, never somewhere else, never huge."""

from __future__ import annotations

import os
import stat


class Irregular(ValueError):
    """What is at the path is not a file that may be read; the message says why, in one clause."""


def whole(path: str | os.PathLike[str], most: int, links: bool = False) -> bytes:
    """All bytes of the regular file at `path`, `most` of them at the most.

    A pipe, a device, a socket or a folder is refused without being waited for; so is a link as the
    last part of the path, unless `links`. Raises Irregular, and OSError.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    try:
        fd = os.open(path, flags if links else flags | os.O_NOFOLLOW)
    except OSError:
        if not links and os.path.islink(path):
            raise Irregular("it is a link, and none is followed here") from None
        if _is_special(path):
            raise Irregular("it is no regular file") from None
        raise
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise Irregular("it is no regular file")
        if found.st_size > most:
            raise Irregular(f"it has more than {most} bytes")
        data = file.read(most + 1)
    if len(data) > most:
        raise Irregular(f"it has more than {most} bytes")
    return data


def _is_special(path: str | os.PathLike[str]) -> bool:
    """Whether there is something at `path` that is no file: a socket cannot even be opened."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False
