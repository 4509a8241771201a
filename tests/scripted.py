"""Workers that are programs of a few lines in the place of the interpreter.

They are quick to start, and each does exactly one thing.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fp4tune.probes.worker.supervisor import Worker

HEAD = """
import json, os, signal, sys, time
commands, events = int(sys.argv[3]), int(sys.argv[4])
secret, number = None, 0
def read():
    global secret, number
    if secret is None:
        secret = line()["secret"]
    command = line()
    number = command.pop("id")
    return {**command.pop("arguments"), **command}
def line():
    found = b""
    while not found.endswith(b"\\n") or not found.strip():
        piece = os.read(commands, 1)
        if not piece:
            sys.exit(0)
        found += piece
    return json.loads(found)
def say(**message):
    text = json.dumps({"id": number, **message})
    os.write(events, b"\\n" + (secret + text).encode() + b"\\n")
"""
"""What each program begins with: its side of the protocol."""


@contextmanager
def scripted(folder: Path, code: str, **other) -> Iterator[Worker]:
    """A Worker whose process runs `code` after HEAD; `other` as for `Worker`."""
    script = folder / "script.py"
    script.write_text(HEAD + textwrap.dedent(code))
    program = folder / "program"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{script}" "$@"\n')
    program.chmod(0o755)
    made = Worker(str(program), **other)
    try:
        yield made
    finally:
        made.close()
