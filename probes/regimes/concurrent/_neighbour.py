"""A process of its own that keeps a device busy while it is told to. Standard library and torch.

Run as a script: ``_neighbour.py FD DEVICE PARENT``, the last a process id. FD is a shared file of
two 64-bit integers: what to do (`PAUSE`, `GO`, `END`), and how many rounds of work are finished, -1
before the first can begin.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
import time

PAUSE, GO, END = 0, 1, 2
SIZE = 16


def main(fd: int, device: str, parent: int) -> None:
    """Work until told to end, or until the parent is gone."""
    shared = mmap.mmap(fd, SIZE)
    import torch

    on_gpu = device != "cpu"
    side = 2048 if on_gpu else 64
    left = torch.ones(side, side, dtype=torch.bfloat16, device=device)
    source = torch.zeros((128 << 20) if on_gpu else 1 << 16, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    done = 0
    torch.mm(left, left)
    struct.pack_into("q", shared, 8, done)
    while os.getppid() == parent:
        (order,) = struct.unpack_from("q", shared, 0)
        if order == END:
            return
        if order == PAUSE:
            time.sleep(0.001)
            continue
        for _ in range(4):
            torch.mm(left, left)
            target.copy_(source)
        if on_gpu:
            torch.cuda.synchronize()
        done += 1
        struct.pack_into("q", shared, 8, done)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
