"""Record batches that wait to be written: in memory while they are few, else in a file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .extras import need

IN_MEMORY = 16 << 20
"""Bytes beyond which a pile lies on the disk."""

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Mark:
    """How high a pile was: its bytes, and how many batches of each key."""

    bytes: int
    batches: dict[Key, int]


class Pile:
    """Batches by a key, in the order they came. Its file has no name: it goes with the process."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ipc = need("pyarrow.ipc")
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115 - `close` closes it
        self._places: dict[Key, list[tuple[int, int]]] = {}

    def put(self, key: Key, batch: Any) -> None:
        """Raises OSError where the disk is full."""
        data = batch.serialize()
        self._file.seek(self.bytes)
        self._file.write(data)
        self._places.setdefault(key, []).append((self.bytes, data.size))
        self.bytes += data.size

    def mark(self) -> Mark:
        return Mark(self.bytes, {key: len(found) for key, found in self._places.items()})

    def back_to(self, mark: Mark) -> None:
        """Forget what came since the mark."""
        self._file.seek(mark.bytes)
        self._file.truncate()
        self.bytes = mark.bytes
        self._places = {key: self._places[key][:count] for key, count in mark.batches.items()}

    def filled(self) -> list[Key]:
        return [key for key, found in self._places.items() if found]

    def batches(self, key: Key, schema: Any) -> Iterator[Any]:
        """The batches of a key, with the Arrow schema that they were made with."""
        for at, size in self._places[key]:
            self._file.seek(at)
            yield self._ipc.read_record_batch(
                need("pyarrow").py_buffer(self._file.read(size)), schema
            )

    def close(self) -> None:
        self._file.close()
