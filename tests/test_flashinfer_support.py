"""What we say about FlashInfer's backends agrees with FlashInfer; no GPU is needed to ask."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.probes import registry
from fp4tune.probes.backends.flashinfer import _support as support
from fp4tune.probes.backends.flashinfer import mm_fp4 as provider
from fp4tune.probes.backends.flashinfer._tuner import interrupted
from fp4tune.probes.problem import MXFP4, NVFP4, Device, Fp4Tensor, Problem

pytest.importorskip("flashinfer")

SMS = [80, 86, 87, 89, 90, 100, 101, 103, 107, 110, 120, 121]
NAMES = list(support.SPECS)


def problem(format_name="nvfp4", m=4, n=1024, k=1024, out_dtype="bf16"):
    return Problem(format_name, m, n, k, activation="fp4", out_dtype=out_dtype)


def is_sentence(reason):
    return isinstance(reason, str) and len(reason.split()) >= 4 and "\n" not in reason


def test_the_registry_names_every_backend():
    assert tuple(support.SPECS) == registry.FLASHINFER
    assert [b.name for b in provider.backends()] == NAMES
    assert {b.activation for b in provider.backends()} == {"fp4"}


def test_we_know_every_backend_of_the_installed_flashinfer():
    assert set(support.installed()) <= {spec.api for spec in support.SPECS.values()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sm", SMS)
def test_every_sm_agrees_with_flashinfers_own_table(name, sm):
    api = support.SPECS[name].api
    table = support.mm_fp4().is_backend_supported(api, sm)
    reason = support.unsupported_sm(name, sm)
    assert (reason is None) == table
    whole = provider.FlashInfer(name).unsupported(problem(), Device("cuda", sm))
    if reason is not None:
        assert is_sentence(reason)
        assert whole == reason
        listed = support.supported_sms(api)
        assert all(str(s) in reason for s in listed)
    elif whole is not None:  # a dependency or toolkit that this machine lacks
        assert is_sentence(whole)
        assert " on SM " not in whole or "needs" in whole


def test_there_is_no_dense_fp4_gemm_for_sm90():
    for backend in provider.backends():
        reason = backend.unsupported(problem(), Device("cuda", 90))
        assert "not on SM 90" in reason or "has no mm_fp4 backend" in reason


@pytest.mark.parametrize("name", NAMES)
def test_cpus_activations_and_groups_have_a_reason(name):
    backend = provider.FlashInfer(name)
    assert "CUDA GPU" in backend.unsupported(problem(), Device("cpu"))
    w4a16 = Problem("nvfp4", 1, 128, 256)
    assert "takes fp4 activations" in backend.unsupported(w4a16, Device("cuda", 100))
    grouped = Problem("nvfp4", 1, 128, 256, activation="fp4", groups=4)
    assert "4 groups" in backend.unsupported(grouped, Device("cuda", 100))


def flashinfers_answer(api, p):
    """The part of FlashInfer's argument check that needs no GPU: whether it accepts shapes."""
    base = pytest.importorskip("flashinfer.gemm.gemm_base")
    checks = {
        "trtllm": "_trtllm_gemm_fp4_requirement",
        "cutlass": "_cutlass_gemm_fp4_requirement",
        "cutedsl_low_latency": "_cutedsl_low_latency_gemm_fp4_requirement",
        "cake": "cake_mm_fp4_requirement",
    }
    check = getattr(base, checks[api], None)
    if check is None:
        pytest.skip(f"this FlashInfer has no {api}")
    block = 16 if p.format == "nvfp4" else 32
    a = torch.empty(p.m, p.k // 2, dtype=torch.uint8)
    b = torch.empty(p.n, p.k // 2, dtype=torch.uint8)
    sf = torch.empty(128, 4, dtype=torch.uint8)
    alpha = torch.ones(p.m if api == "cake" else 1)
    try:
        return bool(
            check(
                a,
                b.t(),
                sf,
                sf.t(),
                alpha,
                p.dtype,
                torch.empty(p.m, p.n, dtype=p.dtype),
                block,
                False,
                api,
                p.format == "nvfp4",
            )
        )
    except ValueError:
        return False


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(
        [n for n in NAMES if support.SPECS[n].api in ("trtllm", "cutedsl_low_latency", "cake")]
    ),
    format_name=st.sampled_from(["nvfp4", "mxfp4"]),
    out_dtype=st.sampled_from(["bf16", "fp16"]),
    m=st.integers(1, 12),
    n=st.integers(1, 40),
    blocks=st.integers(1, 16),
)
def test_what_flashinfers_checks_refuse_we_refuse(name, format_name, out_dtype, m, n, blocks):
    p = problem(format_name, m, 8 * n, 32 * blocks, out_dtype)
    ours = support.limits(name, 100).reason(name, p)
    theirs = flashinfers_answer(support.SPECS[name].api, p)
    if not theirs:
        assert is_sentence(ours)
    elif ours is not None:  # trtllm's weight shuffle asks for more than its argument check
        assert name == "flashinfer-trtllm" and "multiple of 128" in ours


@pytest.mark.parametrize(
    ("name", "sm", "p", "words"),
    [
        ("flashinfer-cutlass", 100, problem("mxfp4"), "nvfp4 only"),
        ("flashinfer-cutlass", 100, problem(n=1000), "n to be a multiple of 32"),
        ("flashinfer-cutlass", 120, problem(n=1004), "n to be a multiple of 8"),
        ("flashinfer-cutlass", 120, problem(k=1040), "k to be a multiple of 32"),
        ("flashinfer-trtllm", 100, problem(out_dtype="fp16"), "bf16 only"),
        ("flashinfer-trtllm", 100, problem(n=192), "n to be a multiple of 128"),
        ("flashinfer-cute-dsl", 120, problem("mxfp4"), "nvfp4 only"),
        ("flashinfer-cute-dsl", 120, problem(k=1056), "k to be a multiple of 64"),
        ("flashinfer-cute-dsl", 120, problem(m=0), "m to be at least 1"),
        ("flashinfer-cute-dsl", 120, problem(m=2**21), "32 bits"),
        ("flashinfer-cute-dsl", 100, problem(n=1004), "n to be a multiple of 8"),
        ("flashinfer-cutedsl-low-latency", 100, problem(m=9), "m up to 8"),
        ("flashinfer-cutedsl-low-latency", 100, problem("mxfp4", k=1088), "multiple of 128"),
        ("flashinfer-b12x", 120, problem(k=1040), "k to be a multiple of 32"),
        ("flashinfer-cake", 100, problem(k=1152), "k to be a multiple of 256"),
    ],
)
def test_limits_are_named(name, sm, p, words):
    if support.unsupported_sm(name, sm):
        pytest.skip("not in this FlashInfer")
    reason = provider.FlashInfer(name).unsupported(p, Device("cuda", sm))
    assert is_sentence(reason) and words in reason


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


ASK = (
    "from fp4tune.probes.registry import load_one\n"
    "from fp4tune.probes.problem import Device, Problem\n"
    "b = load_one('flashinfer-cutlass')\n"
    "import sys; assert 'flashinfer' not in sys.modules\n"
    "p = Problem('nvfp4', 1, 128, 256, activation='fp4')\n"
    "print(b.unsupported(p, Device('cuda', 120)))\n"
)


@pytest.mark.slow
def test_an_unwritable_home_is_a_reason(tmp_path):
    # A file where a folder should be: it stops root as well, unlike permissions.
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = run_python(ASK, FLASHINFER_WORKSPACE_BASE=str(blocked / "base"))
    assert done.returncode == 0, done.stderr
    answer = done.stdout.strip().splitlines()[-1]
    assert "importing FlashInfer failed" in answer and "FLASHINFER_WORKSPACE_BASE" in answer


@pytest.mark.slow
def test_flashinfer_not_installed_is_a_reason():
    hide = (
        "import importlib.util as u\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'flashinfer' else real(n, *a)\n"
    )
    done = run_python(hide + ASK)
    assert done.stdout.strip().splitlines()[-1] == "FlashInfer is not installed", done.stderr


def draw(fmt, rows, k):
    g = torch.Generator().manual_seed(rows + k)
    return Fp4Tensor(
        fmt,
        torch.randint(0, 256, (rows, k // 2), generator=g).to(torch.uint8),
        torch.randint(0, 256, (rows, k // fmt.block), generator=g).to(torch.uint8),
        torch.tensor(0.25),
    )


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=lambda f: f.name)
@pytest.mark.parametrize("rows", [1, 128, 200])
def test_scales_land_where_the_128x4_formula_says(fmt, rows):
    t = draw(fmt, rows, 7 * fmt.block * 2)
    found = provider.swizzled(t.scales)
    columns = t.scales.shape[1]
    padded = -(-columns // 4) * 4
    assert found.shape == (-(-rows // 128) * 128, padded)
    flat = found.flatten()
    seen = torch.zeros(flat.numel(), dtype=torch.bool)
    for r in range(rows):
        for c in range(columns):
            tile = (r // 128) * (padded // 4) + c // 4
            at = tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4
            assert flat[at] == t.scales[r, c]
            seen[at] = True
    assert not flat[~seen].any()


def test_swizzled_weights_share_their_codes_and_shuffled_ones_are_flashinfers():
    p = problem(n=256, k=256)
    weight = draw(NVFP4, 256, 256)
    plain = provider.FlashInfer("flashinfer-cutlass").prepare(weight, p)
    assert plain.codes.data_ptr() == weight.codes.data_ptr()
    shuffled = provider.FlashInfer("flashinfer-trtllm").prepare(weight, p)
    flashinfer = pytest.importorskip("flashinfer")
    assert torch.equal(shuffled.codes, flashinfer.shuffle_matrix_a(weight.codes, 128))
    order = [weight.codes.tolist().index(row) for row in shuffled.codes.tolist()]
    assert torch.equal(shuffled.scales, provider.swizzled(weight.scales[order]))


def test_alpha_is_one_product_kept_for_each_pair():
    p = problem(n=128, k=256)
    backend = provider.FlashInfer("flashinfer-cutlass")
    one, two = (backend.prepare(draw(NVFP4, 128, 256), p) for _ in range(2))
    a = backend.prepare_activation(draw(NVFP4, 3, 256))
    first = a.alpha(one, per_token=False)
    assert first.shape == (1,) and first.item() == 0.0625 and first.dtype == torch.float32
    assert a.alpha(one, per_token=False) is first
    assert a.alpha(two, per_token=False) is not first
    rows = backend.prepare_activation(draw(NVFP4, 3, 256)).alpha(one, per_token=True)
    assert rows.tolist() == [0.0625] * 3 and rows.is_contiguous()
    mx = backend.prepare(draw(MXFP4, 128, 256), problem("mxfp4", n=128, k=256))
    assert a.alpha(mx, per_token=False) is None


def test_a_runner_is_taken_where_the_autotuner_would_choose(monkeypatch):
    tuner = pytest.importorskip("flashinfer.autotuner").AutoTuner.get()
    runner, inputs = object(), [torch.zeros(1)]

    def function(**call):
        tuner.choose_one("fp4_gemm", [runner], None, inputs)
        raise AssertionError("the call went on")

    chosen = interrupted(function, {"backend": "cutlass"})
    assert chosen.runner is runner and chosen.inputs is inputs
    assert "choose_one" not in vars(tuner)


@pytest.mark.slow
@given(
    st.recursive(
        st.integers() | st.booleans() | st.none() | st.text(),
        lambda inner: st.lists(inner).map(tuple),
    )
)
def test_tactic_names_round_trip(tactic):
    assert provider.parse_tactic(json.dumps(tactic)) == tactic


def test_a_foreign_tactic_name_is_refused():
    with pytest.raises(ValueError, match="not a FlashInfer tactic"):
        provider.parse_tactic("__import__('os')")
