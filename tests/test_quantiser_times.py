"""A W4A4 layer takes the time of the fastest right quantiser, too."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import stores
import torch
from test_quantisers import CPU, Ours

from fp4tune.autotune.choice import layouts
from fp4tune.autotune.evidence.recorder import Recorder
from fp4tune.autotune.publication.publish import quantiser_times
from fp4tune.autotune.stages import quantiser_timing
from fp4tune.autotune.verdict.buckets import ranges
from fp4tune.cache.ledger import Ledger
from fp4tune.probes import quantisers
from fp4tune.probes.problem import Problem

SCOPE = {"arch": "sm100", "gpu": "B200", "format": "nvfp4", "out_dtype": "bf16", "k": 64}
KEY = ("sm100", "B200", "sglang", "nvfp4", "fp4", "bf16", 1, 256, 64)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Slow(Ours):
    def quantise(self, x, gsf):
        for _ in range(8):
            super().quantise(x, gsf)
        return super().quantise(x, gsf)


class InProcess:
    """Answers what a worker is asked, without one."""

    patience = SimpleNamespace(build=1.0)

    def __init__(self, quantiser):
        self.quantiser = quantiser

    def ask(self, do, silence=None, **arguments):
        if do == "open_quantiser_timing":
            self.timing = quantisers.QuantiserTiming(self.quantiser, **arguments, device=CPU)
        return self.timing.sample(arguments["indices"]) if do == "sample" else None


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_quantiser_is_sampled_at_every_m_asked_for(format, dtype):
    timing = quantisers.QuantiserTiming(Ours(format), dtype, 64, [1, 4], 3, CPU)
    assert all(us > 0 for us in timing.sample([0, 1, 0]))


def test_the_faster_of_two_is_what_a_layer_takes(tmp_path):
    problem = Problem("nvfp4", 2, 256, 64, "fp4")
    with Ledger.open(tmp_path) as ledger:
        record = Recorder(ledger, stores.start(ledger), 7)
        for name in ("ours", "slow"):
            environment = replace(stores.ENVIRONMENT, fingerprint=name[0] * 64, backend=name)
            ledger.add_environment(environment)
            record.knows(name, environment.fingerprint)
        runners = {"ours": InProcess(Ours()), "slow": InProcess(Slow())}
        quantiser_timing._time_quantisers(problem, runners, 5, 3, record)
        rows = list(record.timings.values())
    assert {(row.bucket.m_hi, row.bucket.n, row.backend) for row in rows} == {
        (m.hi, 0, name) for m in ranges(2) if m.hi for name in runners
    }
    target = SimpleNamespace(device=SimpleNamespace(arch="sm100"), name="B200")
    report = SimpleNamespace(target=target, timings=rows, findings=[])
    timed = quantiser_times([report], [])
    found = layouts._fastest_single(timed, KEY)
    assert found == {
        row.bucket.m_hi: row.median_us for row in rows if row.backend == "ours"
    } and set(found) == {1, 2}
    assert layouts._fastest_single(timed, (*KEY[:4], "bf16", *KEY[5:])) is None
    assert layouts._fastest_single(timed, (*KEY[:8], 128)) is None
    assert layouts.quantisers_of({"quantisers": timed}) == timed


def test_earlier_times_stay_until_they_are_measured_again_or_the_quantiser_is_wrong():
    before = [
        {**SCOPE, "m_hi": 1, "backend": "a", "us": 3.0},
        {**SCOPE, "m_hi": 1, "backend": "b", "us": 2.0},
    ]
    target = SimpleNamespace(device=SimpleNamespace(arch="sm100"), name="B200")
    place = SimpleNamespace(n=0, format="nvfp4", out_dtype="bf16", k=64, m_hi=1)
    wrong = SimpleNamespace(bucket=place, backend="b")
    again = SimpleNamespace(bucket=place, backend="a", median_us=4.0)
    assert quantiser_times([], before) == before
    report = SimpleNamespace(target=target, timings=[again], findings=[wrong])
    (left,) = quantiser_times([report], before)
    assert left == {**SCOPE, "m_hi": 1, "backend": "a", "us": 4.0}


@pytest.mark.parametrize("stored", [None, 3, [3], [{"us": 1}], "x"])
def test_what_another_version_stored_counts_for_nothing(stored):
    assert layouts.quantisers_of({"quantisers": stored}) == []
