"""Files in whose place something else lies: said in a sentence, and never waited for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reports import alone  # noqa: F401
from stores import put, spawn
from test_quarantine import K, N

from fp4tune.cache import reader, state
from fp4tune.cache.errors import Corrupt
from fp4tune.machine import files


def fifo(path: Path) -> None:
    os.mkfifo(path)


def bound(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


KINDS = {"pipe": fifo, "socket": bound, "folder": Path.mkdir, "device": device}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", [state.CHOICES, state.LEDGER, "ledger.db-wal", "ledger.db-shm", "ledger.db-journal"]
)
def test_what_is_no_file_is_one_sentence_and_never_waited_for(tmp_path, kind, name):
    put(tmp_path)
    for path in [*tmp_path.glob(f"{name}*")] if name != "ledger.db-journal" else []:
        path.unlink()
    KINDS[kind](tmp_path / name)
    code = """
        import sys
        from pathlib import Path
        from fp4tune.cache.errors import Corrupt
        from fp4tune.cache import reader
        from fp4tune.cache.ledger import Ledger
        place, name = Path(sys.argv[1]), sys.argv[2]
        for attempt in (
            lambda: reader.open(place), lambda: Ledger.open(place),
            lambda: Ledger.open(place, readonly=True),
        ):
            try:
                attempt()
            except Corrupt as error:
                print(str(error).replace("\\n", "|"))
    """
    other = spawn(code, tmp_path, name, stdout=subprocess.PIPE, text=True)
    try:
        said = other.communicate(timeout=60)[0].splitlines()
    finally:
        other.kill()
    assert len(said) == (1 if name == state.CHOICES else 2), said
    assert all("regular file" in line and str(tmp_path) in line for line in said)


@pytest.mark.parametrize(
    "command", [("choose", "3", N, K), ("show",), ("facts",), ("explain", "3", N, K)]
)
def test_commands_do_not_wait_for_a_pipe(tmp_path, command):
    put(tmp_path)
    (tmp_path / state.CHOICES).unlink()
    os.mkfifo(tmp_path / state.CHOICES)
    done = subprocess.run(
        [sys.executable, "-m", "fp4tune.cli", *map(str, command), "--state", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr
    assert "no regular file" in done.stderr + done.stdout


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.booleans())
def test_only_regular_files_are_opened(kind, links):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        KINDS[kind](path)
        for opening in (
            lambda: files.descriptor(path, links),
            lambda: files.whole(path, 10, links),
            lambda: files.opened(path, links),
        ):
            with pytest.raises(files.Irregular):
                opening()
        path.rmdir() if kind == "folder" else path.unlink()
        path.write_bytes(b"12345")
        assert files.whole(path, 5, links) == b"12345"
        with pytest.raises(files.Irregular, match="more than 4 bytes"):
            files.whole(path, 4, links)


def test_a_choices_db_of_any_size_is_not_read(tmp_path, monkeypatch):
    put(tmp_path)
    os.chmod(tmp_path / state.CHOICES, 0o644)
    os.truncate(tmp_path / state.CHOICES, 1 << 40)  # takes no room on the disk
    with pytest.raises(Corrupt, match="more than"):
        reader.open(tmp_path)
