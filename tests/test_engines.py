"""Each engine is told what was proven, by its own names, and otherwise left alone.

The stand-ins here were recorded from SGLang 0.5.23 and vLLM 0.33.0: what they look up, when, and
what they do with it. `benchmarks/engines_real.py` runs the same against the real ones.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
import types
from dataclasses import dataclass, field

import engine_trees
import pytest
import torch
from engine_store import BUCKETS, CONDITION, FIELDS, LAYERS, SCOPES, fill
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import spawn
from typer.testing import CliRunner

import fp4tune
from fp4tune import cli
from fp4tune.cache import quarantine_store, reader
from fp4tune.cache.errors import Missing
from fp4tune.engines import (
    applied,
    emit,
    here,
    interpreter,
    names,
    per_call,
    plugin,
    select,
)
from fp4tune.engines import sglang as sglang_plugin
from fp4tune.engines import vllm as vllm_plugin
from fp4tune.probes import registry

EXPECTED = {
    ("sm90", "sglang"): ("marlin", "marlin"),
    ("sm90", "vllm"): ("vllm-marlin", "MarlinNvFp4LinearKernel"),
    ("sm100", "sglang"): ("flashinfer-cudnn", "flashinfer_cudnn"),
    ("sm100", "vllm"): ("flashinfer-cudnn", "FlashInferCudnnNvFp4LinearKernel"),
    ("sm120", "sglang"): ("flashinfer-cudnn", "flashinfer_cudnn"),
    ("sm120", "vllm"): ("flashinfer-b12x", "FlashInferB12xNvFp4LinearKernel"),
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch, beside):
    """No GPU, no advice of an earlier test, and none of its environment; both engines beside."""
    monkeypatch.syspath_prepend(beside)
    interpreter.of.cache_clear()
    for name in ("FP4TUNE_LEVEL", "FP4TUNE_GENERATION", "FP4TUNE_APPLIED", "VLLM_DISABLED_KERNELS"):
        monkeypatch.setenv(name, "")  # so that what a plugin sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(here, "gpus", lambda: [])
    monkeypatch.setattr(reader, "_own", ())
    monkeypatch.setattr(reader, "_readers", [])
    plugin.selection.cache_clear()
    plugin.say_once.cache_clear()


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "fp4tune")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "fp4tune"]


def selected(place, engine, **other):
    return select.select(select.open_for(engine, place), engine, **other)


# -- choosing for an engine


@pytest.mark.parametrize("arch, engine", EXPECTED)
def test_the_fastest_proven_backend_that_the_engine_can_name(tmp_path, arch, engine):
    fill(tmp_path, arch)
    found = selected(tmp_path, engine)
    assert (found.backend, found.word) == EXPECTED[arch, engine]
    assert len(found.buckets) == len(BUCKETS) * len(LAYERS) and found.layers == sorted(LAYERS)
    assert set(found.rejected) == set(FIELDS[arch]) - {found.backend}


def test_every_name_is_of_a_backend_there_is():
    assert set(names.NAMES) <= set(registry.names())
    classes = {c for name in names.NAMES.values() for c in name.vllm.values()}
    assert classes <= {*engine_trees.KERNELS, "HummingMxFp4LinearKernel"}


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(sorted(SCOPES)),
    st.data(),
)
def test_nothing_unproven_and_nothing_without_a_name_is_ever_emitted(tmp_path_factory, arch, data):
    times = st.one_of(st.none(), st.floats(1, 50))
    some = data.draw(st.fixed_dictionaries({name: times for name in FIELDS[arch]}))
    if all(time is None for time in some.values()):
        return
    bad = data.draw(st.dictionaries(st.sampled_from(sorted(some)), st.sampled_from([1, 2, 17])))
    bad = {name: at for name, at in bad.items() if name != min(some, key=lambda b: some[b] or 1e9)}
    place = tmp_path_factory.mktemp("s")
    fill(place, arch, some, unsafe_at=bad)
    for engine in names.ENGINES:
        try:
            found = selected(place, engine)
        except Missing:
            continue
        able = {
            name
            for name, time in some.items()
            if time is not None
            and name not in bad
            and names.named(engine, name, "nvfp4", names.sm_of(arch))
            and not (engine == "vllm" and name == "marlin" and "vllm-marlin" in some)
        }
        # A bucket in which nothing at all is safe is published only where something was chosen.
        assert (found.backend in able) if able else (found.backend is None)
        made = emit.emission(found)
        assert bool(made.args) == bool(found.backend)
        if engine == "vllm" and found.backend:
            assert found.word not in made.env["VLLM_DISABLED_KERNELS"].split(",")


def test_the_profile_of_the_engine_goes_before_strict(tmp_path):
    fill(tmp_path / "a", "sm90", profile="strict")
    assert selected(tmp_path / "a", "sglang").profile == "strict"
    fill(tmp_path / "b", "sm90", profile="sglang")
    assert selected(tmp_path / "b", "sglang").profile == "sglang"
    with pytest.raises(Missing, match="no choices"):
        selected(tmp_path / "b", "vllm")


def test_choices_of_another_gpu_are_not_applied_here(tmp_path, monkeypatch):
    fill(tmp_path, "sm90")
    monkeypatch.setattr(here, "gpus", lambda: [("sm90", "NVIDIA H100")])
    with pytest.raises(Missing):
        selected(tmp_path, "sglang")
    monkeypatch.setattr(here, "gpus", lambda: [("sm90", "NVIDIA H200"), ("sm90", "NVIDIA H100")])
    with pytest.raises(Missing, match="several kinds"):
        selected(tmp_path, "sglang")


def test_an_engines_own_build_is_what_counts_once_it_was_probed(tmp_path):
    some = {"torch-dequant": 90.0, "marlin": 5.0, "vllm-marlin": None, "humming": 9.0}
    fill(tmp_path / "a", "sm90", some)
    assert selected(tmp_path / "a", "vllm").backend == "humming"
    assert selected(tmp_path / "a", "sglang").backend == "marlin"
    del some["vllm-marlin"]
    fill(tmp_path / "b", "sm90", some)
    found = selected(tmp_path / "b", "vllm")
    assert found.backend == "marlin" and "own build" in " ".join(found.notes)


def test_a_quarantined_backend_is_not_emitted(tmp_path):
    fill(tmp_path, "sm120")
    found = reader.open(tmp_path)
    assert found.choose(3, *LAYERS[0], activation="fp4").backend == "flashinfer-b12x"
    fp4tune.report_fault("flashinfer-b12x", 3, *LAYERS[0], activation="fp4", reason="NaN")
    chosen = selected(tmp_path, "vllm")
    assert chosen.backend == "flashinfer-cudnn"
    assert "quarantined: NaN" in chosen.rejected["flashinfer-b12x"]


# -- emissions


def run(*arguments, code: int = 0):
    done = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert done.exit_code == code, (done.output, done.exception)
    return done


def bash(snippet: str, then: str) -> list[str]:
    done = subprocess.run(["bash", "-c", f"{snippet}\n{then}"], capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize("arch, engine", EXPECTED)
def test_the_snippet_gives_a_shell_the_very_arguments(tmp_path, arch, engine):
    fill(tmp_path, arch, conditions=(CONDITION,))
    out = run("emit", engine, "--state", tmp_path).stdout
    document = json.loads(run("emit", engine, "--state", tmp_path, "--json").stdout)
    assert bash(out, "printf '%s\\0' \"${FP4TUNE_ARGS[@]}\"") == document["args"]
    for key, value in document["env"].items():
        assert bash(out, f"printf '%s\\0' \"${key}\"") == [value]
    comments = [line for line in out.splitlines() if line.startswith("# ")]
    assert any("generation 1" in line for line in comments)
    assert any(f"holds if {CONDITION['text']}" in line for line in comments)
    assert any("safe in all 8 buckets of 2 layers" in line for line in comments)
    assert document["backend"] == EXPECTED[arch, engine][0]


def test_sglang_and_vllm_arguments(tmp_path):
    fill(tmp_path / "90", "sm90")
    fill(tmp_path / "120", "sm120")
    assert emit.emission(selected(tmp_path / "90", "sglang")).args == [
        "--fp4-gemm-backend",
        "marlin",
    ]
    option, value = emit.emission(selected(tmp_path / "90", "vllm")).args
    assert option == "--kernel-config" and json.loads(value) == {
        "linear_backend_per_quant": {"nvfp4_w4a4": "marlin", "nvfp4_w4a16": "marlin"}
    }
    _, value = emit.emission(selected(tmp_path / "120", "vllm")).args
    assert json.loads(value) == {
        "linear_backend_per_quant": {"nvfp4_w4a4": "flashinfer_b12x"},
    }


def test_where_nothing_can_be_named_nothing_is_emitted(tmp_path):
    fill(tmp_path, "sm90", {"torch-dequant": 90.0, "triton-w4a16": 7.0, "marlin": None})
    done = run("emit", "sglang", "--state", tmp_path, code=1)
    assert all(line.startswith("# ") for line in done.stdout.splitlines())
    assert "triton-w4a16: sglang has no name for it" in done.stdout
    document = json.loads(run("emit", "json", "--state", tmp_path, code=1).stdout)
    assert [d["args"] for d in document.values()] == [[], []]
    run("emit", "sglang", "--state", tmp_path / "nowhere", code=2)


def test_the_environment_pins_the_generation(tmp_path):
    fill(tmp_path, "sm90")
    document = json.loads(run("emit", "env", "--state", tmp_path, "--json").stdout)
    assert document["env"] == {
        "FP4TUNE_STATE": str(tmp_path),
        "FP4TUNE_GENERATION": "1",
        "FP4TUNE_LEVEL": "process",
    }
    run("emit", "everything", "--state", tmp_path, code=2)
    run("emit", "sglang", "--arch", "sm80", "--state", tmp_path, code=2)


# -- what the engine would run


@pytest.mark.parametrize(
    "engine, args, environ, runs, safe",
    [
        ("sglang", "", {}, "flashinfer-cutlass", False),
        ("sglang", "--fp4-gemm-backend auto", {}, "flashinfer-cutlass", False),
        ("sglang", "--fp4-gemm-backend=flashinfer_cudnn", {}, "flashinfer-cudnn", True),
        ("sglang", "--fp4-gemm-backend flashinfer_trtllm", {}, "flashinfer-trtllm", False),
        ("vllm", "", {}, "flashinfer-cutlass", False),
        ("vllm", "--linear-backend flashinfer-cudnn", {}, "flashinfer-cudnn", True),
        (
            "vllm",
            """--kernel-config '{"linear_backend_per_quant": {"nvfp4_w4a4": "flashinfer_b12x"}}'""",
            {},
            "flashinfer-b12x",
            True,
        ),
        (
            "vllm",
            "",
            {"VLLM_DISABLED_KERNELS": "FlashInferCutlassNvFp4LinearKernel"},
            "flashinfer-b12x",
            True,
        ),
    ],
)
def test_the_exit_code_is_about_what_the_engine_would_run(
    tmp_path, monkeypatch, engine, args, environ, runs, safe
):
    fill(tmp_path, "sm120")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    call = ("show", "--state", tmp_path, "--engine", engine, "--engine-args", args, "--json")
    document = json.loads(run(*call, code=0 if safe else 1).stdout)["engine"]
    assert (document["runs"], document["safe"]) == (runs, safe)
    assert document["choice"] == EXPECTED["sm120", engine][0]
    n, k = LAYERS[0]
    problem = ("choose", 3, n, k, "--activation", "fp4", "--state", tmp_path)
    run(*problem, "--engine", engine, "--engine-args", args, code=0 if safe else 1)
    run(*problem)


def test_an_emission_that_is_applied_makes_it_safe(tmp_path):
    for arch in SCOPES:
        fill(tmp_path / arch, arch)
        for engine in names.ENGINES:
            found = selected(tmp_path / arch, engine)
            made = emit.emission(found)
            assert applied.assess(found, made.args, {})["safe"]
            assert applied.assess(found, (), made.env)["safe"] or engine == "sglang"


# -- plugins, against recorded engines


class HookRegistry:
    """SGLang's: hooks by dotted path, applied when all plugins have run; errors are swallowed."""

    hooks: list[tuple] = []

    @classmethod
    def register(cls, target, hook, hook_type):
        cls.hooks.append((target, hook, hook_type))

    @classmethod
    def apply(cls):
        for target, hook, hook_type in cls.hooks:
            path, _, attribute = target.rpartition(".")
            module, _, owner = path.rpartition(".")
            owner = getattr(importlib.import_module(module), owner)
            original = getattr(owner, attribute)

            def wrapper(*args, _original=original, _hook=hook, **kwargs):
                changed = _hook(*args, **kwargs)
                if changed is not None:
                    args, kwargs = changed
                return _original(*args, **kwargs)

            assert hook_type == "before"
            setattr(owner, attribute, wrapper)


@pytest.fixture
def sglang(monkeypatch):
    """`load_plugins`, and a function that makes ServerArgs as SGLang does and resolves them."""

    @dataclass
    class ServerArgs:
        fp4_gemm_runner_backend: str = "auto"

        def resolve_once(self):
            self._resolution_finished = True

        def __setattr__(self, name, value):
            if getattr(self, "_resolution_finished", False) and name[0] != "_":
                raise AttributeError(f"{name} assigned after resolution")
            object.__setattr__(self, name, value)

    def resolved(*given):
        made = ServerArgs(*given)
        for _ in range(2):
            made.resolve_once()
        return made

    def module(name, **content):
        made = types.ModuleType(name)
        made.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, made)

    for name in ("sglang", "sglang.srt", "sglang.srt.plugins"):
        module(name, __path__=[])
    module("sglang.srt.server_args", ServerArgs=ServerArgs)
    kinds = types.SimpleNamespace(BEFORE="before")
    module("sglang.srt.plugins.hook_registry", HookRegistry=HookRegistry, HookType=kinds)
    monkeypatch.setattr(HookRegistry, "hooks", [])

    def load_plugins():
        sglang_plugin.register()
        HookRegistry.apply()
        return resolved

    return load_plugins


@pytest.fixture
def unsupported() -> set[str]:
    """Kernels that vLLM says it cannot run here."""
    return set()


@pytest.fixture
def vllm(monkeypatch, unsupported):
    """`load_general_plugins`, and EngineArgs as vLLM makes them."""

    @dataclass
    class KernelConfig:
        linear_backend: str = "auto"
        linear_backend_per_quant: dict | None = None

    shared = KernelConfig()

    @dataclass
    class EngineArgs:
        linear_backend: str = "auto"
        kernel_config: KernelConfig = field(default_factory=lambda: shared)

        def create_engine_config(self, usage_context=None):
            return self.kernel_config

    def kernel(name):
        def answer(cls):
            return name not in unsupported, "too old"

        return type(name, (), {"is_supported": classmethod(answer)})

    module = types.ModuleType("vllm.engine.arg_utils")
    module.EngineArgs = EngineArgs
    linear = types.ModuleType("vllm.model_executor.kernels.linear")
    linear._POSSIBLE_NVFP4_KERNELS = {"cuda": [kernel(name) for name in engine_trees.KERNELS]}
    for made in (
        types.ModuleType("vllm"),
        types.ModuleType("vllm.model_executor"),
        types.ModuleType("vllm.model_executor.kernels"),
        linear,
        module,
    ):
        monkeypatch.setitem(sys.modules, made.__name__, made)

    def load_general_plugins():
        vllm_plugin.register()
        vllm_plugin.register()
        return EngineArgs

    return load_general_plugins


@pytest.mark.parametrize("level", ["", "emit", "off", "nonsense"])
def test_by_default_the_plugins_only_say_something(
    own_state, sglang, vllm, monkeypatch, said, level
):
    fill(own_state, "sm90")
    monkeypatch.setenv("FP4TUNE_LEVEL", level)
    assert sglang()().fp4_gemm_runner_backend == "auto"
    assert vllm()().create_engine_config().linear_backend_per_quant is None
    assert len(said()) == (0 if level == "off" else 2)


@pytest.mark.parametrize("arch", SCOPES)
def test_an_option_left_at_auto_gets_the_choice(own_state, sglang, vllm, monkeypatch, said, arch):
    fill(own_state, arch, conditions=(CONDITION,))
    monkeypatch.setenv("FP4TUNE_LEVEL", "process")
    assert sglang()().fp4_gemm_runner_backend == EXPECTED[arch, "sglang"][1]
    config = vllm()().create_engine_config(usage_context="x")
    linear = names.NAMES[EXPECTED[arch, "vllm"][0]].linear
    assert set(config.linear_backend_per_quant.values()) == {linear}
    assert len(said()) == 2 and all("generation 1" in line for line in said())
    assert all(CONDITION["text"] in line for line in said())
    assert (os.environ["FP4TUNE_GENERATION"], os.environ["FP4TUNE_APPLIED"]) == ("1", "1")


def test_what_the_user_said_stands(own_state, sglang, vllm, monkeypatch, said):
    fill(own_state, "sm120")
    monkeypatch.setenv("FP4TUNE_LEVEL", "process")
    assert sglang()("flashinfer_cutlass").fp4_gemm_runner_backend == "flashinfer_cutlass"
    assert os.environ["FP4TUNE_APPLIED"] == "0"
    arguments = vllm()
    given = arguments(linear_backend="cutlass").create_engine_config()
    assert given.linear_backend_per_quant is None
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", "HummingNvFp4LinearKernel")
    assert arguments().create_engine_config().linear_backend_per_quant is None
    assert len(said()) == 3 and all("was asked for" in line for line in said())


def test_a_kernel_that_vllm_would_refuse_is_not_asked_for(
    own_state, vllm, monkeypatch, said, unsupported
):
    """Asking for one is an error there."""
    fill(own_state, "sm120")
    monkeypatch.setenv("FP4TUNE_LEVEL", "process")
    unsupported.add("FlashInferB12xNvFp4LinearKernel")
    assert vllm()().create_engine_config().linear_backend_per_quant is None
    assert len(said()) == 1 and "keeps auto: too old" in said()[0]


def test_nothing_a_plugin_meets_stops_the_engine(own_state, sglang, vllm, monkeypatch, said):
    monkeypatch.setenv("FP4TUNE_LEVEL", "process")
    own_state.mkdir()
    (own_state / "choices.db").write_text("no database")
    assert sglang()().fp4_gemm_runner_backend == "auto"
    assert vllm()().create_engine_config().linear_backend_per_quant is None
    assert len(said()) == 1 and "does nothing here: Foreign" in said()[0]
    assert sglang_plugin.register() is None
    monkeypatch.setattr(select, "open_for", lambda *a, **k: 1 / 0)
    assert sglang()().fp4_gemm_runner_backend == "auto"


def test_the_plugins_need_no_package_but_their_engine(tmp_path):
    code = """
        import sys
        before = set(sys.modules)
        from fp4tune.engines import applied, emit, installed, names, plugin, select, sglang, vllm
        from fp4tune.engines import pinning, stack
        loaded = {name.partition(".")[0] for name in set(sys.modules) - before} - {"fp4tune"}
        sys.exit(str({n for n in loaded if n not in sys.stdlib_module_names} or ""))
    """
    assert spawn(code).wait(30) in (0, 1)
    done = spawn(code, stderr=subprocess.PIPE, text=True)
    assert done.communicate(timeout=30)[1].strip() == ""


# -- one backend per call

N, K = LAYERS[0]


def mm_fp4(
    a, b, a_descale, b_descale, alpha=None, out_dtype=torch.bfloat16, out=None, block_size=16,
    use_8x4_sf_layout=False, backend="auto", use_nvfp4=True, enable_pdl=True,
):  # fmt: skip
    """FlashInfer's signature; answers with the backend it was asked for."""
    calls.append((a.shape[0], backend, a_descale.dtype))
    if backend == refuses.get("backend"):
        raise ValueError("this backend does not take it")
    return torch.zeros(a.shape[0], b.shape[1], dtype=out_dtype)


calls: list[tuple] = []
refuses: dict[str, str] = {}


def operands(m: int, n: int = N, k: int = K):
    a, b = torch.zeros(m, k // 2, dtype=torch.uint8), torch.zeros(k // 2, n, dtype=torch.uint8)
    scales = [torch.zeros(x, k // 16, dtype=torch.float8_e4m3fn) for x in (m, n)]
    return [a, b, scales[0], scales[1].T, torch.ones(1), torch.bfloat16]


@pytest.fixture
def wrapped(tmp_path):
    """cutlass is the choice up to m=16, cudnn beyond."""
    fields = {"flashinfer-cutlass": 5.0, "flashinfer-cudnn": 6.0, "torch-dequant-w4a4": 90.0}
    fill(tmp_path, "sm120", fields, unsafe_at={"flashinfer-cutlass": 17})
    calls.clear()
    refuses.clear()
    return per_call.wrap(mm_fp4, reader.open(tmp_path))


def test_the_proven_backend_is_called_for_each_m(wrapped):
    for m, api in ((1, "cutlass"), (16, "cutlass"), (17, "cudnn"), (256, "cudnn"), (257, "b12x")):
        wrapped(*operands(m), backend="b12x")
        assert calls[-1][:2] == (m, api)
    assert calls[0][2] == torch.uint8 and calls[-1][2] == torch.float8_e4m3fn


@pytest.mark.parametrize(
    "other",
    [
        {"backend": "trtllm"},
        {"backend": "cute-dsl", "use_8x4_sf_layout": True},
        {"backend": "cake"},
        {"backend": "cudnn", "use_nvfp4": False},
        {"backend": "cudnn", "alpha": torch.ones(3)},
    ],
)
def test_what_was_not_proven_is_passed_through(wrapped, other):
    arguments = operands(3)
    if "alpha" in other:
        del arguments[4:]
    wrapped(*arguments, **other)
    assert calls[-1][1] == other["backend"]
    wrapped(*operands(3, n=64), backend="cudnn")
    assert calls[-1][1] == "cudnn"


def mm_fp4_74(a, b, a_descale, b_descale, alpha=None, out_dtype=torch.bfloat16, out=None,
              backend="auto", *, batch_invariant=False, temperature=1.0):  # fmt: skip
    """One with parameters that were not there when the wrapper was written."""
    calls.append((a.shape[0], backend, batch_invariant))
    return torch.zeros(a.shape[0], b.shape[1], dtype=out_dtype)


def test_a_parameter_that_is_not_known_is_passed_through_unless_at_its_default(tmp_path):
    fill(tmp_path, "sm120", {"flashinfer-cutlass": 5.0, "flashinfer-cudnn": 6.0})
    wrapped = per_call.wrap(mm_fp4_74, reader.open(tmp_path))
    calls.clear()
    for _ in range(2):  # the second time from what was answered before
        wrapped(*operands(3), backend="cudnn")
        wrapped(*operands(3), backend="cudnn", batch_invariant=False)
        wrapped(*operands(3), backend="cudnn", batch_invariant=True)
        wrapped(*operands(3), backend="cudnn", temperature=0.5)
    backends = ["cutlass", "cutlass", "cudnn", "cudnn"]
    assert [backend for _, backend, _ in calls] == backends * 2
    assert calls[2][2] is True and calls[6][2] is True
    with pytest.raises(TypeError):
        wrapped(*operands(3), backend="cudnn", never_heard_of=1)


def test_a_layer_that_was_not_probed_runs_what_is_known_bad_with_one_warning(wrapped, caplog):
    for n in (64, 128, 64):
        wrapped(*operands(3, n=n), backend="cutlass")
        wrapped(*operands(3, n=n), backend="cudnn")
    assert [backend for _, backend, _ in calls] == ["cutlass", "cudnn"] * 3
    warned = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warned) == 1
    assert "64x2048 runs flashinfer-cutlass, which is unsafe" in warned[0].getMessage()


def test_what_was_answered_is_forgotten_with_the_readers_view(tmp_path):
    fill(tmp_path, "sm120", {"flashinfer-cutlass": 5.0, "flashinfer-cudnn": 6.0})
    wrapped = per_call.wrap(mm_fp4, found := reader.open(tmp_path))
    calls.clear()
    wrapped(*operands(3), backend="b12x")
    fill(tmp_path, "sm120", {"flashinfer-cutlass": 7.0, "flashinfer-cudnn": 6.0})
    found._due = 0.0
    wrapped(*operands(3), backend="b12x")
    assert [backend for _, backend, _ in calls] == ["cutlass", "cudnn"]


def test_an_explicit_option_is_not_overridden_per_call(wrapped, monkeypatch):
    monkeypatch.setenv("FP4TUNE_APPLIED", "0")
    wrapped(*operands(3), backend="b12x")
    assert calls[-1][1] == "b12x"


def test_a_backend_that_does_not_take_the_call_is_left_out_and_said(wrapped, said):
    refuses["backend"] = "cutlass"
    for _ in range(2):
        wrapped(*operands(3), backend="b12x")
    assert [backend for _, backend, _ in calls] == ["cutlass", "b12x", "b12x"]
    assert len(said()) == 1


def test_an_error_of_the_engines_own_call_stays_its_own(wrapped):
    refuses["backend"] = "b12x"
    with pytest.raises(ValueError, match="does not take it"):
        wrapped(*operands(3, n=64), backend="b12x")
    with pytest.raises(TypeError):
        wrapped()


def test_attributes_are_the_originals(wrapped):
    mm_fp4.suitable = ["x"]
    try:
        assert wrapped.suitable == ["x"] and wrapped.__name__ == "mm_fp4"
        wrapped.suitable = ["y"]
        assert mm_fp4.suitable == ["y"] and not hasattr(wrapped, "other")
        assert wrapped.__doc__ == mm_fp4.__doc__
    finally:
        del mm_fp4.suitable


def test_a_fault_takes_effect_at_the_next_call(wrapped, tmp_path):
    wrapped(*operands(3), backend="b12x")
    told = fp4tune.report_fault("flashinfer-cutlass", 3, N, K, activation="fp4")
    wrapped(*operands(3), backend="b12x")
    assert [backend for _, backend, _ in calls] == ["cutlass", "cudnn"]
    quarantine_store.lift(told.quarantine.id, quarantine_store.place(tmp_path))


@pytest.mark.slow
def test_inside_an_opaque_operator_it_chooses_under_torch_compile(wrapped):
    """As both engines call it: m is symbolic outside, and a number inside."""

    @torch.library.custom_op("fp4tune_test::mm", mutates_args=())
    def op(a: torch.Tensor, b: torch.Tensor, sa: torch.Tensor, sb: torch.Tensor) -> torch.Tensor:
        return wrapped(a, b, sa, sb, torch.ones(1), torch.bfloat16, backend="b12x")

    @op.register_fake
    def _(a, b, sa, sb):
        return torch.empty(a.shape[0], b.shape[1], dtype=torch.bfloat16)

    compiled = torch.compile(lambda *x: op(*x) + 1, backend="eager", dynamic=True, fullgraph=True)
    for m in (3, 40, 200):
        compiled(*operands(m)[:4])
    assert [(m, api) for m, api, _ in calls] == [(3, "cutlass"), (40, "cudnn"), (200, "cudnn")]


def test_traced_directly_it_is_the_original(wrapped):
    compiled = torch.compile(
        lambda a, b, sa, sb: wrapped(a, b, sa, sb, backend="b12x") + 1, backend="eager"
    )
    assert compiled(*operands(3)[:4]).shape == (3, N)


@pytest.mark.gpu
def test_it_may_be_called_while_a_cuda_graph_is_captured(tmp_path):
    fields = {"flashinfer-cutlass": 5.0, "flashinfer-cudnn": 6.0}
    fill(tmp_path, "sm120", fields, unsafe_at={"flashinfer-cutlass": 17})
    seen = []

    def kernel(a, b, a_descale, b_descale, backend="auto"):
        seen.append(backend)
        return a.float() @ b.float()

    call = per_call.wrap(kernel, reader.open(tmp_path))
    given = [x.cuda() for x in operands(3)[:4]]
    given[0].fill_(1)
    given[1].fill_(2)
    call(*given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*given)
    graph.replay()
    torch.cuda.synchronize()
    assert seen == ["cutlass", "cutlass"] and bool((out == K).all())
