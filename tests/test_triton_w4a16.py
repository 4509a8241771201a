"""`triton-w4a16`: exact on every machine that can run it, and tactics that fit the GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.probes.backends.triton_w4a16 import _context
from fp4tune.probes.backends.triton_w4a16._tactics import (
    TileConfig,
    candidates,
    parse,
    shared_limit,
    splits,
)
from fp4tune.probes.backends.triton_w4a16.gemm import TritonW4A16, _constants, compile_for
from fp4tune.probes.check.reference import expect
from fp4tune.probes.data import exact
from fp4tune.probes.problem import FORMATS, Device, Fp4Tensor, Problem

SMS = (80, 86, 87, 89, 90, 100, 103, 107, 110, 120, 121)
BACKEND = TritonW4A16()
H200 = Device("cuda", 90)

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

configs = st.builds(
    TileConfig,
    st.sampled_from(("gemm", "tma")),
    *(st.integers(1, 512) for _ in range(6)),
    st.just(1) | st.integers(1, 8),
).filter(lambda config: config.kernel == "gemm" or config.deep == 1)
problems = st.builds(
    Problem,
    st.just("nvfp4"),
    st.integers(0, 9000),
    st.integers(1, 40000),
    st.integers(1, 1800).map(lambda blocks: 16 * blocks),
)
devices = st.sampled_from(SMS).map(lambda sm: Device("cuda", sm))


@given(configs)
def test_a_tactics_name_says_all_of_it(config: TileConfig) -> None:
    assert parse(config.name) == config


@pytest.mark.parametrize(
    "name",
    [
        "default",
        "",
        "gemm",
        "gemm-bm16",
        "gemm-bm16-bn64",
        "other-bm16-bn64-sk1-w4-s4-g8",
        "gemm-bm16-bn64-sk1-w4-s4-g8-x1",
        "gemm-bm016-bn64-sk1-w4-s4-g8",
        "gemm-bn64-bm16-sk1-w4-s4-g8",
    ],
)
def test_another_name_is_refused_even_where_nothing_is_to_be_computed(name: str) -> None:
    nothing = torch.empty((0, 64), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="no tactic"):
        BACKEND.run(None, nothing, nothing, name)  # type: ignore[arg-type]


@settings(deadline=None)
@given(problems, devices)
def test_every_gpu_has_a_few_tactics_for_every_problem(problem: Problem, device: Device) -> None:
    found = list(candidates(problem, device))
    assert 1 <= len(found) <= 6
    assert len(set(found)) == len(found)
    for config in found:
        assert parse(config.name) == config
        assert config.shared() <= shared_limit(device)
        assert config.stages >= 2
        # fp32 accumulators a thread holds: more than half its registers would spill
        assert config.bm * config.bn <= config.warps * 32 * 128
        assert config.kernel == "gemm" or (device.sm or 0) >= 90


@settings(deadline=None)
@given(problems, devices, st.sampled_from((16, 64, 128)), st.sampled_from((1, 2, 8)))
def test_k_is_cut_only_where_tiles_are_too_few(
    problem: Problem, device: Device, side: int, waves: int
) -> None:
    split = splits(problem, device, side, side, waves)
    tiles_k = -(-problem.k // 128)
    assert split in (1, 2, 4, 8, 16)
    if split > 1:
        assert tiles_k // split >= 4
    more = splits(problem.at(problem.m + 1000), device, side, side, waves)
    assert more <= split


@pytest.mark.parametrize(
    ("problem", "device", "word"),
    [
        (Problem("nvfp4", 1, 64, 64), Device("cpu"), "CUDA"),
        (Problem("nvfp4", 1, 64, 64), Device("cuda", 75), "SM75"),
        (Problem("nvfp4", 1, 64, 64, activation="fp4"), H200, "16-bit"),
        (Problem("nvfp4", 1, 64, 64, groups=8), H200, "dense"),
        (Problem("mxfp4", 1, 64, 64, out_dtype="fp16"), H200, "fp16"),
    ],
)
def test_a_reason_names_what_does_not_fit(problem: Problem, device: Device, word: str) -> None:
    reason = BACKEND.unsupported(problem, device)
    assert reason is not None and word in reason and "\n" not in reason


@needs_triton
@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_gpu_from_sm80_is_supported(sm: int, fmt: str) -> None:
    assert BACKEND.unsupported(Problem(fmt, 1, 33, 96), Device("cuda", sm)) is None


def every_value(fmt: str) -> tuple[Fp4Tensor, torch.Tensor]:
    """A weight (256, block) of every code with every scale byte, and its values in float64."""
    form = FORMATS[fmt]
    codes = torch.arange(form.block, dtype=torch.uint8).remainder(16).repeat(256, 1)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    byte = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
    weight = Fp4Tensor(form, packed, byte, torch.tensor(1.0))
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    values = torch.cat((magnitudes, -magnitudes))[codes.int()]
    if form.scale == "e4m3":
        return weight, values * byte.view(torch.float8_e4m3fn).double()
    scale = torch.exp2(byte.double() - 127)
    return weight, values * torch.where(byte == 255, float("nan"), scale)


INTERPRETED = """
import sys
import torch
from fp4tune.probes.backends.triton_w4a16.gemm import TritonW4A16
from fp4tune.probes.data import exact
from fp4tune.probes.problem import Problem
from fp4tune.probes.check.reference import expect
from test_triton_w4a16 import every_value

backend = TritonW4A16()
for fmt, m, n, k, tactic in (
    ("nvfp4", 1, 33, 48, "gemm-bm16-bn64-sk1-w4-s4-g8"),
    ("nvfp4", 17, 130, 208, "gemm-bm16-bn128-sk2-w4-s4-g1"),
    ("mxfp4", 5, 37, 416, "gemm-bm16-bn64-sk4-w4-s4-g8"),
    ("nvfp4", 17, 130, 208, "tma-bm16-bn256-sk2-w4-s4-g8"),
    ("nvfp4", 5, 37, 384, "gemm-bm8-bn64-sk1-w4-s3-g8-d2"),
    ("mxfp4", 9, 70, 800, "gemm-bm16-bn64-sk2-w4-s3-g8-d2"),
):
    if tactic.startswith("tma") and "tma" not in sys.argv:
        continue
    problem = Problem(fmt, m, n, k, out_dtype="fp16")
    operands = exact(problem, 24, 3, "cpu")
    state = backend.prepare(operands.weight, problem)
    out = torch.full((m, n), float("nan"), dtype=torch.float16)
    backend.run(state, operands.a, out, tactic)
    assert torch.equal(out, expect(operands, problem).lo), (tactic, m, n, k)

weight, values = every_value("nvfp4")
problem = Problem("nvfp4", 16, *weight.shape, out_dtype="fp16")
out = torch.full((16, 256), float("nan"), dtype=torch.float16)
state = backend.prepare(weight, problem)
backend.run(state, torch.eye(16, dtype=torch.float16), out, "gemm-bm16-bn256-sk1-w4-s4-g8")
finite = [row for row in range(256) if row not in (127, 255)]  # NaN scales are the GPU's to show
assert torch.equal(out.T[finite], values[finite].half())
print("interpreted")
"""


def has_descriptors() -> bool:
    return any(c.kernel == "tma" for c in candidates(Problem("nvfp4", 500, 4096, 4096), H200))


@pytest.mark.slow
@needs_triton
def test_the_interpreter_computes_exact_problems_exactly() -> None:
    """The kernels' own code on a CPU, all but the inline PTX, in fp16 (it has no bf16 dot)."""
    paths = [os.path.dirname(os.path.abspath(__file__)), *filter(None, sys.path)]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, *(["tma"] if has_descriptors() else [])],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter cannot run loops with this NumPy (2.4 and newer)")
    assert done.stdout.strip() == "interpreted", done.stderr[-2000:]


def machine_code(config: TileConfig, sm: int, mx: bool, bf16: bool):
    """The gemm kernel of `config`, compiled for SM `sm` without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fp4tune.probes.backends.triton_w4a16 import _kernels as kernels

    half = "bf16" if bf16 else "fp16"
    names = kernels.gemm.arg_names
    pointers = {
        "a": f"tensordesc<{half}[{config.bm}, 128]>" if config.kernel == "tma" else f"*{half}",
        "words": "*i32",
        "scales": "*u8" if mx else "*i16",
        "gscale": "*fp32",
        "out": "*fp32" if config.split > 1 else f"*{half}",
    }
    constants = _constants(config, mx, bf16) | {"PTX": True}
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    signature = {x: pointers.get(x, "constexpr" if x in constants else "i32") for x in names}
    sixteen = [*pointers, "n", "k", "stride_a", "n_pad"]
    if config.kernel == "tma":
        sixteen.remove("a")
    source = ASTSource(
        kernels.gemm,
        signature,
        {(names.index(x),): value for x, value in constants.items()},
        {(names.index(x),): [["tt.divisibility", 16]] for x in sixteen},
    )
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


@needs_triton
@pytest.mark.parametrize(
    ("sm", "name", "instruction", "format_", "bf16"),
    [
        (80, "gemm-bm64-bn64-sk1-w4-s3-g8", "mma.sync", "nvfp4", True),
        (90, "gemm-bm16-bn64-sk4-w4-s4-g8", "wgmma", "nvfp4", False),
        (90, "gemm-bm8-bn64-sk1-w4-s3-g8-d2", "m64n8k16", "nvfp4", True),
        (90, "tma-bm128-bn128-sk1-w8-s3-g8", "cp.async.bulk.tensor", "mxfp4", True),
        (100, "tma-bm128-bn128-sk1-w8-s3-g8", "tcgen05.mma", "nvfp4", True),
        (120, "gemm-bm64-bn128-sk1-w4-s3-g8", "mma.sync", "nvfp4", True),
    ],
)
def test_kernels_compile_without_a_gpu_and_fit(
    sm: int, name: str, instruction: str, format_: str, bf16: bool, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if not has_descriptors():
        pytest.skip("written for the compiler interface of Triton 3.4 and newer")
    config = parse(name)
    kernel = machine_code(config, sm, format_ == "mxfp4", bf16)
    assert instruction in kernel.asm["ptx"]
    assert kernel.metadata.shared <= config.shared() <= shared_limit(Device("cuda", sm))


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    "name", ["gemm-bm16-bn64-sk4-w4-s4-g8", "gemm-bm32-bn128-sk1-w4-s4-g8",
             "gemm-bm8-bn64-sk1-w4-s4-g8", "gemm-bm16-bn64-sk1-w4-s3-g8-d2",
             "tma-bm64-bn64-sk2-w4-s3-g8", "tma-bm128-bn128-sk1-w8-s3-g8"]
)  # fmt: skip
def test_no_wgmma_is_in_flight_while_its_registers_are_written_again(
    name: str, tmp_path, monkeypatch
) -> None:
    # A wgmma with its left operand in registers may read them until it is waited for; the next
    # step of the loop writes them. Waiting for all but some leaves single tiles wrong under load.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if not has_descriptors():
        pytest.skip("written for the compiler interface of Triton 3.4 and newer")
    for mx, bf16 in ((False, True), (False, False), (True, True)):
        ptx = machine_code(parse(name), 90, mx, bf16).asm["ptx"]
        assert set(re.findall(r"wgmma\.wait_group\S* (\d+)", ptx)) == {"0"}


def here() -> Device:
    major, minor = torch.cuda.get_device_capability()
    return Device("cuda", 10 * major + minor, torch.cuda.current_device())


KINDS = [("nvfp4", "bf16"), ("nvfp4", "fp16"), ("mxfp4", "bf16")]


@pytest.fixture
def gpu() -> Device:
    device = here()
    if reason := BACKEND.unsupported(Problem("nvfp4", 1, 64, 64), device):
        pytest.skip(reason)
    return device


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (200, 1056), (33, 32), (1000, 2080)])
@pytest.mark.parametrize(("fmt", "dtype"), KINDS)
def test_every_tactic_answers_exact_problems_bit_for_bit(gpu, fmt, dtype, n, k) -> None:
    for m in (1, 17, 129, 500):
        problem = Problem(fmt, m, n, k, out_dtype=dtype)
        BACKEND.build([problem], gpu, 8)
        operands = exact(problem, 24, m, gpu.torch)
        assert isinstance(operands.a, torch.Tensor)
        state, want = BACKEND.prepare(operands.weight, problem), expect(operands, problem).lo
        tall = [f"{t}-bm128-bn256-sk1-w8-s2-g8" for t in ("gemm", "tma") if gpu.sm in (90, 100)]
        for tactic in (*BACKEND.tactics(problem, gpu), *tall):
            out = torch.full((m, n), float("nan"), dtype=problem.dtype, device=gpu.torch)
            BACKEND.run(state, operands.a, out, tactic)
            assert torch.equal(out, want), (m, tactic)
            BACKEND.run(state, operands.a[:0], out[:0], tactic)


@pytest.mark.gpu
@pytest.mark.parametrize(("fmt", "dtype"), KINDS)
def test_every_code_with_every_scale_byte_is_dequantised_exactly(gpu, fmt, dtype) -> None:
    weight, values = every_value(fmt)
    n, k = weight.shape
    problem = Problem(fmt, k, n, k, out_dtype=dtype)
    state = BACKEND.prepare(weight.to(gpu.torch), problem)
    a = torch.eye(k, dtype=problem.dtype, device=gpu.torch)
    for tactic in BACKEND.tactics(problem, gpu):
        out = torch.full((k, n), 7.0, dtype=problem.dtype, device=gpu.torch)
        BACKEND.run(state, a, out, tactic)
        wrong = out.T.cpu() != values.to(problem.dtype)
        is_nan = values.isnan().any(1)  # a NaN spreads over the 16 or 32 columns of its block
        assert not bool(wrong[~is_nan].any()), tactic
        assert bool(out.T[is_nan.to(gpu.torch)].isnan().all()), tactic


@pytest.mark.gpu
def test_strided_and_misaligned_operands_are_taken(gpu) -> None:
    problem = Problem("nvfp4", 17, 200, 512)
    operands = exact(problem, 24, 0, gpu.torch)
    assert isinstance(operands.a, torch.Tensor)
    state, want = BACKEND.prepare(operands.weight, problem), expect(operands, problem).lo
    tactics = {c.name for m in (1, 17, 500) for c in candidates(problem.at(m), gpu)}
    for tactic in sorted(tactics):
        for extra, offset in ((16, 0), (24, 8), (7, 1)):
            wide = torch.full((17, 512 + extra), float("nan"), device=gpu.torch).bfloat16()
            a = wide[:, offset : offset + 512]
            a.copy_(operands.a)
            raw = torch.full((1 + 17 * 200,), float("nan"), device=gpu.torch).bfloat16()
            out = raw[1:].view(17, 200)
            BACKEND.run(state, a, out, tactic)
            assert torch.equal(out, want), (tactic, extra, offset)
        one = operands.a[:1].expand(17, -1)
        out = torch.empty((17, 200), dtype=torch.bfloat16, device=gpu.torch)
        BACKEND.run(state, one, out, tactic)
        assert torch.equal(out, want[:1].expand(17, -1)), tactic


@pytest.mark.gpu
def test_one_prepared_weight_serves_several_streams_and_threads(gpu) -> None:
    problem = Problem("nvfp4", 64, 1024, 4096)
    tactics = [t for t in BACKEND.tactics(problem, gpu) if parse(t).split > 1]
    assert tactics
    BACKEND.build([problem], gpu, 8)
    pairs = [exact(problem, 24, seed, gpu.torch) for seed in range(2)]
    weight = pairs[0].weight
    state = BACKEND.prepare(weight, problem)
    acts = [pair.a for pair in pairs]
    serial = [torch.empty((64, 1024), dtype=torch.bfloat16, device=gpu.torch) for _ in acts]
    for a, out in zip(acts, serial, strict=True):
        assert isinstance(a, torch.Tensor)
        BACKEND.run(state, a, out, tactics[0])
    outs = [[torch.full_like(alone, float("nan")) for _ in range(50)] for alone in serial]
    torch.cuda.synchronize()

    def work(i: int) -> None:
        with torch.cuda.device(gpu.torch), torch.cuda.stream(torch.cuda.Stream()):
            for out in outs[i]:
                BACKEND.run(state, acts[i], out, tactics[0])
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert all(torch.equal(out, serial[i]) for out in outs[i])


def compiled_kernels() -> int:
    from fp4tune.probes.backends.triton_w4a16 import _kernels as kernels

    return sum(
        len(entry[0])
        for kernel in (kernels.gemm, kernels.reduce)
        for entry in kernel.device_caches.values()
    )


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1024, 200, 33])
def test_what_was_built_serves_any_m_inside_a_graph(gpu, n: int) -> None:
    problem = Problem("nvfp4", 16, n, 2048)
    BACKEND.build([problem], gpu, 8)
    operands = exact(problem.at(500), 24, 0, gpu.torch)
    assert isinstance(operands.a, torch.Tensor)
    state, want = BACKEND.prepare(operands.weight, problem), expect(operands, problem.at(500)).lo
    built = compiled_kernels()
    for tactic in BACKEND.tactics(problem, gpu):
        ms = (1, 2, 13, 16, 31, 500)
        outs = [torch.zeros((m, n), dtype=torch.bfloat16, device=gpu.torch) for m in ms]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for m, out in zip(ms, outs, strict=True):
                BACKEND.run(state, operands.a[:m], out, tactic)
        for _ in range(3):
            for out in outs:
                out.fill_(float("nan"))
            graph.replay()
            assert all(torch.equal(out, want[: out.shape[0]]) for out in outs), tactic
    assert compiled_kernels() == built


@pytest.mark.gpu
def test_compiling_ahead_is_what_a_launch_uses(gpu) -> None:
    """For every tactic of the table, split or not: the launch compiles nothing more."""
    for m in (16, 32, 64, 128, 500):
        problem = Problem("mxfp4", m, 512, 4096)
        operands = exact(problem, 24, 0, gpu.torch)
        assert isinstance(operands.a, torch.Tensor)
        state = BACKEND.prepare(operands.weight, problem)
        out = torch.empty((m, 512), dtype=torch.bfloat16, device=gpu.torch)
        for config in candidates(problem, gpu):
            compile_for(problem, config)
            before = compiled_kernels()
            BACKEND.run(state, operands.a, out, config.name)
            assert compiled_kernels() == before, config


# -- the context that tensor maps are encoded in

DRIVER = """
static _Thread_local void *current;
static int retained;
int cuCtxGetCurrent(void **context) { *context = current; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return index > 3 ? 101 : 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) {
  retained++; *context = (void *)(long)(device + 1); return 0; }
int cuCtxSetCurrent(void *context) { current = context; return 0; }
int times_retained(void) { return retained; }
"""


def test_a_thread_without_a_context_gets_the_devices_own_once(tmp_path, monkeypatch) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("needs a C compiler")
    source, made = tmp_path / "driver.c", tmp_path / "driver.so"
    source.write_text(DRIVER)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(made), str(source)], check=True)
    monkeypatch.setattr(_context, "DRIVER", str(made))
    driver = ctypes.CDLL(str(made))
    found: list[int | None] = []

    def work(calls: int) -> None:
        for _ in range(calls):
            _context.ensure_current(2)
        context = ctypes.c_void_p()
        driver.cuCtxGetCurrent(ctypes.byref(context))
        found.append(context.value)

    threads = [threading.Thread(target=work, args=(calls,)) for calls in (1, 3)]
    for thread in threads:
        thread.start()
        thread.join()
    assert found == [3, 3] and driver.times_retained() == 2

    def refused() -> None:
        with pytest.raises(RuntimeError, match="cuDeviceGet failed with CUDA error 101"):
            _context.ensure_current(9)
        found.append(None)

    thread = threading.Thread(target=refused)
    thread.start()
    thread.join()
    assert found[-1] is None
