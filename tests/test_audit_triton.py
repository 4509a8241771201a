"""The audit of the zoo's Triton GEMM, compiled for SM90 with and without its wait; no GPU.

tests/gpu/test_audit_hopper.py launches the same kernels and compares.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fp4tune.machine import codedigest
from fp4tune.probes import audit

triton = pytest.importorskip("triton")

TOOLS = codedigest.disassembler() and codedigest.disassembler("nvdisasm")
pytestmark = pytest.mark.skipif(not TOOLS, reason="needs cuobjdump and nvdisasm")
VERDICT = {"first": "clean", "weights": "clean", "never": "flagged"}
"""By when the GEMM waits. Triton's metadata says that all are launched with PDL."""


def compiled(when: str, folder: Path, monkeypatch) -> Path:
    """The cubin of the zoo's GEMM for SM90, with Triton's metadata beside it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fp4tune.probes.zoo import _gemm_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    names = _gemm_triton.gemm.arg_names
    pointers = {
        "a": "*bf16",
        "a_scales": "*u8",
        "a_alpha": "*fp32",
        "codes": "*u8",
        "scales": "*u8",
        "alpha": "*fp32",
        "out": "*bf16",
    }
    constants = {"WHEN": when, "FP4": False, "DROP": "", "BM": 16, "BN": 64, "HALF": 32}
    signature = {x: pointers.get(x, "constexpr" if x in constants else "i32") for x in names}
    source = ASTSource(
        _gemm_triton.gemm, signature, {(names.index(x),): value for x, value in constants.items()}
    )
    options = {"num_warps": 4, "num_stages": 3, "launch_pdl": True}
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    (found,) = folder.rglob("gemm.cubin")
    return found


@pytest.mark.parametrize("when", VERDICT)
def test_the_audit_tells_them_apart_without_a_gpu(when, tmp_path, monkeypatch):
    (report,) = audit.audit([compiled(when, tmp_path, monkeypatch)], 90)
    assert (report.verdict, report.authority, report.pdl) == (VERDICT[when], "sass", "yes")
