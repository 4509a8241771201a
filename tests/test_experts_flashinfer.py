"""FlashInfer's routed experts without a GPU: layouts, what calls are given, builds and reasons."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from emulator import experts as emulator

from fp4tune.probes.backends.flashinfer import experts_build, experts_cutlass
from fp4tune.probes.data.generator import hash_elements
from fp4tune.probes.grouped.exact import draw_tokens, draw_weights
from fp4tune.probes.grouped.problem import GATES, ExpertsProblem
from fp4tune.probes.problem import Device

HOPPER = Device("cuda", 90)
VERSIONS = ("0.6.12", "0.7.4")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=VERSIONS)
def sm90(request, monkeypatch):
    """FlashInfer of a version on an emulated SM90."""
    module = emulator.Sm90(request.param)
    enums = SimpleNamespace(ActivationType=emulator.KINDS)
    monkeypatch.setattr(experts_cutlass, "_moe", lambda: module)
    monkeypatch.setattr(experts_cutlass, "_take_library", lambda: None)
    monkeypatch.setattr(experts_cutlass, "_takes_tactics", lambda: request.param >= "0.7")
    monkeypatch.setitem(sys.modules, "flashinfer.tllm_enums", enums)
    return module


def codes(experts, rows, k):
    return (
        (hash_elements(experts * rows, k // 2, 5, "cpu") & 255)
        .to(torch.uint8)
        .view(experts, rows, k // 2)
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_interleaving_is_undone_bit_by_bit(version):
    plain = codes(2, 32, 128)
    laid = emulator.interleaved(plain, version)
    assert laid.shape == plain.shape and not torch.equal(laid, plain)
    assert torch.equal(emulator.joined(emulator.opened(laid, version)), plain)
    scales = codes(2, 128, 16)
    assert torch.equal(emulator.unfolded(emulator.folded(scales, version), 128, version), scales)


def test_the_installed_flashinfer_folds_scales_so():
    moe = pytest.importorskip("flashinfer.fused_moe")
    version = __import__("flashinfer").__version__
    scales = codes(3, 192, 16)
    folded = moe.interleave_moe_scales_for_sm90_mixed_gemm(scales, group_size=32)
    assert torch.equal(emulator.unfolded(folded, 192, version), scales)


HARNESS = """
#include <cstdint>
#include <cstdio>
#define __global__
#define __device__
#define __forceinline__ inline
struct Index { int x, y; };
static Index threadIdx, blockIdx, blockDim, gridDim;
%s
int main(int argc, char** argv) {
  int rows = %d, cols = %d, lanes = %d;
  static uint8_t in[1 << 20], out[1 << 20];
  fread(in, 1, rows * cols / 2, stdin);
  blockDim = {lanes, 1}; gridDim = {1, 1}; blockIdx = {0, 0}; threadIdx = {0, 0};
  for (threadIdx.x = 0; threadIdx.x < lanes; ++threadIdx.x)
    interleave_fp4_weights_for_sm90_mixed_gemm_kernel(in, out, rows, cols);
  fwrite(out, 1, rows * cols / 2, stdout);
}
"""


def test_the_installed_flashinfers_own_kernel_interleaves_so(tmp_path):
    """Its source, run on the host: one lane after another."""
    env = pytest.importorskip("flashinfer.jit.env")
    version = __import__("flashinfer").__version__
    source = next(env.FLASHINFER_CSRC_DIR.rglob("moe_gemm_mixed_utils.cu")).read_text()
    kernel = re.search(
        r"__global__ void interleave_fp4_weights_for_sm90_mixed_gemm_kernel.*?\n}\n", source, re.S
    )
    lanes = int(re.search(r"dim3 block\((\d+), 32\);\n\s*interleave_fp4_weights", source)[1])
    rows, k = 32, 192
    (tmp_path / "kernel.cc").write_text(HARNESS % (kernel[0], rows, k, lanes))
    program = tmp_path / "kernel"
    subprocess.run(["c++", "-w", "-o", program, tmp_path / "kernel.cc"], check=True)
    plain = codes(1, rows, k)
    made = subprocess.run(
        [program], input=plain.numpy().tobytes(), capture_output=True, check=True
    ).stdout
    laid = torch.frombuffer(bytearray(made), dtype=torch.uint8).view(1, rows, k // 2)
    assert torch.equal(laid, emulator.interleaved(plain, version))


def problem(gate="swiglu", scaling=1.0, n=128, k=256):
    return ExpertsProblem("mxfp4", 8, n, k, groups=6, top_k=2, gate=gate, scaling=scaling)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("n", "k"), [(128, 256), (96, 160)], ids=["whole", "padded"])
def test_a_call_computes_the_layer(sm90, gate, n, k):
    p = problem(gate, 1.0 if n == 128 else 2.0, n, k)
    backend = experts_cutlass.CutlassExperts()
    weights = draw_weights(p, 3, "cpu", range(0, 6, 2), sparse_gates=False)
    state = backend.prepare(weights, p)
    for law in ("balanced", "elsewhere"):
        drawn, right = draw_tokens(p, weights, range(0, 6, 2), (law,), 5)
        out = torch.full((p.m, p.k), torch.nan, dtype=torch.bfloat16)
        backend.run(state, drawn.a.x, drawn.a.ids, drawn.a.weights, out, "default")
        assert torch.equal(out, right.lo)
    assert sm90.tactics == [None, None]


def test_tactics_are_pairs_that_hold_each_kernel(sm90, monkeypatch):
    assert experts_cutlass.pairs([0, 3], [28, 30, 31]) == [
        "gemm1=0,gemm2=28",
        "gemm1=3,gemm2=30",
        "gemm1=0,gemm2=31",
    ]
    assert experts_cutlass.parse("gemm1=3,gemm2=30") == (3, 30)
    assert experts_cutlass.parse("default") is None
    with pytest.raises(ValueError, match="no pair"):
        experts_cutlass.parse("3,30")


def test_a_pair_reaches_the_gemms(sm90, monkeypatch):
    asked = {}
    tuner = SimpleNamespace(choose_one=lambda op, runners, config, inputs: (runners[0], -1))
    getter = SimpleNamespace(AutoTuner=SimpleNamespace(get=lambda: tuner))
    monkeypatch.setitem(sys.modules, "flashinfer.autotuner", getter)
    plain = sm90.cutlass_fused_moe

    def asking(**call):
        for op in ("trtllm::fused_moe::gemm1", "trtllm::fused_moe::gemm2", "another"):
            asked[op] = tuner.choose_one(op, ["runner"], None, [])[1]
        plain(**call)

    if sm90.version < "0.7":
        sm90.cutlass_fused_moe = asking
    p = problem()
    backend = experts_cutlass.CutlassExperts()
    weights = draw_weights(p, 3, "cpu", range(6), sparse_gates=False)
    drawn, right = draw_tokens(p, weights, range(6), ("balanced",), 5)
    state, out = backend.prepare(weights, p), torch.empty(p.m, p.k, dtype=torch.bfloat16)
    for tactic in ("gemm1=2,gemm2=31", "default"):
        backend.run(state, drawn.a.x, drawn.a.ids, drawn.a.weights, out, tactic)
        assert torch.equal(out, right.lo)
        pair = (2, 31) if tactic != "default" else None
        if sm90.version >= "0.7":
            assert sm90.tactics.pop() == (list(pair) if pair else None)
        else:
            assert tuple(asked.values()) == (*(pair or (-1, -1)), -1)


@pytest.fixture(scope="module")
def flashinfer():
    return pytest.importorskip("flashinfer")


def test_a_partial_build_has_what_tactics_select(flashinfer, tmp_path, monkeypatch):
    """From the installed FlashInfer's sources; nothing is compiled."""
    if experts_build.missing():
        pytest.skip("FlashInfer asks nvcc for its version")
    env = __import__("flashinfer.jit.env", fromlist=["env"])
    core = __import__("flashinfer.jit.core", fromlist=["core"])
    monkeypatch.setattr(core, "check_cuda_arch", lambda: None)  # there may be no GPU
    monkeypatch.setattr(env, "FLASHINFER_GEN_SRC_DIR", tmp_path / "generated")
    monkeypatch.setattr(env, "FLASHINFER_JIT_DIR", tmp_path / "built")
    asked, most = experts_build.specification(), experts_build.PER_UNIT
    units = [p for p in asked.sources if ".generated." in p.name]
    made = [list(experts_build.kernels(p.read_text())) for p in units]
    assert max(map(len, made)) <= most
    every = {(k.tile, k.cluster) for unit in made for k in unit}
    numbers = experts_build.numbered(experts_build.heuristic())
    # The first of them is what a plain call runs.
    assert numbers[0] == (made[0][0].tile, made[0][0].cluster)
    assert experts_build.WORKSPACE_TILE in {k.tile for k in made[0]}
    left_out = {tile for tile, cluster in numbers if (tile, cluster) not in every}
    assert all(k == 512 and n >= 128 or k == 256 and m + n == 384 for m, n, k in left_out)
    assert [p for p in experts_build.specification(1).sources if ".generated." in p.name] == units[
        :1
    ]
    before = units[0].stat().st_mtime_ns
    experts_build.specification()
    assert units[0].stat().st_mtime_ns == before
    runners = next(p for p in asked.sources if p.name == experts_build.RUNNERS).read_text()
    assert runners.count("\ntemplate class CutlassMoeFCRunner<") == 1
    names = {p.name for p in asked.sources}
    assert names > experts_build.BY_HAND and "-lnvrtc" not in asked.extra_ldflags


def test_the_drivers_library_is_named_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    flags = experts_build.driver_to_link(tmp_path / "made")
    (tmp_path / "a.cc").write_text("extern int cuInit(unsigned); int f() { return cuInit(0); }")
    made = tmp_path / "a.so"
    subprocess.run(["c++", "-shared", "-fPIC", tmp_path / "a.cc", *flags, "-o", made], check=True)
    assert b"libcuda.so.1" in made.read_bytes()
    (tmp_path / "lib64" / "stubs").mkdir(parents=True)
    (tmp_path / "lib64" / "stubs" / "libcuda.so").touch()
    assert experts_build.driver_to_link(tmp_path / "made") == []


def test_what_is_left_out_has_a_stand_in_until_it_is_built(tmp_path):
    """A table of virtual functions names one that there is not: without it nothing would load."""

    def linked(*sources):
        made = tmp_path / f"{len(sources)}.so"
        subprocess.run(["c++", "-shared", "-fPIC", "-Wl,-z,now", *sources, "-o", made], check=True)
        return made

    space = "namespace tensorrt_llm { struct T { virtual int f(); virtual int g(); T(); }; "
    one, other, stubs = (tmp_path / f"{n}.cpp" for n in ("one", "other", "stubs"))
    one.write_text(space + 'int T::f() { return 1; } T::T() {} } extern "C" int ask() {'
                   " tensorrt_llm::T t; return t.f(); }")  # fmt: skip
    other.write_text(space + "int T::g() { return 2; } }")
    names = experts_build.left_out(linked(one))
    assert names and all("12tensorrt_llm" in n for n in names)
    with pytest.raises(OSError, match="undefined symbol"):
        ctypes.CDLL(str(linked(one)))
    stubs.write_text(experts_build.stand_ins(names))
    whole = linked(one, stubs)
    assert experts_build.left_out(whole) == [] and ctypes.CDLL(str(whole)).ask() == 1
    assert ctypes.CDLL(str(linked(one, other, stubs))).ask() == 1


def test_sources_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="lists no tiles"):
        experts_build.numbered("int main() {}")
    with pytest.raises(ValueError, match="0 runners"):
        experts_build.one_runner("template class CutlassMoeFCRunner<half, half>;\n")


def test_only_kernels_that_a_library_holds_are_offered(tmp_path, monkeypatch):
    path = tmp_path / "fused_moe_90.so"
    assert experts_build.held(path) is None
    path.with_suffix(".json").write_text(
        json.dumps({"kernels": [[[64, 16, 128], [1, 1, 1]], [[64, 16, 128], [1, 2, 1]]]})
    )
    heuristic = (
        "get_candidate_tiles_sm90(x) { if (config & GROUPED_GEMM) {\n"
        "if (config & A::WEIGHT_ONLY) { return { CtaShape64x16x128B, CtaShape64x32x128B}; } } }"
    )
    monkeypatch.setattr(experts_build, "library", lambda: path)
    monkeypatch.setattr(experts_build, "heuristic", lambda: heuristic)
    runner = SimpleNamespace(get_valid_tactics=lambda inputs, profile: list(range(8, 16)))
    seen = SimpleNamespace(runner=runner, inputs=[torch.zeros(1)])
    assert experts_cutlass._valid(seen, 2) == [8, 10]
    assert runner.gemm_idx_for_tuning == 2


def test_a_library_that_was_brought_is_found(flashinfer, tmp_path, monkeypatch):
    monkeypatch.setattr(experts_build, "_built_place", lambda name: tmp_path / "none")
    monkeypatch.setattr(experts_build, "_ahead_folders", lambda env: ())
    monkeypatch.setenv(experts_build.FOLDER, str(tmp_path))
    assert experts_build.library() is None
    path = tmp_path / flashinfer.__version__ / "fused_moe_90.so"
    path.parent.mkdir()
    path.touch()
    assert experts_build.library() == path


@pytest.mark.parametrize(
    ("device", "format_", "said"),
    [
        (Device("cpu"), "mxfp4", "needs a CUDA GPU"),
        (Device("cuda", 100), "mxfp4", "not on SM 100"),
        (HOPPER, "nvfp4", "mxfp4 only"),
    ],
)
def test_reasons(device, format_, said):
    p = ExpertsProblem(format_, 8, 128, 256, groups=6, top_k=2)
    assert said in experts_cutlass.CutlassExperts().unsupported(p, device)


def test_no_library_and_no_compiler_is_a_reason(sm90, monkeypatch):
    backend = experts_cutlass.CutlassExperts()
    monkeypatch.setattr(experts_cutlass, "version", lambda: sm90.version)
    monkeypatch.setattr(experts_build, "library", lambda: None)
    monkeypatch.setattr(experts_build, "missing", lambda: None)
    assert backend.unsupported(problem(), HOPPER) is None
    monkeypatch.setattr(experts_build, "missing", lambda: "nvcc is not on PATH")
    assert f"FlashInfer {sm90.version}, and nvcc" in backend.unsupported(problem(), HOPPER)
