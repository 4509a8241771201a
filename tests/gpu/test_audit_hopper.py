"""On Hopper: a kernel launched with PDL, with and without its wait, told apart by audit and probe.

The audit reads the very files that were launched; tests/test_audit_triton.py has its half without
a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fp4tune.machine import codedigest
from fp4tune.probes import audit
from fp4tune.probes.data import exact
from fp4tune.probes.launch.case import Launch, case
from fp4tune.probes.launch.outcome import Budget
from fp4tune.probes.problem import Problem
from fp4tune.probes.regimes import REGIMES
from fp4tune.probes.zoo.pdl import PdlGemm

triton = pytest.importorskip("triton")

SM = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
TOOLS = codedigest.disassembler() and codedigest.disassembler("nvdisasm")
pytestmark = pytest.mark.skipif(not TOOLS, reason="needs cuobjdump and nvdisasm")
VERDICT = {"first": "clean", "weights": "clean", "never": "flagged"}
"""By when the GEMM waits. Triton's metadata says that all are launched with PDL."""


@pytest.mark.parametrize("when", VERDICT)
@pytest.mark.gpu
@pytest.mark.skipif(SM < (9, 0), reason="needs a GPU with programmatic dependent launch")
def test_audit_and_probe_agree(when, tmp_path, monkeypatch):
    """What was launched is what is audited: Triton's cache of this very process."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from fp4tune.probes.zoo import _gemm_triton

    # Kernels of other tests are in memory, and would be in no cache of this one.
    for held in _gemm_triton.gemm.device_caches.values():
        held[0].clear()
    backend = PdlGemm(f"audited-{when}", when)
    problem = Problem("nvfp4", 64, 1024, 1024)
    cases = [case(backend, problem, exact(problem, 24, seed, "cuda")) for seed in (1, 2)]
    launches = [Launch(i % 2, 3 * i, m, "default", i) for i, m in enumerate((1, 16))]
    outcome = REGIMES["pdl-raw"](backend, cases, launches, Budget(6, 6, 0.0))
    assert outcome.not_exercised is None, outcome.proof
    wrong = any(not report.clean for _, report in outcome.reports)
    reports = audit.audit([tmp_path], 10 * SM[0] + SM[1])
    verdicts = {r.verdict for r in reports if Path(r.module.path or "").name == "gemm.cubin"}
    assert verdicts == {VERDICT[when]}
    assert wrong == (VERDICT[when] == "flagged"), outcome.proof
