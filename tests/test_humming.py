"""How ``humming`` names schedules, which it takes for which m, and when it says no."""

from __future__ import annotations

import importlib.util
import string
from types import SimpleNamespace

import humming_device
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp4tune.probes.backends import _humming as shared
from fp4tune.probes.backends import humming as adapter
from fp4tune.probes.backends._humming import decode, encode
from fp4tune.probes.backends.humming import Humming, HummingLayer, schedule, schedules
from fp4tune.probes.problem import FORMATS, Device, Fp4Tensor, Problem

H200 = Device("cuda", 90)
PROBLEM = Problem("nvfp4", 16, 256, 256)

needs_humming = pytest.mark.skipif(
    importlib.util.find_spec("humming") is None, reason="needs humming-kernels"
)

word = st.text(string.ascii_lowercase + "_", min_size=1).filter(
    lambda text: text[0] != "_" and text not in ("true", "false", "none")
)
shape = st.lists(st.integers(0, 512), min_size=2, max_size=3)
schedule_values = st.one_of(st.none(), st.booleans(), st.integers(0, 10**6), word, shape)


@given(st.dictionaries(word, schedule_values, min_size=1))
def test_a_schedules_name_says_all_of_it(tuning: dict) -> None:
    name = encode(tuning)
    assert decode(name) == tuning
    assert encode(dict(reversed(tuning.items()))) == name


@pytest.mark.parametrize(
    "name",
    ["", "default", "a=1;b=2", "block_shape=1}x2", 'mma_type="mma"', "a=1,", "a=1.5"],
)
def test_what_names_no_schedule_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a humming schedule"):
        decode(name)


@pytest.mark.parametrize(
    ("problem", "device", "said"),
    [
        (PROBLEM, Device("cpu"), "CUDA"),
        (PROBLEM, Device("cuda", 75), "SM75"),
        (Problem("mxfp4", 16, 256, 256, activation="fp4"), H200, "fp4"),
        (Problem("nvfp4", 16, 256, 256, groups=8), H200, "groups"),
        (Problem("nvfp4", 16, 100, 256), H200, "100"),
    ],
)
def test_a_reason_names_what_does_not_fit(problem: Problem, device: Device, said: str) -> None:
    reason = Humming().unsupported(problem, device)
    assert reason is not None and said in reason and "\n" not in reason


@needs_humming
@pytest.mark.parametrize("format_name", list(FORMATS))
@pytest.mark.parametrize("out_dtype", ["bf16", "fp16"])
def test_both_formats_and_dtypes_are_supported(format_name: str, out_dtype: str) -> None:
    problem = Problem(format_name, 0, 64, 96, out_dtype=out_dtype)
    assert Humming().unsupported(problem, H200) is None


@pytest.fixture
def gpu(monkeypatch) -> Device:
    """The GPU that is there; else humming is told an H200's facts, all its heuristics need."""
    return humming_device.or_h200(monkeypatch)


@needs_humming
@pytest.mark.parametrize("format_name", list(FORMATS))
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (200, 96)])
def test_every_m_has_the_schedule_of_its_interval(
    gpu: Device, format_name: str, n: int, k: int
) -> None:
    layer = HummingLayer(format_name, "bf16", n, k, 0)
    highs, tactics = schedules(layer)
    assert list(highs) == sorted(set(highs)) and highs[-1] >= 2**30
    low = 0
    for high, tactic in zip(highs, tactics, strict=True):
        inside = {low + 1, (low + 1 + high) // 2, high}
        assert {schedule(layer, m) for m in inside} == {tactic}
        low = high
    assert schedule(layer, 0) == tactics[0]


@needs_humming
def test_a_tactic_is_the_schedule_humming_chose(gpu: Device) -> None:
    problem = Problem("nvfp4", 17, 4096, 4096)
    (name,) = Humming().tactics(problem, gpu)
    config = adapter.layer_config(HummingLayer.of(problem, 0))
    chosen = shared.heuristics(config, {"gemm_type": "dense"}, 0)
    own = next(tuning for low, high, tuning in chosen if low < 17 <= high)
    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in own.items()}
    assert decode(name) == plain
    assert '"block_shape"' in shared.tuning_json(name)


def test_a_version_that_takes_other_arguments_is_named(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "humming"
    (folder / "tune").mkdir(parents=True)
    for file, (function, needed) in shared._NEEDED.items():
        arguments = ", ".join(sorted(needed - {"expert_layout"}))
        (folder / file).write_text(f"def {function}({arguments}): ...\n")
    monkeypatch.setattr(
        shared.importlib.util,
        "find_spec",
        lambda name: SimpleNamespace(submodule_search_locations=[str(folder)]),
    )
    monkeypatch.setattr(shared, "version", lambda: "7.0")
    reason = shared.unusable()
    assert reason is not None and "7.0" in reason and "take expert_layout" in reason
    assert all(known in reason for known in shared.KNOWN)
    forward = folder / "forward.py"
    forward.write_text(forward.read_text().replace("(", "(expert_layout, ", 1))
    shared._arguments.cache_clear()
    assert shared.unusable() is None


@needs_humming
def test_a_schedule_of_another_humming_is_refused(gpu: Device) -> None:
    with pytest.raises(ValueError, match="gemm_type"):
        shared.tuning_json("gemm_type=dense")


@pytest.mark.gpu
@needs_humming
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("format_name", list(FORMATS))
@pytest.mark.parametrize(("n", "k"), [(256, 256), (200, 96)])
def test_a_pinned_schedule_computes_any_m_without_another_kernel(
    gpu: Device, format_name: str, n: int, k: int
) -> None:
    backend, problem = Humming(), Problem(format_name, 17, n, k)
    backend.build([problem], gpu, 4)
    (tactic,) = backend.tactics(problem, gpu)
    fmt = FORMATS[format_name]
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=draw)
    one = 0x38 if fmt.scale == "e4m3" else 127
    scales = torch.full((n, k // fmt.block), one, dtype=torch.uint8)
    weight = Fp4Tensor(fmt, codes, scales, torch.tensor(1.0)).to("cuda")
    a = torch.randint(-1, 2, (100, k), generator=draw).bfloat16().cuda()
    state = backend.prepare(weight, problem)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    values = torch.cat((values, -values))
    nibbles = torch.stack((codes & 15, codes >> 4), dim=2).reshape(n, k).int()
    right = a.double().cpu() @ values[nibbles].T
    compiled = backend.files()
    for m in (1, 17, 100):
        out = torch.full((m, n), float("nan"), dtype=problem.dtype, device="cuda")
        backend.run(state, a[:m], out, tactic)
        error = (out.double().cpu() - right[:m]).norm() / right[:m].norm()
        assert error < 1e-2
    assert backend.files() == compiled and all(path.is_file() for path in compiled)
