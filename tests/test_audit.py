"""The audit of real files: compiled here, without a GPU."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fp4tune.cli import app
from fp4tune.machine import codedigest
from fp4tune.probes import audit
from fp4tune.probes.audit import barrier, disassemble, install, judge, launch, ninja, text
from fp4tune.probes.audit.disassemble import ArchKernel, MachineCode
from fp4tune.probes.audit.launch import PdlUse
from fp4tune.probes.audit.sass import SassKernel

KERNELS = r"""
#define WAIT asm volatile("griddepcontrol.wait;" ::: "memory")
template <int HOW> __global__ void gemm(const unsigned* a, const unsigned* b, float* c) {
  float d0 = 0, d1 = 0, d2 = 0, d3 = 0;
  if (HOW == 1) WAIT;
  unsigned y = b[threadIdx.x];
  if (HOW == 2) WAIT;
  unsigned x = a[threadIdx.x];
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%4,%4,%4}, {%5,%5}, {%0,%1,%2,%3};"
      : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3) : "r"(x), "r"(y));
  c[threadIdx.x] = d0 + d1 + d2 + d3;
}
#ifdef ONLY
template __global__ void gemm<ONLY>(const unsigned*, const unsigned*, float*);
#else
template __global__ void gemm<0>(const unsigned*, const unsigned*, float*);
template __global__ void gemm<1>(const unsigned*, const unsigned*, float*);
template __global__ void gemm<2>(const unsigned*, const unsigned*, float*);
#endif
#ifdef PDL
extern "C" void run(const unsigned* a, const unsigned* b, float* c, cudaStream_t stream, int grid) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid); config.blockDim = dim3(32); config.stream = stream;
  cudaLaunchAttribute attribute[1];
  attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute[0].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = attribute; config.numAttrs = PDL;
  cudaLaunchKernelEx(&config, gemm<ONLY>, a, b, c);
}
#endif
"""
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(
    not NVCC or not codedigest.disassembler() or not codedigest.disassembler("nvdisasm"),
    reason="needs nvcc, cuobjdump and nvdisasm",
)
runner = CliRunner()


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Compile KERNELS: `build("x.cubin", "-DONLY=1")`."""
    folder = tmp_path_factory.mktemp("audit")
    (folder / "k.cu").write_text(KERNELS)

    def compiled(name: str, *flags: str) -> Path:
        to = folder / name
        if not to.exists():
            kind = {".cubin": ["-cubin"], ".o": ["-c"], ".so": ["-shared"]}[to.suffix]
            fpic = [] if to.suffix == ".cubin" else ["-Xcompiler", "-fPIC", "-cudart", "shared"]
            command = [NVCC, "-O2", "-arch=sm_90a", *kind, *fpic, *flags, "-o", to, folder / "k.cu"]
            subprocess.run(command, check=True, capture_output=True)
        return to

    return compiled


@needs_nvcc
def test_kernels_with_and_without_the_wait_are_told_apart(build):
    code = disassemble.machine_code_of(build("all.cubin"))
    waits = {k.kernel.name: k.kernel.wait for k in code.kernels}
    told = {name[name.index("ILi") + 3]: wait for name, wait in waits.items()}
    assert told == {"0": "no-wait", "1": "wait-present", "2": "access-before-wait"}
    assert all(k.sm == 90 and k.kernel.mma == {"HMMA": 1} for k in code.kernels)
    assert code.digest == codedigest.of(build("all.cubin")).value


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize(
    ("name", "flags", "verdict", "pdl"),
    [
        ("bare.o", ("-DONLY=0", "-DPDL=1"), "flagged", "yes"),
        ("waits.so", ("-DONLY=1", "-DPDL=1"), "clean", "yes"),
        ("prefetches.o", ("-DONLY=2", "-DPDL=1"), "clean", "yes"),
        ("unlaunched.cubin", ("-DONLY=0",), "unknown", "unknown"),
    ],
)
def test_a_binary_alone_is_enough(build, name, flags, verdict, pdl):
    """No sources, no flags, no version: only what the compiler made."""
    (report,) = audit.audit([build(name, *flags)])
    assert (report.verdict, report.pdl, report.authority) == (verdict, pdl, "sass")
    assert (report.remedy is not None) == (verdict == "flagged")
    (finding,) = audit.audit_findings([report], backend="mine")
    assert (finding["backend"], finding["verdict"]) == ("mine", verdict)
    assert finding["digest"] == codedigest.of(build(name, *flags)).value
    json.dumps(finding)


@needs_nvcc
def test_what_cannot_be_read_is_one_sentence_and_not_clean(build, tmp_path):
    whole = build("waits.so", "-DONLY=1", "-DPDL=1").read_bytes()
    wrong = {"empty.so": b"", "text.so": b"no code", "short.so": whole[: len(whole) // 2]}
    wrong["short.cubin"] = build("all.cubin").read_bytes()[:-200]
    for name, data in wrong.items():
        path = tmp_path / name
        path.write_bytes(data)
        result = runner.invoke(app, ["audit", str(path)])
        assert result.exit_code == 2, result.output
        (report,) = audit.audit([path])
        assert report.verdict == "unknown" and len(report.evidence) == 1
        assert report.evidence[0].startswith(f"{name}: ")
    nowhere = runner.invoke(app, ["audit", str(tmp_path / "none.so")])
    assert nowhere.exit_code == 2 and "does not exist" in nowhere.output


@pytest.mark.slow
@needs_nvcc
def test_the_command_says_it_in_its_exit_code_and_json(build):
    bad = runner.invoke(app, ["audit", "--json", str(build("bare.o", "-DONLY=0", "-DPDL=1"))])
    assert bad.exit_code == 1 and json.loads(bad.stdout)[0]["verdict"] == "flagged"
    good = str(build("waits.so", "-DONLY=1", "-DPDL=1"))
    assert runner.invoke(app, ["audit", good]).exit_code == 0
    elsewhere = runner.invoke(app, ["audit", good, "--arch", "120"])
    assert elsewhere.exit_code == 2 and "no machine code for SM120" in elsewhere.stdout


@pytest.mark.slow
@needs_nvcc
def test_a_jit_cache_is_judged_by_code_and_its_flags_are_told(build, tmp_path, monkeypatch):
    cached = tmp_path / ".cache/flashinfer/9.9/90a/cached_ops/fp4_gemm_cutlass"
    cached.mkdir(parents=True)
    shutil.copy(build("bare.so", "-DONLY=0", "-DPDL=1"), cached / "fp4_gemm_cutlass.so")
    flag = "-DCUTLASS_ENABLE_GDC_FOR_SM90=1"
    (cached / "build.ninja").write_text(f"nvcc = nvcc\ncuda_cflags = -O3 $\n    {flag}\n")
    (report,) = audit.audit([tmp_path])
    assert report.verdict == "flagged", "the flag is there, and the code does not wait"
    assert (report.module.kind, report.module.version) == ("jit", "9.9")
    assert report.module.backend == "flashinfer-cutlass"
    assert any(flag in line for line in report.evidence) and "delete" in report.remedy
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path))
    assert [m.path for m in install.jit_cache()] == [report.module.path]


@pytest.mark.slow
@pytest.mark.parametrize("sm", [90, 100, 120])
def test_triton_kernels_and_what_triton_says_of_their_launch(sm, tmp_path):
    triton = pytest.importorskip("triton")
    if not codedigest.disassembler("nvdisasm"):
        pytest.skip("needs nvdisasm")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = tmp_path / "kernels.py"
    module.write_text(TRITON)
    spec = importlib.util.spec_from_file_location("kernels", module)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    for waits, verdict in ((False, "flagged"), (True, "clean")):
        signature = {"a": "*bf16", "c": "*fp32", "wait": "constexpr"}
        source = ASTSource(kernels.multiply, signature, {"wait": waits})
        built = triton.compile(source, target=GPUTarget("cuda", sm, 32))
        path = tmp_path / f"{sm}-{waits}.cubin"
        path.write_bytes(built.asm["cubin"])
        (report,) = audit.audit([path])
        assert report.pdl == "unknown" and report.verdict == ("clean" if waits else "unknown")
        path.with_suffix(".json").write_text(json.dumps({"launch_pdl": True}))
        (report,) = audit.audit([path], sm)
        assert (report.pdl, report.verdict) == ("yes", verdict)
        path.with_suffix(".json").write_text(json.dumps({"launch_pdl": False}))
        assert audit.audit([path], sm)[0].verdict == "clean"


TRITON = """
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

@triton.jit
def multiply(a, c, wait: tl.constexpr):
    if wait:
        gdc_wait()
    i = tl.arange(0, 32)
    x = tl.load(a + i[:, None] * 32 + i[None, :])
    tl.store(c + i[:, None] * 32 + i[None, :], tl.dot(x, x))
"""


def kernel(wait: str, mma: str | None = "OMMA.SF", name: str = "k", **more) -> SassKernel:
    """A kernel that loads global memory and waits, or not, as `wait` says."""
    counts = {mma: 64} if mma else {}
    scaled = 64 if mma and "SF" in mma else 0
    return SassKernel(name, wait, int(wait != "no-wait"), 0, counts, scaled, "0x0 LDG", **more)


def code_of(*kernels: SassKernel) -> MachineCode:
    return MachineCode(tuple(ArchKernel(120, each) for each in kernels), (120,), "d")


def verdict(module, code, use, **more) -> str:
    return judge.decide(module, judge.AuditEvidence(code, use, **more)).verdict


FILE = judge.GpuModule("m", "file", "/m.so")


def test_machine_code_over_flags_over_version():
    module = judge.GpuModule(
        "fp4_gemm_cutlass_sm120", "jit", "/x.so", "flashinfer-cutlass", "0.7.2"
    )
    flags = ("-DCUTLASS_ENABLE_GDC_FOR_SM100=1",)
    pdl = PdlUse("yes", ("a source",))
    bare, waits = code_of(kernel("no-wait")), code_of(kernel("wait-present"))
    assert verdict(module, bare, pdl, flags=flags) == "flagged"
    old = replace(module, version="0.6.4")
    clean = judge.decide(old, judge.AuditEvidence(waits, pdl, ()))
    assert clean.verdict == "clean" and judge.ABOUT_WAITS in clean.evidence
    partly = replace(waits, problem="x.so: nvdisasm failed")
    assert verdict(module, partly, pdl, flags=flags) == "unknown"
    spec = replace(module, kind="spec", path=None)
    empty, full = judge.BarrierTrial(False, "barrier", ""), judge.BarrierTrial(True, "flags", "")
    assert verdict(spec, None, pdl, barrier=empty) == "flagged"
    assert verdict(spec, None, pdl, barrier=empty, hand_written=("own.cuh",)) == "unknown"
    assert verdict(spec, None, pdl, barrier=full) == "clean"
    assert verdict(spec, None, pdl, flags=flags) == "unknown", "a version decides nothing"
    asked = PdlUse("possible", block_scaled=True)
    assert verdict(spec, None, asked, barrier=empty) == "doubtful"


@pytest.mark.parametrize(
    ("mma", "use", "expected"),
    [
        ("OMMA.SF", PdlUse("yes", kernels={"k": "yes"}), "flagged"),
        ("OMMA.SF", PdlUse("yes", kernels={"k": "no"}), "clean"),
        ("OMMA.SF", PdlUse("yes"), "flagged"),
        ("OMMA.SF", PdlUse("unknown"), "flagged"),
        ("OMMA.SF", PdlUse("no"), "flagged"),  # not of this very kernel
        ("OMMA.SF", PdlUse("no", every=True), "clean"),
        ("HMMA", PdlUse("yes", kernels={"k": "yes"}), "flagged"),
        ("HMMA", PdlUse("yes", kernels={"other": "yes"}), "unknown"),
        ("HMMA", PdlUse("yes", every=True), "flagged"),
        ("HMMA", PdlUse("possible"), "unknown"),
        (None, PdlUse("yes", kernels={"k": "yes"}), "flagged"),  # a GEMV, a quantiser
        (None, PdlUse("possible", kernels={"k": "possible"}), "unknown"),
        (None, PdlUse("unknown"), "unknown"),
        (None, PdlUse("no", every=True), "clean"),
    ],
)
def test_a_kernel_without_a_wait_is_cleared_by_its_own_launch_alone(mma, use, expected):
    assert verdict(FILE, code_of(kernel("no-wait", mma)), use) == expected
    waits = kernel("wait-present", "OMMA.SF", "gemm")
    for both in ((kernel("no-wait", mma), waits), (waits, kernel("no-wait", mma))):
        assert verdict(FILE, code_of(*both), use) == expected


def test_no_name_excuses_a_kernel():
    """A bad kernel beside a good one of the same name, or that differs in a bool."""
    use = PdlUse("yes")
    for good, bad in (("gemm", "gemm"), ("gemmILi4ELb1EE", "gemmILi4ELb0EE")):
        kernels = (kernel("wait-present", name=good), kernel("no-wait", name=bad))
        assert verdict(FILE, code_of(*kernels), use) == "flagged"
        assert verdict(FILE, code_of(*kernels[::-1]), use) == "flagged"


def test_a_wait_that_does_nothing_is_no_wait_and_doubts_are_a_verdict_of_their_own():
    idle = kernel("access-before-wait", "HMMA", idle=True)
    assert verdict(FILE, code_of(idle), PdlUse("yes", every=True)) == "flagged"
    assert verdict(FILE, code_of(idle), PdlUse("no", every=True)) == "clean"
    doubted = kernel("access-before-wait", "HMMA", doubts=("it stores first",))
    report = judge.decide(FILE, judge.AuditEvidence(code_of(doubted), PdlUse("yes")))
    assert report.verdict == "doubtful" and "it stores first" in report.evidence[-1]
    assert text.exit_code([report]) == 2
    assert verdict(FILE, code_of(doubted, kernel("no-wait")), PdlUse("yes")) == "flagged"
    untouched = SassKernel("empty", "no-wait", 0, 0)
    assert verdict(FILE, code_of(untouched), PdlUse("yes", every=True)) == "clean"


def test_what_an_older_install_left_counts_for_nothing():
    left = replace(FILE, kind="left-over")
    flagged = judge.decide(left, judge.AuditEvidence(code_of(kernel("no-wait")), PdlUse("yes")))
    clean = judge.decide(FILE, judge.AuditEvidence(code_of(kernel("wait-present")), PdlUse("yes")))
    assert text.exit_code([flagged]) == 2 and text.exit_code([flagged, clean]) == 0


def test_a_remedy_fits_the_install():
    jit, aot, file = (judge.GpuModule("m", kind, "/m.so") for kind in ("jit", "aot", "file"))
    assert "delete /m.so" in judge.remedy(jit, True) and "tried" in judge.remedy(jit, True)
    assert "does not help" in judge.remedy(jit, False)
    assert "uninstall" in judge.remedy(aot) and "griddepcontrol.wait" in judge.remedy(file)


@pytest.mark.parametrize(
    ("text", "pdl"),
    [
        ("gemm.run(args, workspace, stream, nullptr, /*enablePDL=*/true);", "yes"),
        ("gemm.run(stream, nullptr, /*launch_with_pdl=*/false);", "no"),
        ("attr.val.programmaticStreamSerializationAllowed = 1;", "yes"),
        ("attr.val.programmaticStreamSerializationAllowed = enable_pdl;", "possible"),
        ("// gemm.run(args, /*enablePDL=*/true);", "unknown"),
        ("gemm.run(args, workspace, stream);", "unknown"),
    ],
)
def test_sources_say_how_they_launch(text, pdl, tmp_path):
    own, foreign = tmp_path / "include", tmp_path / "cutlass"
    own.mkdir()
    foreign.mkdir()
    (foreign / "all.h").write_text("launch(/*enablePDL=*/true);")
    (own / "t.h").write_text(f'#include "{foreign}/all.h"\n{text}\n')
    unit = tmp_path / "unit" / "k.cu"
    unit.parent.mkdir()
    unit.write_text('#include <t.h>\nasm("griddepcontrol.wait;");\n')
    found = launch.of_sources([unit], [own])
    assert found.launch.pdl == pdl and found.waits == ("k.cu",)


def test_a_build_file_is_read_as_ninja_reads_it(tmp_path):
    (tmp_path / "build.ninja").write_text(
        "cuda_home = /opt/c\nnvcc = $cuda_home/bin/nvcc\ncommon = -isystem $cuda_home/include $\n"
        "    -isystem /p/flashinfer/data/include $\n"
        "    -isystem /p/flashinfer/data/cutlass/include\n"
        "cuda_cflags = $common $\n    -DA=1\nrule cuda_compile\n"
        "  command = $nvcc $cuda_cflags -c $in -o $out\n"
        "build /b/k.cuda.o: cuda_compile /g/k.cu\n"
    )
    build = ninja.read(tmp_path / "build.ninja")
    assert build.nvcc == "/opt/c/bin/nvcc" and build.sources == (Path("/g/k.cu"),)
    assert build.flags[-1] == "-DA=1" and len(build.includes) == 3
    assert Path("/p/flashinfer/data/include") in build.own
    assert not any("cutlass" in str(p) for p in build.own)
    assert ninja.read(tmp_path / "none") is None


HEADER = """
#if defined(CUTLASS_ENABLE_GDC_FOR_SM100) && defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 1200)
#define ON
#endif
namespace cutlass { namespace arch { __device__ inline void wait_on_dependent_grids() {
#ifdef ON
  asm volatile("griddepcontrol.wait;");
#endif
} } }
"""


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [True, False])
def test_the_barrier_is_tried_out_under_the_modules_own_flags(compiler, tmp_path, monkeypatch):
    if compiler and not (NVCC and codedigest.disassembler()):
        pytest.skip("needs nvcc and a disassembler")
    if not compiler:
        monkeypatch.setattr(barrier.shutil, "which", lambda name: None)
    header = tmp_path / barrier.HEADER
    header.parent.mkdir(parents=True)
    header.write_text(HEADER)
    target = "-gencode=arch=compute_120f,code=sm_120f"
    bare = ninja.NinjaBuild((f"-I{tmp_path}", target), (), (tmp_path,), "")
    flagged = replace(bare, flags=(*bare.flags, judge.FLAG))
    assert barrier.of(bare, 120).waits is False
    assert barrier.of(flagged, 120).waits is True
    assert barrier.of(flagged, 120).how == ("barrier" if compiler else "flags")
    assert barrier.of(flagged, 100).waits is None, "it builds nothing for SM100"
    other = replace(flagged, flags=tuple(f.replace("120", "121") for f in flagged.flags))
    assert barrier.of(other, 121).waits is False, "this CUTLASS ignores the flag on SM121"
    if compiler:
        assert barrier.flag_works(bare, 120) is True
