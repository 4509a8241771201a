"""What adapters say they support is what their libraries say, for every SM they know."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp4tune.probes import registry
from fp4tune.probes.backends import cudnn_graph
from fp4tune.probes.backends.flashinfer import w4a16
from fp4tune.probes.backends.torch import scaled_mm
from fp4tune.probes.backends.vllm import cutlass
from fp4tune.probes.backends.vllm.marlin import VllmMarlin
from fp4tune.probes.problem import Device, Problem

SMS = [80, 86, 87, 89, 90, 100, 101, 103, 107, 110, 120, 121]
W4A16 = registry.FLASHINFER_W4A16
OTHERS = ("cudnn-graph", "cudnn-graph-w4a16", "torch-scaled-mm", "vllm-cutlass", "vllm-marlin")


def problem(backend, fmt="nvfp4", m=4, n=1024, k=1024, out_dtype="bf16", groups=1):
    return Problem(fmt, m, n, k, activation=backend.activation, out_dtype=out_dtype, groups=groups)


def is_sentence(reason):
    return isinstance(reason, str) and len(reason.split()) >= 4 and "\n" not in reason


@pytest.mark.parametrize("name", [*W4A16, *OTHERS])
def test_devices_activations_and_groups_have_a_reason(name):
    backend = registry.load_one(name)
    assert "CUDA GPU" in backend.unsupported(problem(backend), Device("cpu"))
    other = {"bf16": "fp4", "fp4": "bf16"}[backend.activation]
    foreign = Problem("nvfp4", 1, 128, 256, activation=other)
    assert f"takes {backend.activation} activations" in backend.unsupported(
        foreign, Device("cuda", 100)
    )
    assert "4 groups" in backend.unsupported(problem(backend, groups=4), Device("cuda", 100))


@pytest.mark.parametrize("name", W4A16)
@pytest.mark.parametrize("sm", SMS)
def test_flashinfers_table_of_mm_bf16_fp4(name, sm):
    pytest.importorskip("flashinfer.gemm.gemm_bf16_fp4")
    spec = w4a16.SPECS[name]
    _, multiply = w4a16.functions()
    backend = registry.load_one(name)
    reason = backend.unsupported(problem(backend), Device("cuda", sm))
    if not multiply.is_backend_supported(spec.api, sm) or sm in spec.refused:
        assert f"not on SM {sm}" in reason
    elif reason is not None:
        assert is_sentence(reason) and "needs" in reason


def test_what_flashinfers_table_lists_and_its_preparation_refuses(monkeypatch):
    dsl = pytest.importorskip("flashinfer.gemm.gemm_bf16_fp4_cute_dsl")
    spec = w4a16.SPECS["flashinfer-w4a16-cute-dsl"]
    weight = torch.zeros(64, 32, dtype=torch.uint8)
    scales = torch.zeros(512, dtype=torch.uint8)
    refused = []
    for sm in w4a16.supported_sms("cute-dsl"):
        monkeypatch.setattr(dsl, "get_compute_capability", lambda device, sm=sm: divmod(sm, 10))
        try:
            dsl._prepare_cute_dsl(weight, scales, None, 16)
        except NotImplementedError:
            refused.append(sm)
        except Exception:  # noqa: S110 (a view of cutlass-dsl, which may be missing)
            pass
    assert tuple(refused) == spec.refused


def test_we_know_every_backend_of_the_installed_mm_bf16_fp4():
    module = pytest.importorskip("flashinfer.gemm.gemm_bf16_fp4")
    import typing

    assert set(typing.get_args(module._Bf16Fp4Backend)) == {s.api for s in w4a16.SPECS.values()}


@pytest.mark.parametrize(
    ("name", "sm", "changes", "words"),
    [
        ("flashinfer-w4a16-cute-dsl", 120, {"n": 1056}, "n to be a multiple of 64"),
        ("flashinfer-w4a16-cute-dsl", 100, {"out_dtype": "fp16"}, "bf16 only"),
        ("flashinfer-w4a16-cudnn", 100, {"fmt": "mxfp4"}, "nvfp4 only"),
        ("flashinfer-w4a16-cute-dsl-native", 120, {"m": 0}, "m to be at least 1"),
        ("flashinfer-w4a16-blackwell-tiled", 100, {"n": 1056}, "n to be a multiple of 64"),
        ("cudnn-graph", 90, {}, "not on SM 90"),
        ("torch-scaled-mm", 90, {}, "not on SM 90"),
        ("torch-scaled-mm", 120, {"fmt": "mxfp4"}, "SM 100 and 103"),
        ("torch-scaled-mm", 100, {"fmt": "mxfp4", "out_dtype": "fp16"}, "bf16 only"),
        ("torch-scaled-mm", 100, {"n": 1000}, "n to be a multiple of 16"),
        ("vllm-cutlass", 90, {}, "not on SM 90"),
        ("vllm-cutlass", 130, {}, "not on SM 130"),
        ("vllm-cutlass", 120, {"fmt": "mxfp4"}, "nvfp4 only"),
        ("vllm-cutlass", 120, {"n": 1008}, "n to be a multiple of 32"),
        ("vllm-marlin", 70, {}, "needs SM 75"),
        ("vllm-marlin", 75, {}, "SM 80 for bf16"),
        ("vllm-marlin", 90, {"k": 1056}, "k to be a multiple of 64"),
    ],
)
def test_limits(name, sm, changes, words):
    if name.startswith("flashinfer"):
        pytest.importorskip("flashinfer.gemm.gemm_bf16_fp4")
    backend = registry.load_one(name)
    assert words in backend.unsupported(problem(backend, **changes), Device("cuda", sm))


@pytest.mark.parametrize("sm", SMS)
def test_torch_takes_what_we_say_it_takes(sm):
    """On meta tensors torch checks what it can without a device; the rest is from its sources."""
    backend = registry.load_one("torch-scaled-mm")
    reason = backend.unsupported(problem(backend), Device("cuda", sm))
    if scaled_mm.operator() is None:
        assert "scaled matmul" in reason or sm < 100
    else:
        assert (reason is None) == (sm >= 100)


@pytest.mark.parametrize("version", [91000, 91300, 91400, 92300, 92301, 92801, "no library"])
@pytest.mark.parametrize("sm", SMS)
def test_cudnns_versions(version, sm, monkeypatch):
    monkeypatch.setattr(cudnn_graph, "_cudnn_version", lambda: version)
    for backend in cudnn_graph.backends():
        for fmt in ("nvfp4", "mxfp4"):
            reason = backend.unsupported(problem(backend, fmt), Device("cuda", sm))
            if sm not in cudnn_graph.SMS:
                assert "not on SM" in reason
                continue
            lowest = cudnn_graph.LOWEST[backend.activation]
            if fmt == "mxfp4" and sm >= 120:
                lowest = max(lowest, cudnn_graph.LOWEST_MXFP4_SM12)
            able = isinstance(version, int) and version >= lowest
            assert (reason is None) == able
            assert able or is_sentence(reason)


def test_cudnns_sms_are_those_flashinfer_runs_it_on():
    support = pytest.importorskip("fp4tune.probes.backends.flashinfer._support")
    pytest.importorskip("flashinfer")
    assert tuple(support.supported_sms("cudnn")) == cudnn_graph.SMS


@given(sm=st.integers(80, 129), answer=st.booleans())
def test_vllm_answers_for_its_build(sm, answer):
    asked = []

    def operator(name):
        if name.endswith("supports_fp4"):
            return lambda capability: asked.append(capability) or answer
        return print

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutlass, "operator", operator)
        backend = cutlass.VllmCutlass()
        reason = backend.unsupported(problem(backend), Device("cuda", sm))
    if sm >= 100:
        assert asked == [sm] and (reason is None) == answer
    else:
        assert not asked and "not on SM" in reason


def test_without_vllm_its_backends_say_so(monkeypatch):
    monkeypatch.setattr(cutlass.importlib.util, "find_spec", lambda name: None)
    cutlass.operator.cache_clear()
    for backend in (cutlass.VllmCutlass(), VllmMarlin()):
        reason = backend.unsupported(problem(backend), Device("cuda", 120))
        assert reason == "vLLM is not installed"
