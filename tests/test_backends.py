"""The torch backends compute what they say, and the registry finds and checks backends."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.probes import registry
from fp4tune.probes.backends import DEFAULT_TACTIC, build_kernels, tactics
from fp4tune.probes.backends.torch.compiled import TorchCompile
from fp4tune.probes.backends.torch.dequant import Resident, torch_dequant, torch_dequant_w4a4
from fp4tune.probes.decoding import Decoder, scale_table
from fp4tune.probes.formats import DTYPES
from fp4tune.probes.problem import FORMATS, MXFP4, NVFP4, Device, Fp4Tensor, Problem

CPU = Device("cpu")
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def draw(fmt, rows, k, seed, global_scale=1.0, scales=None):
    """Random codes; scales are random finite ones of moderate size unless given."""
    g = torch.Generator().manual_seed(seed)
    low, high = (0x28, 0x48) if fmt is NVFP4 else (120, 134)
    shape = (rows, k // fmt.block)
    if scales is None:
        scales = torch.randint(low, high, shape, generator=g).to(torch.uint8)
    return Fp4Tensor(
        fmt,
        torch.randint(0, 256, (rows, k // 2), generator=g).to(torch.uint8),
        scales,
        torch.tensor(global_scale),
    )


def exact(t: Fp4Tensor) -> torch.Tensor:
    """`t` without its global scale in float64, one element at a time from the definitions."""
    rows, k = t.shape
    out = torch.empty(rows, k, dtype=torch.float64)
    for i in range(rows):
        for j in range(k):
            byte = int(t.codes[i, j // 2])
            code = byte >> 4 if j % 2 else byte & 15
            value = E2M1[code & 7] * (-1 if code & 8 else 1)
            raw = int(t.scales[i, j // t.format.block])
            if t.format.scale == "e8m0":
                scale = 2.0 ** (raw - 127)
            else:
                e, f = raw >> 3 & 15, raw & 7
                scale = (8 + f) * 2.0 ** (e - 10) if e else f * 2.0**-9
            out[i, j] = value * scale
    return out


def activation(m, k, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-255, 256, (m, k), generator=g).to(dtype)


def outcome(backend, problem, weight, a, tactic):
    assert backend.unsupported(problem, CPU) is None
    out = torch.full((problem.m, problem.n), torch.nan, dtype=problem.dtype)
    backend.run(backend.prepare(weight, problem), a, out, tactic)
    return out


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_code_and_scale_decodes_exactly(fmt, dtype):
    codes = torch.arange(256).to(torch.uint8).repeat(256 * 2 // fmt.block)[None]
    finite = 0xFF if fmt is MXFP4 else 0x7F
    # One row a scale, each of 16 or 32 blocks of the same scale over all bytes.
    rows = [r for r in range(256) if r != finite and (fmt is MXFP4 or r < 128)]
    scales = torch.tensor(rows).to(torch.uint8)[:, None].expand(-1, codes.shape[1] * 2 // fmt.block)
    t = Fp4Tensor(fmt, codes.expand(len(rows), -1), scales.contiguous(), torch.tensor(1.0))
    got = Decoder.of(fmt, dtype, torch.device("cpu"))(t)
    want = exact(Fp4Tensor(fmt, t.codes[:1, :16], scales[:1, : 32 // fmt.block], t.global_scale))
    assert torch.equal(got[:1, :32].double(), want)
    magnitudes = torch.tensor([v * s for v in E2M1 for s in (1, -1)], dtype=torch.float64)
    for row, raw in enumerate(rows):
        s = scale_table(fmt)[raw].double()
        values = (magnitudes * s).to(dtype).double()  # past the largest fp32: infinite
        assert set(got[row].double().tolist()) == set(values.tolist())


def test_scale_nans_stay_nan():
    assert scale_table(NVFP4)[[0x7F, 0xFF]].isnan().all()
    assert scale_table(MXFP4)[255].isnan()
    assert scale_table(MXFP4)[0] == 2.0**-127


@settings(max_examples=25, deadline=None)
@given(
    fmt=st.sampled_from(list(FORMATS.values())),
    out_dtype=st.sampled_from(list(DTYPES)),
    m=st.sampled_from([0, 1, 2, 17]),
    n=st.integers(1, 40),
    blocks=st.integers(1, 6),
    power=st.integers(-6, 2),
    seed=st.integers(0, 2**31),
)
def test_dequant_is_exact_at_powers_of_two(fmt, out_dtype, m, n, blocks, power, seed):
    k = blocks * fmt.block
    problem = Problem(fmt.name, m, n, k, out_dtype=out_dtype)
    weight = draw(
        fmt, n, k, seed, 2.0**power, torch.full((n, blocks), 0x30 if fmt is NVFP4 else 127).byte()
    )
    a = activation(m, k, problem.dtype, seed)
    want = (a.double() @ exact(weight).T * 2.0**power).to(problem.dtype)
    for tactic in tactics(torch_dequant(), problem, CPU):
        assert torch.equal(outcome(torch_dequant(), problem, weight, a, tactic), want)


@settings(max_examples=25, deadline=None)
@given(alpha=st.floats(1e-3, 1.0), m=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_fp32_rounds_once_at_any_global_scale(alpha, m, seed):
    problem = Problem("nvfp4", m, 24, 64)
    weight = draw(NVFP4, 24, 64, seed, alpha, torch.full((24, 4), 0x38).byte())
    a = activation(m, 64, torch.bfloat16, seed)
    exact_sum = a.double() @ exact(weight).T  # exact in fp32, as one product of two fp32 is fp64
    want = (exact_sum * weight.global_scale.double()).float().bfloat16()
    assert torch.equal(outcome(torch_dequant(), problem, weight, a, "fp32"), want)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_w4a4_multiplies_both_global_scales(fmt):
    problem = Problem(fmt.name, 5, 12, 96, activation="fp4")
    weight, a = draw(fmt, 12, 96, 1, 0.25), draw(fmt, 5, 96, 2, 0.5)
    want = (exact(a) @ exact(weight).T * 0.125).bfloat16()
    for tactic in tactics(torch_dequant_w4a4(), problem, CPU):
        assert torch.equal(outcome(torch_dequant_w4a4(), problem, weight, a, tactic), want)


def test_mxfp4_keeps_scales_that_fp16_cannot_hold():
    problem = Problem("mxfp4", 3, 8, 64, out_dtype="fp16")
    assert tactics(torch_dequant(), problem, CPU) == ("fp32",)
    scales = torch.tensor([[127 - 30, 127 + 10]]).expand(8, 2).byte()
    weight = draw(MXFP4, 8, 64, 3, 1.0, scales)
    a = torch.zeros(3, 64, dtype=torch.float16)
    a[:, :32] = 1024
    want = (a.double() @ exact(weight).T).half()
    assert torch.equal(outcome(torch_dequant(), problem, weight, a, "default"), want)
    assert "e8m0" in Resident().unsupported(problem, CPU)


def test_16_bit_tactic_never_overflows_before_the_global_scale():
    problem = Problem("nvfp4", 2, 8, 256, out_dtype="fp16")
    weight = draw(NVFP4, 8, 256, 4, 2.0**-20, torch.full((8, 16), 0x78).byte())
    a = activation(2, 256, torch.float16, 4)
    want = (a.double() @ exact(weight).T * 2.0**-20).half()
    assert want.isfinite().all()
    for tactic in tactics(torch_dequant(), problem, CPU):
        assert torch.equal(outcome(torch_dequant(), problem, weight, a, tactic), want)


def test_resident_folds_power_of_two_scales_exactly():
    problem = Problem("nvfp4", 7, 16, 64)
    weight = draw(NVFP4, 16, 64, 5, 0.125)
    state = Resident().prepare(weight, problem)
    assert state.dtype == torch.bfloat16
    assert torch.equal(state.double(), exact(weight) * 0.125)
    a = activation(7, 64, torch.bfloat16, 5)
    out = outcome(Resident(), problem, weight, a, "default")
    assert torch.equal(out, torch.mm(a, state.t()))


def test_other_activations_and_groups_have_a_reason():
    for backend in (torch_dequant(), torch_dequant_w4a4(), Resident(), TorchCompile()):
        other = "fp4" if backend.activation == "bf16" else "bf16"
        wrong = Problem("nvfp4", 1, 16, 16, activation=other)
        assert f"takes {backend.activation} activations" in backend.unsupported(wrong, CPU)
        grouped = Problem("nvfp4", 1, 16, 16, activation=backend.activation, groups=8)
        assert "8 groups" in backend.unsupported(grouped, CPU)


@pytest.fixture(scope="module")
def compiled():
    backend = TorchCompile()
    problems = [Problem(f, 16, 64, 128, out_dtype=o) for f in FORMATS for o in DTYPES]
    reason = backend.unsupported(problems[0], CPU)
    if reason:
        pytest.skip(reason)
    build_kernels(backend, problems, CPU, 1)
    return backend


@pytest.mark.slow
def test_compiled_agrees_with_the_floor_and_never_recompiles(compiled):
    rng = random.Random(0)
    with torch.compiler.set_stance("fail_on_recompile"):
        for case in range(24):
            fmt = rng.choice(list(FORMATS.values()))
            m, n, k = rng.choice([0, 1, 2, 65, 300]), rng.randrange(2, 70), 64 * rng.randrange(1, 5)
            problem = Problem(fmt.name, m, n, k, out_dtype=rng.choice(list(DTYPES)))
            weight = draw(fmt, n, k, case, 0.3)
            a = activation(m, k, problem.dtype, case)
            (tactic,) = tactics(compiled, problem, CPU)
            got = outcome(compiled, problem, weight, a, tactic)
            assert torch.equal(got, outcome(torch_dequant(), problem, weight, a, "fp32"))


@pytest.mark.slow
def test_compiled_decodes_every_byte_under_every_scale(compiled):
    for fmt in FORMATS.values():
        rows = torch.arange(256).to(torch.uint8)
        weight = Fp4Tensor(
            fmt,
            rows.repeat(256, 1),
            rows[:, None].repeat(1, 512 // fmt.block),
            torch.tensor(1.0),
        )
        state = compiled.prepare(weight, Problem(fmt.name, 1, 256, 512))
        want = Decoder.of(fmt, torch.float32, torch.device("cpu"))(weight)
        got = state.dequantised("fp32")
        assert torch.equal(got.isnan(), want.isnan())
        keep = ~want.isnan()
        assert torch.equal(got[keep].view(torch.int32), want[keep].view(torch.int32))


@pytest.mark.slow
def test_compiled_state_serves_threads_in_any_grad_mode(compiled):
    problem = Problem("nvfp4", 33, 48, 128)
    with torch.inference_mode():
        weight = draw(NVFP4, 48, 128, 9, 0.3)
        state = compiled.prepare(weight, problem)
    a = activation(33, 128, torch.bfloat16, 9)
    want = outcome(torch_dequant(), problem, weight, a, "fp32")
    good = []

    def work(inference):
        out = torch.empty_like(want)
        with torch.inference_mode(inference):
            for _ in range(20):
                out.fill_(torch.nan)
                compiled.run(state, a, out, "fp32")
                good.append(torch.equal(out, want))

    with torch.compiler.set_stance("fail_on_recompile"):
        threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert good == [True] * 80


def test_compiled_says_what_it_lacks(monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nonexistent/g++",))
    reason = TorchCompile().unsupported(Problem("nvfp4", 1, 16, 16), CPU)
    assert reason is not None and "C++ compiler" in reason


def test_names_are_listed_without_importing_providers():
    assert {"torch-dequant", "marlin", "humming", "triton-w4a16"} <= set(registry.names())
    assert set(registry.FLASHINFER) <= set(registry.names())
    assert all(name == name.lower() and "_" not in name for name in registry.BUILTIN)


@pytest.mark.slow
def test_loading_one_imports_no_other_provider():
    code = (
        "import sys\n"
        "from fp4tune.probes.registry import load\n"
        "assert list(load(['torch-dequant'])) == ['torch-dequant']\n"
        "bad = [m for m in sys.modules if m.split('.')[0] in ('flashinfer', 'humming', 'triton')"
        " or m.startswith('fp4tune.probes.backends.') and m.rpartition('.')[2] not in"
        " ('torch', 'dequant', '_returned')]\n"
        "assert not bad, bad\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(registry.BUILTIN))
def test_builtins_load_under_their_own_name(name):
    try:
        backend = registry.load_one(name)
    except registry.BadBackend as error:
        if "No module named 'triton'" in str(error):
            pytest.skip("Triton is not installed")
        raise
    assert backend.name == name
    problem = Problem("nvfp4", 1, 128, 256, activation=backend.activation)
    reason = backend.unsupported(problem, CPU)
    assert reason is None or reason.strip()


def test_unknown_names_get_a_suggestion():
    with pytest.raises(registry.UnknownBackend, match="did you mean torch-dequant"):
        registry.load(["torch-dequnat"])
    with pytest.raises(registry.UnknownBackend, match="there are torch-dequant"):
        registry.load(["zzz"])


GOOD = """
class Mine:
    name = "mine"
    activation = "bf16"
    layout = "plain"
    def unsupported(self, problem, device): return None
    def prepare(self, weight, problem): return weight
    def run(self, state, a, out, tactic): out.zero_()

class NoRun:
    name = "no-run"
    activation = "bf16"
    layout = "plain"
    def unsupported(self, problem, device): return None
    def prepare(self, weight, problem): return weight

class ShortRun(Mine):
    def run(self, state): pass

class OddActivation(Mine):
    activation = "int8"

instance = Mine()
several = [Mine(), Mine()]

class Ours(Mine):
    name = "marlin"

class Mutant(Mine):
    name = "zoo-mine"

class Controls(Mine):
    name = "controls"

class Experts(Mine):
    name = "torch-experts"
def failing(): raise RuntimeError("no luck")
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(GOOD)
    return path


def test_a_file_gives_a_class_or_an_instance(file):
    for attribute in ("Mine", "instance"):
        loaded = registry.load([f"{file}:{attribute}"])
        assert list(loaded) == ["mine"]
        assert loaded["mine"].layout == "plain"


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("NoRun", r"lacks run\(\)"),
        ("ShortRun", r"run\(\) does not take \(state, a, out, tactic\)"),
        ("OddActivation", "'int8'"),
        ("failing", "no luck"),
        ("absent", "has no 'absent'"),
        ("several", "2 backends"),
        ("Ours", "is called marlin: this is the name of a backend of fp4tune's own"),
        ("Mutant", "is called zoo-mine"),
        ("Controls", "is called controls"),
        ("Experts", "is called torch-experts"),
        ("", "FILE.py:NAME"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(file, attribute, message):
    with pytest.raises(registry.BadBackend, match=message) as caught:
        registry.load_one(f"{file}:{attribute}")
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(registry.BadBackend, match="no file"):
        registry.load_file(f"{tmp_path}/none.py:X")
    broken = tmp_path / "broken.py"
    broken.write_text("import not_a_module_at_all")
    with pytest.raises(registry.BadBackend, match="not_a_module_at_all"):
        registry.load_file(f"{broken}:X")


def test_a_file_is_what_it_says_now_whatever_was_compiled_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = tmp_path / "mine.py"
    for name in ("one", "two"):  # of one length, in one second
        file.write_text(f"from fp4tune.probes.zoo.floor import Right\nIT = Right({name!r})\n")
        os.utime(file, (1_700_000_000, 1_700_000_000))
        assert registry.load_file(f"{file}:IT").name == name
    assert not list(tmp_path.rglob("*.pyc"))


def install(folder: Path, module: str, source: str, entries: dict[str, str]) -> None:
    """A distribution with entry points, as an installer would leave it in `folder`."""
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{registry.GROUP}]", *lines, ""]))


def test_plugins_are_found_and_a_broken_one_breaks_nothing_else(tmp_path, monkeypatch):
    install(
        tmp_path,
        "plugin_of_someone",
        GOOD,
        {
            "mine": "plugin_of_someone:several",
            "no-run": "plugin_of_someone:NoRun",
            "gone": "module_that_is_gone:X",
            "torch-dequant": "plugin_of_someone:Mine",
        },
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded, broken = registry.load_all()
    assert loaded["mine"].name == "mine"
    assert type(loaded["torch-dequant"]).__name__ == "TorchDequant"  # ours cannot be replaced
    reasons = {b.name: b.reason for b in broken}
    assert "run()" in reasons["no-run"]
    assert "module_that_is_gone" in reasons["gone"]
    assert "fp4tune's own" in reasons["torch-dequant"]
    assert registry.load(["mine"])["mine"].name == "mine"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch-dequant", "torch-compile"])
@pytest.mark.parametrize("alpha", [0.25, 0.3])
@pytest.mark.parametrize("out_dtype", list(DTYPES))
@pytest.mark.parametrize("format_name", list(FORMATS))
def test_on_a_gpu_sums_are_fp32_and_rounded_once(name, alpha, out_dtype, format_name):
    major, minor = torch.cuda.get_device_capability()
    device = Device("cuda", 10 * major + minor)
    (backend,) = registry.load([name]).values()
    fmt = FORMATS[format_name]
    n, k = 96, 512
    problem = Problem(format_name, 1, n, k, out_dtype=out_dtype)
    one = torch.full((n, k // fmt.block), 0x38 if fmt is NVFP4 else 127).byte()
    global_scale = alpha if fmt.has_global else 1.0
    weight = draw(fmt, n, k, 11, global_scale, one)
    values = Decoder.of(fmt, torch.float32, torch.device("cpu"))(weight).double()
    build_kernels(backend, [problem], device, 1)
    state = backend.prepare(weight.to("cuda"), problem)
    for m in (0, 1, 17, 129):
        a = activation(m, k, problem.dtype, m) / 64
        want = (a.double() @ values.T * weight.global_scale.double()).float().to(problem.dtype)
        for tactic in tactics(backend, problem.at(m), device):
            out = torch.full((m, n), torch.nan, dtype=problem.dtype, device="cuda")
            graph = torch.cuda.CUDAGraph()
            inputs = a.cuda()
            backend.run(state, inputs, out, tactic)
            torch.cuda.synchronize()
            assert torch.equal(out.cpu(), want)
            if m:
                with torch.cuda.graph(graph):
                    backend.run(state, inputs, out, tactic)
                out.fill_(torch.nan)
                graph.replay()
                torch.cuda.synchronize()
                assert torch.equal(out.cpu(), want)


def test_a_plugin_with_a_name_that_is_none_is_left_out_and_told(tmp_path, monkeypatch):
    evil = "ev\x1b[31mil"
    install(tmp_path, "plugin_of_a_stranger", GOOD, {evil: "plugin_of_a_stranger:Mine"})
    monkeypatch.syspath_prepend(str(tmp_path))
    assert evil not in registry.names()
    loaded, broken = registry.load_all()
    assert evil not in loaded and ascii(evil) in [b.name for b in broken]
    assert "letters" in {b.name: b.reason for b in broken}[ascii(evil)]


@pytest.mark.parametrize("name", ["", "a b", "a\nb", "\u202ea", "x" * 129, "-x", "<b>", "a/b"])
def test_a_backend_with_a_name_that_is_none_is_not_one(name):
    with pytest.raises(registry.BadBackend, match="a name is") as error:
        registry.check(SimpleNamespace(name=name, activation="bf16", layout="plain",
                                       unsupported=lambda p, d: None, prepare=lambda w, p: None,
                                       run=lambda s, a, o, t: None), "here")  # fmt: skip
    assert str(error.value).isprintable() and len(str(error.value)) < 300


def test_tactics_with_names_that_are_none_are_left_out():
    offered = [
        '[128, 64, "x"]',
        "block_shape=8x128,use_tma=false",
        "evil\x1b[2J",
        "a\nb",
        "x" * 501,
    ]
    backend = SimpleNamespace(tactics=lambda problem, device: [*offered, 3])
    assert tactics(backend, None, None) == tuple(offered[:2])
    silent = SimpleNamespace(tactics=lambda problem, device: ["\x00"])
    assert tactics(silent, None, None) == (DEFAULT_TACTIC,)
