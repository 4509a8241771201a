"""Files on a disk or behind any fsspec URL, through one small interface."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

from ..errors import Refused
from ..machine import files
from .extras import need

MOST = 256 << 20
"""Bytes of a file that are read at once, unless the caller says fewer."""
FORGOTTEN = 24 * 3600.0
"""Seconds after which a temporary file belongs to a writer that was killed."""
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")


class Place:
    """A folder (or a file) somewhere: `fs` is fsspec's file system and `root` the path in it."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        """Raises Refused for a protocol nobody here speaks."""
        self.url = os.fspath(url)
        core = need("fsspec.core")
        try:
            self.fs, root = core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise Refused(f"{self.url} cannot be opened: {error}") from None
        self.root = root.rstrip("/") or "/"
        self.local = "file" in _protocols(self.fs)

    def path(self, *names: str) -> str:
        return "/".join((self.root, *names))

    def isfile(self, *names: str) -> bool:
        return bool(self.fs.isfile(self.path(*names)))

    def isdir(self) -> bool:
        return bool(self.fs.isdir(self.root))

    def read(self, *names: str, most: int = MOST, links: bool = False) -> bytes:
        """A whole file of at most `most` bytes; on a disk never a pipe, a device or, unless
        `links`, a link. Raises Irregular, and OSError."""
        path = self.path(*names)
        if self.local:
            return files.whole(path, most, links)
        # What a server says of the size is not believed: reading ends there all the same.
        with self.fs.open(path, "rb") as file:
            data: bytes = file.read(most + 1)
        if len(data) > most:
            raise files.Irregular(f"it has more than {most} bytes")
        return data

    def names(self, *folder: str, all_kinds: bool = False) -> list[str]:
        """The names of the files in a folder, sorted; none where it is not there. With
        `all_kinds` also of what is no file: a pipe, a device, a folder."""
        found = self._listed(folder)
        return sorted(name for name, kind in found if all_kinds or kind == "file")

    def folders(self, *folder: str) -> list[str]:
        """The names of the folders in a folder, sorted; none where it is not there."""
        return sorted(name for name, kind in self._listed(folder) if kind == "directory")

    def _listed(self, folder: Sequence[str]) -> list[tuple[str, str]]:
        try:
            self.fs.invalidate_cache()
            found = self.fs.ls(self.path(*folder), detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [(f["name"].rstrip("/").rpartition("/")[2], f["type"]) for f in found]

    def write(self, data: bytes, *names: str) -> None:
        """Put a whole file there or none. Raises OSError."""
        with self.writing(*names) as file:
            file.write(data)

    @contextmanager
    def writing(self, *names: str) -> Iterator[BinaryIO]:
        """A file to write into, which is there whole once this ends, and not at all if it fails:
        renamed into place on a disk; elsewhere sent in one piece, which object stores show only
        once it is complete. Raises OSError."""
        path = self.path(*names)
        if not self.local:
            with tempfile.NamedTemporaryFile(prefix="fp4tune-fleet-") as file:
                yield file  # type: ignore[misc]  # a wrapper with all that a binary file has
                file.flush()
                self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                self.fs.put_file(file.name, path)
            return
        folder = os.path.dirname(path)
        os.makedirs(folder, exist_ok=True)
        temporary = os.path.join(folder, f".{os.path.basename(path)}.{secrets.token_hex(4)}")
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, path)
        except BaseException:
            if os.path.lexists(temporary):
                os.unlink(temporary)
            raise

    def tidy(self, *folder: str) -> None:
        """Remove temporary files on a disk that a killed writer left long ago."""
        if not self.local:
            return
        try:
            found = list(os.scandir(self.path(*folder)))
        except OSError:
            return
        for entry in found:
            try:
                ours = _TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
                age = time.time() - entry.stat(follow_symlinks=False).st_mtime
                if ours and age > FORGOTTEN:
                    os.unlink(entry.path)
            except OSError:
                continue  # another merge was quicker, or it is not ours to remove


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
