"""What is kept of a probe on a full disk is counted, and said."""

from __future__ import annotations

import pytest
from stores import evidence, isolated, start

from fp4tune.autotune.evidence.kept import with_what_is_kept
from fp4tune.cache import state
from fp4tune.cache.errors import Full
from fp4tune.cache.ledger import Ledger


def test_what_is_kept_of_a_probe_on_a_full_disk_is_counted(tmp_path):
    error = Full(tmp_path / state.LEDGER, "the disk is full")
    assert with_what_is_kept(error, tmp_path, ["r"]) is error, "nothing can be said of no ledger"
    with Ledger.open(tmp_path) as ledger:
        run, other = start(ledger), start(ledger)
        ledger.add_all([evidence(run) for _ in range(16)] + [evidence(other)])
    said = str(with_what_is_kept(error, tmp_path, [run]))
    assert "16 rows of this probe's evidence are kept" in said and "\n" not in said


FULL = """
import os, subprocess, sys
from pathlib import Path
from fp4tune.cache.ledger import Ledger
place = Path(sys.argv[1]) / "small"
place.mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)], check=True)
Ledger.open(place).close()
room = os.statvfs(place)
left = room.f_bavail * room.f_frsize - 160 * 1024
(place / "filler").write_bytes(b"x" * left)
command = [sys.executable, "-m", "fp4tune.cli", "probe", "--gpu", "none", "--shape", "256,256",
           "--max-m", "1", "--level", "quick", "--backend", "torch-dequant", "--state", str(place)]
done = subprocess.run(command, capture_output=True, text=True)
with Ledger.open(place, readonly=True) as ledger:
    kept = sum(map(len, (ledger.evidence(), ledger.findings(), ledger.timings(),
                         ledger.verdicts())))
sys.stderr.write(done.stderr)
print(done.returncode, kept, done.stderr.strip().splitlines()[-1])
"""


@pytest.mark.slow
def test_a_probe_that_fills_the_disk_says_what_it_kept(tmp_path):
    done = isolated(FULL, tmp_path)
    assert done.returncode == 0, done.stderr
    code, kept, line = done.stdout.strip().split(" ", 2)
    assert code == "2" and int(kept) > 0, done.stderr
    assert f" {kept} row" in line and "kept" in line and "Traceback" not in done.stderr
