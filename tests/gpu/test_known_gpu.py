"""On a GPU: a second probe measures nothing, quantisers and compiled backends included."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu


def probe(place, *more: str) -> dict:
    command = [sys.executable, "-m", "fp4tune.cli", "probe", "--gpu", "0", "--level", "quick"]
    command += ["--shape", "2048,1024", "--shape", "1024,2048", "--max-m", "64", *more]
    paths = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [*command, "--state", str(place), "--json"],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode in (0, 1), done.stderr
    (report,) = json.loads(done.stdout)
    return report


def test_a_second_probe_measures_nothing_and_chooses_the_same(tmp_path):
    first, second = probe(tmp_path), probe(tmp_path)
    # What is inconclusive is tried again, so only what came to a verdict is compared.
    open_ = {
        (c["backend"], c["bucket"]["n"], c["bucket"]["activation"])
        for c in first["candidates"]
        if c["verdict"] == "inconclusive"
        and not any("reference line" in reason for reason in c["reasons"])
    }
    for row in second["known"]:
        again = set(row["measured"])
        assert again <= {b for b, n, a in open_ if (n, a) == (row["n"], row["activation"])}
        if not again:
            assert row["times"] == first["run"]
    if not open_:
        assert second["choices"] == first["choices"]
        assert second["layers"] == first["layers"]
        assert second["generation"] == first["generation"]
