"""On a GPU: the race between real backends, within a time budget, and a quantiser's time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

from fp4tune.probes import quantisers
from fp4tune.probes.problem import Device

pytestmark = pytest.mark.gpu

BACKENDS = ("torch-dequant", "triton-w4a16", "marlin", "torch-bf16-resident")


def probe(place, *more: str) -> dict:
    command = [sys.executable, "-m", "fp4tune.cli", "probe", "--gpu", "0", "--level", "quick"]
    command += ["--shape", "2048,1024", "--max-m", "16", "--activation", "bf16"]
    command += [word for name in BACKENDS for word in ("--backend", name)]
    paths = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [*command, *more, "--state", str(place), "--json"],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode in (0, 1), done.stderr
    (report,) = json.loads(done.stdout)
    return report


def test_within_a_budget_two_are_proven_and_the_slower_is_not_tried(tmp_path):
    report = probe(tmp_path, "--budget", "380")
    assert not report["left"]
    real = [c for c in report["candidates"] if c["backend"] != "torch-bf16-resident"]
    for m in {c["bucket"]["m_hi"] for c in real}:
        mine = [c for c in real if c["bucket"]["m_hi"] == m]
        count = Counter(c["verdict"] for c in mine)
        assert count["safe"] <= 2, mine
        left = [c for c in mine if any("not tried" in reason for reason in c["reasons"])]
        assert not left or count["safe"] == 2
        if m and left:
            slowest = max(c["median_us"] for c in mine if c["verdict"] == "safe")
            assert all(c["median_us"] >= slowest for c in left)


def test_every_time_has_samples_and_its_interval_holds_the_median(tmp_path):
    report = probe(tmp_path, "--budget", "380")
    assert report["timings"]
    for row in report["timings"]:
        assert 2 <= row["samples"] <= 5
        assert row["lo_us"] <= row["median_us"] <= row["hi_us"]
        assert row["detail"]["before"]["sm_mhz"] > 0


class Halves:
    """Not a quantiser that is right, but one that a graph can hold, and whose time is known."""

    name, format, layout, activation = "halves", "mxfp4", "linear", "fp4"

    def quantise(self, x, gsf):
        codes = torch.empty(x.shape[0], x.shape[1] // 2, dtype=torch.uint8, device=x.device)
        codes.copy_(x[:, ::2])
        return codes, codes


def test_a_quantiser_s_time_grows_with_what_it_reads():
    timing = quantisers.QuantiserTiming(Halves(), "bf16", 8192, [1, 8192], 3, Device("cuda", None))
    for _ in range(3):
        small, large = timing.sample([0, 1])
    # 128 MiB in and 32 MiB out: no GPU moves more than 20 TB/s, nor less than 0.1.
    assert 0.1 < small < large and 8 < large < 2000
