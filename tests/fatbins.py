"""Fatbins, and libraries that hold them, without a CUDA compiler."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

from fp4tune.machine import fatbin


def made(*images: fatbin.Image, content: bytes = bytes(8)) -> bytes:
    """A fatbin with these images, each of the same eight bytes."""
    entries = b""
    for image in images:
        flags = 0x11 | image.exact << 20 | image.family << 21
        header = struct.pack(
            "<HHIQIIII", 1 if image.ptx else 2, 0x101, 64, 8, 0, 0, 0x10008, image.sm
        )
        header += bytes(8) + struct.pack("<Q", flags) + bytes(64 - len(header) - 16)
        entries += header + content
    return struct.pack("<IHHQ", fatbin.MAGIC, 1, 16, len(entries)) + entries


def library(to: Path, *modules: bytes) -> Path:
    """A shared object at `to` with these fatbins; needs a C compiler."""
    (to.parent / "modules").write_bytes(b"".join(modules))
    source = to.parent / "library.s"
    source.write_text('.section .nv_fatbin, "a"\n.align 8\n.incbin "modules"\n')
    command = ["gcc", "-shared", "-nostdlib", "-o", str(to), str(source)]
    subprocess.run(command, cwd=to.parent, check=True, capture_output=True)
    return to
