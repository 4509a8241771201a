"""Files on a disk or behind any fsspec URL, through one small interface."""

from __future__ import annotations

import os
import secrets
from typing import Any

from ..errors import Refused
from .extras import need


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

    def size(self, *names: str) -> int:
        return int(self.fs.size(self.path(*names)) or 0)

    def read(self, *names: str) -> bytes:
        data: bytes = self.fs.cat_file(self.path(*names))
        return data

    def names(self, *folder: str) -> list[str]:
        """The names of the files in a folder, sorted; none where it is not there."""
        try:
            self.fs.invalidate_cache()
            found = self.fs.ls(self.path(*folder), detail=True)
        except FileNotFoundError:
            return []
        return sorted(f["name"].rpartition("/")[2] for f in found if f["type"] == "file")

    def write(self, data: bytes, *names: str) -> None:
        """Put a whole file there or none: renamed into place on a disk; elsewhere written in one
        piece, which object stores show only once it is complete. Raises OSError."""
        path = self.path(*names)
        if not self.local:
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.fs.pipe_file(path, data)
            return
        folder = os.path.dirname(path)
        os.makedirs(folder, exist_ok=True)
        temporary = os.path.join(folder, f".{os.path.basename(path)}.{secrets.token_hex(4)}")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, path)
        except BaseException:
            if os.path.lexists(temporary):
                os.unlink(temporary)
            raise


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
